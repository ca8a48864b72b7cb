"""From text to token ids, and where the prefix ends.

The tokenizer's own special tokens are never added: training windows have none, and whether a
beginning-of-text token comes first is the caller's choice (`prepend_bos`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import numpy as np
from jaxtyping import Int

from memlens.errors import SequenceError
from memlens.sequences.set import Attr

Tokenizer = Any
"""A Hugging Face tokenizer: its many classes share no public base that can be relied on."""


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]


_PORTION = 10_000


def decode(tokenizer: Tokenizer, rows: Sequence[Sequence[int]] | np.ndarray) -> list[str]:
    """Return the text of each row of token ids: what `batch_decode` returns, faster and in portions."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    texts: list[str] = []
    for start in range(0, len(rows), _PORTION):
        part = rows[start : start + _PORTION]
        lists = part.tolist() if isinstance(part, np.ndarray) else [list(row) for row in part]
        if start == 0 and backend is not None:  # some tokenizers decode in their own way
            few = lists[:32]
            own = tokenizer.clean_up_tokenization_spaces or tokenizer.batch_decode(few) != _decoded(
                backend, few
            )
            backend = None if own else backend
        texts += tokenizer.batch_decode(lists) if backend is None else _decoded(backend, lists)
    return texts


def _decoded(backend: Any, rows: list[list[int]]) -> list[str]:
    return backend.decode_batch(rows, skip_special_tokens=False)


def bos_id(tokenizer: Tokenizer) -> int:
    """Return the id of the beginning-of-text token.

    Raises:
        SequenceError: The tokenizer has none.
    """
    if tokenizer is None or tokenizer.bos_token_id is None:
        name = getattr(tokenizer, "name_or_path", None) or "given"
        raise SequenceError(f"prepend_bos=True, but the tokenizer ({name}) has no beginning-of-text token")
    return int(tokenizer.bos_token_id)


def split_points(tokenizer: Tokenizer, prompts: Sequence[str], rows: Sequence[Sequence[int]]) -> list[int]:
    """Return how many tokens of each text belong to its prompt.

    The text is tokenized as a whole, as in training; the prefix is the longest run of leading tokens that
    the prompt alone has too. A space between prompt and continuation therefore goes to the first target
    (" sat"), whichever of the two it was written in, if the tokenizer keeps a space with the word that
    follows. A token that straddles the boundary is a target.

    Args:
        tokenizer: The tokenizer that made `rows`.
        prompts: The text given to the model.
        rows: The token ids of prompt and continuation together.
    """
    pairs = zip(encode(tokenizer, prompts), rows, strict=True)
    return [sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(*pair, strict=False))) for pair in pairs]


def encode_answers(
    tokenizer: Tokenizer, prompts: Sequence[str], texts: Sequence[str]
) -> tuple[list[list[int]], Int[np.ndarray, "text"]]:
    """Return the tokens of each text, and the position at which the word after its prompt begins.

    That position is the text's split point, or the first position after it whose token is more than white
    space: tokenizers that keep spaces apart from words give a bare space first, which says nothing about
    the word.

    Args:
        tokenizer: The tokenizer.
        prompts: What each text begins with.
        texts: Prompt and answer together.

    Raises:
        SequenceError: There is no tokenizer.
    """
    rows = encode(need_tokenizer(tokenizer), texts)
    starts = split_points(tokenizer, prompts, rows)
    found = [_word_position(tokenizer, row, start) for row, start in zip(rows, starts, strict=True)]
    return rows, np.array(found, dtype=np.int64)


def _word_position(tokenizer: Tokenizer, row: Sequence[int], start: int) -> int:
    for position in range(start, len(row) - 1):
        if tokenizer.decode([row[position]]).strip():
            return position
    return len(row) - 1 if start < len(row) else start


def need_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer, or raise `SequenceError` if there is none."""
    if tokenizer is None:
        raise SequenceError("text needs a tokenizer: pass the model, or tokenizer=")
    return tokenizer


def tokenizer_attrs(tokenizer: Tokenizer) -> dict[str, Attr]:
    """Return what identifies a tokenizer: its name, the size of its vocabulary and a fingerprint.

    The fingerprint is computed from up to 512 evenly spaced vocabulary entries, so copies of one vocabulary
    under different names (all Pythia sizes) agree, and added special tokens do not matter.
    """
    size = int(tokenizer.vocab_size)
    ids = range(0, size, max(1, size // 512))
    entries = tokenizer.convert_ids_to_tokens(list(ids))
    digest = hashlib.sha256("\x00".join(map(str, [size, *entries])).encode("utf-8", "replace")).hexdigest()
    return {
        "tokenizer": str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__),
        "vocab_size": size,
        "vocabulary": digest[:16],
    }
