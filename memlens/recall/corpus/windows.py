"""Windows of a corpus in a seeded random order, one block at a time, without loading the corpus.

Arrays (also memory-mapped) and lists of rows are shuffled as a whole: a row's place in the order is computed,
not stored. Sources that can only be read from front to back (a generator, a streamed dataset) are shuffled
within blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from torch import Tensor

from memlens.errors import ColumnError, FileFormatError, SequenceError, SourceNotFoundError, VocabularyError
from memlens.files import expanded, parsing
from memlens.sequences.readers.drafts import TOKENS, find_column, listing
from memlens.sequences.readers.memmaps import MappedRows, open_megatron
from memlens.sequences.readers.sources import load_array
from memlens.sequences.set import SequenceSet


@dataclass(frozen=True, eq=False)
class Block:
    """Some windows, in the order in which they are scanned.

    Attributes:
        tokens: Their ids.
        row: The row of the source that each comes from.
        start: Where in its row each begins.
        n_rows: Number of rows read (of an array: windows).
        n_short: Number of rows shorter than a window.
        whole: False if a limit cut the block short.
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
        """A digest of the block's windows and their places."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.tokens, self.row, self.start):
            digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a source.

    Attributes:
        kind: What the source is: "array", "rows" or "stream".
        n_rows: Number of rows (of an array: windows); None for a stream.
        table: The rows' facts if the source has some: those of a `SequenceSet`.
        read: From numbers of rows to their windows; a stream gives its next rows, as many or fewer.
    """

    kind: str
    n_rows: int | None
    table: pd.DataFrame | None
    read: Callable[[Int[np.ndarray, "row"]], Block]

    def blocks(self, seed: int, size: int, limit: int | None = None) -> Iterator[Block]:
        """Yield the windows of `size` rows at a time, of at most `limit` rows in all.

        Args:
            seed: Seed of the order.
            size: Rows per block.
            limit: Stop after this many rows.
        """
        for number in count():
            block = self.block(number, seed, size, limit)
            if block is None:
                return
            yield block

    def block(self, number: int, seed: int, size: int, limit: int | None = None) -> Block | None:
        """Return one of these blocks, of a stream the next one; None beyond the last."""
        start = number * size
        end = start + size if self.n_rows is None else min(start + size, self.n_rows)
        stop = end if limit is None else min(end, limit)
        numbers = np.arange(start, stop)
        if self.n_rows is not None:
            numbers = shuffled(numbers, self.n_rows, seed)
        block = self.read(numbers) if len(numbers) else None
        if block is None or not block.n_rows:
            return None
        return _reordered(block, seed, start, stop == end or block.n_rows < len(numbers))

    def n_blocks(self, size: int, limit: int | None = None) -> int | None:
        """Return the number of these blocks; None for a stream."""
        known = [n for n in (self.n_rows, limit) if n is not None]
        return None if self.n_rows is None else -(-min(known) // size)


def open_windows(source: Any, length: int, stride: int | None, tokens_column: str | None) -> Windows:
    """Return the windows of a source.

    Args:
        source: `[row, token]` or `[token]` integers, the path of a `.npy` file of them or of a Megatron
            corpus (`.bin`), a `SequenceSet`, a table or dataset with a column of ids, a list or an iterable
            of rows.
        length: Tokens per window.
        stride: Tokens from one window to the next; None for only the first window of each row (of one long
            text: windows one after the other).
        tokens_column: The column of ids of a table or dataset.

    Raises:
        SourceNotFoundError: There is no such file.
        FileFormatError: It is neither a `.npy` file of integers nor a Megatron corpus.
        ColumnError: There is no column of ids.
        SequenceError: The source does not consist of token ids, or has nothing as long as a window.
    """
    if isinstance(source, str | Path):
        path = expanded(source)
        with parsing(path):
            mapped = _mapped(path)
            if isinstance(mapped, MappedRows):
                return _of_rows(mapped, length, stride, None, None)
            return _of_array(mapped, length, stride)
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return _of_array(source, length, stride)
    table = source.table if isinstance(source, SequenceSet) else None
    if isinstance(source, SequenceSet):
        if len(source) and (longest := source.tokens.shape[1]) < length:
            raise _too_short(longest, length)
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
    def cut(rows: list[Any], numbers: np.ndarray) -> Block:
        pairs = zip(rows, numbers.tolist(), strict=False)  # a stream may end early
        return _cut([_ids(row, number, tokens_column) for row, number in pairs], numbers, length, stride)

    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return Windows(
            "rows",
            len(source),
            table,
            lambda numbers: cut([source[row] for row in numbers.tolist()], numbers),
        )
    rows = iter(source)
    return Windows("stream", None, None, lambda numbers: cut(list(islice(rows, len(numbers))), numbers))


def shuffled(index: Int[np.ndarray, "index"], n: int, seed: int) -> Int[np.ndarray, "index"]:
    """Return where a seeded permutation of 0 to n - 1 maps each index, without making the permutation.

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


def _mapped(path: Path) -> np.ndarray | MappedRows:
    if path.suffix.lower() == ".bin" and path.is_file():
        return open_megatron(path)
    if path.suffix.lower() != ".npy":
        raise FileFormatError(
            f"{path} is not a .npy or .bin file: read other formats with memlens.load_sequences and give its "
            "set"
        )
    if not path.is_file():
        raise SourceNotFoundError(f"there is no file {path}")
    return load_array(path, mmap_mode="r")


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
        raise _too_short(array.shape[1], length)

    def read(numbers: np.ndarray) -> Block:
        row, start = numbers // per_row, numbers % per_row * step
        tokens = [array[r, s : s + length] for r, s in zip(row, start, strict=True)]
        return Block(np.stack(tokens).astype(np.int64), row, start, len(numbers), 0)

    return Windows("array", len(array) * per_row, None, read)


def _too_short(longest: int, length: int) -> SequenceError:
    """Return the error for a corpus in which nothing is as long as a window, with lengths that would fit."""
    fits = f": give prefix_len={longest // 2} and suffix_len={longest - longest // 2}" if longest > 1 else ""
    return SequenceError(
        f"the longest row of the corpus has {longest} tokens, and {length} are needed{fits}."
    )


def _column(columns: Iterable[Any], wanted: str | None) -> str:
    """Return the name of the column of ids."""
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
    for ids, number in zip(rows, numbers.tolist(), strict=False):
        last = len(ids) - length
        for place in range(0, max(last + 1, 0), stride or max(last + 1, 1)):
            tokens.append(ids[place : place + length])
            row.append(number)
            start.append(place)
    found = np.stack(tokens) if tokens else np.zeros((0, length), np.int64)
    short = sum(len(ids) < length for ids in rows)
    return Block(found, np.array(row, np.int64), np.array(start, np.int64), len(rows), short)


def _reordered(block: Block, seed: int, first: int, whole: bool) -> Block:
    """Shuffle within a block, which separates windows of one row and reorders streamed rows."""
    order = np.random.default_rng([seed, first]).permutation(len(block))
    negative = (block.tokens < 0).any(-1)
    if negative.any():
        row = int(block.row[negative.argmax()])
        raise VocabularyError(f"row {row} of the corpus has a negative token id: ids are 0 or more")
    return replace(
        block, tokens=block.tokens[order], row=block.row[order], start=block.start[order], whole=whole
    )
