"""`SequenceSet`: token ids, the length of each sequence's prefix, and one row of facts per sequence.

A sequence is a *prefix* (given to the model) and a *continuation* (the target tokens: what the model may
have memorized). Ragged sets are padded on the right; padding is never read. Nothing here needs a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from memlens.errors import ColumnError, SequenceError, VocabularyError

if TYPE_CHECKING:
    from datasets import Dataset

Rows = int | slice | Sequence[int] | Sequence[bool] | np.ndarray | pd.Series | Tensor
"""What `SequenceSet.__getitem__` accepts."""

RESERVED_COLUMNS = ("tokens", "prefix_len")
"""Columns of a file that become attributes of the set, not columns of its table."""


def shortened_cells(table: pd.DataFrame, most: int = 60) -> pd.DataFrame:
    """Return a table to be shown, in which what is longer than `most` characters is cut there.

    >>> shortened_cells(pd.DataFrame({"text": ["a word", "words"], "n": [1, 2]}), 5)["text"].tolist()
    ['a wor…', 'words']
    """
    return table.map(lambda value: value if len(str(value)) <= most else f"{str(value)[:most]}…")


def pad(tokens: Tensor | np.ndarray | Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return `[seq, pos]` ids padded on the right with 0, and the mask of real tokens."""
    if isinstance(tokens, Tensor | np.ndarray):
        array = tokens if isinstance(tokens, Tensor) else _as_tensor(tokens)
        if array.ndim != 2:
            raise SequenceError(
                f"token ids have shape {tuple(array.shape)}: give a [sequence, position] array"
            )
        return array, torch.ones(array.shape, dtype=torch.bool, device=array.device)
    lengths = torch.tensor([len(row) for row in tokens], dtype=torch.int64)
    width = int(lengths.max()) if len(lengths) else 0
    total, cells = int(lengths.sum()), len(lengths) * width
    if cells > max(2**28, 100 * total):  # 2 GiB that are almost all padding
        raise SequenceError(
            f"row {int(lengths.argmax())} has {width} tokens and {len(lengths)} rows have {total}: padding "
            "all rows to that length would fill the memory; cut or leave out the long ones"
        )
    mask = torch.arange(width) < lengths[:, None]
    padded = torch.zeros(mask.shape, dtype=torch.int64)
    flat = np.array([token for row in tokens for token in row] or np.empty(0, np.int64))
    padded[mask] = torch.from_numpy(_signed(flat))
    return padded, mask


def _as_tensor(tokens: np.ndarray) -> Tensor:
    """Return integers as a tensor that may share their memory, or that of a mapped file."""
    plain = tokens.dtype.kind in "iu" and tokens.dtype.isnative and tokens.dtype != np.uint64
    shared = plain and tokens.flags.writeable and min(tokens.strides, default=0) >= 0
    return torch.from_numpy(tokens if shared else _signed(tokens))


def _signed(tokens: np.ndarray) -> np.ndarray:
    """Return integers as int64: torch has no arithmetic for uint16 and uint32."""
    if not np.issubdtype(tokens.dtype, np.integer):
        raise SequenceError(f"token ids are {tokens.dtype}: give integers")
    return tokens.astype(np.int64)


def check_shapes(tokens: Tensor, mask: Tensor, prefix_len: Tensor) -> None:
    """Raise `SequenceError` unless the three fit each other and contain integers."""
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
    """Raise for the first row with a gap in its mask, a negative id, or an empty prefix or continuation."""
    lengths = mask.sum(-1)
    if not mask.all():
        right_padded = torch.arange(mask.shape[1]) < lengths[:, None]
        for row in _first_rows((mask != right_padded).any(-1)):
            raise SequenceError(f"the mask of row {row} has a gap: sequences are padded on the right only")
    negative = int(tokens.min()) < 0 if tokens.numel() else False
    for row in _first_rows((tokens < 0).any(-1)) if negative else ():
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
            raise ColumnError(f"the table has the reserved column {name!r}: rename or drop it")
    table = table.reset_index(drop=True)
    if "id" not in table:
        table.insert(0, "id", [str(i) for i in range(n)])
    table["id"] = table["id"].astype(str)
    repeated = sorted(set(table["id"][table["id"].duplicated()]))
    if repeated:
        raise SequenceError(f"the ids {some(repeated)} belong to more than one sequence: make them unique")
    return table


def row_index(rows: Rows, n: int) -> Int[Tensor, "row"]:
    """Return the positions of the chosen rows, in the given order."""
    if isinstance(rows, slice):
        return torch.from_numpy(np.arange(n)[rows].copy())
    array = np.atleast_1d(rows.cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows))
    array = array if array.size else array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "biu":
        raise TypeError("choose sequences by an integer, a slice, a mask of booleans or integers")
    if array.dtype == bool and len(array) != n:
        raise IndexError(f"a mask of {len(array)} rows does not fit a set of {n} sequences")
    if array.dtype != bool and (outside := array[(array < -n) | (array >= n)]).size:
        raise IndexError(f"row {int(outside[0])} does not exist: the set has {n} sequences")
    return torch.from_numpy(np.arange(n)[array])


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
    """Return the ids as strings; repeated ones get the suffix "-2", "-3", ….

    >>> unique_ids(["a", "b", "a"])
    ['a', 'b', 'a-2']
    """
    names: dict[str, None] = {}
    known = set(map(str, ids))
    for name in map(str, ids):
        free, n = name, 1
        while free in names or (n > 1 and free in known):
            n += 1
            free = f"{name}-{n}"
        names[free] = None
    return list(names)


Attr = str | int | float | bool
"""A setting that is kept with a set, in JSON or parquet."""


@dataclass(frozen=True, eq=False)
class SequenceSet:
    """A set of sequences that a model may have memorized.

    The logits that predict the token at position ``p`` are at ``p - 1``; target positions are
    ``prefix_len .. length - 1``.

    Attributes:
        tokens: Token ids, int64 on the CPU, padded on the right with 0.
        mask: True for real tokens.
        prefix_len: Number of tokens given to the model, at least 1 and less than the length.
        table: One row per sequence; at least the column `id` (unique strings).
        attrs: Where the set comes from and how it was made.

    Raises:
        SequenceError: Shapes that do not fit, a mask that is not right-padded, an empty prefix or an empty
            continuation; names the row.
        VocabularyError: A negative token id; names row and position.
        ColumnError: The table has a reserved column (`tokens`, `prefix_len`).

    >>> seqs = SequenceSet.from_tokens([[5, 6, 7, 8], [5, 9, 2]], prefix_len=2)
    >>> seqs.target_ids
    tensor([[ 7,  8],
            [ 2, -1]])
    >>> seqs.target_positions
    tensor([[ 2,  3],
            [ 2, -1]])
    >>> seqs[1].lengths
    tensor([3])
    """

    tokens: Int[Tensor, "seq pos"]
    mask: Bool[Tensor, "seq pos"]
    prefix_len: Int[Tensor, "seq"]
    table: pd.DataFrame
    attrs: Mapping[str, Attr] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_shapes(self.tokens, self.mask, self.prefix_len)
        mask = self.mask.detach().to("cpu", torch.bool)
        tokens = self.tokens.detach().to("cpu", torch.int64)
        if tokens.data_ptr() == self.tokens.data_ptr():
            tokens = tokens.clone()  # the set's own: a caller's array, or a mapped file, may change later
        if not mask.all():
            tokens[~mask] = 0
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "prefix_len", self.prefix_len.detach().to("cpu", torch.int64))
        object.__setattr__(self, "table", checked_table(self.table, len(self)))
        object.__setattr__(self, "attrs", dict(self.attrs))
        check_rows(self.tokens, mask, self.prefix_len)

    @classmethod
    def from_tokens(
        cls,
        tokens: Tensor | np.ndarray | Sequence[Sequence[int]],
        prefix_len: int | Sequence[int] | np.ndarray | Tensor,
        *,
        table: pd.DataFrame | None = None,
        mask: Tensor | np.ndarray | None = None,
        attrs: Mapping[str, Attr] | None = None,
    ) -> SequenceSet:
        """Make a set from a 2-D array of ids, or from rows of different lengths.

        Args:
            tokens: `[seq, pos]` integers, or one list of ids per sequence.
            prefix_len: One number for all, or one per sequence.
            table: Facts about the sequences; the ids are "0", "1", … if it has no column `id`.
            mask: True for real tokens; by default all of an array, and each row's own length.
            attrs: Kept with the set.

        Raises:
            SequenceError: As the constructor does.
        """
        padded, own_mask = pad(tokens)
        prefix = torch.from_numpy(np.broadcast_to(np.array(prefix_len), len(padded)).copy())
        used = own_mask if mask is None else torch.as_tensor(mask)
        table = pd.DataFrame(index=range(len(padded))) if table is None else table
        return cls(padded, used, prefix, table, attrs or {})

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @cached_property
    def lengths(self) -> Int[Tensor, "seq"]:
        """Number of real tokens of each sequence, prefix and continuation."""
        return self.mask.sum(-1)

    @cached_property
    def n_targets(self) -> Int[Tensor, "seq"]:
        """Number of target tokens of each sequence."""
        return self.lengths - self.prefix_len

    @property
    def max_targets(self) -> int:
        """The longest continuation, in tokens; 0 for an empty set."""
        return int(self.n_targets.max()) if len(self) else 0

    @property
    def uniform(self) -> bool:
        """True if all sequences have the same length and the same prefix length."""
        return bool(self.mask.all()) and len(self.prefix_len.unique()) <= 1

    @cached_property
    def target_mask(self) -> Bool[Tensor, "seq target"]:
        """True where `target_ids` and `target_positions` have a target."""
        return torch.arange(self.max_targets) < self.n_targets[:, None]

    @cached_property
    def target_positions(self) -> Int[Tensor, "seq target"]:
        """Position of each target token, -1 outside. The logits that predict it are one position before."""
        positions = self.prefix_len[:, None] + torch.arange(self.max_targets)
        return torch.where(self.target_mask, positions, -1)

    @cached_property
    def target_ids(self) -> Int[Tensor, "seq target"]:
        """The target tokens, -1 outside."""
        ids = self.tokens.gather(1, self.target_positions.clamp_min(0))
        return torch.where(self.target_mask, ids, -1)

    @property
    def ids(self) -> list[str]:
        """The sequences' names: the table's column `id`."""
        return self.table["id"].tolist()

    @property
    def texts(self) -> list[str] | None:
        """The table's column `text`, or None."""
        return self.table["text"].tolist() if "text" in self.table else None

    def rows(self) -> list[list[int]]:
        """The real tokens of each sequence, without padding.

        >>> SequenceSet.from_tokens([[5, 6, 7], [5, 9]], 1).rows()
        [[5, 6, 7], [5, 9]]
        """
        pairs = zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)
        return [row[:length] for row, length in pairs]

    def halves(self) -> tuple[list[list[int]], list[list[int]]]:
        """The real tokens of each prefix, and of each continuation.

        >>> SequenceSet.from_tokens([[5, 6, 7], [5, 9]], 1).halves()
        ([[5], [5]], [[6, 7], [9]])
        """
        pairs = list(zip(self.rows(), self.prefix_len.tolist(), strict=True))
        return [row[:n] for row, n in pairs], [row[n:] for row, n in pairs]

    def __getitem__(self, rows: Rows) -> SequenceSet:
        """Return the chosen sequences, in the given order, without columns that are all padding."""
        index = row_index(rows, len(self))
        width = int(self.lengths[index].max()) if len(index) else 0
        return SequenceSet(
            self.tokens[index, :width],
            self.mask[index, :width],
            self.prefix_len[index],
            self.table.iloc[index.numpy()],
            self.attrs,
        )

    def concat(self, other: SequenceSet, *, id_suffix: str = "") -> SequenceSet:
        """Return this set followed by `other`; where attributes differ, this set's are kept.

        Args:
            other: The sequences to append.
            id_suffix: Appended to the ids of `other`, for sets with the same ids.

        Raises:
            SequenceError: Both sets have a sequence with the same id.
        """
        theirs = other.table.assign(id=other.table["id"] + id_suffix)
        shared = sorted(set(self.ids) & set(theirs["id"]))
        if shared:
            raise SequenceError(
                f"both sets have sequences with the ids {some(shared)}: pass id_suffix= for the second set"
            )
        return SequenceSet.from_tokens(
            self.rows() + other.rows(),
            torch.cat([self.prefix_len, other.prefix_len]),
            table=pd.concat([self.table, theirs], ignore_index=True),
            attrs={**other.attrs, **self.attrs},
        )

    def first_targets(self, n: int = 1) -> SequenceSet:
        """Return the same sequences with at most `n` target tokens each."""
        rows = [prefix + targets[:n] for prefix, targets in zip(*self.halves(), strict=True)]
        return SequenceSet.from_tokens(rows, self.prefix_len, table=self.table, attrs=self.attrs)

    def with_table(self, table: pd.DataFrame) -> SequenceSet:
        """Return the same sequences with another table."""
        return self._with("table", checked_table(table, len(self)))

    def with_attrs(self, **attrs: Attr) -> SequenceSet:
        """Return the same sequences with these attributes added or replaced."""
        return self._with("attrs", {**self.attrs, **attrs})._with("table", self.table.copy())

    def _with(self, name: str, value: object) -> SequenceSet:
        """Return a set that shares the tokens, which are checked and are not copied again."""
        other = copy(self)
        object.__setattr__(other, name, value)
        return other

    def to_parquet(self, path: str | Path) -> Path:
        """Write the set to one parquet file that `from_parquet` reads back without loss.

        The columns are those of the table, `tokens` (list of int64) and `prefix_len`; the attributes are in
        the file's metadata.
        """
        from memlens.sequences.parquet import write_parquet

        return write_parquet(self, path)

    @classmethod
    def from_parquet(cls, path: str | Path) -> SequenceSet:
        """Read what `to_parquet` wrote, or any parquet file with the columns `tokens` and `prefix_len`.

        Raises:
            FileFormatError: It is not a parquet file.
            ColumnError: A column is missing.
        """
        from memlens.sequences.parquet import read_parquet

        return read_parquet(path)[0]

    def to_dataset(self) -> Dataset:
        """Return a Hugging Face dataset with the columns that `to_parquet` writes.

        `memlens.load_sequences` reads it back, also from the hub (`"hf:NAME"`).

        >>> SequenceSet.from_tokens([[5, 6, 7], [8, 9, 3]], 1).to_dataset().column_names
        ['id', 'tokens', 'prefix_len']
        """
        from datasets import Dataset
        from datasets.table import InMemoryTable

        from memlens.sequences.parquet import as_arrow

        return Dataset(InMemoryTable(as_arrow(self)))

    def __repr__(self) -> str:
        facts = [f"prefix {span(self.prefix_len)}", f"continuation {span(self.n_targets)} tokens"]
        if source := self.attrs.get("source"):
            facts.append(f"from {source}")
        return f"SequenceSet({len(self)} sequences, {', '.join(facts)})"

    def _repr_html_(self) -> str:
        head = self.table.head(5).assign(
            prefix_len=self.prefix_len[:5].numpy(), n_targets=self.n_targets[:5].numpy()
        )
        more = f"<p>… and {len(self) - 5} more</p>" if len(self) > 5 else ""
        shown = shortened_cells(head)
        return f"<p><b>{escape(repr(self))}</b></p>{shown.to_html(escape=True, index=False)}{more}"
