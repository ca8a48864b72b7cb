"""Checks of a set before any forward pass: does it fit a model? Every error names the row and the value."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from memlens.errors import EmptySetError, SequenceError, VocabularyError, check_option
from memlens.sequences.set import SequenceSet, some, span
from memlens.sequences.tokenizing import tokenizer_attrs

_PORTION = 65_536


@dataclass(frozen=True)
class SequenceReport:
    """What a check of a set found; none of it prevents the set from being used.

    Attributes:
        n_sequences: Number of sequences.
        n_tokens: Number of real tokens.
        lengths: Shortest and longest sequence, in tokens.
        prefix_lens: Shortest and longest prefix, in tokens.
        duplicates: Ids of sequences with the same tokens and prefix length as an earlier one.
        eos_rows: Ids of sequences with an end-of-text token inside the continuation.
        empty_rows: Empty rows of the source, left out when it was read.
        checked_vocabulary: Size of the vocabulary that the ids were checked against; 0 if there was none.
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
            parts.append(f"{len(self.eos_rows)} contain an end-of-text token: {some(self.eos_rows)}")
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
        model: A TransformerLens model: its `cfg` and `tokenizer` give the defaults of the next arguments.
        d_vocab: Size of the vocabulary (the rows of the embedding).
        n_ctx: The model's context length, in tokens.
        eos_token_id: The end-of-text token, or several. Greedy decoding in most studies never emits one,
            so a continuation that contains one can never match.
        on_eos: "raise" if a continuation contains one, or "keep" it and only report it.
        check_tokenizer: Refuse a set made with another tokenizer (if the set records one).

    Raises:
        EmptySetError: The set has no sequences.
        VocabularyError: An id is outside the vocabulary, or another tokenizer made the set.
        SequenceError: A sequence is longer than the context, or contains an end-of-text token.

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
    return SequenceReport(
        n_sequences=len(seqs),
        n_tokens=int(seqs.mask.sum()),
        lengths=(int(seqs.lengths.min()), int(seqs.lengths.max())),
        prefix_lens=(int(seqs.prefix_len.min()), int(seqs.prefix_len.max())),
        duplicates=_duplicates(seqs),
        eos_rows=_eos_rows(seqs, eos, on_eos),
        empty_rows=tuple(int(row) for row in str(seqs.attrs.get("empty_rows", "")).split()),
        checked_vocabulary=d_vocab or 0,
    )


def check_is_set(seqs: object) -> None:
    """Raise `SequenceError` for anything other than a set of sequences: texts, ids, a table."""
    if not isinstance(seqs, SequenceSet):
        raise SequenceError(
            f"a {type(seqs).__name__} is not a SequenceSet: read it with memlens.load_sequences first"
        )


def eos_mask(seqs: SequenceSet, eos_token_id: int | Collection[int] | None) -> Tensor:
    """Return `[seq]`: True where a target is an end-of-text token."""
    if eos_token_id is None or not len(seqs):
        return torch.zeros(len(seqs), dtype=torch.bool)
    ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    found = torch.zeros(len(seqs), dtype=torch.bool)
    for rows in _portions(len(seqs)):
        target = torch.arange(seqs.tokens.shape[1]) >= seqs.prefix_len[rows, None]
        found[rows] = (
            torch.isin(seqs.tokens[rows], torch.tensor(ids, dtype=torch.int64)) & target & seqs.mask[rows]
        ).any(-1)
    return found


def _portions(n: int) -> Iterator[slice]:
    """Yield portions of rows, so that what is computed for each token is small."""
    for start in range(0, n, _PORTION):
        yield slice(start, start + _PORTION)


def _eos_rows(seqs: SequenceSet, eos: int | Collection[int] | None, on_eos: str) -> tuple[str, ...]:
    rows = eos_mask(seqs, eos).nonzero()[:, 0].tolist()
    if rows and on_eos == "raise":
        raise SequenceError(
            f"{len(rows)} sequences have an end-of-text token ({eos}) inside the continuation, in rows "
            f"{some(rows)}: leave them out (on_eos='drop' when loading) or allow them (on_eos='keep')"
        )
    return tuple(seqs.table["id"].iloc[rows])


def _check_vocabulary(seqs: SequenceSet, d_vocab: int) -> None:
    if int(seqs.tokens.max()) >= d_vocab:
        outside = (seqs.tokens >= d_vocab).nonzero()
        row, position = outside[0].tolist()
        raise VocabularyError(
            f"row {row}, position {position} holds the token id {int(seqs.tokens[row, position])}, but the "
            f"model's vocabulary has {d_vocab} entries: were the sequences made with another tokenizer?"
        )


def _check_context(seqs: SequenceSet, n_ctx: int) -> None:
    fed = seqs.lengths if seqs.attrs.get("last_token_fed", True) else seqs.lengths - 1
    too_long = (fed > n_ctx).nonzero()
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


def _duplicates(seqs: SequenceSet) -> tuple[str, ...]:
    """Return the ids of repeated sequences: rows with the same hash are compared token by token."""
    lengths = torch.stack([seqs.lengths, seqs.prefix_len], 1)
    factors = np.random.default_rng(0).integers(0, 2**63, 2 + seqs.tokens.shape[1]) * 2 + 1
    hashes = np.empty(len(seqs), dtype=np.int64)
    for rows in _portions(len(seqs)):
        hashes[rows] = torch.cat([lengths[rows], seqs.tokens[rows]], 1).numpy() @ factors  # modulo 2**64
    like = np.flatnonzero(pd.Series(hashes).duplicated(keep=False))
    keys = [row.tobytes() for row in torch.cat([lengths[like], seqs.tokens[like]], 1).numpy()]
    return tuple(seqs.table["id"].iloc[like[pd.Series(keys, dtype=object).duplicated()]])
