"""Methods of other works, in our own code from their description."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from memlens.benchmark.localizer import Scores, localizer, reshaped
from memlens.forward.batches import make_batches
from memlens.forward.capture import run_capturing
from memlens.forward.components import ComponentKind
from memlens.forward.hooks import hook_name
from memlens.forward.metrics import METRICS
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.neuron_choice import value_norms
from memlens.instruments.decode.logit_attribution import attribute_logits
from memlens.instruments.screen.backward import Spot, run_backward
from memlens.sequences.set import SequenceSet

_BATCH = 8


@localizer("activation times norm", components=("neuron",), cost="one forward pass", cites="chang2024")
@torch.no_grad()
def activation_times_norm(
    model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
) -> Scores:
    r"""Mean of :math:`|m_n| \cdot \lVert v_n \rVert` over the positions that predict targets.

    MemPi's "activations" (arXiv 2311.09060).
    """
    trunk = Trunk(model)
    names = [hook_name("mlp_post", layer) for layer in range(trunk.n_layers)]
    found = []
    for batch, targets in make_batches(sequences, _BATCH, trunk.device):
        _, acts = run_capturing(trunk, batch.tokens, names)
        weights = targets.mask.float() / targets.mask.sum(-1, keepdim=True)
        for name in names:
            acts[name] = acts[name].gather(
                1, targets.positions[..., None].expand(-1, -1, acts[name].shape[-1])
            )
        found.append(torch.stack([(acts[n].abs() * weights[..., None]).sum(1) for n in names], 1).float())
    norms = value_norms(model, range(trunk.n_layers)).float()
    return (torch.cat(found) * norms).cpu().numpy()


@localizer(
    "gradient of the output weights", components=("head", "neuron", "layer_mlp", "layer_attention"),
    cost="one forward and backward pass", cites="stoehr2024",
)  # fmt: skip
def weight_gradient(
    model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
) -> Scores:
    r"""Norm of the gradient of the loss for a component's output weights.

    With :math:`a_t` what a component gives at position t and :math:`g_t` the gradient of the mean target
    log-probability at the residual that it writes to, the gradient of its output weights is
    :math:`\sum_t a_t g_t^\top` (before a post-norm, where a layer has one).
    """
    trunk = Trunk(model)
    attention = component in ("head", "layer_attention")
    source, sink = ("z", "attn_out") if attention else ("mlp_post", "mlp_out")
    layers = range(trunk.n_layers)
    found = []
    for batch, targets in make_batches(sequences, _BATCH, trunk.device):
        with torch.no_grad():
            resid = trunk.embed(batch.tokens)
            _, acts = run_capturing(trunk, batch.tokens, [hook_name(source, n) for n in layers])
        back = run_backward(
            trunk, targets, resid, 0, METRICS["target_logprob"], [Spot.of(sink, n) for n in layers]
        )
        rows = []
        for n in layers:
            a, g = acts[hook_name(source, n)].float(), back.gradients[n].float()
            a = a if attention else a[..., None]
            squares = torch.einsum("bthd,btm->bhdm", a, g).square().sum((2, 3))
            rows.append(squares if not component.startswith("layer") else squares.sum(1, keepdim=True))
        found.append(torch.stack(rows, 1).sqrt().cpu().numpy())
    return np.concatenate(found)


@localizer(
    "direct logit attribution", components=("head", "layer_mlp", "layer_attention"), cost="one forward pass"
)
def direct_logit_attribution(
    model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
) -> Scores:
    """What a component writes straight into the targets' logits."""
    name = {"head": "head_logit", "layer_mlp": "mlp", "layer_attention": "attn"}[component]
    result = attribute_logits(model, sequences, progress=False)
    return reshaped(result[name].values, model, component)
