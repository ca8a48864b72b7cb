"""Replacing activations: `Replacement` says by what and at which positions. Every ablation uses one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from memlens.choices import Mode, Positions
from memlens.errors import OptionError, SequenceError, SiteError, check_option
from memlens.forward.batches import Batch
from memlens.forward.capture import ActivationSource, mean_activations
from memlens.forward.hooks import HookFn, hook_name
from memlens.forward.trunk import Trunk
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import BatchHook, ByBatch

MODES: tuple[str, ...] = get_args(Mode)
POSITIONS: tuple[str, ...] = get_args(Positions)

Part = int | list[int] | None
"""A head, or several heads; None for the whole activation."""
Replace = Callable[[Tensor, Part], Tensor]
"""From an activation and a part of it to the values that take the part's place."""
MakeReplace = Callable[[Batch | None], Replace]
"""From a batch to what replaces its activations; only "resample" needs to know the batch."""


@dataclass(frozen=True)
class Replacement:
    r"""By what an ablation replaces an activation, and at which positions.

    Attributes:
        mode: The values that take the activation's place:

            - ``"zero"``: 0;
            - ``"mean"``: the mean over all positions of `reference`;
            - ``"resample"``: the activation at the same position of another sequence of `reference`, drawn
              once per sequence;
            - ``"mean_of_other_heads"`` (heads only): :math:`\frac{1}{H-1}\sum_{h' \ne h} z_{h'}` of the same
              layer and position.
        positions: One of `POSITIONS`.
        reference: The set for "mean" and "resample"; None for the sequences that are changed.
        seed: For "resample".

    Raises:
        OptionError: Unknown mode or positions.
    """

    mode: Mode = "zero"
    positions: Positions = "all"
    reference: SequenceSet | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_option("mode", self.mode, MODES)
        check_option("positions", self.positions, POSITIONS)

    @property
    def settings(self) -> dict[str, Any]:
        """What a result records of it."""
        reference = "sequences" if self.reference is None else dict(self.reference.attrs)
        return {**vars(self), "reference": reference}

    def by_layer(
        self, model: Any, site: str, layers: Sequence[int], sequences: SequenceSet
    ) -> dict[int, MakeReplace]:
        """Return what replaces the activations of a site, by layer.

        Raises:
            OptionError: "mean_of_other_heads" at a site other than "z".
            SiteError: "mean_of_other_heads" in a model with one head per layer.
            SequenceError: "resample" with fewer than two reference sequences.
        """
        if self.mode == "zero":
            return dict.fromkeys(layers, lambda batch: _zeros)
        if self.mode == "mean_of_other_heads":
            if site != "z":
                raise OptionError(f"mean_of_other_heads needs site='z', not {site!r}: use mode='zero'.")
            if Trunk(model).n_heads < 2:
                raise SiteError("mean_of_other_heads needs at least two heads per layer: use mode='zero'.")
            return dict.fromkeys(layers, lambda batch: _mean_of_others)
        reference = sequences if self.reference is None else self.reference
        names = {layer: hook_name(site, layer) for layer in layers}
        if self.mode == "mean":
            means = mean_activations(model, reference, list(names.values()))
            return {layer: _constant(means[name]) for layer, name in names.items()}
        rows = other_rows(len(sequences), len(reference), self.seed)
        source = ActivationSource(model, reference, list(names.values()), rows)
        return {layer: _from_source(source, name) for layer, name in names.items()}

    def where(self, batch: Batch | None) -> Bool[Tensor, "batch pos"] | None:
        """Return the positions that are replaced; None for all of them."""
        return None if batch is None else where(batch, self.positions)

    def bound(self, make: Callable[[Batch | None], HookFn]) -> HookFn | BatchHook:
        """Return the hook that `make` gives: a plain function where it is the same for every batch."""
        differs = self.positions != "all" or self.mode == "resample"
        return ByBatch(make) if differs else make(None)

    def hook(self, by: MakeReplace, part: Part = None) -> HookFn | BatchHook:
        """Return the hook that replaces an activation, or some of its heads together."""

        def make(batch: Batch | None) -> HookFn:
            replace, at = by(batch), self.where(batch)

            def fn(x: Tensor, hook: Any) -> Tensor:
                old = x if part is None else x[:, :, part]
                new = replace(x, part).to(x.dtype).expand(old.shape)
                new = new if at is None else torch.where(at[(..., *[None] * (old.ndim - 2))], new, old)
                if part is None:
                    return new.clone()
                out = x.clone()
                out[:, :, part] = new
                return out

            return fn

        return self.bound(make)


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


def _zeros(x: Tensor, part: Part) -> Tensor:
    return torch.zeros((), dtype=x.dtype, device=x.device)


def _mean_of_others(z: Tensor, part: Part) -> Tensor:
    """The mean of the heads that stay (0 where none does); without a part, of each head's others."""
    if part is None:
        return (z.sum(2, keepdim=True) - z) / (z.shape[2] - 1)
    if isinstance(part, int):
        return (z.sum(2) - z[:, :, part]) / (z.shape[2] - 1)
    left = z.shape[2] - len(part)
    return ((z.sum(2) - z[:, :, part].sum(2)) / left if left else torch.zeros_like(z[:, :, 0]))[:, :, None]


def _constant(values: Tensor) -> MakeReplace:
    return lambda batch: lambda x, part: values if part is None else values[part]


def _from_source(source: ActivationSource, name: str) -> MakeReplace:
    def by(batch: Batch | None) -> Replace:
        assert batch is not None  # `Replacement.bound` gives one to "resample"
        donor = source.of(batch)[name]
        return lambda x, part: donor if part is None else donor[:, :, part]

    return by


def other_rows(n: int, n_reference: int, seed: int) -> Int[Tensor, " seq"]:
    """Return, for each of `n` rows, a reference row with another number, drawn with a seed.

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
