"""The folder of a run: every result is on disk as soon as it is there, and the report can be made from it.

The folder holds::

    DIR/run.json            what the folder holds (below)
    DIR/<name>.nc           one result each
    DIR/<name>.parquet      one table each (recall.parquet: the recall scores)
    DIR/<name>.plotly.json  one figure each that is drawn from no single result
    DIR/<name>.explorer.json  sequences to look into one by one
    DIR/report.html         made by `finish` or `report_from_directory`

`run.json` holds::

    {"format": "memlens run 1", "title": str, "lead": str, "command": str | null, "created": str,
     "finished": bool, "settings": {...}, "versions": {package: version},
     "findings": [{"title", "statement", "estimate", "low", "high", "unit", "n", "control"}],
     "results": [{"name", "title", "lead",
                  "figures": [{"options": {...}, "reading": str | null, "caption": str}]}],
     "tables": [{"name", "title", "note", "section"}],
     "sections": [{"name", "title", "lead"}],
     "figures": [{"name", "section", "reading", "caption"}],
     "explorers": [{"name", "section", "reading", "caption"}],
     "failures": [{"step": str, "message": str}],
     "citations": [{"key": str, "what": str}]}

It is rewritten after each addition, whole or not at all, so that a later step that fails loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from memlens.files import write_atomically
from memlens.report.bibliography import Citation
from memlens.report.from_directory import report_from_directory
from memlens.report.model import FigureRequest, Finding
from memlens.report.render import versions_here
from memlens.report.run_file import file_name, plain, read_run
from memlens.report.side_files import EXPLORER_SUFFIX, FIGURE_SUFFIX, save_explorer, save_figure
from memlens.results.result import Result


class RunDirectory:
    """A folder that keeps the results of a run as they come.

    Opening a folder that has a `run.json` goes on with it: what is added under a name replaces what was
    there.

    Args:
        path: the folder; made if it does not exist.
        title: heading of the report.
        settings: every parameter of the run.
        lead: a paragraph below the heading.
        command: the command line that makes it again.
        fresh: start over: delete the files that an older `run.json` names, and nothing else.

    Example:
        >>> import tempfile, xarray as xr
        >>> run = RunDirectory(tempfile.mkdtemp(), title="Demo", settings={"seed": 0})
        >>> data = xr.Dataset({"exact_match": ("sequence", [1.0, 0.0])}, {"sequence": ["a", "b"]})
        >>> run.add_result("recall", Result.create(data, kind="recall")).name
        'recall.nc'
        >>> run.finish().name
        'report.html'
    """

    path: Path

    def __init__(
        self,
        path: str | Path,
        *,
        title: str | None = None,
        settings: Mapping[str, Any] | None = None,
        lead: str | None = None,
        command: str | None = None,
        fresh: bool = False,
    ) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        if fresh:
            self._clear()
        self._run = read_run(self.path)
        given = {"title": title, "lead": lead, "command": command}
        self._run.update({key: value for key, value in given.items() if value is not None})
        self._run["settings"] = {**self._run["settings"], **(settings or {})}
        self._run.update(finished=False, versions=versions_here())
        self._write()

    def _clear(self) -> None:
        """Delete what the folder's `run.json` names, then `run.json` itself."""
        old = read_run(self.path)
        suffixes = {"results": ".nc", "tables": ".parquet"}
        suffixes |= {"figures": FIGURE_SUFFIX, "explorers": EXPLORER_SUFFIX}
        for part, suffix in suffixes.items():
            for entry in old[part]:
                (self.path / f"{file_name(entry['name'])}{suffix}").unlink(missing_ok=True)
        for name in ("run.json", "report.html"):
            (self.path / name).unlink(missing_ok=True)

    def add_result(
        self,
        name: str,
        result: Result,
        *,
        title: str | None = None,
        lead: str = "",
        figures: Iterable[FigureRequest] = (),
    ) -> Path:
        """Save a result as `<name>.nc` and note how the report shows it; return the file's path."""
        saved = result.save(self.path / f"{file_name(name)}.nc")
        entry = {"name": name, "title": title or name.replace("_", " ").capitalize(), "lead": lead}
        self._put("results", {**entry, "figures": [asdict(figure) for figure in figures]})
        return saved

    def add_table(
        self, name: str, frame: pd.DataFrame, *, title: str | None = None, note: str = "", section: str = ""
    ) -> Path:
        """Save a table as `<name>.parquet`; return the file's path.

        The report shows it below the figures of the result that `section` names, else at the end.
        """
        saved = self.path / f"{file_name(name)}.parquet"
        write_atomically(saved, frame.to_parquet())
        entry = {"name": name, "title": title or name.replace("_", " ").capitalize(), "note": note}
        self._put("tables", {**entry, "section": section})
        return saved

    def add_section(self, name: str, title: str, lead: str = "") -> None:
        """Open a part of the report that is of no single result: `add_figure` and `add_table` name it."""
        self._put("sections", {"name": name, "title": title, "lead": lead})

    def add_figure(
        self, name: str, figure: go.Figure, *, section: str, reading: str = "", caption: str = ""
    ) -> Path:
        """Save a figure as `<name>.plotly.json`, to be shown in a section; return the file's path."""
        saved = self.path / f"{file_name(name)}{FIGURE_SUFFIX}"
        save_figure(figure, saved)
        self._put("figures", {"name": name, "section": section, "reading": reading, "caption": caption})
        return saved

    def add_explorer(
        self, name: str, payload: Mapping[str, Any], *, section: str, reading: str = "", caption: str = ""
    ) -> Path:
        """Save an explorer's payload as `<name>.explorer.json`, for a section; return the file's path."""
        saved = save_explorer(payload, self.path / f"{file_name(name)}{EXPLORER_SUFFIX}")
        self._put("explorers", {"name": name, "section": section, "reading": reading, "caption": caption})
        return saved

    def add_finding(self, finding: Finding) -> None:
        """Note a finding; one with the same title is replaced."""
        self._put("findings", asdict(finding), key="title")

    def add_citations(self, *citations: Citation) -> None:
        """Note sources for the bibliography, beside those that the results themselves rest on."""
        known = self._run["citations"]
        known.extend(entry for entry in map(asdict, citations) if entry not in known)
        self._write()

    def add_settings(self, settings: Mapping[str, Any]) -> None:
        """Note further parameters."""
        self._run["settings"].update(settings)
        self._write()

    def add_failure(self, step: str, error: BaseException | str) -> None:
        """Note that a step failed; the report says so and shows the rest."""
        self._put("failures", {"step": step, "message": str(error)}, key="step")

    def finish(self) -> Path:
        """Mark the run as finished, write `report.html` and return its path."""
        self._run["finished"] = True
        self._write()
        return report_from_directory(self.path)

    def _put(self, part: str, entry: dict[str, Any], key: str = "name") -> None:
        """Add an entry, in the place of an older one with the same key."""
        entries = self._run[part]
        places = [place for place, old in enumerate(entries) if old[key] == entry[key]]
        if places:
            entries[places[0]] = entry
        else:
            entries.append(entry)
        self._write()

    def _write(self) -> None:
        text = json.dumps(self._run, indent=1, ensure_ascii=False, default=plain)
        write_atomically(self.path / "run.json", text.encode("utf-8", errors="backslashreplace"))


def save_run(
    path: str | Path,
    findings: Iterable[Finding],
    settings: Mapping[str, Any],
    results: Mapping[str, Result],
    tables: Mapping[str, pd.DataFrame] | None = None,
    *,
    title: str | None = None,
    command: str | None = None,
) -> Path:
    """Write a whole run at once and return its folder; `report_from_directory` makes the report."""
    run = RunDirectory(path, title=title, settings=settings, command=command)
    for name, result in results.items():
        run.add_result(name, result)
    for name, frame in (tables or {}).items():
        run.add_table(name, frame)
    for finding in findings:
        run.add_finding(finding)
    return run.path
