"""Windows of a corpus in a seeded random order, a block at a time, without loading the corpus.

Arrays (memory-mapped ones too) and lists of rows are shuffled throughout: where a row comes is computed, not
stored. What can only be read from front to back (a generator, a streamed dataset) is shuffled within blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from memlens.errors import ColumnError, FileFormatError, SequenceError, SourceNotFoundError, VocabularyError
from memlens.sequences.readers.drafts import TOKENS, find_column, listing
from memlens.sequences.set import SequenceSet


@dataclass(frozen=True, eq=False)
class Block:
    """Some windows, in the order in which they are looked at.

    Attributes:
        tokens: Their ids.
        row: The row of the source that each is from.
        start: Where in its row it begins.
        n_rows: Rows that were read (of an array: windows).
        n_short: How many of them are shorter than a window.
        whole: False where a limit cut the block short.
    """

    tokens: Int[np.ndarray, "window pos"]
    row: Int[np.ndarray, "window"]
    start: Int[np.ndarray, "window"]
    n_rows: int
    n_short: int
    whole: bool = True

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def fingerprint(self) -> str:
        """A name of what the block holds and where it stands."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.tokens, self.row, self.start):
            digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
        return digest.hexdigest()


Read = Callable[[Int[np.ndarray, "row"]], Block]


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a source.

    Attributes:
        kind: What the source is: "array", "rows" or "stream".
        n_rows: How many rows (of an array: windows) there are; None where only reading to the end tells.
        table: The rows' facts where the source has some: that of a `SequenceSet`.
        read: From numbers of rows to their windows; of a stream None.
        stream: The rows, from the first; of anything else None.
        cut: From rows and their numbers to windows.
    """

    kind: str
    n_rows: int | None
    table: pd.DataFrame | None
    read: Read | None
    stream: Callable[[], Iterator[Any]] | None
    cut: Callable[[Iterable[Any], np.ndarray], Block]

    def blocks(self, seed: int, size: int, limit: int | None = None) -> Iterator[Block]:
        """Yield the windows of `size` rows at a time, of at most `limit` rows in all.

        Args:
            seed: Decides the order.
            size: Rows of a block.
            limit: Stop after this many rows.
        """
        if self.read is None:
            yield from self._streamed(seed, size, limit)
            return
        n = self.n_rows or 0
        for start in range(0, n if limit is None else min(n, limit), size):
            end = min(start + size, n)
            stop = end if limit is None else min(end, limit)
            block = self.read(shuffled(np.arange(start, stop), n, seed))
            yield _reordered(block, seed, start, stop == end)

    def _streamed(self, seed: int, size: int, limit: int | None) -> Iterator[Block]:
        assert self.stream is not None
        rows, start = self.stream(), 0
        while limit is None or start < limit:
            wanted = size if limit is None else min(size, limit - start)
            found = list(islice(rows, wanted))
            if not found:
                return
            block = self.cut(found, np.arange(start, start + len(found)))
            yield _reordered(block, seed, start, len(found) < wanted or wanted == size)
            start += len(found)


def open_windows(source: Any, length: int, stride: int | None, tokens_column: str | None) -> Windows:
    """Make windows of a source.

    Args:
        source: `[row, token]` or `[token]` integers, the path of a `.npy` file of them, a `SequenceSet`, a
            table or dataset with a column of ids, a list or an iterable of rows.
        length: Tokens of a window.
        stride: From one window to the next; None for the first window of each row alone (of one long text:
            windows one after the other).
        tokens_column: The column of ids of a table or dataset.

    Raises:
        SourceNotFoundError: There is no such file.
        FileFormatError: It is no `.npy` file of integers.
        ColumnError: There is no column of ids.
        SequenceError: What was given holds no token ids, or nothing as long as a window.
    """
    if isinstance(source, str | Path):
        source = _mapped(Path(source).expanduser())
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return _of_array(source, length, stride)
    table = source.table if isinstance(source, SequenceSet) else None
    if isinstance(source, SequenceSet):
        source = source.rows()
    elif isinstance(source, pd.DataFrame):
        source = source[_column(source.columns, tokens_column)].tolist()
    elif getattr(source, "column_names", None):
        tokens_column = _column(source.column_names, tokens_column)
    if isinstance(source, dict | str | bytes) or not isinstance(source, Iterable):
        raise SequenceError(
            f"a {type(source).__name__} is not a corpus: give an array of ids, a .npy file, a SequenceSet, a "
            "dataset, or an iterable of rows"
        )
    return _of_rows(source, length, stride, tokens_column, table)


def _of_rows(
    source: Any, length: int, stride: int | None, tokens_column: str | None, table: pd.DataFrame | None
) -> Windows:
    def cut(rows: Iterable[Any], numbers: np.ndarray) -> Block:
        pairs = zip(rows, numbers.tolist(), strict=True)
        return _cut([_ids(row, number, tokens_column) for row, number in pairs], numbers, length, stride)

    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        n_rows = len(source)
        return Windows(
            "rows", n_rows, table, lambda rows: cut((source[row] for row in rows.tolist()), rows), None, cut
        )
    return Windows("stream", None, None, None, lambda: iter(source), cut)


def shuffled(index: Int[np.ndarray, "index"], n: int, seed: int) -> Int[np.ndarray, "index"]:
    """Return where a seeded permutation of 0 to n - 1 sends each index, without making the permutation.

    A Feistel network over the next power of four, walked until it is back below n.

    >>> sorted(shuffled(np.arange(10), 10, seed=3).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    keys = np.random.default_rng(seed).integers(0, 2**63, 6, dtype=np.uint64)
    value = np.asarray(index).astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        value[outside] = _feistel(value[outside], half, keys)
        outside = value >= n
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for key in keys:
        mixed = (right + key) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(29))) & mask)
    return (left << half) | right


def _mapped(path: Path) -> np.ndarray:
    if path.suffix.lower() != ".npy":
        raise FileFormatError(
            f"{path} is no .npy file: read other forms with memlens.load_sequences and give its set"
        )
    if not path.is_file():
        raise SourceNotFoundError(f"there is no file {path}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FileFormatError(f"{path} is not a .npy file of numbers: {error}") from error
    return array


def _of_array(array: np.ndarray, length: int, stride: int | None) -> Windows:
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise SequenceError(
            f"the corpus is {array.dtype} of shape {array.shape}: give [row, token] or [token] integers"
        )
    step = length if stride is None else stride
    if array.ndim == 1:
        array = array[None]
    elif stride is None:
        array = array[:, :length]
    per_row = (array.shape[1] - length) // step + 1
    if per_row < 1:
        raise SequenceError(
            f"the corpus has rows of {array.shape[1]} tokens and a window has {length}: shorten prefix_len "
            "or suffix_len"
        )

    def read(numbers: np.ndarray) -> Block:
        row, start = numbers // per_row, numbers % per_row * step
        tokens = [array[r, s : s + length] for r, s in zip(row, start, strict=True)]
        return Block(np.stack(tokens).astype(np.int64), row, start, len(numbers), 0)

    def cut(rows: Iterable[Any], numbers: np.ndarray) -> Block:
        return read(numbers)

    return Windows("array", len(array) * per_row, None, read, None, cut)


def _column(columns: Iterable[Any], wanted: str | None) -> str:
    """Return the column of ids, among the names of columns."""
    frame = pd.DataFrame(columns=list(columns))
    found = find_column(frame, wanted, TOKENS)
    if found is None:
        raise ColumnError(
            f"the corpus has no column of token ids: {listing(frame)}; name it in tokens_column"
        )
    return found


def _ids(row: Any, number: int, tokens_column: str | None) -> np.ndarray:
    if isinstance(row, dict):
        row = row[_column(row, tokens_column)]
    ids = row.detach().cpu().numpy() if isinstance(row, Tensor) else np.asarray(row)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise SequenceError(
            f"row {number} of the corpus is {ids.dtype} of shape {ids.shape}: give one list of ids per row"
        )
    return ids.astype(np.int64)


def _cut(rows: Sequence[np.ndarray], numbers: np.ndarray, length: int, stride: int | None) -> Block:
    tokens, row, start = [], [], []
    for ids, number in zip(rows, numbers.tolist(), strict=True):
        last = len(ids) - length
        for place in range(0, max(last + 1, 0), stride or max(last + 1, 1)):
            tokens.append(ids[place : place + length])
            row.append(number)
            start.append(place)
    found = np.stack(tokens) if tokens else np.zeros((0, length), np.int64)
    short = sum(len(ids) < length for ids in rows)
    return Block(found, np.array(row, np.int64), np.array(start, np.int64), len(rows), short)


def _reordered(block: Block, seed: int, first: int, whole: bool) -> Block:
    """Shuffle within a block: windows of one row part, and streamed rows leave their order."""
    order = np.random.default_rng([seed, first]).permutation(len(block))
    negative = (block.tokens < 0).any(-1)
    if negative.any():
        row = int(block.row[negative.argmax()])
        raise VocabularyError(f"row {row} of the corpus holds a negative token id: ids are 0 or more")
    return replace(
        block, tokens=block.tokens[order], row=block.row[order], start=block.start[order], whole=whole
    )
