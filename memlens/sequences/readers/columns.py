"""Which columns of a table hold what: the usual names, and those a caller gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from memlens.errors import ColumnError, near_matches

TOKENS = ("tokens", "input_ids", "token_ids")


PROMPT = ("prompt", "prefix", "context")


CONTINUATION = ("continuation", "suffix", "target", "completion")


TEXT = ("text", "sequence", "content", "sentence")


ID = ("id", "uid", "sequence_id", "index")


@dataclass(frozen=True)
class Columns:
    """The names of columns a caller gave; None: look for the usual names."""

    tokens: str | None = None
    prompt: str | None = None
    continuation: str | None = None
    text: str | None = None
    id: str | None = None


def find_column(frame: pd.DataFrame, given: str | None, usual: Sequence[str]) -> str | None:
    """Return the given column, or the first usual one that is there, or None.

    Raises:
        ColumnError: The given column is not there.
    """
    if given is None:
        return next((name for name in usual if name in frame), None)
    if given not in frame:
        hint = near_matches(given, map(str, frame.columns))
        raise ColumnError(f"there is no column {given!r}: {listing(frame)}.{hint}")
    return given


def listing(frame: pd.DataFrame) -> str:
    """Return the names of the columns there are, for an error message."""
    return f"the columns are {', '.join(map(str, frame.columns)) or 'none'}"
