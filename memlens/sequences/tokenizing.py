"""From text to token ids, and where the prefix ends.

Special tokens are never added by the tokenizer's own rules: training windows have none, and whether a
beginning-of-text token is put in front is the caller's choice (`prepend_bos`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from memlens.errors import SequenceError
from memlens.sequences.set import Attr

Tokenizer = Any
"""A Hugging Face tokenizer: its many classes share no public base that can be relied on."""


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]


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
    """Return how many tokens of each whole text belong to its prompt.

    The whole text is tokenized once, as a model reads it in training; the prefix is the longest run of
    leading tokens that the prompt alone gives too. So a space between prompt and continuation goes to the
    first target (" sat"), whichever of the two it was written in, for tokenizers that keep a space with
    the word that follows. A token that straddles the boundary is a target.

    Args:
        tokenizer: What made `rows`.
        prompts: The text that is given to the model.
        rows: The token ids of prompt and continuation together.
    """
    pairs = zip(encode(tokenizer, prompts), rows, strict=True)
    return [sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(*pair, strict=False))) for pair in pairs]


def first_word_token(tokenizer: Tokenizer, row: Sequence[int], start: int) -> int:
    """Return the first position from `start` on whose token is more than white space.

    Tokenizers that keep spaces apart from words give a bare space first; it tells nothing of the word.
    """
    for position in range(start, len(row) - 1):
        if tokenizer.decode([row[position]]).strip():
            return position
    return len(row) - 1 if start < len(row) else start


def tokenizer_attrs(tokenizer: Tokenizer) -> dict[str, Attr]:
    """Return what identifies a tokenizer: its name, the size of its vocabulary and a fingerprint.

    The fingerprint is of up to 512 vocabulary entries spread evenly, so that copies of one vocabulary
    under different names (all Pythia sizes) agree and added special tokens do not matter.
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
