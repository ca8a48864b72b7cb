"""Pretokenized training corpora: Megatron's `.bin` with its `.idx`.

The format is that of Megatron-LM, GPT-NeoX and NeMo (`MMIDIDX`, version 1), all numbers little-endian. The
`.bin` file has the token ids and nothing else; the `.idx` file says where each sequence is in it:

| bytes | content |
|---|---|
| 9 | `MMIDIDX`, two zeros |
| 8 | version, 1 |
| 1 | type of a token id: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 |
| 8, 8 | number of sequences `n`; number of document bounds |
| 4 `n` | tokens of each sequence |
| 8 `n` | its first byte in the `.bin` file |
| the rest | document bounds, and modes in multimodal corpora; not used |
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from memlens.errors import FileFormatError, SourceNotFoundError
from memlens.sequences.readers.registry import register_file

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


class MappedRows(Sequence[list[int]]):
    """Rows of a mapped array of token ids; a row is read when it is asked for.

    Args:
        tokens: `[token]`.
        first: Index of each row's first token.
        lengths: Number of tokens of each row.
    """

    def __init__(self, tokens: np.ndarray, first: np.ndarray, lengths: np.ndarray) -> None:
        self.tokens = tokens
        self.first = first
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> MappedRows: ...
    def __getitem__(self, index: int | slice) -> list[int] | MappedRows:
        if isinstance(index, slice):
            return MappedRows(self.tokens, self.first[index], self.lengths[index])
        start = int(self.first[index])
        return self.tokens[start : start + int(self.lengths[index])].tolist()

    def read(self) -> np.ndarray | list[list[int]]:
        """Return all rows: an array if they have one length, else lists."""
        lengths = np.unique(self.lengths)
        if len(lengths) != 1:
            return list(self)
        return self.tokens[np.asarray(self.first)[:, None] + np.arange(lengths[0])]


@register_file(".bin")
def _read_megatron(path: Path, _: Sequence[str]) -> tuple[MappedRows, dict[str, Any]]:
    return open_megatron(path), {}


def open_megatron(path: Path) -> MappedRows:
    """Return the sequences of a Megatron corpus, mapped.

    Args:
        path: The `.bin` file; the `.idx` file stands beside it.

    Raises:
        SourceNotFoundError: There is no `.idx` file.
        FileFormatError: The files are not such a corpus, or do not belong together.
    """
    index = path.with_suffix(".idx")
    if not index.is_file():
        raise SourceNotFoundError(
            f"there is no file {index}: a Megatron corpus is {path.name} and {index.name}"
        )
    size = index.stat().st_size
    with index.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise FileFormatError(
            f"{index} does not begin with MMIDIDX: it is not the index of a Megatron corpus"
        )
    _, version, code, n, _ = _HEADER.unpack(header)
    if version != 1 or code not in _TYPES:
        raise FileFormatError(
            f"{index} has version {version} and token type {code}: memlens reads version 1 with integers"
        )
    if _HEADER.size + 12 * n > size:
        raise FileFormatError(f"{index} names {n} sequences, but its {size} bytes cannot hold their places")
    if not n or not path.stat().st_size:
        return MappedRows(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))
    lengths = np.memmap(index, "<i4", "r", _HEADER.size, (n,))
    pointers = np.memmap(index, "<i8", "r", _HEADER.size + 4 * n, (n,))
    width = np.dtype(_TYPES[code]).itemsize
    tokens = np.memmap(path, _TYPES[code], "r", shape=(path.stat().st_size // width,))
    wrong = (lengths < 0) | (pointers < 0) | (pointers % width != 0)
    wrong |= pointers // width + lengths > len(tokens)
    if wrong.any():
        row = int(wrong.argmax())
        raise FileFormatError(
            f"{index} puts sequence {row} at byte {pointers[row]} with {lengths[row]} tokens, but "
            f"{path.name} has {len(tokens)} tokens of {width} bytes: are both files of one corpus?"
        )
    return MappedRows(tokens, pointers // width, lengths)
