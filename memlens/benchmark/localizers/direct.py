"""Direct effects: what a component itself writes for the targets, with nothing after it responding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memlens.benchmark.localizer import Scores, localizer, reshaped
from memlens.forward.batches import Targets, at_targets, logits_at, make_batches
from memlens.forward.capture import ActivationSource, captured_at_targets
from memlens.forward.components import ComponentKind
from memlens.forward.hooks import hook_name
from memlens.forward.metrics import METRICS
from memlens.forward.trunk import Trunk
from memlens.instruments.patch.path_patching import patch_paths
from memlens.sequences.corrupt import corrupt
from memlens.sequences.set import SequenceSet

_BATCH = 8
_WRITES = {"layer_mlp": "mlp_out", "layer_attention": "attn_out"}


@localizer(
    "path patching to the logits", components=("head", "layer_mlp", "layer_attention"),
    cost="two forward passes, and the unembedding once per component", cites="wang2023",
)  # fmt: skip
def path_patching(
    model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
) -> Scores:
    r"""Log-probability that the targets lose by a component's direct path to the logits.

    :math:`m(r) - m(r + c' - c)`, with :math:`r` the final residual, :math:`c` what the component adds to it
    in the run on the sequence, :math:`c'` in the run on the sequence with a corrupted prefix, and :math:`m`
    the mean target log-probability through final norm and unembedding. Everything between the component and
    the final residual keeps its value: `memlens.patch_paths` with ``receiver_input="logits"`` and
    ``mlps="frozen"``, extended to MLPs and whole attentions.
    """
    corrupted = corrupt(sequences, seed=seed)
    if component == "head":
        found = patch_paths(
            model, sequences, corrupted, mlps="frozen", direction="noising", metrics=("target_logprob",),
            progress=False,
        )  # fmt: skip
        return reshaped(-found.effect("target_logprob").values, model, component)
    trunk = Trunk(model)
    last = hook_name("resid_post", trunk.n_layers - 1)
    names = [hook_name(_WRITES[component], layer) for layer in range(trunk.n_layers)]
    here, there = (ActivationSource(model, each, [*names, last]) for each in (sequences, corrupted))
    scores = []
    for batch, targets in make_batches(sequences, _BATCH, trunk.device):
        clean, other = here.of(batch), there.of(batch)
        final = at_targets(clean[last], targets)
        moved = (final + at_targets(other[name] - clean[name], targets) for name in names)
        whole, *patched = logprobs(trunk, targets, [final, *moved])
        scores.append(np.stack([whole - each for each in patched], axis=1))
    return reshaped(np.concatenate(scores), model, component)


@localizer(
    "lens promotion",
    components=("layer_mlp", "layer_attention"),
    cost="one forward pass, and the unembedding twice per layer",
)
def lens_promotion(
    model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
) -> Scores:
    r"""What a layer's MLP or attention adds to the targets' log-probability under the logit lens.

    With :math:`m` the mean target log-probability of a residual through final norm and unembedding: for
    attention :math:`m(r_\text{pre} + a) - m(r_\text{pre})`, for the MLP
    :math:`m(r_\text{post}) - m(r_\text{post} - b)`, where :math:`a` and :math:`b` are what they add to the
    residual between the layer's input and its output. The sum over both of all sequential layers is the
    model's own log-probability less that of the embedding. (Ours.)
    """
    trunk = Trunk(model)
    stream = "resid_pre" if component == "layer_attention" else "resid_post"
    sign = 1 if component == "layer_attention" else -1
    layers = range(trunk.n_layers)
    names = [hook_name(site, n) for site in (stream, _WRITES[component]) for n in layers]
    scores = []
    for item in captured_at_targets(trunk, sequences, names, batch_size=_BATCH, progress=False):
        ends = [item.acts[hook_name(stream, n)] for n in layers]
        added = [item.acts[hook_name(_WRITES[component], n)] for n in layers]
        moved = logprobs(trunk, item.targets, (r + sign * c for r, c in zip(ends, added, strict=True)))
        gains = [sign * (b - a) for a, b in zip(logprobs(trunk, item.targets, ends), moved, strict=True)]
        scores.append(np.stack(gains, axis=1))
    return reshaped(np.concatenate(scores), model, component)


@torch.no_grad()
def logprobs(trunk: Trunk, targets: Targets, residuals: Iterator[Tensor] | list[Tensor]) -> list[np.ndarray]:
    """Return the mean target log-probability of residuals `[batch, target, d_model]`, each `[batch]`."""
    metric, mask = METRICS["target_logprob"], targets.mask
    return [
        metric(logits_at(trunk.unembed, r, mask), targets.ids, mask).double().cpu().numpy() for r in residuals
    ]
