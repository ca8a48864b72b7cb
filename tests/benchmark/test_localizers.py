"""Every localizer gives numbers; those written here are checked against plain computations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from memlens.benchmark import LOCALIZERS
from memlens.models.load import load_model
from memlens.organisms.planting.carriers import ComponentWeights
from memlens.organisms.planting.plant import recalled
from memlens.sequences.set import SequenceSet
from tests.tiny import tiny_huggingface_model


def rows(n: int, seed: int) -> SequenceSet:
    generator = torch.Generator().manual_seed(seed)
    return SequenceSet.from_tokens(torch.randint(4, 90, (n, 12), generator=generator), 6)


@pytest.mark.parametrize("name", LOCALIZERS.names())
def test_every_localizer_gives_a_finite_number_for_each_component(
    name: str, tiny_model: Callable[..., Any]
) -> None:
    method = LOCALIZERS[name]
    for component in method.components:
        scores = method(tiny_model("olmo2"), rows(2, 0), component=component, others=rows(4, 1))
        assert scores.shape[0] == 2
        assert method.control or np.ptp(scores[0]) > 0


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neo", "llama_gqa"])
def test_the_weight_gradient_is_that_of_autograd(family: str) -> None:
    seqs = rows(1, 3)
    hf = tiny_huggingface_model(family)
    weights = ComponentWeights(hf)
    recalled(hf, seqs).nll.sum().backward()
    model = load_model(tiny_huggingface_model(family), device="cpu", check_weights=False)
    method = LOCALIZERS["gradient of the output weights"]
    for kind in ("head", "neuron", "layer_mlp", "layer_attention"):
        found = method(model, seqs, component=kind, others=seqs)[0]
        for component in weights.components(kind)[::7] or weights.components(kind):
            parts = weights.slices(component)
            part = parts[0] if kind == "neuron" else parts[-1]
            gradient = weights.parameter(part.name).grad
            assert gradient is not None
            expected = gradient.index_select(part.dim, part.index).norm().item()
            assert found[component.layer, component.index] == pytest.approx(expected, rel=1e-4)
