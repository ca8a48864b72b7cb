"""Replacing activations: by what, and at which positions; ablation of heads, MLPs and neurons shares it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from memlens.errors import SequenceError
from memlens.forward.batches import Batch
from memlens.forward.capture import ActivationSource, mean_activations
from memlens.forward.hooks import hook_name
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import ByBatch

POSITIONS = ("all", "prompt", "targets", "last_prompt")
"""Every position; those given to the model; those that predict a target; the one that predicts the first."""


def replacement_settings(
    mode: str, positions: str, reference: SequenceSet | None, seed: int
) -> dict[str, Any]:
    """Return what an ablation records of how it replaces."""
    return {
        "mode": mode,
        "positions": positions,
        "seed": seed,
        "reference": "sequences" if reference is None else dict(reference.attrs),
    }


Replace = Callable[[Tensor, int | list[int] | None], Tensor]
"""From an activation and a head, or several (None: all of it), to what stands in their place."""


def where(batch: Batch, positions: str) -> Bool[Tensor, "batch pos"] | None:
    """Return the positions that one of `POSITIONS` names; None for all of them."""
    before = batch.predicts.cumsum(1) - batch.predicts.long()  # predicting positions to the left
    if positions == "targets":
        return batch.predicts
    if positions == "prompt":
        return before == 0
    if positions == "last_prompt":
        return batch.predicts & (before == 0)
    return None


def replacing(by: Callable[[Batch], Replace], head: int | list[int] | None, positions: str) -> ByBatch:
    """Return the hook that replaces an activation, or some heads of it at once.

    Args:
        by: Gives the replacement for a batch.
        head: The head or the heads; None for the whole activation.
        positions: One of `POSITIONS`.
    """

    def make(batch: Batch) -> Callable[..., Tensor]:
        replace, at = by(batch), where(batch, positions)

        def fn(x: Tensor, hook: Any) -> Tensor:
            old = x if head is None else x[:, :, head]
            new = replace(x, head).to(x.dtype).expand(old.shape)
            new = new if at is None else torch.where(at[(..., *[None] * (old.ndim - 2))], new, old)
            if head is None:
                return new.clone()
            out = x.clone()
            out[:, :, head] = new
            return out

        return fn

    return ByBatch(make)


def replacements(
    model: Any, site: str, mode: str, layers: Sequence[int], reference: SequenceSet, n: int, seed: int
) -> dict[int, Callable[[Batch], Replace]]:
    """Return by layer what replaces a site's activation.

    Args:
        model: A TransformerLens model.
        site: A site, such as "z" or "mlp_out".
        mode: "zero", "mean" (over all positions of `reference`) or "resample" (the same position of another
            sequence of `reference`).
        layers: The layers.
        reference: The reference set.
        n: How many sequences are to be edited.
        seed: For "resample".

    Raises:
        SequenceError: "resample" with fewer than two reference sequences.
    """
    if mode == "zero":
        return dict.fromkeys(layers, lambda batch: _zeros)
    names = {layer: hook_name(site, layer) for layer in layers}
    if mode == "mean":
        means = mean_activations(model, reference, list(names.values()))
        return {layer: _constant(means[name]) for layer, name in names.items()}
    source = ActivationSource(model, reference, list(names.values()), other_rows(n, len(reference), seed))
    return {layer: _from_source(source, name) for layer, name in names.items()}


def _zeros(x: Tensor, head: Any) -> Tensor:
    return torch.zeros((), dtype=x.dtype, device=x.device)


def _constant(values: Tensor) -> Callable[[Batch], Replace]:
    return lambda batch: lambda x, head: values if head is None else values[head]


def _from_source(source: ActivationSource, name: str) -> Callable[[Batch], Replace]:
    def by(batch: Batch) -> Replace:
        donor = source.of(batch)[name]
        return lambda x, head: donor if head is None else donor[:, :, head]

    return by


def other_rows(n: int, n_reference: int, seed: int) -> Int[Tensor, " seq"]:
    """Return for each of `n` rows a reference row with another number, drawn with a seed.

    Raises:
        SequenceError: There are fewer than two reference rows.
    """
    if n_reference < 2:
        raise SequenceError(
            f"resampling needs at least two reference sequences and there is {n_reference}: give more."
        )
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(n) % n_reference
    return (own + torch.randint(1, n_reference, (n,), generator=generator)) % n_reference
