"""Files as tables: the content of a `.npy`, `.jsonl`, `.csv` or `.parquet` file, before any tokenizing."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import FileFormatError, SequenceError
from memlens.sequences.parquet import read_table
from memlens.sequences.readers.registry import Opened, Request, read_file, register_file, register_source


@register_file(".npy", "a NumPy array")
def _read_npy(path: Path, _: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FileFormatError(f"{path} is not a .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        what = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise FileFormatError(f"{path} holds {what}: sequences are a two-dimensional array of integers")
    return array, {}


@register_file(".jsonl", "JSON lines")
def _read_jsonl(path: Path, _: Sequence[str]) -> tuple[list[Any] | pd.DataFrame, dict[str, Any]]:
    values = [_parse_line(path, n, line) for n, line in enumerate(_lines(path), 1) if line.strip()]
    kinds = {type(v) for v in values}
    if kinds == {dict}:
        return pd.DataFrame(values), {}
    if kinds in ({str}, {list}, set()):
        return values, {}
    names = ", ".join(sorted(k.__name__ for k in kinds))
    raise FileFormatError(
        f"{path} mixes lines of the kinds {names}: use objects, strings or lists of ids only"
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from error


def _parse_line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise FileFormatError(
            f"{path}, line {number} is not JSON: {error.msg} at column {error.colno} of {line[:40]!r}"
        ) from error


@register_file(".csv", "a comma-separated table")
def _read_csv(path: Path, as_text: Sequence[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    try:
        # Texts such as "NA" and "null" are texts, so only empty cells count as missing.
        kinds: dict[Hashable, Any] = dict.fromkeys(as_text, object)
        return pd.read_csv(path, keep_default_na=False, encoding="utf-8-sig", dtype=kinds), {}
    except pd.errors.EmptyDataError:
        return pd.DataFrame(), {}
    except (UnicodeDecodeError, pd.errors.ParserError) as error:
        raise FileFormatError(f"{path} is not a comma-separated table of UTF-8 text: {error}") from error


@register_file(".parquet", "a parquet file")
def _read_parquet(path: Path, _: Sequence[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    return read_table(path)


def is_pair(source: Any) -> bool:
    """Whether a source is a tuple or list of two `.npy` files.

    >>> is_pair(("train_prefix.npy", "train_suffix.npy")), is_pair(("a text", "another"))
    (True, False)
    """
    return (
        isinstance(source, tuple | list)
        and len(source) == 2
        and all(isinstance(part, str | Path) and Path(part).suffix.lower() == ".npy" for part in source)
    )


@register_source("pair", "two .npy files, of prefixes and of suffixes", is_pair)
def _open_pair(source: Sequence[str | Path], _: Request) -> Opened:
    return Opened(read_pair(*source), " + ".join(Path(part).name for part in source))


def read_pair(prefix_path: str | Path, suffix_path: str | Path) -> pd.DataFrame:
    """Return the columns `tokens` (both joined) and `prefix_len`, one row per pair.

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
        raise FileFormatError(f"{path} has shape {array.shape}: give at least one token per row")
    return array
