"""The folder of an audit: what it may hold already, and where what holds secrets is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memlens.errors import OptionError
from memlens.files import made_folder
from memlens.report.from_directory import SUFFIXES, file_of, read_run
from memlens.studies.auditing.options import CSV, steps_folder
from memlens.studies.auditing.redaction import Hide
from memlens.studies.running import StudyDirectory

_OWN = ("recall", "extraction_curve", "deletion", "leaks", "ranked_head", "ranked_neuron", "remedies")
"""Names of the results and tables that an audit writes."""


class AuditDirectory(StudyDirectory):
    """The folder of an audit, which is made anew each time from what was measured and kept.

    Attributes:
        csv: The file with the full texts. What a second run continues from lies beside it.
    """

    csv: Path


def opened(
    path: Path, *, csv: Path | None, hide: Hide | None, settings: Mapping[str, Any], **options: Any
) -> AuditDirectory:
    """Return an empty folder for an audit; what an earlier one wrote there is deleted.

    Args:
        path: The folder.
        csv: The file with the full texts, if not in the folder.
        hide: Takes out of messages what is secret; None: nothing is hidden.
        settings: All parameters.
        **options: Of `RunDirectory`.

    Raises:
        OptionError: Something is hidden, and the folder holds results or tables of something else.
    """
    if hide is not None:
        _clear(path)
    folder = AuditDirectory(path, settings=settings, fresh=True, **options)
    folder.hide, folder.csv = hide, folder.path / CSV if csv is None else csv
    folder.keeps_in = made_folder(steps_folder(folder.csv))
    folder.keeps_in.chmod(0o700)
    (folder.path / CSV).unlink(missing_ok=True)  # of an earlier audit
    return folder


def _clear(path: Path) -> None:
    """Refuse a folder with results or tables of something else: a report shows all that its folder holds.

    What an audit left there that was killed before it could name it is deleted.

    Raises:
        OptionError: There are some.
    """
    if not path.is_dir():
        return
    old = read_run(path)
    for part in ("results", "tables"):
        named = {file_of(path, part, entry["name"]) for entry in old[part]}
        own = {file_of(path, part, name) for name in _OWN if old["settings"].get("study") == "audit"}
        for file in own - named:
            file.unlink(missing_ok=True)
        loose = [file for file in path.glob(f"*{SUFFIXES[part]}") if file not in named]
        if loose:
            raise OptionError(
                f"{path} holds {len(loose)} {part} of something else ({SUFFIXES[part]}), which the report "
                "would show: name another folder."
            )
