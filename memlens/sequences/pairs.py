"""Prefixes and suffixes in two `.npy` files, as in the lm-extraction-benchmark.

Its `train_prefix.npy` and `train_suffix.npy` are two arrays of uint16, `[15000, 50]` each: row i of the one
is continued by row i of the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import FileFormatError, SequenceError
from memlens.sequences.files import read_file

__all__ = ["is_pair", "read_pair"]


def is_pair(source: Any) -> bool:
    """Whether a source is a tuple of two `.npy` files.

    >>> is_pair(("train_prefix.npy", "train_suffix.npy")), is_pair(("a text", "another"))
    (True, False)
    """
    return (
        isinstance(source, tuple)
        and len(source) == 2
        and all(isinstance(part, str | Path) and Path(part).suffix.lower() == ".npy" for part in source)
    )


def read_pair(prefix_path: str | Path, suffix_path: str | Path) -> pd.DataFrame:
    """Return the columns `tokens` (both joined) and `prefix_len`, one row a pair.

    Args:
        prefix_path: `[n, prefix]` integers.
        suffix_path: `[n, suffix]` integers, in the same order.

    Raises:
        SourceNotFoundError: One of the files is missing.
        FileFormatError: A file holds no two-dimensional array of integers, or one without columns.
        SequenceError: The arrays have different numbers of rows.
    """
    paths = [Path(path).expanduser() for path in (prefix_path, suffix_path)]
    prefix, suffix = (_read(path) for path in paths)
    if len(prefix) != len(suffix):
        raise SequenceError(
            f"{paths[0].name} has {len(prefix)} rows and {paths[1].name} has {len(suffix)}: row by row they "
            "are the two halves of one sequence, so give files of one list"
        )
    rows = np.concatenate([prefix.astype(np.int64), suffix.astype(np.int64)], axis=1)
    return pd.DataFrame({"tokens": rows.tolist(), "prefix_len": prefix.shape[1]})


def _read(path: Path) -> np.ndarray:
    array, _ = read_file(path)
    if not array.shape[1]:
        raise FileFormatError(f"{path} has shape {array.shape}: give at least one token a row")
    return array
