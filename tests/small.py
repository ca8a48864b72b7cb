"""Small sets of sequences for the tiny models of `tests.tiny`."""

from __future__ import annotations

import torch

from memlens.sequences import SequenceSet
from tests.tiny import D_VOCAB, FAMILIES, HOOKED_FAMILIES

CASES = [*((family, "hooked") for family in HOOKED_FAMILIES), *((family, "bridge") for family in FAMILIES)]
"""Every family with every backend it has; the fixture skips what the installed release does not have."""


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
