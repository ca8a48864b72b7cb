"""Explorers of a run: kept as JSON beside the results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from memlens.errors import FileFormatError
from memlens.files import write_atomically
from memlens.report.figure_files import read_each
from memlens.report.model import ExplorerBlock

__all__ = ["EXPLORER_SUFFIX", "save_explorer", "saved_explorers"]

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
