"""Batches of a set of sequences, and the positions that predict their targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from memlens.sequences.set import SequenceSet

if TYPE_CHECKING:
    from memlens.forward.capture import FunctionalPass


@dataclass(frozen=True)
class Targets:
    """The targets of a batch, and the positions that predict them.

    Attributes:
        positions: Positions of the predicting logits, `[batch, target]`; 0 outside the mask.
        ids: Target ids; 0 outside the mask.
        mask: True where there is a target.
    """

    positions: Int[Tensor, "batch target"]
    ids: Int[Tensor, "batch target"]
    mask: Bool[Tensor, "batch target"]

    def each(self) -> Targets:
        """Return every target as a batch row of its own."""
        return Targets(*(t[self.mask][:, None] for t in (self.positions, self.ids, self.mask)))


def make_batches(
    seqs: SequenceSet, size: int, device: torch.device, rows: Sequence[int] | Tensor | None = None
) -> Iterator[tuple[Batch, Targets]]:
    """Split a set (or some of its rows, in the given order) into batches, each padded to its own longest.

    Where the set has the attribute `last_token_fed=False`, the longest sequences of a batch lose their last
    token, which is a target and predicts none: so they may have one token more than the model's context.
    """
    chosen = torch.as_tensor(range(len(seqs)) if rows is None else rows)
    for rows in chosen.split(size):
        part = seqs[rows]
        width = int(part.lengths.max()) - (not seqs.attrs.get("last_token_fed", True))
        mask = part.target_mask
        positions = torch.where(mask, part.target_positions - 1, 0)
        predicts = torch.zeros(len(part), width, dtype=torch.bool)
        predicts[torch.arange(len(part))[:, None].expand_as(mask)[mask], positions[mask]] = True
        batch = Batch(
            rows, part.tokens[:, :width].to(device), part.mask[:, :width].to(device), predicts.to(device)
        )
        ids = torch.where(mask, part.target_ids, 0)
        yield batch, Targets(positions.to(device), ids.to(device), mask.to(device))


def at_positions(x: Tensor, positions: Int[Tensor, "batch target"]) -> Tensor:
    """Return `x` `[copies * batch, pos, …]` at the positions of each row, `[copies * batch, target, …]`."""
    positions = positions.repeat(len(x) // len(positions), 1)
    return x[torch.arange(len(x), device=x.device)[:, None], positions]


def at_targets(final: Tensor, targets: Targets) -> Tensor:
    """Return final residuals at the predicting positions, `[copies * batch, target, d_model]`."""
    return at_positions(final, targets.positions)


def logits_at(unembed: Callable[[Tensor], Tensor], rows: Tensor, mask: Tensor) -> Tensor:
    """Return the logits of final residuals `[row, target, d_model]`; 0 where there is no target."""
    if bool(mask.all()):
        return unembed(rows)
    some = unembed(rows[mask])
    return some.new_zeros((*mask.shape, some.shape[-1])).index_put_((mask,), some)


@dataclass(frozen=True)
class Batch:
    """The sequences that a hook sees.

    Attributes:
        rows: Their row numbers in the `SequenceSet`.
        tokens: Their ids, padded on the right.
        mask: True where there is a real token.
        predicts: True at the positions whose logits predict a target token.
        by: What ran the unchanged model, where its own layers did not: activations that are compared with
            those of that pass have to come from the same arithmetic.
    """

    rows: Int[Tensor, " batch"]
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    predicts: Bool[Tensor, "batch pos"]
    by: FunctionalPass | None = None
