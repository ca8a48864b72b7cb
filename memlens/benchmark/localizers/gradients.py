"""Gradient estimates of ablations and patches: every component from a few passes."""

from __future__ import annotations

from typing import Any

from memlens.benchmark.localizer import Scores, localizer, reshaped
from memlens.instruments.screen.gradients import attribute_ablation, attribute_gradients
from memlens.organisms.planting.carriers import ComponentKind
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
    cites="hanna2024",
)(_from_corrupted("noising", "integrated_gradients", "embedding"))  # fmt: skip
