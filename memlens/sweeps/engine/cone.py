"""Compute only what changes downstream of some starts.

A change at position p of a layer's input reaches only positions ≥ p of later layers. `Cone` stacks the
starts of a portion along the batch, runs the remaining layers on the positions from the first changed
one on, lets the stack grow as it passes the layers where others start, reads keys and values of the
unchanged prefix from the baseline, and queries the last layer at the target positions only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memlens.forward.batches import at_positions
from memlens.forward.blocks import FunctionalBlocks, KeysValues
from memlens.sweeps.engine.entries import Start


class Cone:
    """Runs the layers downstream of changes to one batch's baseline.

    Args:
        blocks: The model's blocks.
        resid: The baseline's residual at each layer's input (`n_layers`: at the end), for the whole batch.
        positions: Predicting positions, `[batch, target]`; 0 outside the targets' mask.
        stop: The first position after those that predict a target.
        chunk_tokens: The largest number of positions (over all rows) that run through a layer at a time.
    """

    blocks: FunctionalBlocks
    resid: Mapping[int, Tensor]
    stop: int
    positions: Tensor
    chunk_tokens: int
    n_layers: int

    def __init__(
        self,
        blocks: FunctionalBlocks,
        resid: Mapping[int, Tensor],
        positions: Tensor,
        stop: int,
        chunk_tokens: int,
    ) -> None:
        self.blocks, self.resid, self.stop = blocks, resid, stop
        self.positions, self.chunk_tokens = positions, chunk_tokens
        self.n_layers = blocks.trunk.n_layers
        self._kept: dict[int, KeysValues] = {}

    def final(self, starts: Sequence[Start]) -> Float[Tensor, "row target d_model"]:
        """Return the residual after the last layer at the predicting positions, start by start.

        Positions before the first changed one hold the baseline's.
        """
        size, first = len(self.positions), min(s.first for s in starts)
        order = sorted(range(len(starts)), key=lambda i: starts[i].layer)
        local = (self.positions - first).clamp_min(0)
        pending = [starts[i] for i in order]
        active: Tensor | None = None
        for layer in range(pending[0].layer, self.n_layers + 1):
            entering = [s for s in pending if s.layer == layer]
            pending = pending[len(entering) :]
            if entering:
                new = torch.cat([self._entered(s, first) for s in entering])
                if layer == self.n_layers:
                    new = at_positions(new, local)
                active = new if active is None else torch.cat([active, new])
            if layer < self.n_layers:
                assert active is not None
                active = self._run(layer, active, first, local if layer == self.n_layers - 1 else None)
        assert active is not None
        out = torch.empty_like(active)
        back = torch.tensor(order, device=out.device)
        out.unflatten(0, (-1, size))[back] = active.unflatten(0, (-1, size))
        return torch.where(
            (self.positions < first)[..., None].repeat(len(starts), 1, 1), self._baseline(len(starts)), out
        )

    def _baseline(self, copies: int) -> Tensor:
        return at_positions(self.resid[self.n_layers], self.positions).repeat(copies, 1, 1)

    def _entered(self, start: Start, first: int) -> Tensor:
        """Return a start's residual at positions ``first .. stop``, at the input of its layer."""
        new = self.blocks.add_mlp(start.layer - 1, start.resid) if start.mid else start.resid
        if start.first == first:
            return new
        return torch.cat([self.resid[start.layer][:, first : start.first], new], 1)

    def _run(self, layer: int, active: Tensor, first: int, queries: Tensor | None) -> Tensor:
        """Run a layer on the stack, a chunk of whole batches at a time."""
        size, copies = len(self.positions), len(active) // len(self.positions)
        step = max(1, self.chunk_tokens // (size * active.shape[1]))
        parts = []
        for i in range(0, copies, step):
            rows = active[i * size : (i + step) * size]
            n = len(rows) // size
            past = None if first == 0 else self._past(layer, first, n)
            asked = None if queries is None else queries.repeat(n, 1)
            parts.append(self.blocks.run(layer, rows, past, asked))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _past(self, layer: int, first: int, copies: int) -> KeysValues:
        """Return keys and values of the unchanged positions, for `copies` interventions."""
        keys, values = (t[:, :, :first].repeat(copies, 1, 1, 1) for t in self._kv(layer))
        return keys, values

    def _kv(self, layer: int) -> KeysValues:
        if layer not in self._kept:
            self._kept[layer] = self.blocks.keys_values(layer, self.resid[layer][:, : self.stop])
        return self._kept[layer]
