"""A reader: files with one `prompt => continuation` per line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from memlens.errors import FileFormatError
from memlens.sequences.readers.registry import register_file


@register_file(".pairs")
def read_pairs(path: Path, as_text: Sequence[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return a table with the columns `prompt` and `continuation`, which `load_sequences` recognizes.

    Args:
        path: The file.
        as_text: Columns that are text even if they look like numbers, for formats without types.

    Returns:
        The content, here a table, and a dictionary: its entry `attrs`, if any, is recorded with the set.
    """
    rows = [line.partition("=>") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not all(arrow for _, arrow, _ in rows):
        raise FileFormatError(f"{path}: a line has no '=>': write `prompt => continuation` on each line.")
    prompts, continuations = [row[0].rstrip() for row in rows], [row[2].rstrip() for row in rows]
    return pd.DataFrame({"prompt": prompts, "continuation": continuations}), {}
