"""Figures and explorers that are kept as JSON beside the results."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import plotly.graph_objects as go
import plotly.io as pio

from memlens.errors import FileFormatError
from memlens.files import write_atomically
from memlens.report.model import ExplorerBlock, FigureBlock

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


EXPLORER_SUFFIX = ".explorer.json"


_FORMAT = "memlens explorer 1"


def save_explorer(payload: Mapping[str, Any], path: Path) -> Path:
    """Write a payload as JSON, whole or not at all."""
    text = json.dumps(dict(payload), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return write_atomically(path, text.encode("utf-8", errors="backslashreplace"))


def saved_explorers(
    entries: Iterable[tuple[Path, Mapping[str, Any]]], warnings: list[str]
) -> list[ExplorerBlock]:
    """Return the explorers of files, each with its words.

    Args:
        entries: A file, and what `run.json` says of it (`reading`, `caption`).
        warnings: A sentence is added for each file that cannot be read.
    """

    def read(file: Path, entry: Mapping[str, Any]) -> ExplorerBlock:
        payload = json.loads(file.read_text(encoding="utf-8"))
        if payload["format"] != _FORMAT:
            raise FileFormatError(f"its format is {payload['format']!r}, not {_FORMAT!r}")
        return ExplorerBlock(payload, entry["reading"], entry["caption"])

    return read_each("explorer", read, entries, warnings)
