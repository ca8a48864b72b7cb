"""Patching from the twin: what recall loses when a component does what it did before the memory was written.

Patching a model's layers with those of one that never saw a text is the first stage of the unlearning depth
score (Lee et al., arXiv 2605.24614), which patches the residual; here single components are patched. It needs
the model without the memory, so it bounds what others can reach and is no instrument for an auditor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from memlens.benchmark.localizer import Scores, component_shape, localizer, reshaped
from memlens.benchmark.localizers.ablations import lost
from memlens.benchmark.localizers.gradients import SITES
from memlens.forward.batches import Batch
from memlens.forward.capture import ActivationSource
from memlens.forward.components import ComponentKind
from memlens.forward.hooks import hook_name
from memlens.instruments.patch.patching import write_cell
from memlens.instruments.screen.backward import GradientRun
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention


@localizer(
    "patching from the twin", components=("head", "layer_mlp", "layer_attention"), twin=True, specific=False,
    cost="one exact pass per component, and one of the twin", cites="lee2026",
)  # fmt: skip
def twin_patching(
    model: Any,
    sequences: SequenceSet,
    *,
    component: ComponentKind,
    others: SequenceSet,
    seed: int,
    twin: Any = None,
) -> Scores:
    """Loss of log-probability when a component's output is the twin's, from its run on the same sequence."""
    site = SITES[component][0]
    n_layers, n = component_shape(model, component)
    source = ActivationSource(twin, sequences, [hook_name(site, layer) for layer in range(n_layers)])
    cells = [
        {"layer": layer, **({"head": index} if component == "head" else {})}
        for layer in range(n_layers)
        for index in range(n)
    ]
    patches = [
        Intervention(
            f"{site} {cell}", [(hook_name(site, cell["layer"]), write_cell(source, site, cell))], cell
        )
        for cell in cells
    ]
    return reshaped(lost(model, sequences, patches), model, component)


@localizer(
    "attribution patching from the twin", components=("neuron",), twin=True, specific=False,
    cost="one forward and backward pass, and one forward pass of the twin", cites="lee2026",
)  # fmt: skip
def twin_attribution(
    model: Any,
    sequences: SequenceSet,
    *,
    component: ComponentKind,
    others: SequenceSet,
    seed: int,
    twin: Any = None,
) -> Scores:
    r"""First-order estimate of the same patch for each neuron: :math:`-(a_\text{twin} - a) \cdot g`."""
    run = GradientRun(
        model, sequences, "mlp_post", "neuron", layers=None, metric="target_logprob",
        method="attribution_patching", steps=1, batch_size=None,
    )  # fmt: skip
    source = ActivationSource(twin, sequences, [hook_name("mlp_post", layer) for layer in run.layers])

    def deltas(batch: Batch, here: Mapping[int, Tensor]) -> dict[int, Tensor]:
        there = source.of(batch)
        return {layer: there[hook_name("mlp_post", layer)] - a for layer, a in here.items()}

    return reshaped(-run.result(deltas, False, {}).effect("target_logprob").values, model, component)
