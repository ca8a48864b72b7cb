"""Controls: what a ranking is worth that knows nothing about the sequence."""

from __future__ import annotations

from typing import Any

import numpy as np

from memlens.benchmark.localizer import Scores, component_shape, localizer
from memlens.forward.components import ComponentKind
from memlens.forward.read_weights import output_projection
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.neuron_choice import value_norms
from memlens.sequences.set import SequenceSet

_ALL: tuple[ComponentKind, ...] = ("head", "neuron", "layer_mlp", "layer_attention")


@localizer("random", components=_ALL, control=True, specific=False)
def random(
    model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
) -> Scores:
    """A uniform random number for each component."""
    return np.random.default_rng([seed, 3]).random((len(sequences), *component_shape(model, component)))


@localizer("weight norm", components=_ALL, control=True, specific=False)
def weight_norm(
    model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
) -> Scores:
    """Euclidean norm of the weights with which a component writes to the residual; it reads no sequence."""
    layers = range(Trunk(model).n_layers)
    if component in ("neuron", "layer_mlp"):
        norms = value_norms(model, layers).float().cpu().numpy()
    else:
        norms = np.stack(
            [output_projection(model, n)[0].flatten(1).norm(dim=1).cpu().numpy() for n in layers]
        )
    if component.startswith("layer"):
        norms = np.sqrt(np.square(norms).sum(1, keepdims=True))
    return np.repeat(norms[None].astype(float), len(sequences), axis=0)
