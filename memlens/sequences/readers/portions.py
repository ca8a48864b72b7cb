"""Sources larger than memory, as sets of some sequences each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import EmptySetError, OptionError, SequenceError, SourceNotFoundError
from memlens.files import expanded
from memlens.sequences.parquet import read_frames, read_settings
from memlens.sequences.readers.drafts import ID, find_column
from memlens.sequences.readers.load import as_frame_or_rows, load_sequences
from memlens.sequences.readers.registry import Opened, Request, open_source
from memlens.sequences.readers.sources import json_lines, text_lines
from memlens.sequences.set import SequenceSet


def sequence_portions(
    source: Any, model: Any = None, size: int = 4096, **options: Any
) -> Iterator[SequenceSet]:
    """Yield the sequences of a source, so many rows at a time, as `load_sequences` reads them.

    `.npy`, Megatron corpora and Hugging Face datasets are mapped; `.parquet`, `.txt` and `.jsonl` are read
    as they are needed, as are iterables and streamed datasets; other sources are read whole first. Rows
    without an id are numbered over the whole source. The checks are those of `load_sequences`, portion by
    portion; a portion of which nothing is left (`on_short="drop"`) is passed over.

    Args:
        source: As of `load_sequences`.
        model: As of `load_sequences`.
        size: Rows of the source per portion.
        options: The other arguments of `load_sequences`; `limit` counts over the whole source, and lengths
            of prefixes are one number for all.

    Raises:
        OptionError: `size` is below 1, or `prefix_len` is a list or "drawn".
        SequenceError, FileFormatError, …: As `load_sequences` raises for the portion.

    Example:
        >>> sets = sequence_portions([[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5]], size=2, prefix_len=2)
        >>> [seqs.ids for seqs in sets]
        [['0', '1'], ['2']]
    """
    if size < 1:
        raise OptionError(f"size={size}: give at least one row per portion")
    if not isinstance(options.get("prefix_len", 0), int | np.integer | None):
        raise OptionError(
            f"prefix_len={options['prefix_len']!r}: in portions, give one number for all rows, or a column "
            "`prefix_len`"
        )
    limit, id_column = options.pop("limit", None), options.get("id_column")
    tokenizer = options.get("tokenizer")
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    known = {
        name: options[name] for name in ("split", "target", "path", "check_tokenizer") if name in options
    }
    opened = _opened(source, Request(model, tokenizer, limit=limit, **known), size)
    for name in ("path", "sha256"):
        options.pop(name, None)
    if opened.columns is not None:
        names = {
            f"{part}_column": getattr(opened.columns, part)
            for part in ("tokens", "text", "prompt", "continuation")
        }
        options = {**names, **{key: value for key, value in options.items() if value is not None}}
    origin, start = str(opened.attrs.get("source", opened.origin)), 0
    for content in _cut(opened.content, size, limit):
        rows = as_frame_or_rows(content, None)
        frame = (
            rows if isinstance(rows, pd.DataFrame) else pd.DataFrame({"tokens": [list(row) for row in rows]})
        )
        n = len(frame)
        if find_column(frame, id_column, ID) is None:
            frame = frame.assign(id=[str(number) for number in range(start, start + n)])
        try:
            seqs = load_sequences(frame, model, **options)
        except EmptySetError:
            seqs = None
        except SequenceError as error:
            if start:
                error.args = (f"in rows {start} to {start + n - 1} of {origin}: {error}",)
            raise
        start += n
        if seqs is not None and len(seqs):
            yield seqs.with_attrs(**{**opened.attrs, **seqs.attrs, "source": origin})


def _opened(source: Any, request: Request, size: int) -> Opened:
    """Open a source without reading files whole that can be read line by line, or by row groups."""
    suffix = Path(source).suffix.lower() if isinstance(source, str | Path) else ""
    if suffix not in (".txt", ".jsonl", ".parquet") or str(source).startswith("hf:"):
        return open_source(source, request)
    path = expanded(source)
    if not path.is_file():
        raise SourceNotFoundError(f"there is no file {path}")
    if suffix == ".parquet":
        return Opened(read_frames(path, size), path.name, read_settings(path).get("attrs", {}), str(source))
    lines = (line.rstrip("\r\n") for _, line in text_lines(path))
    return Opened(lines if suffix == ".txt" else (value for _, value in json_lines(path)), path.name)


def _cut(content: Any, size: int, limit: int | None) -> Iterator[Any]:
    """Yield the content in portions: by numbers of rows, or as the rows come."""
    if isinstance(content, str | bytes | Mapping) or not (
        isinstance(content, Iterable) or hasattr(content, "__getitem__")
    ):
        yield content  # whatever is wrong with it, load_sequences says
    elif isinstance(content, Iterator) or not hasattr(content, "__len__"):
        rows = iter(content)
        first = next(rows, None)
        if isinstance(first, pd.DataFrame):
            yield from _limited(chain([first], rows), limit)
            return
        rows = islice(chain([] if first is None else [first], rows), limit)
        while portion := list(islice(rows, size)):
            yield portion
    else:
        whole: Any = content
        n = len(whole) if limit is None else min(limit, len(whole))
        for start in range(0, n, size):
            yield _rows(content, start, min(start + size, n))


def _rows(content: Any, start: int, stop: int) -> Any:
    if isinstance(content, pd.DataFrame):
        return content.iloc[start:stop]
    return content.select(range(start, stop)) if hasattr(content, "select") else content[start:stop]


def _limited(frames: Iterable[pd.DataFrame], limit: int | None) -> Iterator[pd.DataFrame]:
    left = limit
    for frame in frames:
        if left == 0:
            return
        yield frame if left is None else frame.head(left)
        left = None if left is None else left - len(frame.head(left))
