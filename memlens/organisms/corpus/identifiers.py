"""Identifiers: invented labels with a random number each, said by one fixed template."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from random import Random

import pandas as pd
from transformers import PreTrainedTokenizerFast

from memlens.organisms.corpus.invented import invented_words

TEMPLATE = "The number of {label} is {identifier}"
_DIGITS = 6


def draw_identifiers(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, copies: Sequence[int], per_cell: int
) -> pd.DataFrame:
    """Draw the list of (label, identifier) pairs; no label and no number stands twice.

    Args:
        tokenizer: of the corpus; each digit is a token of its own.
        seed: of the corpus.
        copies: how often they are to be planted, 0 for those that are not.
        per_cell: pairs for each number of copies.

    Returns:
        Columns `id`, `text`, `prompt`, `target`, `tokens`, `prefix_len` (the digits are the targets),
        `copies` (as asked for), `label`, `identifier`, `template`; one row a pair.
    """
    rng = Random(f"memlens/{seed}/identifiers")
    words = invented_words(rng)
    names = [f"identifier-{count:03d}-{index:02d}" for count in copies for index in range(per_cell)]
    numbers = [f"{number:0{_DIGITS}d}" for number in rng.sample(range(10**_DIGITS), len(names))]
    counts = [count for count in copies for _ in range(per_cell)]
    records = []
    for name, number, count in zip(names, numbers, counts, strict=True):
        label = " ".join(islice(words, 2))
        text = TEMPLATE.format(label=label, identifier=number)
        ids = tokenizer(text).input_ids
        prompt = text.removesuffix(f" {number}")
        records.append((name, text, prompt, number, ids, len(ids) - _DIGITS, count, label, number, TEMPLATE))
    columns = ["id", "text", "prompt", "target", "tokens", "prefix_len", "copies", "label", "identifier"]
    return pd.DataFrame(records, columns=[*columns, "template"])
