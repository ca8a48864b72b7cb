"""Explorers of a run: kept as JSON beside the results."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from memlens.errors import FileFormatError
from memlens.files import write_atomically
from memlens.report.model import ExplorerBlock

__all__ = ["EXPLORER_SUFFIX", "save_explorer", "saved_explorers"]

EXPLORER_SUFFIX = ".explorer.json"
_FORMAT = "memlens explorer 1"
_LOG = logging.getLogger(__name__)


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
    found = []
    for file, entry in entries:
        try:
            payload = json.loads(file.read_text(encoding="utf-8"))
            if payload["format"] != _FORMAT:
                raise FileFormatError(f"its format is {payload['format']!r}, not {_FORMAT!r}")
            found.append(ExplorerBlock(payload, entry["reading"], entry["caption"]))
        except Exception as error:  # one file that cannot be read must not cost the others
            _LOG.warning("the explorer %s cannot be read: %s", file, error)
            warnings.append(f"The explorer {file.name} cannot be read: {error}")
    return found
