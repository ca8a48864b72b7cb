"""Activations of other runs, made when a batch needs them and kept only as long as it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlens.models.hooks import capturing, hook_name
from memlens.models.trunk import Trunk
from memlens.sequences import SequenceSet
from memlens.sweeps.engine import make_batches
from memlens.sweeps.interventions import Batch

__all__ = ["ActivationSource", "mean_head_outputs"]


class ActivationSource:
    """Activations of a source set, row by row beside the sequences of the running batch.

    Args:
        model: A TransformerLens model.
        source: The set whose activations are wanted.
        names: Hook names.
        rows: Which source row stands beside each sequence; the same number by default.
    """

    def __init__(
        self, model: Any, source: SequenceSet, names: Sequence[str], rows: Int[Tensor, " seq"] | None = None
    ) -> None:
        self.trunk, self.source, self.names = Trunk(model), source, list(names)
        self.rows = torch.arange(len(source)) if rows is None else rows
        self._key: tuple[int, ...] | None = None
        self._store: dict[str, Tensor] = {}

    def of(self, batch: Batch) -> dict[str, Tensor]:
        """Return ``{name: [batch, pos, …]}``; a shorter source row is repeated from its start."""
        key = tuple(batch.rows.tolist())
        if key != self._key:
            rows = self.rows[batch.rows]
            lengths = self.source.lengths[rows]
            tokens = self.source.tokens[rows, : int(lengths.max())].to(batch.tokens.device)
            with torch.no_grad(), capturing(self.trunk.model, self.names) as store:
                self.trunk.run(self.trunk.embed(tokens))
            positions = torch.arange(batch.tokens.shape[1])[None] % lengths[:, None]
            each = torch.arange(len(rows))[:, None]
            self._key, self._store = key, {n: a[each, positions] for n, a in store.items()}
        return self._store


@torch.no_grad()
def mean_head_outputs(
    model: Any, sequences: SequenceSet, layers: Sequence[int], batch_size: int = 32
) -> dict[int, Float[Tensor, "head d_head"]]:
    """Return each head's mean `z` over all real positions of a set, by layer."""
    trunk = Trunk(model)
    names = {layer: hook_name("z", layer) for layer in layers}
    sums: dict[int, Tensor] = {}
    for batch, _ in make_batches(sequences, batch_size, trunk.device):
        with capturing(model, list(names.values())) as store:
            trunk.run(trunk.embed(batch.tokens))
        for layer, name in names.items():
            part = store[name][batch.mask].sum(0, dtype=torch.float64)
            sums[layer] = sums.get(layer, torch.zeros_like(part)) + part
    n = int(sequences.mask.sum())
    return {layer: (total / n).to(trunk.dtype) for layer, total in sums.items()}
