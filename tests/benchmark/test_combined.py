"""The rank product's parts against plain computations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from memlens.benchmark import LOCALIZERS
from memlens.benchmark.localizers import combined
from memlens.benchmark.localizers.ablations import ablations, lost
from memlens.errors import SequenceError
from memlens.sequences.set import SequenceSet


def rows(n: int, seed: int, length: int = 12) -> SequenceSet:
    generator = torch.Generator().manual_seed(seed)
    return SequenceSet.from_tokens(torch.randint(4, 90, (n, length), generator=generator), 6)


def test_log_ranks_are_zero_for_the_first_and_share_ties() -> None:
    found = combined.log_ranks(np.array([[[3.0, 1.0], [2.0, 2.0]]]))
    assert np.allclose(np.exp(-found), [[[1, 4], [2.5, 2.5]]])


def test_continued_targets_are_what_the_model_generates(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox")
    seqs = rows(3, 0)
    found = combined.continued(model, seqs)
    tokens = seqs.tokens[:, :6]
    with torch.no_grad():
        for _ in range(6):
            tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1)[:, None]], 1)
    assert torch.equal(found.tokens, tokens)
    assert torch.equal(found.prefix_len, seqs.prefix_len)


def test_only_the_screened_neurons_are_ablated_and_rank_first(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("olmo2")
    seqs, others = rows(2, 1), rows(3, 2)
    found = LOCALIZERS["rank product"](model, seqs, component="neuron", others=others)
    exact = -lost(model, seqs, ablations(model, seqs, "neuron", "zero", others, 0)).reshape(found.shape)
    cheap = np.sum(
        [
            combined.log_ranks(LOCALIZERS[name](model, seqs, component="neuron", others=others))
            for name in ("gradient of the output weights", "gate gradient", "activation times norm")
        ],
        axis=0,
    )
    for score, total, effect in zip(found, cheap, exact, strict=True):
        screened = total >= np.quantile(total, 0.9)
        assert score[screened].min() > score[~screened].max()
        by_hand = total[screened] + combined.log_ranks(-effect[screened][None])[0]
        assert np.allclose(score[screened], by_hand, atol=1e-6)
        assert (np.argsort(score[~screened]) == np.argsort(total[~screened])).all()


@pytest.mark.parametrize("component", ["head", "layer_mlp", "layer_attention"])
def test_heads_and_layers_are_compared_with_other_text(
    component: Any, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("gpt_neox")
    seqs, others = rows(2, 1), rows(3, 2)
    found = LOCALIZERS["rank product"](model, seqs, component=component, others=others)
    text = [*others.rows(), *combined.continued(model, others).rows()]
    usual = SequenceSet.from_tokens(text, 6)
    evidence = []
    for name in ("gradient of the output weights", "zero ablation"):
        own, there = (LOCALIZERS[name](model, s, component=component, others=others) for s in (seqs, usual))
        if name == "zero ablation":
            evidence.append((own - there.mean(0)) / there.std(0, ddof=1))
        else:
            rms = np.sqrt((there**2).mean(0))
            evidence.append(own / (rms + np.quantile(rms, 0.1)))
    expected = combined.log_ranks(evidence[0]) + combined.log_ranks(evidence[1])
    assert np.allclose(found, expected, atol=1e-6)


def test_heads_are_not_compared_with_themselves(tiny_model: Callable[..., Any]) -> None:
    seqs = rows(3, 1)
    with pytest.raises(SequenceError, match="needs at least two other sequences"):
        LOCALIZERS["rank product"](tiny_model("gpt_neox"), seqs, component="head", others=seqs)
