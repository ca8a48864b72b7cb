"""Files as tables: what stands in a `.npy`, `.jsonl`, `.csv` or `.parquet` file, before any tokenizing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import FileFormatError, SourceNotFoundError, near_matches
from memlens.files import zoo_folders
from memlens.sequences.parquet import read_table

__all__ = ["SUFFIXES", "read_file", "zoo_file"]

SUFFIXES = (".npy", ".jsonl", ".csv", ".parquet")


def read_file(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return a file's content (an array, a list or a table) and memlens' settings if it holds any.

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
    readers = {".npy": _read_npy, ".jsonl": _read_jsonl, ".csv": _read_csv}
    return readers[path.suffix.lower()](path), {}


def zoo_file(name: str) -> Path:
    """Return the planted list of a model of the zoo: shipped with it, or trained on demand.

    Args:
        name: "zoo/pythia-s", for instance.

    Raises:
        SourceNotFoundError: There is no such model, or it has no list.
    """
    short = name.removeprefix("zoo/")
    for folder in zoo_folders():
        path = folder / short / "sequences.parquet"
        if path.is_file():
            return path
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


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        # Texts such as "NA" and "null" are texts, so only empty cells count as missing.
        return pd.read_csv(path, keep_default_na=False, encoding="utf-8-sig")
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except (UnicodeDecodeError, pd.errors.ParserError) as error:
        raise FileFormatError(f"{path} is not a comma-separated table of UTF-8 text: {error}") from error
