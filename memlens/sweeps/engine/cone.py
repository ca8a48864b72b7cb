"""Compute only what changes downstream of some starts.

A change at position p of a layer's input reaches only positions ≥ p of later layers. `Cone` stacks the
starts of a portion that begin at one position along the batch, runs the remaining layers on the positions
from that one on, for all stacks together, lets the stacks grow as they pass the layers where others start,
reads keys and values of the unchanged prefix from the baseline, and queries the last layer at the target
positions only. Where a start changes one position alone, its first layer computes only what that changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memlens.forward.batches import at_positions
from memlens.forward.blocks import FunctionalBlocks, KeysValues, Stack, Unchanged
from memlens.sweeps.engine.entries import Start


class Cone:
    """Runs the layers downstream of changes to one batch's baseline.

    Args:
        blocks: The model's blocks.
        resid: The baseline's residual at each layer's input (`n_layers`: at the end), for the whole batch.
        positions: Predicting positions, `[batch, target]`; 0 outside the targets' mask.
        stop: The first position after those that predict a target.
    """

    blocks: FunctionalBlocks
    resid: Mapping[int, Tensor]
    stop: int
    positions: Tensor
    n_layers: int

    def __init__(
        self, blocks: FunctionalBlocks, resid: Mapping[int, Tensor], positions: Tensor, stop: int
    ) -> None:
        self.blocks, self.resid, self.stop, self.positions = blocks, resid, stop, positions
        self.n_layers = blocks.trunk.n_layers
        self._kept: dict[int, KeysValues] = {}
        self._unchanged: tuple[int, Unchanged] | None = None

    def final(self, starts: Sequence[Start]) -> Float[Tensor, "row target d_model"]:
        """Return the residual after the last layer at the predicting positions, start by start.

        Positions before a start's first changed one hold the baseline's.
        """
        stacks: dict[int, Tensor] = {}
        members: dict[int, list[int]] = {}

        def join(first: int, new: Tensor, some: list[int]) -> None:
            stacks[first] = torch.cat([stacks[first], new]) if first in stacks else new
            members.setdefault(first, []).extend(some)

        for layer in range(min(start.layer for start in starts), self.n_layers + 1):
            entering: dict[tuple[int, bool, bool], list[int]] = {}
            for i, start in enumerate(starts):
                if start.layer == layer:
                    entering.setdefault((start.first, start.mid, start.alone), []).append(i)
            changed: list[tuple[int, Tensor, list[int]]] = []
            for (first, mid, alone), some in entering.items():
                new = torch.cat([starts[i].resid for i in some])
                if mid:
                    new = self.blocks.add_mlp(layer - 1, new)
                if alone and has_shortcut(layer, self.n_layers):
                    changed.append((first, new[:, 0], some))
                    continue
                if alone:
                    later = self.resid[layer][:, first + 1 : self.stop].repeat(len(some), 1, 1)
                    new = torch.cat([new, later], 1)
                if layer == self.n_layers:
                    new = at_positions(new, self._counted_from(first).repeat(len(some), 1))
                join(first, new, some)
            if layer < self.n_layers and stacks:
                stacks.update(zip(stacks, self._run(layer, stacks), strict=True))
            if changed:
                found = self.blocks.run_changed(layer, self._of(layer), [(at, new) for at, new, _ in changed])
                for (first, _, some), out in zip(changed, found, strict=True):
                    join(first, out, some)
        out = torch.cat(list(stacks.values())).unflatten(0, (-1, len(self.positions)))
        order = torch.tensor([i for some in members.values() for i in some], device=out.device)
        firsts = torch.tensor([start.first for start in starts], device=self.positions.device)
        before = self.positions < firsts[:, None, None]
        baseline = at_positions(self.resid[self.n_layers], self.positions)
        return torch.where(before[..., None], baseline, out[order.argsort()]).flatten(0, 1)

    def _counted_from(self, first: int) -> Tensor:
        return (self.positions - first).clamp_min(0)

    def _run(self, layer: int, stacks: Mapping[int, Tensor]) -> list[Tensor]:
        """Run a layer on the stacks, given by their first position; after the last, take what predicts."""
        size, last = len(self.positions), layer == self.n_layers - 1
        read: list[Stack] = []
        chosen: list[Tensor | None] = []
        for first, rows in stacks.items():
            copies = len(rows) // size
            asked = self._counted_from(first).repeat(copies, 1) if last else None
            whole = asked is not None and rows.shape[1] <= asked.shape[1]  # fewer than would be asked
            chosen.append(asked if whole else None)
            if whole:
                asked = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[:2])
            past = self._past(layer, first, copies) if first else None
            read.append(Stack(rows, past, asked))
        found = self.blocks.run_together(layer, read)
        return [x if at is None else at_positions(x, at) for x, at in zip(found, chosen, strict=True)]

    def _past(self, layer: int, first: int, copies: int) -> KeysValues:
        """Return keys and values of the unchanged positions, for `copies` interventions."""
        keys, values = (t[:, :, :first] for t in self._kv(layer))
        if len(keys) == 1:
            return keys.expand(copies, -1, -1, -1), values.expand(copies, -1, -1, -1)
        return keys.repeat(copies, 1, 1, 1), values.repeat(copies, 1, 1, 1)

    def _of(self, layer: int) -> Unchanged:
        """What a layer computes unchanged; only the last one is kept, since starts are sorted by layer."""
        if self._unchanged is None or self._unchanged[0] != layer:
            resid, out = (self.resid[n][:, : self.stop] for n in (layer, layer + 1))
            self._unchanged = layer, self.blocks.unchanged(layer, resid, out)
        return self._unchanged[1]

    def _kv(self, layer: int) -> KeysValues:
        if layer not in self._kept:
            self._kept[layer] = self.blocks.keys_values(layer, self.resid[layer][:, : self.stop])
        return self._kept[layer]


def has_shortcut(layer: int, n_layers: int) -> bool:
    """Whether starts that change one position alone enter a layer by what that changes.

    The last layer is queried where targets are predicted, which takes less.
    """
    return layer < n_layers - 1
