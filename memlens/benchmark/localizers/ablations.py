"""Exact ablations: what recall loses when one component is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from memlens.benchmark.localizer import Scores, component_shape, localizer, reshaped
from memlens.forward.components import ComponentKind
from memlens.forward.exclusive import computes
from memlens.instruments.ablate.branches import attention_ablations, mlp_ablations
from memlens.instruments.ablate.heads import head_ablations
from memlens.instruments.ablate.neurons import neuron_knock_outs
from memlens.instruments.bypass.bypass import attention_bypasses
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.run import sweep

METRIC = "target_logprob"


@computes
def lost(model: Any, sequences: SequenceSet, interventions: Sequence[Intervention]) -> np.ndarray:
    """Return how much log-probability each intervention takes, in nats, as the sweep's dimensions have it."""
    result = sweep(model, sequences, interventions, (METRIC,), progress=False)
    return -result.effect(METRIC).values


@computes
def ablations(
    model: Any, sequences: SequenceSet, component: ComponentKind, mode: Any, others: SequenceSet, seed: int
) -> list[Intervention]:
    """Return the exact ablation of every component of a kind, in order."""
    common: dict[str, Any] = {"mode": mode, "seed": seed}
    if mode in ("mean", "resample"):
        common["reference"] = others
    if component == "head":
        return head_ablations(model, sequences, **common)
    if component == "layer_mlp":
        return mlp_ablations(model, sequences, **common)
    if component == "layer_attention":
        return attention_ablations(model, sequences, **common)
    n_layers, n_neurons = component_shape(model, "neuron")
    cells = [(layer, neuron) for layer in range(n_layers) for neuron in range(n_neurons)]
    made = single_neurons(model, sequences, cells, **common)
    return [replace(m, coords={"layer": a, "neuron": b}) for m, (a, b) in zip(made, cells, strict=True)]


def single_neurons(
    model: Any, sequences: SequenceSet, cells: Sequence[tuple[int, int]], **options: Any
) -> list[Intervention]:
    """Return the ablation of each neuron `(layer, neuron)` alone; options as for `neuron_knock_outs`."""
    sets = {f"L{layer}N{neuron}": {layer: [neuron]} for layer, neuron in cells}
    return neuron_knock_outs(model, sequences, sets, **options)


def _by_ablation(mode: str) -> Any:
    def score(
        model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
    ) -> Scores:
        interventions = ablations(model, sequences, component, mode, others, seed)
        return reshaped(lost(model, sequences, interventions), model, component)

    return score


for _mode in ("zero", "mean", "resample"):
    _score = _by_ablation(_mode)
    localizer(
        f"{_mode} ablation",
        components=("head", "layer_mlp", "layer_attention"),
        cost="one exact pass per component",
    )(_score)
localizer("mean-of-other-heads ablation", components=("head",), cost="one exact pass per head")(
    _by_ablation("mean_of_other_heads")
)
localizer(
    "zero ablation of neurons", components=("neuron",), cost="one exact pass per neuron", specific=False
)(_by_ablation("zero"))


@localizer("attention bypass", components=("layer_attention",), cost="one exact pass per layer")
def attention_bypass(
    model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
) -> Scores:
    """Loss of log-probability when a layer's attention is bypassed."""
    return reshaped(lost(model, sequences, attention_bypasses(model)), model, component)
