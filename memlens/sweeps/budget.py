"""How much of a sweep runs at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memlens.models.memory import check_batch_size, default_budget, logits_bytes
from memlens.models.trunk import Trunk
from memlens.sequences import SequenceSet
from memlens.sweeps.interventions import Intervention

__all__ = ["Budget", "Numbered", "portions", "position_bytes"]

_REDUCED = 16
"""Target positions reduced at a time on a processor: what is made of their logits stays in its caches."""

Numbered = list[tuple[int, Intervention]]
"""Interventions with their place in the user's list."""

_WELL_FILLED = 2048
"""On a processor a larger stack is no faster and takes more memory."""
_WELL_UNEMBEDDED = 256
"""The same of target positions."""
_WORTHWHILE = 512
"""A smaller stack does not use the processor well: it takes in the next position's interventions."""


@dataclass(frozen=True)
class Budget:
    """How much is run at a time.

    Attributes:
        bytes: What activations may take.
        batch_size: Sequences in a batch.
        stack_tokens: Positions (of all sequences and interventions) in one stacked forward.
        chunk_tokens: Positions that run through a block at a time.
        unembed_rows: Target positions unembedded at a time.
        reduced_rows: Target positions whose logits are made into metrics at a time.
    """

    bytes: int
    batch_size: int
    stack_tokens: int
    chunk_tokens: int
    unembed_rows: int
    reduced_rows: int

    @staticmethod
    def of(trunk: Trunk, seqs: SequenceSet, memory_budget: int | None, batch_size: int | None) -> Budget:
        """Cut a memory budget (bytes) into sizes; by default 1 GiB, or 40 % of a GPU's free memory."""
        check_batch_size(batch_size)
        total = memory_budget or default_budget(trunk.device)
        width = int(seqs.lengths.max())
        item = trunk.dtype.itemsize
        kept = item * width * trunk.d_model * 4 * trunk.n_layers
        logits = logits_bytes(trunk.d_vocab, item)
        on_cpu = trunk.device.type == "cpu"
        tokens = max(1, int(total * 0.6) // position_bytes(trunk, width))
        unembed = max(1, int(total * 0.15) // logits)
        if on_cpu:
            tokens, unembed = min(tokens, _WELL_FILLED), min(unembed, _WELL_UNEMBEDDED)
        size = batch_size or max(1, min(len(seqs), 64, tokens // width, int(total * 0.25) // kept))
        reduced = min(unembed, _REDUCED) if on_cpu else unembed
        return Budget(total, size, max(tokens, size * width), tokens, unembed, reduced)


def position_bytes(trunk: Trunk, width: int) -> int:
    """What one position of a stack takes while a block runs on it."""
    d_mlp = getattr(trunk.model.cfg, "d_mlp", None) or 4 * trunk.d_model
    return trunk.dtype.itemsize * (6 * trunk.d_model + 2 * d_mlp + trunk.n_heads * width)


def portions(items: Numbered, size: int, stop: int, tokens: int) -> Iterator[tuple[int, Numbered]]:
    """Cut interventions into portions of like first positions, and of at most `tokens` positions.

    Args:
        items: Numbered interventions that each edit one point.
        size: Sequences in the batch.
        stop: Positions that are computed end here.
        tokens: Greatest number of positions of a portion, over all its rows.

    Yields:
        The first position of a portion, and the portion.
    """

    def key(x: tuple[int, Intervention]) -> tuple[int, int]:
        return min(x[1].first_position, stop - 1), x[1].start_layer or 0

    part: Numbered = []
    first = 0
    for x in sorted(items, key=key):
        here, load = key(x)[0], len(part) * size * (stop - first)
        full = load + size * (stop - first) > tokens
        if part and (full or (here > first and load >= _WORTHWHILE)):
            yield first, part
            part = []
        if not part:
            first = here
        part.append(x)
    if part:
        yield first, part
