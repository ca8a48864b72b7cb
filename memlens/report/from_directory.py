"""The report of a run's folder, made from its files alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from memlens.errors import OptionError, ResultError
from memlens.report.bibliography import Citation, bibliography, citations_of
from memlens.report.model import FigureBlock, FigureRequest, Finding, Section, TableBlock
from memlens.report.render import write_report
from memlens.report.run_file import file_name, read_run, with_loose_files
from memlens.report.side_files import EXPLORER_SUFFIX, FIGURE_SUFFIX, saved_explorers, saved_figures
from memlens.results.readings import reading
from memlens.results.storage import load_result

_LOG = logging.getLogger(__name__)


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
    run = with_loose_files(read_run(path), path)
    if not any(run[part] for part in ("results", "tables", "findings", "explorers")):
        raise ResultError(f"{path} holds no results, tables or findings: give the folder that a run wrote.")
    warnings = [f"The step {entry['step']!r} failed: {entry['message']}" for entry in run["failures"]]
    if not run["finished"]:
        warnings.append("This run is not finished: what is there so far is shown.")
    sections: list[Section] = []
    cited = _noted(run["citations"], warnings)
    for entry in run["results"]:
        own = [table for table in run["tables"] if table.get("section") == entry["name"]]
        tables = _tables(path, own, warnings)
        figures = _figures(path, entry, warnings, cited)
        sections.append(Section(entry["title"], entry["lead"], figures, tables))
    for entry in run["sections"]:
        own = [table for table in run["tables"] if table.get("section") == entry["name"]]
        drawn = [figure for figure in run["figures"] if figure["section"] == entry["name"]]
        figures = saved_figures(
            [(path / f"{file_name(f['name'])}{FIGURE_SUFFIX}", f) for f in drawn], warnings
        )
        tables = _tables(path, own, warnings)
        shown = [explorer for explorer in run["explorers"] if explorer["section"] == entry["name"]]
        explorers = saved_explorers(
            [(path / f"{file_name(e['name'])}{EXPLORER_SUFFIX}", e) for e in shown], warnings
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
        references=bibliography(cited),
    )


def _noted(entries: Iterable[Mapping[str, str]], warnings: list[str]) -> list[Citation]:
    """Return the citations that `run.json` notes; an unknown key costs itself alone."""
    cited: list[Citation] = []
    for entry in entries:
        try:
            cited.append(Citation(entry["key"], entry["what"]))
        except OptionError as error:
            warnings.append(f"A citation is left out: {error}")
    return cited


def _figures(
    path: Path, entry: Mapping[str, Any], warnings: list[str], cited: list[Citation]
) -> list[FigureBlock]:
    figures: list[FigureBlock] = []
    try:
        result = load_result(path / f"{file_name(entry['name'])}.nc")
        cited += citations_of(result)
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
        file = path / f"{file_name(entry['name'])}.parquet"
        try:
            tables.append(TableBlock(entry["title"], pd.read_parquet(file), entry["note"]))
        except Exception as error:  # as above
            _LOG.warning("the table %s cannot be read: %s", file, error)
            warnings.append(f"The table {file.name} cannot be read: {error}")
    return tables
