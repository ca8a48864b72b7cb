"""Figures that are drawn from no single result: kept as plotly's JSON beside the results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import plotly.graph_objects as go
import plotly.io as pio

from memlens.files import write_atomically
from memlens.report.model import FigureBlock

__all__ = ["FIGURE_SUFFIX", "read_each", "save_figure", "saved_figures"]

FIGURE_SUFFIX = ".plotly.json"
_LOG = logging.getLogger(__name__)
_Block = TypeVar("_Block")


def save_figure(figure: go.Figure, path: Path) -> Path:
    """Write a figure as plotly's JSON, whole or not at all."""
    return write_atomically(path, str(figure.to_json()).encode())


def saved_figures(
    entries: Iterable[tuple[Path, Mapping[str, Any]]], warnings: list[str]
) -> list[FigureBlock]:
    """Return the figures of files, each with its words.

    Args:
        entries: A file, and what `run.json` says of it (`reading`, `caption`).
        warnings: A sentence is added for each file that cannot be read.
    """

    def read(file: Path, entry: Mapping[str, Any]) -> FigureBlock:
        figure = go.Figure(pio.from_json(file.read_text(encoding="utf-8")))
        return FigureBlock(figure, entry["reading"], entry["caption"])

    return read_each("figure", read, entries, warnings)


def read_each(
    what: str,
    read: Callable[[Path, Mapping[str, Any]], _Block],
    entries: Iterable[tuple[Path, Mapping[str, Any]]],
    warnings: list[str],
) -> list[_Block]:
    """Return what is read of each file; one that cannot be read must not cost the others.

    Args:
        what: What the files hold, in a word.
        read: Reads one.
        entries: A file, and what `run.json` says of it.
        warnings: A sentence is added for each file that cannot be read.
    """
    found = []
    for file, entry in entries:
        try:
            found.append(read(file, entry))
        except Exception as error:
            _LOG.warning("the %s %s cannot be read: %s", what, file, error)
            warnings.append(f"The {what} {file.name} cannot be read: {error}")
    return found
