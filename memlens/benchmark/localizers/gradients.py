r"""Gradient estimates of ablations and patches: every component from a few passes.

Each score estimates the change of the mean target log-probability when a component's activation :math:`a`
becomes :math:`a'`: :math:`(a' - a) \cdot g`, summed over positions, with the sign that makes it larger where
recall depends on the component. :math:`g` is the gradient

- "gate gradient": in the run on the sequence, with :math:`a' = 0`;
- "gate gradient to the mean": the same, with :math:`a'` the mean over `others`;
- "integrated gradients": on average over 8 points between :math:`a` and :math:`a' = 0`, layer by layer;
- "attribution patching (noising)": in the run on the sequence, with :math:`a'` from a corrupted prefix. This
  is NAP, node attribution patching, in MIB (Mueller et al., arXiv 2504.13151);
- "attribution patching (denoising)": the reverse, in the run on the corrupted prefix;
- "integrated gradients over the inputs (noising)" and "integrated gradients of the patch (noising)": on
  average over 8 points between the two inputs, or between :math:`a` and :math:`a'` layer by layer. These are
  MIB's NAP-IG, over inputs and over activations.
"""

from __future__ import annotations

from typing import Any

from memlens.benchmark.localizer import Scores, localizer, reshaped
from memlens.forward.components import ComponentKind
from memlens.instruments.screen.gradients import attribute_ablation, attribute_gradients
from memlens.sequences.corrupt import corrupt
from memlens.sequences.set import SequenceSet

SITES: dict[str, tuple[str, str]] = {
    "head": ("z", "head"),
    "neuron": ("mlp_post", "neuron"),
    "layer_mlp": ("mlp_out", "layer"),
    "layer_attention": ("attn_out", "layer"),
}
"""Site and grouping of each kind of component."""

_ALL: tuple[ComponentKind, ...] = ("head", "neuron", "layer_mlp", "layer_attention")


def _estimate(method: str, mode: Any) -> Any:
    def score(
        model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
    ) -> Scores:
        site, over = SITES[component]
        reference: dict[str, Any] = {"reference": others} if mode == "mean" else {}
        result = attribute_ablation(
            model,
            sequences,
            site=site,
            over=over,
            mode=mode,
            method=method,
            seed=seed,
            progress=False,
            **reference,
        )
        return reshaped(-result.effect("target_logprob").values, model, component)

    return score


localizer("gate gradient", components=_ALL, cost="one forward and backward pass")(
    _estimate("attribution_patching", "zero")
)
localizer("gate gradient to the mean", components=_ALL, cost="one forward and backward pass")(
    _estimate("attribution_patching", "mean")
)
localizer(
    "integrated gradients", components=_ALL, cost="8 passes from each layer on", cites="sundararajan2017"
)(_estimate("integrated_gradients", "zero"))


def _from_corrupted(direction: str, method: str, path: str) -> Any:
    def score(
        model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
    ) -> Scores:
        site, over = SITES[component]
        result = attribute_gradients(
            model, sequences, corrupt(sequences, seed=seed), site=site, over=over, direction=direction,
            method=method, path=path, progress=False,
        )  # fmt: skip
        sign = 1 if direction == "denoising" else -1
        return reshaped(sign * result.effect("target_logprob").values, model, component)

    return score


for _direction in ("noising", "denoising"):
    localizer(
        f"attribution patching ({_direction})", components=_ALL, cost="two forward passes and one backward",
        cites="syed2023",
    )(_from_corrupted(_direction, "attribution_patching", "site"))  # fmt: skip
localizer(
    "integrated gradients over the inputs (noising)", components=_ALL, cost="8 forward and backward passes",
    cites="mueller2025",
)(_from_corrupted("noising", "integrated_gradients", "embedding"))  # fmt: skip
localizer(
    "integrated gradients of the patch (noising)", components=_ALL, cost="8 passes from each layer on",
    cites="mueller2025",
)(_from_corrupted("noising", "integrated_gradients", "site"))  # fmt: skip
