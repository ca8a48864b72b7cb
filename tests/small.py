"""Small sets of sequences for the tiny models of `tests.tiny`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

import memlens as ml
from memlens.sequences.set import SequenceSet
from tests.tiny import D_VOCAB, FAMILIES, HOOKED_FAMILIES

Variant = TypeVar("Variant")

CASES = [*((family, "hooked") for family in HOOKED_FAMILIES), *((family, "bridge") for family in FAMILIES)]
"""Every family with every backend it has; the fixture skips what the installed release does not have."""


def spread(variants: Sequence[Variant], each: int = 1) -> list[tuple[str, str, Variant]]:
    """Every case with `each` of the variants in turn, so that several cases meet every variant.

    For variants that do not depend on the family: one that does is tested on all `CASES`. A family's two
    backends meet different variants.
    """
    turns = itertools.cycle(variants)
    found = [(*case, next(turns)) for case in CASES if case[1] == "hooked" for _ in range(each)]
    next(turns)
    return found + [(*case, next(turns)) for case in CASES if case[1] == "bridge" for _ in range(each)]


def ragged(n: int = 4, seed: int = 0) -> SequenceSet:
    """Random sequences of several lengths and prefix lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [20, 17, 12, 20, 9, 15][:n]
    prefixes = [8, 10, 6, 4, 5, 8][:n]
    rows = [torch.randint(0, D_VOCAB - 1, (k,), generator=generator).tolist() for k in lengths]
    return SequenceSet.from_tokens(rows, prefixes)


def corrupted(seqs: SequenceSet, seed: int = 1) -> SequenceSet:
    """The same targets after other random prefixes."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [*torch.randint(0, D_VOCAB - 1, (p,), generator=generator).tolist(), *row[p:]]
        for row, p in zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)
    ]
    return SequenceSet.from_tokens(rows, seqs.prefix_len)


COUNTED = ("target_rank", "exact_match", "matching_prefix", "target_accuracy")
"""Metrics that step where two logits change places, as rounding may make all but equal ones do."""


def largest_difference(a: ml.Result, b: ml.Result) -> float:
    """The largest difference of two results, over all variables that do not count tokens."""
    names = [n for n in a.data.data_vars if str(n).removesuffix("_baseline") not in COUNTED]
    return max(float(np.nanmax(np.abs(a.data[n].values - b.data[n].values))) for n in names)


def near_ties(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A metric: how many other tokens' logits stand within 2e-5 of their target's."""
    chosen = logits.gather(-1, ids[..., None])
    close = ((logits - chosen).abs() < 2e-5).sum(-1) - 1
    return (close * mask).sum(-1)


def counts_agree(a: ml.Result, b: ml.Result, ties: ml.Result) -> bool:
    """Whether metrics that count tokens are equal wherever no target is all but tied with another token."""
    clear = ties["near_ties"] == 0
    return all(bool(((a[m] == b[m]) | a[m].isnull() | ~clear).all()) for m in COUNTED if m in a.data)
