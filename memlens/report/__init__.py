"""One HTML file that says what was found, shows it, and tells how to do it again.

`write_report` makes the file from findings, sections and settings. `RunDirectory` keeps the results of a run
on disk as they come, and `report_from_directory` makes the report from such a folder at any time.
"""

from __future__ import annotations

from memlens.report.bibliography import Citation, bibliography, citations_of
from memlens.report.directory_report import report_from_directory
from memlens.report.model import ExplorerBlock, FigureBlock, FigureRequest, Finding, Section, TableBlock
from memlens.report.readings import reading
from memlens.report.references import REFERENCES, Reference
from memlens.report.render import write_report
from memlens.report.run_directory import RunDirectory, save_run

__all__ = [
    "REFERENCES",
    "Citation",
    "ExplorerBlock",
    "FigureBlock",
    "FigureRequest",
    "Finding",
    "Reference",
    "RunDirectory",
    "Section",
    "TableBlock",
    "bibliography",
    "citations_of",
    "reading",
    "report_from_directory",
    "save_run",
    "write_report",
]
