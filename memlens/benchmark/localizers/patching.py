"""Exact patches between the run on the sequence and one on a corrupted prefix."""

from __future__ import annotations

from typing import Any

from memlens.benchmark.localizer import Scores, localizer, reshaped
from memlens.forward.components import ComponentKind
from memlens.instruments.patch.patching import patch_activations
from memlens.sequences.corrupt import corrupt
from memlens.sequences.set import SequenceSet


def _patch(direction: str) -> Any:
    def score(
        model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
    ) -> Scores:
        result = patch_activations(
            model, sequences, corrupt(sequences, seed=seed), site="z", over="head", direction=direction,
            metrics=("target_logprob",), progress=False,
        )  # fmt: skip
        sign = 1 if direction == "denoising" else -1
        return reshaped(sign * result.effect("target_logprob").values, model, component)

    return score


for _direction in ("denoising", "noising"):
    localizer(f"activation patching ({_direction})", components=("head",), cost="one exact pass per head")(
        _patch(_direction)
    )
