"""Leaving rows of a table out, each for one reason, told in one warning and in the set's attributes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from memlens.errors import EmptySetError
from memlens.sequences.set import Attr

__all__ = ["leave_out"]


def leave_out(
    table: pd.DataFrame, reasons: Mapping[str, Sequence[bool] | np.ndarray], what: str
) -> tuple[pd.DataFrame, dict[str, Attr]]:
    """Return the rows for which no reason holds, and what was left out.

    A row that several reasons hold for counts under the first. The attributes are `n_left_out`, the number
    of rows, and `left_out`, a line such as "2 object not last; 1 repeated".

    Args:
        table: One row an item.
        reasons: For each reason, True where it holds.
        what: What a row is, in the plural, for the messages.

    Raises:
        EmptySetError: Nothing is left.
    """
    gone = np.zeros(len(table), dtype=bool)
    counts: dict[str, int] = {}
    for reason, mask in reasons.items():
        new = np.asarray(mask, dtype=bool) & ~gone
        gone |= new
        if new.any():
            counts[reason] = int(new.sum())
    if not counts:
        return table.reset_index(drop=True), {"n_left_out": 0, "left_out": ""}
    said = "; ".join(f"{count} {reason}" for reason, count in counts.items())
    if gone.all():
        raise EmptySetError(f"none of {len(table)} {what} can be used: {said}")
    warnings.warn(f"{gone.sum()} of {len(table)} {what} are left out: {said}", stacklevel=6)
    kept = table.iloc[np.flatnonzero(~gone)].reset_index(drop=True)
    return kept, {"n_left_out": int(gone.sum()), "left_out": said}
