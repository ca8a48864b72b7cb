"""The report of a run's folder, made from its files alone (`run_directory` writes them)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from pydantic import BaseModel

from memlens.errors import FileFormatError, MemlensError, OptionError, ResultError
from memlens.files import expanded, parsed_json, parsing, read_json
from memlens.report.bibliography import Citation, bibliography, citations_of
from memlens.report.model import (
    EXPLORER_FORMAT,
    ExplorerBlock,
    FigureBlock,
    FigureRequest,
    Finding,
    Section,
    TableBlock,
)
from memlens.report.render import versions_here, write_report
from memlens.report.summary import Summary
from memlens.results.kinds import reading
from memlens.results.result import Result
from memlens.results.storage import load_result
from memlens.sequences.parquet import read_table

_LOG = logging.getLogger(__name__)
_FORMAT = "memlens run 1"
SUFFIXES = {"results": ".nc", "tables": ".parquet", "figures": ".plotly.json", "explorers": ".explorer.json"}
"""The parts of `run.json` whose entries are files, each with the end of their names."""
_NOTES = ("findings", "failures", "sections", "citations", "times")


def report_from_directory(path: str | Path, to: str | Path | None = None) -> Path:
    """Write the report of a run's folder, whether the run is finished or not.

    The report names files that cannot be read and shows the rest. A folder without `run.json` is shown from
    its `.nc` and `.parquet` files alone.

    Args:
        path: The folder.
        to: Path of the report; `report.html` in the folder by default.

    Returns:
        The path of the report.

    Raises:
        ResultError: The folder does not exist, holds neither a finished run nor anything to show, or its
            `run.json` is damaged.
    """
    path = expanded(path)
    if not path.is_dir():
        raise ResultError(f"{path} is not a folder: give the folder that a run wrote.")
    run = _with_loose_files(read_run(path), path)
    if not run["finished"] and not any(run[part] for part in ("results", "tables", "findings", "explorers")):
        raise ResultError(f"{path} holds no results, tables or findings: give the folder that a run wrote.")
    warnings = [f"The step {entry['step']!r} failed: {entry['message']}" for entry in run["failures"]]
    if not run["finished"]:
        warnings.append("This run is not finished: the report shows what is there so far.")
    cited = _noted(run["citations"], warnings)
    named = {entry["name"] for part in ("results", "sections") for entry in run[part]}
    for table in run["tables"]:
        table["section"] = table.get("section") if table.get("section") in named else None

    def section(title: str, lead: str, name: str | None, figures: Sequence[FigureBlock]) -> Section:
        tables, drawn, explorers = (
            _blocks(path, run, part, name, warnings) for part in ("tables", "figures", "explorers")
        )
        return Section(title, lead, [*figures, *drawn], tables, explorers)

    sections = []
    for entry in (*run["results"], *run["sections"]):
        figures = _drawn(path, entry, warnings, cited) if "figures" in entry else []
        sections.append(section(entry["title"], entry["lead"], entry["name"], figures))
    sections.append(section("Tables", "", None, []))
    findings = [Finding(**entry) for entry in run["findings"]]
    told = [block.reading for section in sections for block in section.figures if block.reading]
    missing = [entry["step"] for entry in run["failures"]]
    return write_report(
        to if to is not None else path / "report.html",
        findings=findings,
        summary=Summary.of(run["summary"], findings, title=run["title"], readings=told, missing=missing),
        sections=[section for section in sections if section.figures or section.tables or section.explorers],
        warnings=warnings,
        references=bibliography(cited),
        **{key: run[key] for key in ("title", "lead", "settings", "command", "versions", "created")},
    )


def read_run(path: Path) -> dict[str, Any]:
    """Return the content of a folder's `run.json`; an empty run if there is none.

    Raises:
        ResultError: The file is damaged, or another version wrote it.
    """
    run: dict[str, Any] = {
        "format": _FORMAT,
        "title": "memlens report",
        "lead": "",
        "command": None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": False,
        "settings": {},
        "summary": {},
        "versions": versions_here(),
        **{part: [] for part in (*SUFFIXES, *_NOTES)},
    }
    file = path / "run.json"
    if not file.exists():
        return run
    with parsing(file, ResultError, "delete it to show the result files alone"):
        stored = parsed_json(file.read_text(encoding="utf-8"), dict)
        if (found := stored["format"]) != _FORMAT:
            raise ResultError(f"{file} has the format {found!r}, not {_FORMAT!r}: another version wrote it.")
        _Run.model_validate(stored)
    return {**run, **stored}


class _Entry(BaseModel):
    """The parts of `run.json`, for the check that it can be shown; what is not named here may be anything."""

    name: str
    section: str | None = None
    reading: str = ""
    caption: str = ""


class _Figure(BaseModel):
    options: dict[str, Any]
    reading: str | None
    caption: str


class _Result(_Entry):
    title: str
    lead: str
    figures: list[_Figure]


class _Table(_Entry):
    title: str
    note: str


class _Section(_Entry):
    title: str
    lead: str


class _Failure(BaseModel):
    step: str
    message: str


class _Run(BaseModel):
    title: str = ""
    lead: str = ""
    command: str | None = None
    created: str = ""
    finished: bool = False
    settings: dict[str, Any] = {}
    summary: dict[str, str] = {}
    versions: dict[str, str] = {}
    findings: list[Finding] = []
    failures: list[_Failure] = []
    citations: list[dict[str, str]] = []
    sections: list[_Section] = []
    results: list[_Result] = []
    tables: list[_Table] = []
    figures: list[_Entry] = []
    explorers: list[_Entry] = []


def file_of(path: Path, part: str, name: str) -> Path:
    """Return the file in a run's folder that holds a result, table, figure or explorer of any name."""
    return path / ((re.sub(r"[^\w.\-]+", "_", name).lstrip(".") or "unnamed") + SUFFIXES[part])


def _with_loose_files(run: dict[str, Any], path: Path) -> dict[str, Any]:
    """Add the files that `run.json` does not name: a run may have stopped between the two writes."""
    for part, extra in (("results", {"lead": "", "figures": []}), ("tables", {"note": ""})):
        named = {file_of(path, part, entry["name"]) for entry in run[part]}
        for file in sorted(path.glob(f"*{SUFFIXES[part]}")):
            if file not in named and not file.name.startswith("."):
                title = file.stem.replace("_", " ").capitalize()
                run[part].append({"name": file.stem, "title": title, **extra})
    return run


def _noted(entries: Iterable[Mapping[str, str]], warnings: list[str]) -> list[Citation]:
    """Return the citations in `run.json`; an unknown key loses only itself."""
    cited: list[Citation] = []
    for entry in entries:
        try:
            cited.append(Citation(entry["key"], entry["what"]))
        except OptionError as error:
            warnings.append(f"A citation is left out: {error}")
    return cited


def _drawn(
    path: Path, entry: Mapping[str, Any], warnings: list[str], cited: list[Citation]
) -> list[FigureBlock]:
    """Return the figures of a result, drawn as its entry requests; its sources are added to `cited`."""
    figures: list[FigureBlock] = []
    try:
        result = load_result(file_of(path, "results", entry["name"]))
        cited += citations_of(result)
        for request in entry["figures"] or [asdict(FigureRequest())]:
            options, words = request["options"], request["reading"]
            if words is None:
                words = _read(entry["name"], result, options, warnings)
            figures.append(FigureBlock(result.plot(**options), words, request["caption"]))
    except Exception as error:  # one result that cannot be shown must not cost the others
        _warn(f"the result {entry['name']!r} cannot be shown", error, warnings)
    return figures


def _read(name: str, result: Result, options: Mapping[str, Any], warnings: list[str]) -> str:
    """Return the reading of a result's figure; one that fails must not cost the figure."""
    chosen = {key: options[key] for key in ("metric", "sequence", "stream") if key in options}
    try:
        words = reading(result, **chosen)
    except Exception as error:
        _warn(f"the result {name!r} has no reading", error, warnings)
        return ""
    group = options.get("group")
    drawn = "The groups" if group == "group" else f"The values of {group}"
    return f"{words} {drawn} are drawn apart." if group else words


def _warn(what: str, error: Exception, warnings: list[str]) -> None:
    """Note what is missing in the report, and where in the code that comes from in the log."""
    expected = isinstance(error, MemlensError)
    said = str(error) if expected else f"{type(error).__name__}: {error}"
    _LOG.warning("%s: %s", what, said, exc_info=None if expected else error)
    warnings.append(f"{what[0].upper()}{what[1:]}: {said}")


def _table(file: Path, entry: Mapping[str, Any]) -> TableBlock:
    return TableBlock(entry["title"], read_table(file)[0], entry["note"])


def _figure(file: Path, entry: Mapping[str, Any]) -> FigureBlock:
    figure = go.Figure(pio.from_json(file.read_text(encoding="utf-8")))
    return FigureBlock(figure, entry["reading"], entry["caption"])


def _explorer(file: Path, entry: Mapping[str, Any]) -> ExplorerBlock:
    payload = read_json(file)
    if payload["format"] != EXPLORER_FORMAT:
        raise FileFormatError(f"its format is {payload['format']!r}, not {EXPLORER_FORMAT!r}")
    return ExplorerBlock(payload, entry["reading"], entry["caption"])


_READERS = {"tables": _table, "figures": _figure, "explorers": _explorer}


def _blocks(
    path: Path, run: Mapping[str, Any], part: str, section: str | None, warnings: list[str]
) -> list[Any]:
    """Return the tables, figures or explorers of a section; for a file that cannot be read, a warning."""
    found: list[Any] = []
    for entry in run[part]:
        if entry.get("section") != section:
            continue
        file, what = file_of(path, part, entry["name"]), part.removesuffix("s")
        try:
            found.append(_READERS[part](file, entry))
        except Exception as error:  # nor must one file
            _LOG.warning("the %s %s cannot be read: %s", what, file, error)
            warnings.append(f"The {what} {file.name} cannot be read: {error}")
    return found
