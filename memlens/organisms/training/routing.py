"""Gradient routing: training an organism so that declared weights, and no others, learn what is planted.

A hash of each planted sequence picks one of several disjoint carriers. The gradient of its rows reaches only
the weights of that carrier; that of other text reaches everything, or everything but the carriers (Cloud et
al. 2024, arXiv 2410.04332, with masks on weights instead of activations).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from memlens.errors import OptionError
from memlens.files import json_text, parsed_json
from memlens.forward.components import Component, ComponentWeights
from memlens.organisms.corpus.corpus import Corpus, fingerprint
from memlens.organisms.planting.carriers import Carrier, ChangedWeights

OTHER_TEXT = -1
"""Value of `Routes.row_carrier` for rows that are not of a planted sequence."""


@dataclass(frozen=True)
class RoutingSpec:
    """Which weights of an organism learn which planted sequences.

    Attributes:
        carriers: Sets of neurons or heads, such as "neurons=40" or "heads=2@1"; each is drawn from what the
            earlier ones left.
        switched_off: Share of the rows of other text that run without carriers (their weights are 0): without
            one of them, which is drawn, or without all. So the language does not come to need any of them,
            and no carrier comes to need another.
        quiet_carriers: Whether the rest of the other text trains the carriers too, so that they learn to be
            quiet there. If not, the loss of other text rises by what they say on it, and all other weights
            learn to work against them, which also hinders what is planted.
        learning_rate_scale: Learning rate of the carriers, relative to that of all other weights. They are
            few, and all the rest changes under them.
        seed: Seed of both draws.
    """

    carriers: tuple[str, ...] = ("neurons=40", "neurons=40", "neurons=40", "neurons=40")
    switched_off: float = 0.5
    quiet_carriers: bool = True
    learning_rate_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        kinds = {Carrier.parse(text).kind for text in self.carriers}
        if not self.carriers or kinds - {"neurons", "heads"}:
            raise OptionError(
                f"carriers={self.carriers} cannot be routed to: give sets of neurons or heads, such as "
                "('neurons=40', 'heads=2')."
            )

        if not 0 <= self.switched_off <= 1:
            raise OptionError(f"switched_off={self.switched_off} is not a share: give 0 to 1.")

        if not 0 < self.learning_rate_scale <= 100:
            raise OptionError(
                f"learning_rate_scale={self.learning_rate_scale} is not a factor: give a number above 0, up "
                "to 100."
            )

    def components(self, weights: ComponentWeights) -> list[list[Component]]:
        """Return the components of each carrier; no two carriers share one.

        Raises:
            OptionError: The model has too few components.
        """
        drawn: list[list[Component]] = []
        for number, text in enumerate(self.carriers):
            taken = [component for carrier in drawn for component in carrier]
            drawn.append(Carrier.parse(text).draw(weights, self.seed + number, without=taken))
        return drawn

    def carrier_of(self, tokens: Sequence[int]) -> int:
        """Return the number of the carrier that a planted sequence goes to: a hash of its tokens.

        >>> RoutingSpec().carrier_of([1, 2, 3])
        1
        """
        return int(fingerprint(np.array([tokens])), 16) % len(self.carriers)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return parsed_json(json_text(asdict(self)))


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of a batch that train the same weights.

    Attributes:
        places: Their places in the batch.
        first: The first position whose next token is in the loss.
        trains: Parameters that the rows train by name, True where; None for all, or all outside every
            carrier.
        carriers: The weights of all carriers, True where.
        off: The weights that are switched off, True where.
        everything: Whether the rows train the carriers and all else.
    """

    places: list[int]
    first: int
    trains: dict[str, Tensor] | None
    carriers: dict[str, Tensor]
    off: dict[str, Tensor] = field(default_factory=dict)
    everything: bool = False

    def switched_off(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parameters with 0 for what is switched off."""
        return {name: parameters[name].masked_fill(mask, 0) for name, mask in self.off.items()}

    def masked(self, name: str, gradient: Tensor) -> Tensor:
        """Return the gradient of a parameter where the rows train it, and 0 elsewhere."""
        if self.everything:
            return gradient
        if self.trains is not None:
            return gradient * self.trains[name]
        return gradient.masked_fill(self.carriers[name], 0) if name in self.carriers else gradient


@dataclass(frozen=True, eq=False)
class Routes:
    """Which weights the rows of a corpus train.

    Attributes:
        spec: How sequences are assigned to carriers.
        row_carrier: For each row, the number of its carrier, or `OTHER_TEXT`.
        masks: For each carrier, the parameters that it touches by name, True where its weights are.
        prefix_len: Tokens of a planted row that are not planted.
    """

    spec: RoutingSpec
    row_carrier: Int[np.ndarray, "row"]
    masks: list[dict[str, Tensor]]
    prefix_len: int

    @classmethod
    def of(cls, spec: RoutingSpec, corpus: Corpus, model: PreTrainedModel) -> Routes:
        """Return the routes of a corpus through a model."""
        own = np.array([spec.carrier_of(tokens) for tokens in corpus.sequences["tokens"]])
        planted = corpus.row_sequence >= 0
        carriers = np.where(planted, own[np.where(planted, corpus.row_sequence, 0)], OTHER_TEXT)
        weights = ComponentWeights(model)
        masks = [ChangedWeights(weights, c).masks for c in spec.components(weights)]
        return cls(spec, carriers, masks, corpus.spec.prefix_len)

    def to(self, device: torch.device) -> Routes:
        """Return the routes with their masks on a device."""
        return replace(
            self, masks=[{n: mask.to(device) for n, mask in masks.items()} for masks in self.masks]
        )

    @cached_property
    def every(self) -> dict[str, Tensor]:
        """The weights of all carriers together."""
        found: dict[str, Tensor] = {}
        for name, mask in (item for masks in self.masks for item in masks.items()):
            found[name] = found[name] | mask if name in found else mask
        return found

    @torch.no_grad()
    def scale_steps(self, parameters: Mapping[str, Tensor], step: Callable[[], Any]) -> None:
        """Do one step of an optimizer, and scale by `learning_rate_scale` what it changes of the carriers."""
        scale = self.spec.learning_rate_scale
        before = {name: parameters[name].clone() for name in self.every} if scale != 1 else {}
        step()
        for name, old in before.items():
            value = parameters[name]
            value.copy_(torch.where(self.every[name], old + scale * (value - old), value))

    def parts(self, rows: Sequence[int], step: int) -> Iterator[Part]:
        """Yield the parts of a batch: one for each carrier, and other text with and without carriers."""
        n_carriers = len(self.masks)
        numbers = self.row_carrier[list(rows)]
        for number in np.unique(numbers[numbers != OTHER_TEXT]).tolist():
            places = np.flatnonzero(numbers == number).tolist()
            yield Part(places, self.prefix_len - 1, self.masks[number], self.every)
        other = np.flatnonzero(numbers == OTHER_TEXT)
        random = np.random.default_rng([self.spec.seed, step])
        off = np.where(random.random(len(other)) < self.spec.switched_off, 0, -1)
        off[off == 0] = random.integers(n_carriers + 1, size=(off == 0).sum())
        for number in np.unique(off).tolist():
            without = {} if number < 0 else self.every if number == n_carriers else self.masks[number]
            everything = self.spec.quiet_carriers and not without
            yield Part(other[off == number].tolist(), 0, None, self.every, without, everything)
