"""Files as tables: what stands in a `.npy`, `.jsonl`, `.csv` or `.parquet` file, before any tokenizing."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import FileFormatError, SequenceError, SourceNotFoundError, check_option, near_matches
from memlens.files import zoo_folders, zoo_table
from memlens.sequences.parquet import read_table

SUFFIXES = (".npy", ".jsonl", ".csv", ".parquet")
ZOO_LISTS = ("sequences", "expressions", "facts", "identifiers", "heldout")
"""The lists of sequences that a zoo model's folder may hold; the first is that of planted sequences."""

_AS_TEXT = ("identifier",)


def read_file(path: Path, as_text: Sequence[str] = _AS_TEXT) -> tuple[Any, dict[str, Any]]:
    """Return a file's content (an array, a list or a table) and memlens' settings if it holds any.

    Args:
        path: The file.
        as_text: Columns of a `.csv` file that are text even where they look like numbers.

    Raises:
        SourceNotFoundError: There is no such file.
        FileFormatError: The suffix is unknown, or the content is not what the suffix says.
    """
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise FileFormatError(
            f"{path}: the suffix {path.suffix!r} is not known; use one of {known}, or give texts as a list"
        )
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise SourceNotFoundError(f"there is no file {path}.{near_matches(path.name, siblings)}")
    if path.suffix.lower() == ".parquet":
        return read_table(path)
    if path.suffix.lower() == ".csv":
        return _read_csv(path, as_text), {}
    return _read_npy(path) if path.suffix.lower() == ".npy" else _read_jsonl(path), {}


def zoo_file(name: str, kind: str = "sequences") -> Path:
    """Return a list of a model of the zoo: shipped with it or with another of its corpus, or made on demand.

    Args:
        name: "zoo/pythia-s", for instance.
        kind: Which list, one of `ZOO_LISTS`.

    Raises:
        OptionError: There is no such kind of list.
        SourceNotFoundError: There is no such model, or it lacks the list.
    """
    check_option("the zoo's list", kind, ZOO_LISTS)
    short = name.removeprefix("zoo/").removesuffix("-untrained")
    for folder in (root / short for root in zoo_folders()):
        path = zoo_table(folder, kind)
        if path is not None:
            return path
        there = [known for known in ZOO_LISTS if zoo_table(folder, known)]
        if there:
            raise SourceNotFoundError(
                f"{name!r} has no list of {kind}, it has {', '.join(there)}: it was trained without; train "
                "it anew with `memlens zoo train`, or take another model's."
            )
    found = (p.parent.name for folder in zoo_folders() for p in folder.glob("*/sequences.parquet"))
    known = sorted({f"zoo/{found_name}" for found_name in found})
    listing = f"the zoo has {', '.join(known)}" if known else "the zoo of this installation is empty"
    raise SourceNotFoundError(f"no planted sequences for {name!r}: {listing}.{near_matches(name, known)}")


def _read_npy(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FileFormatError(f"{path} is not a .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        what = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise FileFormatError(f"{path} holds {what}: sequences are a two-dimensional array of integers")
    return array


def _read_jsonl(path: Path) -> list[Any] | pd.DataFrame:
    values = [_parse_line(path, n, line) for n, line in enumerate(_lines(path), 1) if line.strip()]
    kinds = {type(v) for v in values}
    if kinds == {dict}:
        return pd.DataFrame(values)
    if kinds in ({str}, {list}, set()):
        return values
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


def _read_csv(path: Path, as_text: Sequence[str]) -> pd.DataFrame:
    try:
        # Texts such as "NA" and "null" are texts, so only empty cells count as missing.
        kinds: dict[Hashable, Any] = dict.fromkeys(as_text, object)
        return pd.read_csv(path, keep_default_na=False, encoding="utf-8-sig", dtype=kinds)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except (UnicodeDecodeError, pd.errors.ParserError) as error:
        raise FileFormatError(f"{path} is not a comma-separated table of UTF-8 text: {error}") from error


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
