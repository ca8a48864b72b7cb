"""Patching from the twin: what recall loses when a component does what it did before the memory was written.

Patching a model's layers with those of one that never saw a text is the first stage of the unlearning depth
score (Lee et al., arXiv 2605.24614), which patches the residual; here single components are patched. It needs
the model without the memory, so it bounds what others can reach and is no instrument for an auditor.
"""

from __future__ import annotations

from typing import Any

from memlens.benchmark.localizer import Scores, localizer, reshaped
from memlens.benchmark.localizers.ablations import lost
from memlens.benchmark.localizers.gradients import SITES
from memlens.forward.components import ComponentKind
from memlens.instruments.patch.patching import activation_patches
from memlens.instruments.screen.gradients import attribute_ablation
from memlens.sequences.set import SequenceSet


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
    over = "head" if component == "head" else "layer"
    patches = activation_patches(model, sequences, donor=twin, site=SITES[component][0], over=over)
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
    found = attribute_ablation(
        model, sequences, site="mlp_post", mode="donor", donor=twin, method="attribution_patching",
        progress=False,
    )  # fmt: skip
    return reshaped(-found.effect("target_logprob").values, model, component)
