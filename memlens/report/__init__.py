"""One HTML file that says what was found, shows it, and tells how to do it again.

`write_report` makes the file from findings, sections and settings. `RunDirectory` keeps the results of a run
on disk as they come, and `report_from_directory` makes the report from such a folder at any time.
"""

from __future__ import annotations

from memlens.report.model import ExplorerBlock, FigureBlock, Finding, Section, TableBlock
from memlens.report.readings import reading
from memlens.report.render import write_report
from memlens.report.run_directory import FigureRequest, RunDirectory, report_from_directory, save_run

__all__ = [
    "ExplorerBlock",
    "FigureBlock",
    "FigureRequest",
    "Finding",
    "RunDirectory",
    "Section",
    "TableBlock",
    "reading",
    "report_from_directory",
    "save_run",
    "write_report",
]
