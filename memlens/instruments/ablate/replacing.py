"""Replacing activations: what takes their place, and at which positions. Every ablation does it this way."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from memlens.choices import AblationMode, Positions
from memlens.errors import OptionError, SequenceError, SiteError, check_option
from memlens.forward.batches import Batch
from memlens.forward.capture import ActivationSource, mean_activations
from memlens.forward.hooks import HookFn, hook_name
from memlens.forward.trunk import Trunk
from memlens.instruments.donors import check_donor, donor_settings
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import BatchHook, ByBatch, Intervention
from memlens.sweeps.run import SweepOptions

MODES: tuple[str, ...] = get_args(AblationMode)
POSITIONS: tuple[str, ...] = get_args(Positions)

Part = int | list[int] | None
"""A head or neuron, or several of them; None for the whole activation."""
Replace = Callable[[Tensor, Part], Tensor]
"""Maps an activation and a part of it to the values that replace the part."""
MakeReplace = Callable[[Batch | None], Replace]
"""Maps a batch to what replaces its activations; only "resample" needs to know the batch."""
Cell = tuple[str, Mapping[int, Part], Mapping[str, Hashable]]
"""An intervention's name, the part that it replaces in each of its layers, and its coordinates."""


class ReplacementOptions(TypedDict, total=False):
    """The options of `Replacement` other than the mode; `ablate_heads` describes them."""

    positions: Positions
    reference: SequenceSet | None
    seed: int
    donor: Any


class AblationOptions(ReplacementOptions, SweepOptions):
    """The options that every ablation takes beyond its mode and metrics."""


@dataclass(frozen=True)
class Replacement:
    """What an ablation puts in place of an activation, and at which positions.

    The attributes are the options of `ablate_heads`, which describes them.

    Raises:
        OptionError: Unknown mode or positions, "donor" without a donor, or a donor for another mode.
    """

    mode: AblationMode = "zero"
    positions: Positions = "all"
    reference: SequenceSet | None = None
    seed: int = 0
    donor: Any = None

    def __post_init__(self) -> None:
        check_option("mode", self.mode, MODES)
        check_option("positions", self.positions, POSITIONS)
        if self.mode == "donor" and self.donor is None:
            raise OptionError("mode='donor' needs the model whose activations are taken: give donor=.")
        if self.mode != "donor" and self.donor is not None:
            raise OptionError(f"mode={self.mode!r} does not use a donor: give mode='donor', or leave it out.")

    @classmethod
    def split(cls, mode: AblationMode, options: AblationOptions) -> tuple[Replacement, SweepOptions]:
        """Split the options of an ablation into its replacement and what it passes on to `sweep`."""
        rest: Any = dict(options)
        own = {name: rest.pop(name) for name in ReplacementOptions.__annotations__ if name in rest}
        return cls(mode, **own), rest

    @property
    def settings(self) -> dict[str, Any]:
        """What a result records about the replacement."""
        reference = "sequences" if self.reference is None else dict(self.reference.attrs)
        own = {name: value for name, value in vars(self).items() if name != "donor"}
        return {**own, "reference": reference} | ({} if self.donor is None else donor_settings(self.donor))

    def by_layer(
        self, model: Any, site: str, layers: Sequence[int], sequences: SequenceSet
    ) -> dict[int, MakeReplace]:
        """Return what replaces the activations of a site, for each layer.

        Raises:
            OptionError: "mean_of_other_heads" at a site other than "z".
            SiteError: "mean_of_other_heads" in a model with one head per layer.
            SequenceError: "resample" with fewer than two reference sequences.
            DonorError: The donor does not fit the model.
        """
        if self.mode == "zero":
            return dict.fromkeys(layers, lambda batch: _zeros)
        if self.mode == "mean_of_other_heads":
            if site != "z":
                raise OptionError(f"mean_of_other_heads needs site='z', not {site!r}: use mode='zero'.")
            if Trunk(model).n_heads < 2:
                raise SiteError("mean_of_other_heads needs at least two heads per layer: use mode='zero'.")
            return dict.fromkeys(layers, lambda batch: _mean_of_others)
        names = {layer: hook_name(site, layer) for layer in layers}
        if self.mode == "donor":
            check_donor(model, self.donor, sequences, sites=[site])
            source = ActivationSource(self.donor, sequences, list(names.values()))
            return {layer: from_source(source, name) for layer, name in names.items()}
        reference = sequences if self.reference is None else self.reference
        if self.mode == "mean":
            means = mean_activations(model, reference, list(names.values()))
            return {layer: _constant(means[name]) for layer, name in names.items()}
        rows = other_rows(len(sequences), len(reference), self.seed)
        source = ActivationSource(model, reference, list(names.values()), rows)
        return {layer: from_source(source, name) for layer, name in names.items()}

    def where(self, batch: Batch | None) -> Bool[Tensor, "batch pos"] | None:
        """Return the positions that are replaced; None for all positions."""
        return None if batch is None else where(batch, self.positions)

    def interventions(
        self, model: Any, sequences: SequenceSet, site: str, cells: Iterable[Cell]
    ) -> list[Intervention]:
        """Return one intervention per cell; raises what `by_layer` raises."""
        cells = list(cells)
        layers = sorted({layer for _, parts, _ in cells for layer in parts})
        by = self.by_layer(model, site, layers, sequences)
        return [
            Intervention(
                name, [(hook_name(site, n), self.hook(by[n], part)) for n, part in parts.items()], coords
            )
            for name, parts, coords in cells
        ]

    def bound(self, make: Callable[[Batch | None], HookFn]) -> HookFn | BatchHook:
        """Return the hook that `make` makes: a plain function if it is the same for every batch."""
        differs = self.positions != "all" or self.mode in ("resample", "donor")
        return ByBatch(make) if differs else make(None)

    def hook(self, by: MakeReplace, part: Part = None) -> HookFn | BatchHook:
        """Return the hook that replaces an activation or a part of it."""

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
    """Return the positions that one of `POSITIONS` names; None for "all"."""
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
    """The mean of the remaining heads (0 if none remains); without a part, of the others of each head."""
    if part is None:
        return (z.sum(2, keepdim=True) - z) / (z.shape[2] - 1)
    if isinstance(part, int):
        return (z.sum(2) - z[:, :, part]) / (z.shape[2] - 1)
    left = z.shape[2] - len(part)
    return ((z.sum(2) - z[:, :, part].sum(2)) / left if left else torch.zeros_like(z[:, :, 0]))[:, :, None]


def _constant(values: Tensor) -> MakeReplace:
    return lambda batch: lambda x, part: values if part is None else values[part]


def from_source(source: ActivationSource, name: str) -> MakeReplace:
    """Return what replaces an activation by the source's own, at the same places."""

    def by(batch: Batch | None) -> Replace:
        assert batch is not None  # `Replacement.bound` makes hooks by batch for "resample" and "donor"
        there = source.of(batch)[name]
        return lambda x, part: there if part is None else there[:, :, part]

    return by


def other_rows(n: int, n_reference: int, seed: int) -> Int[Tensor, " seq"]:
    """Draw for each of `n` rows a reference row with a different number.

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
