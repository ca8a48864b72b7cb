"""`run.json`: what a run's folder holds, and the names of its files."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memlens.errors import ResultError
from memlens.report.render import versions_here

FORMAT = "memlens run 1"


_PARTS = (
    "findings", "results", "tables", "failures", "sections", "figures", "explorers", "citations",
)  # fmt: skip


def read_run(path: Path) -> dict[str, Any]:
    """Return what `run.json` of a folder says; an empty run where there is none.

    Raises:
        ResultError: when the file is damaged, or of another version.
    """
    run: dict[str, Any] = {
        "format": FORMAT,
        "title": "memlens report",
        "lead": "",
        "command": None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": False,
        "settings": {},
        "versions": versions_here(),
        **{part: [] for part in _PARTS},
    }
    file = path / "run.json"
    if not file.exists():
        return run
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        found = stored["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ResultError(
            f"{file} is damaged ({error}): delete it to show the result files alone."
        ) from error
    if found != FORMAT:
        raise ResultError(f"{file} has the format {found!r}, not {FORMAT!r}: another version wrote it.")
    return {**run, **stored}


def with_loose_files(run: dict[str, Any], path: Path) -> dict[str, Any]:
    """Add the files that `run.json` does not name: a run may have stopped between the two writes."""
    for part, suffix in (("results", ".nc"), ("tables", ".parquet")):
        named = {file_name(entry["name"]) for entry in run[part]}
        for file in sorted(path.glob(f"*{suffix}")):
            if file.stem not in named and not file.name.startswith("."):
                extra = {"lead": "", "figures": []} if part == "results" else {"note": ""}
                title = file.stem.replace("_", " ").capitalize()
                run[part].append({"name": file.stem, "title": title, **extra})
    return run


def file_name(name: str) -> str:
    """Return a name that is one file in the folder, whatever was given."""
    return re.sub(r"[^\w.\-]+", "_", name).lstrip(".") or "unnamed"


def plain(value: object) -> object:
    """Return a number of numpy as Python's, for JSON; anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)  # pyright: ignore[reportAttributeAccessIssue]
