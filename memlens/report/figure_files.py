"""Figures that are drawn from no single result: kept as plotly's JSON beside the results."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from memlens.files import write_atomically
from memlens.report.model import FigureBlock

__all__ = ["FIGURE_SUFFIX", "save_figure", "saved_figures"]

FIGURE_SUFFIX = ".plotly.json"
_LOG = logging.getLogger(__name__)


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
    figures = []
    for file, entry in entries:
        try:
            figure = go.Figure(pio.from_json(file.read_text(encoding="utf-8")))
            figures.append(FigureBlock(figure, entry["reading"], entry["caption"]))
        except Exception as error:  # one figure that cannot be read must not cost the others
            _LOG.warning("the figure %s cannot be read: %s", file, error)
            warnings.append(f"The figure {file.name} cannot be read: {error}")
    return figures
