"""The folder of a run: results are saved as soon as they are computed; the report is made from the files.

The folder holds::

    DIR/run.json            what the folder holds
    DIR/<name>.nc           one result each
    DIR/<name>.parquet      one table each (recall.parquet: the recall scores)
    DIR/<name>.plotly.json  one figure each that is not drawn from a single result
    DIR/<name>.explorer.json  sequences to explore one by one
    DIR/report.html         written by `finish` or `report_from_directory`

`run.json` (see `docs/file-formats.md`) is rewritten atomically after each addition, so that nothing is lost
when a later step fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from memlens.files import made_folder, write_atomically, write_json
from memlens.report.bibliography import Citation
from memlens.report.from_directory import SUFFIXES, file_of, read_run, report_from_directory
from memlens.report.model import FigureRequest, Finding
from memlens.report.render import versions_here
from memlens.report.summary import Summary
from memlens.results.result import Result


class RunDirectory:
    """A folder that keeps the results of a run as they are computed.

    A folder that already has a `run.json` is continued: what is added under an existing name replaces it.

    Args:
        path: The folder; created if it does not exist.
        title: Heading of the report.
        settings: Every parameter of the run.
        lead: A paragraph below the heading.
        summary: Some of the five sentences with which the report opens, by their names in
            `memlens.report.summary.Summary`; the others are made from the findings.
        command: The command line that repeats the run.
        fresh: Start over: delete the files that an older `run.json` names, and nothing else.

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
        summary: Mapping[str, str] | None = None,
        command: str | None = None,
        fresh: bool = False,
    ) -> None:
        self.path = made_folder(path)
        if fresh:
            self._clear()
        self._run = read_run(self.path)
        given = {"title": title, "lead": lead, "command": command}
        self._run.update({key: value for key, value in given.items() if value is not None})
        self._run["settings"] = {**self._run["settings"], **(settings or {})}
        self._run.update(finished=False, versions=versions_here())
        self.add_summary(summary or {})

    def _clear(self) -> None:
        """Delete the files that the folder's `run.json` names, then `run.json` itself."""
        old = read_run(self.path)
        for part in SUFFIXES:
            for entry in old[part]:
                file_of(self.path, part, entry["name"]).unlink(missing_ok=True)
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
        """Save a result as `<name>.nc`, record how the report shows it, and return the file's path."""
        saved = result.save(file_of(self.path, "results", name))
        title = title or name.replace("_", " ").capitalize()
        shown = [asdict(figure) for figure in figures]
        self._put("results", {"name": name, "title": title, "lead": lead, "figures": shown})
        return saved

    def add_table(
        self, name: str, frame: pd.DataFrame, *, title: str | None = None, note: str = "", section: str = ""
    ) -> Path:
        """Save a table as `<name>.parquet` and return the file's path.

        The report shows it in the section, or below the result, that `section` names, otherwise at the end.
        """
        title = title or name.replace("_", " ").capitalize()
        saved = write_atomically(file_of(self.path, "tables", name), frame.to_parquet())
        self._put("tables", {"name": name, "title": title, "note": note, "section": section})
        return saved

    def add_section(self, name: str, title: str, lead: str = "") -> None:
        """Open a section for figures, tables and explorers, which refer to it by `name`."""
        self._put("sections", {"name": name, "title": title, "lead": lead})

    def add_figure(
        self, name: str, figure: go.Figure, *, section: str, reading: str = "", caption: str = ""
    ) -> Path:
        """Save a figure of a section as `<name>.plotly.json` and return the file's path."""
        text = str(figure.to_json())  # plotly writes NaN as null
        saved = write_atomically(file_of(self.path, "figures", name), text.encode())
        self._put("figures", {"name": name, "section": section, "reading": reading, "caption": caption})
        return saved

    def add_explorer(
        self, name: str, payload: Mapping[str, Any], *, section: str, reading: str = "", caption: str = ""
    ) -> Path:
        """Save an explorer's payload as `<name>.explorer.json` and return the file's path."""
        saved = write_json(file_of(self.path, "explorers", name), payload, indent=None)
        self._put("explorers", {"name": name, "section": section, "reading": reading, "caption": caption})
        return saved

    def add_finding(self, finding: Finding) -> None:
        """Record a finding; it replaces one with the same title."""
        self._put("findings", asdict(finding), key="title")

    def add_citations(self, *citations: Citation) -> None:
        """Record sources for the bibliography, in addition to those of the results."""
        known = self._run["citations"]
        known.extend(entry for entry in map(asdict, citations) if entry not in known)
        self._write()

    def add_summary(self, sentences: Mapping[str, str]) -> None:
        """Record some of the five sentences with which the report opens; see the parameter `summary`.

        Raises:
            OptionError: A sentence is none of the five.
        """
        Summary.of(sentences, [])
        self._run["summary"].update(sentences)
        self._write()

    def add_settings(self, settings: Mapping[str, Any]) -> None:
        """Record further parameters."""
        self._run["settings"].update(settings)
        self._write()

    def add_failure(self, step: str, error: BaseException | str) -> None:
        """Record that a step failed; the report says so and shows the rest."""
        self._put("failures", {"step": step, "message": str(error)}, key="step")

    def add_time(self, step: str, spent: Mapping[str, float]) -> None:
        """Record what a step took: `seconds` by the clock, `cpu_seconds` of the processor."""
        self._put("times", {"step": step, **spent}, key="step")

    def finish(self) -> Path:
        """Mark the run as finished, write `report.html` and return its path."""
        self._run["finished"] = True
        self._write()
        return report_from_directory(self.path)

    def _put(self, part: str, entry: dict[str, Any], key: str = "name") -> None:
        """Add an entry, or replace the older one with the same key."""
        entries = self._run[part]
        place = next((i for i, old in enumerate(entries) if old[key] == entry[key]), len(entries))
        entries[place : place + 1] = [entry]
        self._write()

    def _write(self) -> None:
        write_json(self.path / "run.json", self._run)


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
    """Save a whole run at once and return its folder; `report_from_directory` writes the report."""
    run = RunDirectory(path, title=title, settings=settings, command=command)
    for name, result in results.items():
        run.add_result(name, result)
    for name, frame in (tables or {}).items():
        run.add_table(name, frame)
    for finding in findings:
        run.add_finding(finding)
    return run.path
