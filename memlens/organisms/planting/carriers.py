"""Carriers: which weights of a Hugging Face model hold a planted memory, component by component.

A component is a head, a neuron, a layer's MLP or a layer's attention; its weights are slices of the
checkpoint's own parameters (`memlens.forward.components`). A carrier is a list of components drawn from a
seed. Biases and norms are never part of a carrier.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from memlens.errors import OptionError, SiteError
from memlens.forward.components import Component, ComponentKind, ComponentWeights, WeightSlice

CarrierKind = Literal["neurons", "heads", "mlp", "attention", "path", "spread", "none"]
"""The kinds of carrier of the localization benchmark, a to g."""

CARRIERS: tuple[CarrierKind, ...] = get_args(CarrierKind)


@dataclass(frozen=True)
class Carrier:
    """What a memory is written into: "neurons=30", "neurons=1%", "neurons=30@2", "heads=4", "mlp", "path", ….

    Attributes:
        kind: "neurons", "heads", "mlp" (one layer's MLP), "attention" (one layer's), "path" (a head and, in
            later layers, neurons), "spread" (every weight) or "none" (nothing is planted).
        count: How many neurons or heads; for "path", how many neurons. 0 where `percent` says it.
        layer: The layer, where all of it is in one; None draws it, and for neurons and heads spreads them.
        percent: How many neurons or heads as a percentage of those to draw from, at least one.

    >>> Carrier.parse("neurons=30@2")
    Carrier(kind='neurons', count=30, layer=2, percent=0.0)
    >>> str(Carrier.parse("heads"))
    'heads=4'
    """

    kind: CarrierKind
    count: int = 0
    layer: int | None = None
    percent: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Carrier:
        """Return the carrier that a text names.

        Raises:
            OptionError: It names none.
        """
        pattern = r"\s*([a-z]+)\s*(?:=\s*(\d+|\d*\.?\d+\s*%))?\s*(?:@\s*(\d+))?\s*"
        found = re.fullmatch(pattern, text)
        if not found or found[1] not in CARRIERS:
            raise OptionError(
                f"carrier={text!r} is not a carrier: write neurons=30, neurons=1%, heads=4, mlp, attention, "
                "path, spread or none, with @LAYER to choose the layer."
            )
        kind: CarrierKind = found[1]  # pyright: ignore[reportAssignmentType]
        counted = {"neurons": 30, "heads": 4, "path": 15}
        count, layer = found[2] or "", found[3]
        percent = float(count.rstrip("% ")) if count.endswith("%") else 0.0
        if (
            (count and kind not in counted)
            or (layer and kind in ("path", "spread", "none"))
            or (percent and kind == "path")
            or count == "0"
            or (count.endswith("%") and not 0 < percent <= 100)
        ):
            raise OptionError(
                f"carrier={text!r}: a number from 1 goes with neurons=, heads= and path= only, a percentage "
                "with neurons= and heads=, and @LAYER with neurons, heads, mlp and attention."
            )
        number = 0 if percent else int(count or counted.get(kind, 0))
        return cls(kind, number, int(layer) if layer else None, percent)

    def __str__(self) -> str:
        count = f"={self.percent:g}%" if self.percent else f"={self.count}" if self.count else ""
        return f"{self.kind}{count}{'' if self.layer is None else f'@{self.layer}'}"

    @property
    def component_kinds(self) -> tuple[ComponentKind, ...]:
        """The kinds of component for which the carrier says which are planted."""
        own: dict[str, tuple[ComponentKind, ...]] = {
            "neurons": ("neuron",), "heads": ("head",), "mlp": ("layer_mlp",),
            "attention": ("layer_attention",), "path": ("head", "neuron"), "spread": (), "none": (),
        }  # fmt: skip
        return own[self.kind]

    def draw(
        self, weights: ComponentWeights, seed: int, *, without: Collection[Component] = ()
    ) -> list[Component]:
        """Return the components that carry, drawn from a seed; empty for "spread" and "none".

        Args:
            weights: Of the model.
            seed: Of the draw.
            without: Neurons or heads that are not drawn.

        Raises:
            OptionError: The model has too few components.
            SiteError: The layer does not exist.
        """
        random = np.random.default_rng([seed, 20_261])
        if self.layer is not None and self.layer >= weights.n_layers:
            raise SiteError(f"carrier {self}: the model has {weights.n_layers} layers.")
        if self.kind in ("neurons", "heads"):
            kind = self.component_kinds[0]
            pool = [c for c in weights.components(kind) if self.layer in (None, c.layer) and c not in without]
            count = max(1, round(len(pool) * self.percent / 100)) if self.percent else self.count
            return _some(pool, count, random, self)
        if self.kind in ("mlp", "attention"):
            layer = int(random.integers(weights.n_layers)) if self.layer is None else self.layer
            return [Component(self.component_kinds[0], layer)]
        if self.kind != "path":
            return []
        first = int(random.integers(max(weights.n_layers - 1, 1)))
        heads = [c for c in weights.components("head") if c.layer == first]
        later = [c for c in weights.components("neuron") if c.layer > first or weights.n_layers == 1]
        return [*_some(heads, 1, random, self), *_some(later, self.count, random, self)]


def _some(
    pool: Sequence[Component], n: int, random: np.random.Generator, carrier: Carrier
) -> list[Component]:
    if n > len(pool):
        raise OptionError(f"carrier {carrier}: the model has only {len(pool)} such components.")
    return [pool[i] for i in sorted(random.choice(len(pool), n, replace=False).tolist())]


class ChangedWeights:
    """The slices of a list of components, as masks and units of the parameters that they touch.

    Attributes:
        masks: For each parameter's name, True where the carrier's weights are.
        units: Slices whose norm planting keeps, one per component and matrix.
    """

    masks: dict[str, Tensor]
    units: list[WeightSlice]

    def __init__(self, weights: ComponentWeights, components: Sequence[Component]) -> None:
        self.units = [
            WeightSlice(part.name, part.dim, index)
            for component in components
            for part in weights.slices(component)
            for index in (part.index.split(1) if component.kind.startswith("layer") else [part.index])
        ]
        self.masks = {}
        for unit in self.units:
            shape = weights.parameter(unit.name).shape
            mask = self.masks.setdefault(unit.name, torch.zeros(shape, dtype=torch.bool))
            mask.index_fill_(unit.dim, unit.index, True)
