"""Sequences in memory: datasets, tables, tokenizer outputs, lists and arrays; and datasets of the hub."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from memlens.errors import SequenceError, SourceNotFoundError
from memlens.sequences.readers.registry import FILES, Opened, Request, register_source
from memlens.sequences.rows import some
from memlens.sequences.set import SequenceSet


@register_source("hf", "a dataset of the hub", lambda s: isinstance(s, str) and s.startswith("hf:"))
def _open_hub(source: str, request: Request) -> Opened:
    """Open "hf:NAME" or "hf:NAME:SPLIT"."""
    import datasets

    name, split = source.removeprefix("hf:"), request.split
    before, colon, after = name.rpartition(":")
    if colon and "/" not in after and "\\" not in after:
        name, split = before, after
    try:
        return Opened(datasets.load_dataset(name, split=split), source)
    except Exception as error:  # the client raises many kinds, from ConnectionError to ValueError
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SourceNotFoundError(
            f"the dataset {name!r}, split {split!r}, could not be loaded: {reason}"
        ) from error


@register_source("set", "a SequenceSet", lambda s: isinstance(s, SequenceSet))
def _open_set(source: SequenceSet, _: Request) -> Opened:
    frame = source.table.assign(tokens=source.rows(), prefix_len=source.prefix_len.numpy())
    return Opened(frame, "SequenceSet", dict(source.attrs))


def as_frame_or_rows(content: Any, limit: int | None) -> pd.DataFrame | np.ndarray | list[list[int]]:
    """Return a table, or token ids without one: an array or a list of rows.

    Raises:
        SequenceError: The content holds neither texts nor token ids.
    """
    if isinstance(content, pd.DataFrame):
        return content
    if hasattr(content, "column_names") and hasattr(content, "features"):
        return _dataset_frame(content, limit)
    if isinstance(content, Mapping):
        return _mapping_frame(content)
    if isinstance(content, Tensor | np.ndarray) and not _is_text(content):
        return _integer_array(content)
    if isinstance(content, str | bytes | set | frozenset | io.IOBase) or not isinstance(content, Iterable):
        raise SequenceError(
            f"sequences cannot be read from a {type(content).__name__}: give a file, a dataset, a table, "
            "a list or an array"
        )
    return _listed(list(islice(content, limit)))


def _listed(rows: list[Any]) -> pd.DataFrame | list[list[int]]:
    """Return a list of texts, records, pairs of prompt and continuation, or lists of ids."""
    if rows and all(isinstance(row, str) for row in rows):
        names = [Path(row) for row in rows if "\n" not in row and len(row) < 4096]
        if len(names) == len(rows) and all(name.suffix.lower() in FILES for name in names):
            raise SequenceError(
                f"the list holds file names, {some(rows, 2)}: give one file at a time, or the two .npy files "
                "of prefixes and suffixes"
            )
        return pd.DataFrame({"text": [str(row) for row in rows]})
    if rows and all(isinstance(row, Mapping) for row in rows):
        return pd.DataFrame([dict(row) for row in rows])
    if rows and all(isinstance(row, list | tuple) and len(row) == 2 for row in rows):
        firsts, lasts = zip(*rows, strict=True)
        if all(isinstance(part, str) for part in (*firsts, *lasts)):
            return pd.DataFrame({"prompt": firsts, "continuation": lasts})
        if not any(_is_id(part) for part in (*firsts, *lasts)):
            prefixes, suffixes = _id_rows(list(firsts)), _id_rows(list(lasts))
            tokens = [a + b for a, b in zip(prefixes, suffixes, strict=True)]
            return pd.DataFrame({"tokens": tokens, "prefix_len": [len(row) for row in prefixes]})
    return _id_rows(rows)


def _is_text(content: Any) -> bool:
    return isinstance(content, np.ndarray) and content.dtype.kind in "UO"


def _dataset_frame(dataset: Any, limit: int | None) -> pd.DataFrame:
    if not hasattr(dataset, "select"):
        if limit is None:
            raise SequenceError("a streamed dataset has no end: say how many rows to read with limit=")
        return pd.DataFrame(list(islice(dataset, limit)))
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    layout = getattr(dataset, "format", None) or {}
    if layout.get("type") == "custom":  # columns made on the fly, by set_transform or with_transform
        return _mapping_frame(dataset[:])
    return dataset.to_pandas()[layout.get("columns") or dataset.column_names]


def _mapping_frame(content: Mapping[str, Any]) -> pd.DataFrame:
    """Return a dictionary of columns, such as a tokenizer's output, as a table."""
    if not content or any(hasattr(part, "column_names") for part in content.values()):
        parts = f": choose one of its parts, {some(list(content))}" if content else ": it is empty"
        raise SequenceError(f"sequences cannot be read from a {type(content).__name__}{parts}")
    columns = {str(name): _column(str(name), values) for name, values in content.items()}
    if all(values and not isinstance(values[0], str | list) for values in columns.values()):
        columns = {name: [values] for name, values in columns.items()}  # one text, not a list of them
    sizes = {name: len(values) for name, values in columns.items()}
    if len(set(sizes.values())) > 1:
        raise SequenceError(f"the columns have different numbers of rows: {sizes}; give one value per row")
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})


def _column(name: str, values: Any) -> list[Any]:
    if isinstance(values, Tensor | np.ndarray):
        return values.tolist()
    if not isinstance(values, list | tuple | pd.Series):
        raise SequenceError(
            f"{name!r} is a {type(values).__name__}: give a dictionary of columns, each a list or an array"
        )
    return [row.tolist() if isinstance(row, Tensor | np.ndarray) else row for row in values]


def _integer_array(array: Tensor | np.ndarray) -> np.ndarray:
    array = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise SequenceError(
            f"the array is {array.dtype} of shape {array.shape}: give [sequence, position] integers"
        )
    return array.astype(np.int64)


def _id_rows(rows: list[Any]) -> list[list[int]]:
    lists = [row.tolist() if isinstance(row, Tensor | np.ndarray) else row for row in rows]
    for number, row in enumerate(lists):
        if not isinstance(row, list | tuple) or not all(_is_id(token) for token in row):
            raise SequenceError(
                f"row {number} is {str(row)[:40]!r}: give a list of strings or of lists of token ids"
            )
    return [[int(token) for token in row] for row in lists]


def _is_id(token: object) -> bool:
    return isinstance(token, int | np.integer) and not isinstance(token, bool)
