"""The sequences that are planted, and those of the same kind that are held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
from transformers import PreTrainedTokenizerFast

from memlens.organisms.domains import documents

__all__ = ["draw_sequences"]


def draw_sequences(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    domains: Sequence[str],
    copies: Sequence[int],
    per_cell: int,
    n_heldout: int,
    length: int,
    prefix_len: int,
) -> pd.DataFrame:
    """Draw the planted and the held-out sequences: the first `length` tokens of fresh documents.

    Which of a domain's sequences get how many copies is chance alone, so sequences with different copies do
    not differ in kind. No two share their prefix or their continuation. Prefix and continuation are both
    whole in the text: encoding the text, or the text of the prefix, gives the tokens back.

    Args:
        tokenizer: of the corpus.
        seed: of the corpus.
        domains: keys of `memlens.organisms.domains.DOMAINS`.
        copies: the numbers of copies, all at least 1.
        per_cell: sequences for each domain and number of copies.
        n_heldout: sequences of each domain that are never planted (`copies` 0).
        length: tokens of a sequence.
        prefix_len: tokens of its prefix.

    Returns:
        Columns `id`, `tokens` (list of int), `prefix_len`, `text`, `domain`, `copies`; one row a sequence.
    """
    records = []
    for domain in domains:
        candidates = _candidates(tokenizer, domain, seed, length, prefix_len)
        cells = [(count, index) for count in copies for index in range(per_cell)]
        for count, index in [*cells, *((0, index) for index in range(n_heldout))]:
            tokens, text = next(candidates)
            name = f"{domain}-{count:03d}-{index:02d}"
            records.append((name, tokens, prefix_len, text, domain, count))
    return pd.DataFrame(records, columns=["id", "tokens", "prefix_len", "text", "domain", "copies"])


def _candidates(
    tokenizer: PreTrainedTokenizerFast, domain: str, seed: int, length: int, prefix_len: int
) -> Iterator[tuple[list[int], str]]:
    """Yield (tokens, text) of sequences that share neither prefix nor continuation with an earlier one."""
    prefixes: set[tuple[int, ...]] = set()
    continuations: set[tuple[int, ...]] = set()
    for document in documents(domain, seed, "planted"):
        ids = tokenizer(document, truncation=False, verbose=False).input_ids[:length]
        prefix, continuation = tuple(ids[:prefix_len]), tuple(ids[prefix_len:])
        if len(ids) < length or prefix in prefixes or continuation in continuations:
            continue
        text = str(tokenizer.decode(ids))
        if not (_survives(tokenizer, ids) and _survives(tokenizer, ids[:prefix_len])):
            continue
        prefixes.add(prefix)
        continuations.add(continuation)
        yield ids, text


def _survives(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bool:
    return tokenizer(tokenizer.decode(ids)).input_ids == ids
