"""Activations of other runs, made when a batch needs them and kept only as long as it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlens.models.hooks import HookFn, attached, capturing
from memlens.models.trunk import Trunk
from memlens.sequences import SequenceSet
from memlens.sweeps.batches import make_batches
from memlens.sweeps.interventions import Batch, Intervention

__all__ = ["ActivationSource", "mean_activations"]


class ActivationSource:
    """Activations of a source set, row by row beside the sequences of the running batch.

    Args:
        model: A TransformerLens model.
        source: The set whose activations are wanted.
        names: Hook names.
        rows: Which source row stands beside each sequence; the same number by default.
        under: An edit that the source runs under.
    """

    trunk: Trunk
    source: SequenceSet
    names: list[str]
    under: Intervention | None
    rows: Tensor

    def __init__(
        self,
        model: Any,
        source: SequenceSet,
        names: Sequence[str],
        rows: Int[Tensor, " seq"] | None = None,
        under: Intervention | None = None,
    ) -> None:
        self.trunk, self.source, self.names, self.under = Trunk(model), source, list(names), under
        self.rows = torch.arange(len(source)) if rows is None else rows
        self._key: tuple[Any, ...] | None = None
        self._store: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What it is, without what it happens to hold."""
        return {**self.__dict__, "_key": None, "_store": {}}

    @torch.no_grad()
    def of(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``{name: [batch, pos, …]}``; a shorter source row is repeated from its start."""
        key = (self.trunk.dtype, *batch.rows.tolist())
        if key != self._key:
            rows, width = self.rows[batch.rows], batch.tokens.shape[1]
            lengths = self.source.lengths[rows]
            tokens = self.source.tokens[rows, : int(lengths.max())].to(batch.tokens.device)
            with (
                attached(self.trunk.model, self._edit(rows)),
                capturing(self.trunk.model, self.names) as store,
            ):
                self.trunk.run(self.trunk.embed(tokens))
            places = torch.arange(width)[None] % lengths[:, None]
            self._key, self._store = key, {n: _placed(n, a, places) for n, a in store.items()}
        return self._store

    def _edit(self, rows: Int[Tensor, " batch"]) -> list[tuple[str, HookFn]]:
        if self.under is None:
            return []
        ((beside, _),) = make_batches(self.source[rows], len(rows), self.trunk.device)
        return self.under.bound(replace(beside, rows=rows))


def _placed(name: str, activation: Tensor, places: Int[Tensor, "batch pos"]) -> Tensor:
    """Take positions; attention weights, which have two axes of them, stay as they are."""
    if name.endswith("hook_pattern"):
        return activation
    return activation[torch.arange(len(places))[:, None], places]


@torch.no_grad()
def mean_activations(
    model: Any, sequences: SequenceSet, names: Sequence[str], batch_size: int = 32
) -> dict[str, Float[Tensor, "..."]]:
    """Return the mean of each activation over all real positions of a set, by hook name."""
    trunk = Trunk(model)
    sums: dict[str, Tensor] = {}
    for batch, _ in make_batches(sequences, batch_size, trunk.device):
        with capturing(model, names) as store:
            trunk.run(trunk.embed(batch.tokens))
        for name in names:
            part = store[name][batch.mask].sum(0, dtype=torch.float64)
            sums[name] = sums.get(name, torch.zeros_like(part)) + part
    n = int(sequences.mask.sum())
    return {name: (total / n).to(trunk.dtype) for name, total in sums.items()}
