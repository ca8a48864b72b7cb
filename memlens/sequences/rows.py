"""What a set of sequences is checked for and how rows are padded and chosen."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from memlens.errors import ColumnError, SequenceError, VocabularyError

Rows = int | slice | Sequence[int] | Sequence[bool] | np.ndarray | pd.Series | Tensor
"""What `SequenceSet.__getitem__` takes."""

RESERVED_COLUMNS = ("tokens", "prefix_len")
"""Columns of a file that the set itself keeps."""


def pad(tokens: Tensor | np.ndarray | Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return `[seq, pos]` ids padded on the right with 0, and the mask of real tokens."""
    if isinstance(tokens, Tensor | np.ndarray):
        array = tokens if isinstance(tokens, Tensor) else torch.from_numpy(_signed(tokens))
        if array.ndim != 2:
            raise SequenceError(
                f"token ids have shape {tuple(array.shape)}: give a [sequence, position] array"
            )
        return array, torch.ones(array.shape, dtype=torch.bool, device=array.device)
    lengths = torch.tensor([len(row) for row in tokens], dtype=torch.int64)
    width = int(lengths.max()) if len(lengths) else 0
    mask = torch.arange(width) < lengths[:, None]
    padded = torch.zeros(mask.shape, dtype=torch.int64)
    flat = np.array([token for row in tokens for token in row] or np.empty(0, np.int64))
    padded[mask] = torch.from_numpy(_signed(flat))
    return padded, mask


def _signed(tokens: np.ndarray) -> np.ndarray:
    """Return integers as int64: torch has no arithmetic for uint16 and uint32."""
    if not np.issubdtype(tokens.dtype, np.integer):
        raise SequenceError(f"token ids are {tokens.dtype}: give integers")
    return tokens.astype(np.int64)


def check_shapes(tokens: Tensor, mask: Tensor, prefix_len: Tensor) -> None:
    """Raise `SequenceError` unless the three fit each other and hold integers."""
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype in (torch.bool, torch.complex64):
        raise SequenceError(
            f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}: give integers [sequence, position]"
        )
    if mask.shape != tokens.shape:
        raise SequenceError(f"the mask has shape {tuple(mask.shape)}, the tokens {tuple(tokens.shape)}")
    if prefix_len.shape != tokens.shape[:1] or prefix_len.is_floating_point():
        raise SequenceError(
            f"prefix_len is {prefix_len.dtype} of shape {tuple(prefix_len.shape)}: "
            f"give one integer for each of the {tokens.shape[0]} sequences"
        )


def check_rows(tokens: Tensor, mask: Tensor, prefix_len: Tensor) -> None:
    """Raise for the first row with a gap in its mask, a negative id, or nothing to give or to predict."""
    lengths = mask.sum(-1)
    right_padded = torch.arange(mask.shape[1]) < lengths[:, None]
    for row in _first_rows((mask != right_padded).any(-1)):
        raise SequenceError(f"the mask of row {row} has a gap: sequences are padded on the right only")
    for row in _first_rows((tokens < 0).any(-1)):
        position = int((tokens[row] < 0).nonzero()[0])
        raise VocabularyError(
            f"row {row} has the token id {int(tokens[row, position])} at position {position}: "
            "ids are 0 or more; mark padding with the mask"
        )
    for row in _first_rows(prefix_len < 1):
        raise SequenceError(f"row {row} has prefix_len={int(prefix_len[row])}: give at least one token")
    for row in _first_rows(prefix_len >= lengths):
        raise SequenceError(
            f"row {row} has {int(lengths[row])} tokens and prefix_len={int(prefix_len[row])}: nothing is "
            "left to predict; choose a smaller prefix_len or leave the row out"
        )


def _first_rows(bad: Tensor) -> list[int]:
    return bad.nonzero()[:1, 0].tolist()


def checked_table(table: pd.DataFrame, n: int) -> pd.DataFrame:
    """Return a copy with a fresh index and a column `id` of unique strings, or raise."""
    if len(table) != n:
        raise SequenceError(f"the table has {len(table)} rows for {n} sequences")
    for name in RESERVED_COLUMNS:
        if name in table:
            raise ColumnError(
                f"the table has a column {name!r}, which the set itself keeps: rename or drop it"
            )
    table = table.reset_index(drop=True)
    if "id" not in table:
        table.insert(0, "id", [str(i) for i in range(n)])
    table["id"] = table["id"].astype(str)
    repeated = sorted(set(table["id"][table["id"].duplicated()]))
    if repeated:
        raise SequenceError(f"the ids {some(repeated)} belong to more than one sequence: make them unique")
    return table


def row_index(rows: Rows, n: int) -> Int[Tensor, "row"]:
    """Return the positions of the chosen rows, in the order asked for."""
    if isinstance(rows, slice):
        return torch.arange(n)[rows] if (rows.step or 1) > 0 else torch.from_numpy(np.arange(n)[rows].copy())
    if isinstance(rows, pd.Series):
        rows = rows.to_numpy()
    array = np.asarray(rows if not isinstance(rows, Tensor) else rows.cpu().numpy())
    if array.dtype == bool and array.ndim == 1:
        if len(array) != n:
            raise IndexError(f"a mask of {len(array)} rows does not fit a set of {n} sequences")
        return torch.from_numpy(np.flatnonzero(array))
    index = np.atleast_1d(array if array.size else array.astype(np.int64))
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise TypeError("choose sequences by an integer, a slice, a mask of booleans or integers")
    outside = index[(index < -n) | (index >= n)]
    if outside.size:
        raise IndexError(f"row {int(outside[0])} does not exist: the set has {n} sequences")
    return torch.from_numpy(np.where(index < 0, index + n, index).astype(np.int64))


def span(values: Tensor) -> str:
    """Return "32", or "4-13" where the values differ."""
    if not len(values):
        return "0"
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low}-{high}"


def some(values: Sequence[object], n: int = 5) -> str:
    """Return the first `n` values for an error message."""
    shown = ", ".join(repr(v) for v in values[:n])
    return shown if len(values) <= n else f"{shown} and {len(values) - n} more"


def unique_ids(ids: Sequence[object]) -> list[str]:
    """Return the ids as strings, later ones of the same name told apart by "-2", "-3", ….

    >>> unique_ids(["a", "b", "a"])
    ['a', 'b', 'a-2']
    """
    taken: set[str] = set()
    names: list[str] = []
    known = set(map(str, ids))
    for name in map(str, ids):
        free, n = name, 1
        while free in taken or (n > 1 and free in known):
            n += 1
            free = f"{name}-{n}"
        taken.add(free)
        names.append(free)
    return names
