"""Checks on entry: whether a set fits a model, and is what it should be.

All of it happens before any forward pass; every error names the row and the value.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memlens.errors import EmptySetError, SequenceError, VocabularyError, check_option
from memlens.sequences.set import SequenceSet, some, span
from memlens.sequences.tokenizing import tokenizer_attrs


@dataclass(frozen=True)
class SequenceReport:
    """What a check of a set found; nothing in it keeps the set from being used.

    Attributes:
        n_sequences: Sequences in the set.
        n_tokens: Real tokens in the set.
        lengths: Shortest and longest sequence, in tokens.
        prefix_lens: Smallest and largest prefix, in tokens.
        duplicates: Ids of sequences whose tokens and prefix length an earlier one has too.
        eos_rows: Ids of sequences with an end-of-text token inside the continuation.
        empty_rows: Rows of the source that held nothing and were left out when it was read.
        checked_vocabulary: Size of the vocabulary the ids were checked against; 0 where there was none.
    """

    n_sequences: int
    n_tokens: int
    lengths: tuple[int, int]
    prefix_lens: tuple[int, int]
    duplicates: tuple[str, ...] = ()
    eos_rows: tuple[str, ...] = ()
    empty_rows: tuple[int, ...] = ()
    checked_vocabulary: int = 0

    def __str__(self) -> str:
        length, prefix = (span(torch.tensor(bounds)) for bounds in (self.lengths, self.prefix_lens))
        parts = [f"{self.n_sequences} sequences, {self.n_tokens} tokens (length {length}, prefix {prefix})"]
        if self.duplicates:
            parts.append(f"{len(self.duplicates)} repeat an earlier one: {some(self.duplicates)}")
        if self.eos_rows:
            parts.append(f"{len(self.eos_rows)} hold an end-of-text token: {some(self.eos_rows)}")
        if self.empty_rows:
            parts.append(f"{len(self.empty_rows)} empty rows were left out: {some(self.empty_rows)}")
        return "; ".join(parts)


def check_sequences(
    seqs: SequenceSet,
    model: Any = None,
    *,
    d_vocab: int | None = None,
    n_ctx: int | None = None,
    eos_token_id: int | Collection[int] | None = None,
    on_eos: str = "raise",
    check_tokenizer: bool = True,
) -> SequenceReport:
    """Check that a set fits a model, and report anything unusual about it.

    Args:
        seqs: The set.
        model: A TransformerLens model: what is not given below is taken from its `cfg` and `tokenizer`.
        d_vocab: Size of the vocabulary (the rows of the embedding).
        n_ctx: The longest sequence the model takes, in tokens.
        eos_token_id: The end-of-text token, or several. Greedy decoding in most studies never emits one,
            so a continuation that holds one can never match.
        on_eos: "raise" if a continuation holds one, or "keep" and only report it.
        check_tokenizer: Refuse a set that another tokenizer made (where the set records one).

    Raises:
        EmptySetError: The set has no sequences.
        VocabularyError: An id is outside the vocabulary, or another tokenizer made the set.
        SequenceError: A sequence is longer than the context, or holds an end-of-text token.

    >>> print(check_sequences(SequenceSet.from_tokens([[5, 6, 7], [5, 6, 7]], 2), d_vocab=10))
    2 sequences, 6 tokens (length 3, prefix 2); 1 repeat an earlier one: '1'
    """
    check_is_set(seqs)
    check_option("on_eos", on_eos, ["raise", "keep"])
    tokenizer = getattr(model, "tokenizer", None)
    cfg = getattr(model, "cfg", None)
    d_vocab = d_vocab if d_vocab is not None else getattr(cfg, "d_vocab", None)
    n_ctx = n_ctx if n_ctx is not None else getattr(cfg, "n_ctx", None)
    eos = eos_token_id if eos_token_id is not None else getattr(tokenizer, "eos_token_id", None)
    if not len(seqs):
        origin = seqs.attrs.get("source") or seqs.attrs.get("name") or "the set"
        raise EmptySetError(f"no sequences in {origin}: give at least one")
    if check_tokenizer and tokenizer is not None:
        _check_tokenizer(seqs, tokenizer)
    if d_vocab is not None:
        _check_vocabulary(seqs, d_vocab)
    if n_ctx is not None:
        _check_context(seqs, n_ctx)
    return _report(seqs, d_vocab or 0, _eos_rows(seqs, eos, on_eos))


def check_is_set(seqs: object) -> None:
    """Raise `SequenceError` if something other than a set of sequences is given: texts, ids, a table.

    >>> check_is_set(SequenceSet.from_tokens([[5, 6, 7]], 2))
    """
    if not isinstance(seqs, SequenceSet):
        raise SequenceError(
            f"a {type(seqs).__name__} is not a SequenceSet: read it with memlens.load_sequences first"
        )


def eos_mask(seqs: SequenceSet, eos_token_id: int | Collection[int] | None) -> Tensor:
    """Return `[seq]`: True where a target is an end-of-text token."""
    if eos_token_id is None or not len(seqs):
        return torch.zeros(len(seqs), dtype=torch.bool)
    ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    return torch.isin(seqs.target_ids, torch.tensor(ids, dtype=torch.int64)).any(-1)


def _eos_rows(seqs: SequenceSet, eos: int | Collection[int] | None, on_eos: str) -> tuple[str, ...]:
    rows = eos_mask(seqs, eos).nonzero()[:, 0].tolist()
    if rows and on_eos == "raise":
        raise SequenceError(
            f"{len(rows)} sequences have an end-of-text token ({eos}) inside the continuation, in rows "
            f"{some(rows)}: leave them out (on_eos='drop' when loading) or allow them (on_eos='keep')"
        )
    ids = seqs.ids
    return tuple(ids[row] for row in rows)


def _check_vocabulary(seqs: SequenceSet, d_vocab: int) -> None:
    outside = (seqs.tokens >= d_vocab).nonzero()
    if len(outside):
        row, position = outside[0].tolist()
        raise VocabularyError(
            f"row {row}, position {position} holds the token id {int(seqs.tokens[row, position])}, but the "
            f"model's vocabulary has {d_vocab} entries: were the sequences made with another tokenizer?"
        )


def _check_context(seqs: SequenceSet, n_ctx: int) -> None:
    too_long = (seqs.lengths > n_ctx).nonzero()
    if len(too_long):
        row = int(too_long[0])
        raise SequenceError(
            f"row {row} has {int(seqs.lengths[row])} tokens, but the model's context holds {n_ctx}: "
            "shorten it (max_targets= when loading keeps the first tokens of each continuation)"
        )


def _check_tokenizer(seqs: SequenceSet, tokenizer: Any) -> None:
    if not ({"vocabulary", "vocab_size"} & set(seqs.attrs)):
        return
    theirs, ours = seqs.attrs, tokenizer_attrs(tokenizer)
    words = (
        f"the sequences were made with the tokenizer {theirs.get('tokenizer', '?')} "
        f"({theirs.get('vocab_size', '?')} entries), the model has {ours['tokenizer']} ({ours['vocab_size']} "
        "entries)"
    )
    if "vocabulary" in theirs and theirs["vocabulary"] != ours["vocabulary"]:
        raise VocabularyError(f"{words}: load the text again with this model")
    if theirs.get("vocab_size", ours["vocab_size"]) != ours["vocab_size"]:
        warnings.warn(f"{words}: make sure that the ids mean the same", stacklevel=4)


def _report(seqs: SequenceSet, d_vocab: int, eos_rows: tuple[str, ...]) -> SequenceReport:
    return SequenceReport(
        n_sequences=len(seqs),
        n_tokens=int(seqs.mask.sum()),
        lengths=(int(seqs.lengths.min()), int(seqs.lengths.max())),
        prefix_lens=(int(seqs.prefix_len.min()), int(seqs.prefix_len.max())),
        duplicates=_duplicates(seqs),
        eos_rows=eos_rows,
        empty_rows=tuple(int(row) for row in str(seqs.attrs.get("empty_rows", "")).split()),
        checked_vocabulary=d_vocab,
    )


def _duplicates(seqs: SequenceSet) -> tuple[str, ...]:
    seen: set[tuple[int, bytes]] = set()
    repeated = []
    lengths, prefix_lens = seqs.lengths.tolist(), seqs.prefix_len.tolist()
    for row, name in enumerate(seqs.ids):
        key = (prefix_lens[row], seqs.tokens[row, : lengths[row]].numpy().tobytes())
        if key in seen:
            repeated.append(name)
        seen.add(key)
    return tuple(repeated)
