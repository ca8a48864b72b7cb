"""From rows as read to a `SequenceSet`: columns, prefix lengths, rows left out, ids, `prepend_bos`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from memlens.errors import ColumnError, EmptySetError, SequenceError, VocabularyError, near_matches
from memlens.sequences.checks import eos_mask
from memlens.sequences.set import Attr, SequenceSet, some, unique_ids
from memlens.sequences.tokenizing import bos_id, decode, tokenizer_attrs

TOKENS = ("tokens", "input_ids", "token_ids")
PROMPT = ("prompt", "prefix", "context")
CONTINUATION = ("continuation", "suffix", "target", "completion")
TEXT = ("text", "sequence", "content", "sentence")
ID = ("id", "uid", "sequence_id", "index")


@dataclass(frozen=True)
class Columns:
    """The column names that a caller gave; None: look for the usual names."""

    tokens: str | None = None
    prompt: str | None = None
    continuation: str | None = None
    text: str | None = None
    id: str | None = None


def find_column(frame: pd.DataFrame, given: str | None, usual: Sequence[str]) -> str | None:
    """Return the given column, or the first usual one that exists, or None.

    Raises:
        ColumnError: The given column does not exist.
    """
    if given is None:
        return next((name for name in usual if name in frame), None)
    if given not in frame:
        hint = near_matches(given, map(str, frame.columns))
        raise ColumnError(f"there is no column {given!r}: {listing(frame)}.{hint}")
    return given


def listing(frame: pd.DataFrame) -> str:
    """Return the names of a table's columns, for an error message."""
    if not len(frame.columns):
        return "there are no columns, so it may be empty"
    return f"the columns are {', '.join(map(str, frame.columns))}"


LONGEST_TEXT = 2**24
"""Characters of one sequence: no model's context holds as much text."""

DEFAULT_PREFIX_LEN = 32
"""Tokens given to the model by default: published lists have 32 + 32."""

_ROW = "__source_row__"


@dataclass(frozen=True)
class Draft:
    """Sequences as read, before any check.

    Attributes:
        rows: Token ids, one list per row, or a 2-D array.
        prefix_len: Tokens given to the model, one number per row; None if the source does not say.
        table: The other columns, and `text` if there is one.
        attrs: What is known about the set.
        from_text: Whether memlens encoded the rows, without special tokens.
    """

    rows: list[list[int]] | np.ndarray
    prefix_len: np.ndarray | None
    table: pd.DataFrame
    attrs: dict[str, Attr] = field(default_factory=dict)
    from_text: bool = False


def with_prefix(draft: Draft, prefix_len: Any, seed: int = 0) -> Draft:
    """Set each row's prefix length: the caller's, else the source's, else `DEFAULT_PREFIX_LEN`.

    "drawn" draws one for each row, from 1 to its length minus 1. "half" is the source's, or else half of each
    row, at most `DEFAULT_PREFIX_LEN`.
    """
    n = len(draft.rows)
    if isinstance(prefix_len, str) and prefix_len == "half":
        half = np.clip(_lengths(draft) // 2, 1, DEFAULT_PREFIX_LEN)
        return replace(draft, prefix_len=half if draft.prefix_len is None else draft.prefix_len)
    if isinstance(prefix_len, str) and prefix_len == "drawn":
        drawn = np.random.default_rng(seed).integers(1, np.maximum(_lengths(draft), 2))
        return replace(draft, prefix_len=drawn, attrs={**draft.attrs, "prefix_len": "drawn", "seed": seed})
    own = DEFAULT_PREFIX_LEN if draft.prefix_len is None else draft.prefix_len
    given = np.asarray(own if prefix_len is None else prefix_len)
    if given.dtype.kind not in "iu" or (given.ndim and given.shape != (n,)):
        raise SequenceError(
            f"prefix_len={prefix_len!r} does not fit: give one whole number, one for each of {n} "
            'sequences, "half", or "drawn"'
        )
    return replace(draft, prefix_len=np.broadcast_to(given.astype(np.int64), (n,)))


def check_ids(draft: Draft, d_vocab: int | None, tokenizer: Any) -> None:
    """Refuse ids outside the vocabulary, and warn of rows that seem to contain padding.

    Args:
        draft: Sequences as read.
        d_vocab: Size of the model's vocabulary, if known.
        tokenizer: Its padding token is looked for, if it has one of its own.

    Raises:
        VocabularyError: An id is negative or outside the vocabulary; names row and position.
    """
    most = d_vocab or 2**31
    rows = draft.rows
    fits = isinstance(rows, np.ndarray) and rows.size and rows.min() >= 0 and rows.max() < most
    for number, row in enumerate(() if fits else rows):
        place = next((place for place, token in enumerate(row) if not 0 <= token < most), None)
        if place is None:
            continue
        said = f"row {number}, position {place} holds the token id {int(row[place])}, but"
        if row[place] < 0:
            raise VocabularyError(
                f"{said} ids are 0 or more: leave padding out, or mark it in a column attention_mask"
            )
        known = f"the model's vocabulary has {most} entries" if d_vocab else "no vocabulary is that large"
        raise VocabularyError(f"{said} {known}: were the sequences made with another tokenizer?")
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or pad in {getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "bos", "unk")}:
        return
    if isinstance(rows, np.ndarray):
        padded = np.flatnonzero((rows[:, [0, -1]] == pad).any(1)).tolist() if rows.size else []
    else:
        padded = [n for n, row in enumerate(rows) if len(row) and pad in (row[0], row[-1])]
    if padded:
        warnings.warn(
            f"{len(padded)} rows begin or end with the padding token ({pad}), which is read as text: rows "
            f"{some(padded)}; leave padding out, or mark it in a column attention_mask",
            stacklevel=3,
        )


def without_empty(draft: Draft) -> Draft:
    """Leave out empty rows, with a warning and the attribute `empty_rows`."""
    lengths = _lengths(draft)
    draft = replace(draft, table=draft.table.assign(**{_ROW: np.arange(len(lengths))}))
    empty = np.flatnonzero(lengths == 0)
    if not len(empty):
        return draft
    warnings.warn(f"{len(empty)} rows are empty and are left out: rows {some(empty.tolist())}", stacklevel=4)
    draft = replace(draft, attrs={**draft.attrs, "empty_rows": " ".join(map(str, empty))})
    return _kept(draft, lengths > 0)


def without_short(draft: Draft, on_short: str) -> Draft:
    """Leave out sequences that are not longer than their prefix ("drop"), or raise for the first."""
    lengths, prefix_len = _lengths(draft), _prefix_lens(draft)
    source_rows = draft.table[_ROW].to_numpy()
    draft = replace(draft, table=draft.table.drop(columns=[_ROW]))
    short = lengths <= prefix_len
    if not short.any():
        return draft
    if on_short == "raise":
        first, several = int(np.flatnonzero(short)[0]), int(short.sum()) > 1
        raise SequenceError(
            f"{int(short.sum())} {'sequences are' if several else 'sequence is'} not longer than "
            f"{'their' if several else 'its'} prefix, {'the first' if several else 'it'} is row "
            f"{source_rows[first]} with {lengths[first]} tokens and prefix_len={prefix_len[first]}: choose a "
            "smaller prefix_len, or leave them out with on_short='drop'"
        )
    draft = replace(draft, attrs={**draft.attrs, "n_dropped_short": int(short.sum())})
    return _kept(draft, ~short)


def named(draft: Draft, id_column: str | None) -> Draft:
    """Give each row a unique id: the file's, with a suffix where several rows share one."""
    column = find_column(draft.table, id_column, ID)
    if column is None:
        return draft
    names = [str(name) for name in draft.table[column]]
    ids = unique_ids(names)
    if ids != names:
        repeated = [name for name, count in Counter(names).items() if count > 1]
        warnings.warn(
            f"{len(names)} rows have {len(set(names))} ids: {some(repeated)} belong to more than one "
            "sequence and get a suffix",
            stacklevel=4,
        )
    table = draft.table.drop(columns=["id"], errors="ignore")
    table.insert(0, "id", ids)
    return replace(draft, table=table)


PrependBos = bool | Literal["auto"]
"""Whether sequences get a beginning-of-text token; "auto": see `memlens.load_sequences`."""


def assemble(
    draft: Draft, tokenizer: Any, max_targets: int | None, prepend_bos: PrependBos, expected: bool
) -> SequenceSet:
    """Make the set: cut long continuations, decode missing texts, prepend the beginning-of-text token.

    `expected` says whether the model's texts begin with that token; what disagrees with it is warned of.
    """
    rows, prefix_len, attrs = draft.rows, _prefix_lens(draft), dict(draft.attrs)
    table, cut = draft.table, False
    if max_targets is not None:
        if max_targets < 1:
            raise SequenceError(f"max_targets={max_targets}: keep at least one token of each continuation")
        ends = prefix_len + max_targets
        cut = bool((_lengths(draft) > ends).any())
        if cut:
            rows = [list(row[:end]) for row, end in zip(rows, ends.tolist(), strict=True)]
        attrs["max_targets"] = max_targets
    if tokenizer is not None:
        attrs = {**tokenizer_attrs(tokenizer), **attrs}
        if len(rows) and ("text" not in table or cut):
            table = table.assign(text=decode(tokenizer, rows))
    prepended = bool(attrs.get("prepend_bos"))
    given = expected and draft.from_text if prepend_bos == "auto" else prepend_bos
    if given and not prepended:
        first = bos_id(tokenizer)
        has_one = np.array([len(row) > 0 and row[0] == first for row in rows], dtype=bool)
        if first == getattr(tokenizer, "unk_token_id", None) and "text" in table:  # may be an unknown word
            has_one &= (
                table["text"].astype(str).str.startswith(str(getattr(tokenizer, "bos_token", ""))).to_numpy()
            )
        if has_one.any():
            warnings.warn(
                f"{has_one.sum()} of {len(rows)} sequences begin with the beginning-of-text token ({first}) "
                "already: they get no second one",
                stacklevel=4,
            )
        rows = [[*row] if has else [first, *row] for row, has in zip(rows, has_one, strict=True)]
        prefix_len = prefix_len + ~has_one
    attrs["prepend_bos"] = bool(given or prepended)
    if prepend_bos is True and not expected:
        warnings.warn(
            "prepend_bos=True puts a beginning-of-text token in front, but the texts of this model's family, "
            'or of this tokenizer, begin without one; prepend_bos="auto" follows them',
            stacklevel=4,
        )
    elif expected and (bare := [n for n, row in enumerate(rows) if row[0] != bos_id(tokenizer)]):
        hint = "token ids are used as they are: " if prepend_bos == "auto" else ""
        warnings.warn(
            f"{len(bare)} of {len(rows)} sequences do not begin with the beginning-of-text token "
            f"({bos_id(tokenizer)}), but this model's texts do: rows {some(bare)}; "
            f"{hint}prepend_bos=True puts it in front",
            stacklevel=4,
        )
    return SequenceSet.from_tokens(rows, prefix_len, table=table, attrs=attrs)


def drop_eos(seqs: SequenceSet, tokenizer: Any) -> SequenceSet:
    """Leave out sequences with an end-of-text token among their targets; `n_dropped_eos` counts them."""
    dropped = eos_mask(seqs, getattr(tokenizer, "eos_token_id", None))
    return seqs[~dropped].with_attrs(n_dropped_eos=int(dropped.sum()))


def _lengths(draft: Draft) -> np.ndarray:
    if isinstance(draft.rows, np.ndarray):
        return np.full(len(draft.rows), draft.rows.shape[1], dtype=np.int64)
    return np.array([len(row) for row in draft.rows], dtype=np.int64)


def _prefix_lens(draft: Draft) -> np.ndarray:
    n = len(draft.rows)
    return np.broadcast_to(DEFAULT_PREFIX_LEN if draft.prefix_len is None else draft.prefix_len, (n,))


def _kept(draft: Draft, keep: np.ndarray) -> Draft:
    rows = draft.rows
    rows = rows[keep] if isinstance(rows, np.ndarray) else [rows[i] for i in np.flatnonzero(keep)]
    table = draft.table.iloc[np.flatnonzero(keep)].reset_index(drop=True)
    return replace(draft, rows=rows, prefix_len=_prefix_lens(draft)[keep], table=table)


def leave_out(
    table: pd.DataFrame, reasons: Mapping[str, Sequence[bool] | np.ndarray], what: str
) -> tuple[pd.DataFrame, dict[str, Attr]]:
    """Return the rows to which no reason applies, and what was left out.

    A row counts under the first reason that applies. The attributes are `n_left_out`, the number of rows, and
    `left_out`, such as "2 with several objects; 1 repeated".

    Args:
        table: One row per item.
        reasons: For each reason, True where it applies.
        what: What a row is, in the plural, for the messages.

    Raises:
        EmptySetError: Nothing is left.
    """
    gone = np.zeros(len(table), dtype=bool)
    counts: list[str] = []
    for reason, mask in reasons.items():
        new = np.asarray(mask, dtype=bool) & ~gone
        gone |= new
        counts += [f"{new.sum()} {reason}"] if new.any() else []
    said = "; ".join(counts)
    if counts and gone.all():
        raise EmptySetError(f"none of {len(table)} {what} can be used: {said}")
    if counts:
        warnings.warn(f"{gone.sum()} of {len(table)} {what} are left out: {said}", stacklevel=6)
    return table.loc[~gone].reset_index(drop=True), {"n_left_out": int(gone.sum()), "left_out": said}
