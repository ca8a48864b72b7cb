"""Localizers: methods that say where a sequence is stored, all called in the same way.

    @localizer("my_method", components=("head",), cost="one forward pass per head")
    def my_method(model, sequences, *, component, others, seed):
        ...
        return scores  # (sequence, layer, index): higher where the sequence is rather stored

A function in a module of an installed package registers itself through the entry-point group
`memlens.plugins`, and takes part in every suite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from memlens.errors import MemlensError, OptionError, ResultError
from memlens.forward.components import COMPONENT_KINDS, ComponentKind
from memlens.forward.exclusive import computes
from memlens.registry import Registry
from memlens.sequences.set import SequenceSet

Scores = Float[np.ndarray, "sequence layer index"]


class ScoreFunction(Protocol):
    """What a localizer computes; it does not see the truth.

    The model without the memory is seen only by a function that declares it (`Localizer.twin`) and takes it
    as a further keyword, `twin`.
    """

    def __call__(
        self, model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
    ) -> Scores:
        """Return one score per sequence and component.

        Args:
            model: A TransformerLens model.
            sequences: What is asked about.
            component: What is ranked.
            others: Sequences that are not asked about, for means and other references.
            seed: For methods that draw.
        """
        ...


@dataclass(frozen=True)
class Localizer:
    """A method that ranks components.

    Attributes:
        name: Its name in tables.
        components: The kinds of component that it ranks.
        score: The function.
        cost: What it costs, in words.
        control: Whether it is a control: it knows nothing about the sequence.
        specific: Whether it is cheap enough to be run on other sequences too, which gives the variants "less
            others" and "z-scored".
        cites: Key of its publication in the bibliography.
        twin: Whether it needs the model without the memory, which an auditor rarely has; the function gets it
            as `twin`. Such a method is measured where there is a twin, and never recommended.

    Example:
        >>> import memlens as ml
        >>> ml.benchmark.LOCALIZERS["zero ablation"].control
        False
    """

    name: str
    components: tuple[ComponentKind, ...]
    score: ScoreFunction
    cost: str = ""
    control: bool = False
    specific: bool = True
    cites: str = ""
    twin: bool = False

    def given(self, twin: Any) -> Localizer:
        """Return the localizer with the model without the memory, if it needs one.

        Where it needs one and `twin` is None, it ranks no components.
        """
        if not self.twin:
            return self
        if twin is None:
            return replace(self, components=())
        score: Any = self.score
        return replace(self, score=partial(score, twin=twin), twin=False)

    @computes
    def __call__(
        self,
        model: Any,
        sequences: SequenceSet,
        *,
        component: ComponentKind,
        others: SequenceSet,
        seed: int = 0,
    ) -> Scores:
        """Return one score per sequence and component; see `ScoreFunction`.

        Raises:
            OptionError: It does not rank components of this kind, or it needs a twin and was not `given` one.
            ResultError: It raised, or gave scores of another shape, or NaN.
        """
        if component not in self.components:
            raise OptionError(
                f"{self.name} does not rank {component}: it ranks {', '.join(self.components)}."
            )
        if self.twin:
            raise OptionError(
                f"{self.name} needs the model without the memory: use the localizer that given(twin) returns."
            )
        try:
            given: Any = self.score(model, sequences, component=component, others=others, seed=seed)
            if isinstance(given, Tensor):
                given = given.detach().double().cpu()
            found = np.asarray(given, dtype=np.float64)
        except (MemlensError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ResultError(
                f"the localizer {self.name!r} raised {type(error).__name__}: {error}"
            ) from error
        expected = (len(sequences), *component_shape(model, component))
        if found.shape != expected:
            raise ResultError(
                f"the localizer {self.name!r} gave scores of shape {found.shape}: it must give {expected}, "
                "(sequence, layer, index)."
            )
        if lost := int((~np.isfinite(found)).sum()):
            raise ResultError(
                f"the localizer {self.name!r} gave NaN or infinity as {lost} of {found.size} scores: it must "
                "give a number for each."
            )
        return found


LOCALIZERS: Registry[Localizer] = Registry(
    "localizer", of=Localizer, modules=["memlens.benchmark.localizers"]
)


def localizer(
    name: str,
    *,
    components: Sequence[ComponentKind],
    cost: str = "",
    control: bool = False,
    specific: bool = True,
    cites: str = "",
    twin: bool = False,
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register a function as a localizer; see `Localizer` for the arguments.

    Raises:
        OptionError: The name is taken, a kind of component does not exist, or what is decorated cannot be
            called.

    Example:
        >>> import numpy as np
        >>> import memlens as ml
        >>> def later(model, sequences, *, component, others, seed):
        ...     layers = np.arange(model.cfg.n_layers, dtype=float)
        ...     return np.broadcast_to(layers[:, None], (len(sequences), len(layers), 1))
        >>> decorate = ml.benchmark.localizer("later layers", components=("layer_mlp",), control=True)
        >>> _ = decorate(later)  # registers it  # doctest: +SKIP
    """
    if isinstance(components, str):
        raise OptionError(f"components={components!r}: give a list, such as ({components!r},).")
    for kind in components:
        if kind not in COMPONENT_KINDS:
            raise OptionError(f"component {kind!r}: choose from {', '.join(COMPONENT_KINDS)}.")

    def register(score: ScoreFunction) -> ScoreFunction:
        if not callable(score):
            raise OptionError(f"the localizer {name!r} is {score!r}: decorate a function.")
        LOCALIZERS.add(name, Localizer(name, tuple(components), score, cost, control, specific, cites, twin))
        return score

    return register


def component_shape(model: Any, component: ComponentKind) -> tuple[int, int]:
    """Return how many layers a model has, and how many components of a kind in each."""
    config = model.cfg
    per_layer = {"head": config.n_heads, "neuron": config.d_mlp}
    return int(config.n_layers), int(per_layer.get(component, 1))


def reshaped(values: Any, model: Any, component: ComponentKind) -> Scores:
    """Return values `(sequence, layer[, index])` as scores `(sequence, layer, index)`."""
    array = np.asarray(values, dtype=np.float64)
    return array.reshape(len(array), *component_shape(model, component))
