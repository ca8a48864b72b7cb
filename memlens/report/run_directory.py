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
     "failures": [{"step": str, "message": str}]}

It is rewritten after each addition, whole or not at all, so that a later step that fails loses nothing.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from memlens.errors import ResultError
from memlens.files import write_atomically
from memlens.report.explorer_files import EXPLORER_SUFFIX, save_explorer, saved_explorers
from memlens.report.figure_files import FIGURE_SUFFIX, save_figure, saved_figures
from memlens.report.model import FigureBlock, Finding, Section, TableBlock
from memlens.report.readings import reading
from memlens.report.render import versions_here, write_report
from memlens.results import Result, load_result

__all__ = ["FigureRequest", "RunDirectory", "report_from_directory", "save_run"]

FORMAT = "memlens run 1"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FigureRequest:
    """A figure to draw from a saved result.

    Attributes:
        options: for `Result.plot`; JSON types (`metric` may be among them).
        reading: plain words; None has them made from the numbers.
        caption: small print.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    reading: str | None = None
    caption: str = ""


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
        self._run = _read_run(self.path)
        given = {"title": title, "lead": lead, "command": command}
        self._run.update({key: value for key, value in given.items() if value is not None})
        self._run["settings"] = {**self._run["settings"], **(settings or {})}
        self._run.update(finished=False, versions=versions_here())
        self._write()

    def _clear(self) -> None:
        """Delete what the folder's `run.json` names, then `run.json` itself."""
        old = _read_run(self.path)
        suffixes = {"results": ".nc", "tables": ".parquet"}
        suffixes |= {"figures": FIGURE_SUFFIX, "explorers": EXPLORER_SUFFIX}
        for part, suffix in suffixes.items():
            for entry in old[part]:
                (self.path / f"{_file_name(entry['name'])}{suffix}").unlink(missing_ok=True)
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
        saved = result.save(self.path / f"{_file_name(name)}.nc")
        entry = {"name": name, "title": title or name.replace("_", " ").capitalize(), "lead": lead}
        self._put("results", {**entry, "figures": [asdict(figure) for figure in figures]})
        return saved

    def add_table(
        self, name: str, frame: pd.DataFrame, *, title: str | None = None, note: str = "", section: str = ""
    ) -> Path:
        """Save a table as `<name>.parquet`; return the file's path.

        The report shows it below the figures of the result that `section` names, else at the end.
        """
        saved = self.path / f"{_file_name(name)}.parquet"
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
        saved = self.path / f"{_file_name(name)}{FIGURE_SUFFIX}"
        save_figure(figure, saved)
        self._put("figures", {"name": name, "section": section, "reading": reading, "caption": caption})
        return saved

    def add_explorer(
        self, name: str, payload: Mapping[str, Any], *, section: str, reading: str = "", caption: str = ""
    ) -> Path:
        """Save an explorer's payload as `<name>.explorer.json`, for a section; return the file's path."""
        saved = save_explorer(payload, self.path / f"{_file_name(name)}{EXPLORER_SUFFIX}")
        self._put("explorers", {"name": name, "section": section, "reading": reading, "caption": caption})
        return saved

    def add_finding(self, finding: Finding) -> None:
        """Note a finding; one with the same title is replaced."""
        self._put("findings", asdict(finding), key="title")

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
        text = json.dumps(self._run, indent=1, ensure_ascii=False, default=_plain)
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


def report_from_directory(path: str | Path, to: str | Path | None = None) -> Path:
    """Make the report of a run's folder, finished or not.

    Files that cannot be read are named in the report, which shows the rest. A folder without `run.json` is
    shown from its `.nc` and `.parquet` files alone.

    Args:
        path: the folder.
        to: the report's path; `report.html` in the folder by default.

    Returns:
        The path of the report.

    Raises:
        ResultError: when the folder does not exist, holds nothing to show, or its `run.json` is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise ResultError(f"{path} is not a folder: give the folder that a run wrote.")
    run = _with_loose_files(_read_run(path), path)
    if not any(run[part] for part in ("results", "tables", "findings", "explorers")):
        raise ResultError(f"{path} holds no results, tables or findings: give the folder that a run wrote.")
    warnings = [f"The step {entry['step']!r} failed: {entry['message']}" for entry in run["failures"]]
    if not run["finished"]:
        warnings.append("This run is not finished: what is there so far is shown.")
    sections = []
    for entry in run["results"]:
        own = [table for table in run["tables"] if table.get("section") == entry["name"]]
        tables = _tables(path, own, warnings)
        sections.append(Section(entry["title"], entry["lead"], _figures(path, entry, warnings), tables))
    for entry in run["sections"]:
        own = [table for table in run["tables"] if table.get("section") == entry["name"]]
        drawn = [figure for figure in run["figures"] if figure["section"] == entry["name"]]
        figures = saved_figures(
            [(path / f"{_file_name(f['name'])}{FIGURE_SUFFIX}", f) for f in drawn], warnings
        )
        tables = _tables(path, own, warnings)
        shown = [explorer for explorer in run["explorers"] if explorer["section"] == entry["name"]]
        explorers = saved_explorers(
            [(path / f"{_file_name(e['name'])}{EXPLORER_SUFFIX}", e) for e in shown], warnings
        )
        sections.append(Section(entry["title"], entry["lead"], figures, tables, explorers))
    named = {entry["name"] for part in ("results", "sections") for entry in run[part]}
    left = [table for table in run["tables"] if table.get("section") not in named]
    sections.append(Section("Tables", tables=_tables(path, left, warnings)))
    return write_report(
        to if to is not None else path / "report.html",
        title=run["title"],
        lead=run["lead"],
        findings=[Finding(**entry) for entry in run["findings"]],
        sections=[section for section in sections if section.figures or section.tables or section.explorers],
        settings=run["settings"],
        command=run["command"],
        versions=run["versions"],
        created=run["created"],
        warnings=warnings,
    )


def _figures(path: Path, entry: Mapping[str, Any], warnings: list[str]) -> list[FigureBlock]:
    figures = []
    try:
        result = load_result(path / f"{_file_name(entry['name'])}.nc")
        for request in entry["figures"] or [asdict(FigureRequest())]:
            options, words = request["options"], request["reading"]
            if words is None:
                chosen = {key: options[key] for key in ("metric", "sequence", "stream") if key in options}
                words = reading(result, **chosen)
                words += f" The values of {options['group']} are drawn apart." if "group" in options else ""
            figures.append(FigureBlock(result.plot(**options), words, request["caption"]))
    except Exception as error:  # one result that cannot be shown must not cost the others
        _LOG.warning("the result %s cannot be shown: %s", entry["name"], error)
        warnings.append(f"The result {entry['name']!r} cannot be shown: {error}")
    return figures


def _tables(path: Path, entries: Iterable[Mapping[str, Any]], warnings: list[str]) -> list[TableBlock]:
    tables = []
    for entry in entries:
        file = path / f"{_file_name(entry['name'])}.parquet"
        try:
            tables.append(TableBlock(entry["title"], pd.read_parquet(file), entry["note"]))
        except Exception as error:  # as above
            _LOG.warning("the table %s cannot be read: %s", file, error)
            warnings.append(f"The table {file.name} cannot be read: {error}")
    return tables


def _read_run(path: Path) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    run: dict[str, Any] = {
        "format": FORMAT,
        "title": "memlens report",
        "lead": "",
        "command": None,
        "created": now,
    }
    run |= {"finished": False, "settings": {}, "versions": versions_here()}
    run |= {"findings": [], "results": [], "tables": [], "failures": [], "sections": [], "figures": []}
    run |= {"explorers": []}
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


def _with_loose_files(run: dict[str, Any], path: Path) -> dict[str, Any]:
    """Add the files that `run.json` does not name: a run may have stopped between the two writes."""
    for part, suffix in (("results", ".nc"), ("tables", ".parquet")):
        named = {_file_name(entry["name"]) for entry in run[part]}
        for file in sorted(path.glob(f"*{suffix}")):
            if file.stem not in named and not file.name.startswith("."):
                extra = {"lead": "", "figures": []} if part == "results" else {"note": ""}
                title = file.stem.replace("_", " ").capitalize()
                run[part].append({"name": file.stem, "title": title, **extra})
    return run


def _file_name(name: str) -> str:
    """Return a name that is one file in the folder, whatever was given."""
    return re.sub(r"[^\w.\-]+", "_", name).lstrip(".") or "unnamed"


def _plain(value: object) -> object:
    return value.item() if hasattr(value, "item") else str(value)  # pyright: ignore[reportAttributeAccessIssue]
