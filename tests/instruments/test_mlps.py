"""Ablation of whole MLPs against independent computations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, SequenceError, SiteError
from tests.small import CASES, ragged

OUT = "blocks.{}.hook_mlp_out"


def by_hand(model: Any, seqs: ml.SequenceSet, row: int, layer: int, edit: Callable[..., Any]) -> float:
    """Mean log-probability of one unpadded sequence with one plain TransformerLens hook."""
    tokens = torch.tensor([seqs.rows()[row]])
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(OUT.format(layer), edit)])
    logp, start = logits[0].log_softmax(-1), int(seqs.prefix_len[row])
    return float(np.mean([logp[p - 1, tokens[0, p]].item() for p in range(start, tokens.shape[1])]))


def outputs(model: Any, row: list[int], layer: int) -> torch.Tensor:
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([row]), names_filter=[OUT.format(layer)])
    return cache[OUT.format(layer)][0]


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_zero_takes_the_whole_output_away(tiny_model: Any, family: str, backend: str) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    result = ml.ablate_mlps(model, seqs, progress=False)
    assert result.kind == "mlp_ablation"
    assert result["target_logprob"].dims == ("sequence", "layer")
    for row, layer in [(0, 0), (2, 2), (3, 1)]:
        want = by_hand(model, seqs, row, layer, lambda x, hook: torch.zeros_like(x))
        assert float(result["target_logprob"].sel(layer=layer)[row]) == pytest.approx(want, abs=1e-5)


def test_mean_is_over_real_positions_only(tiny_model: Any) -> None:
    model, seqs, reference = tiny_model("olmo2", "bridge"), ragged(), ragged(6, seed=5)
    result = ml.ablate_mlps(model, seqs, mode="mean", reference=reference, layers=[1], progress=False)
    mean = torch.cat([outputs(model, row, 1) for row in reference.rows()]).mean(0)
    want = by_hand(model, seqs, 2, 1, lambda x, hook: mean.expand_as(x))
    assert float(result["target_logprob"][2, 0]) == pytest.approx(want, abs=1e-5)


def test_resample_takes_another_sequence(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(2)
    result = ml.ablate_mlps(model, seqs, mode="resample", layers=[1], progress=False)
    donor = outputs(model, seqs.rows()[1], 1)  # with two sequences the donor of the first is the second
    want = by_hand(model, seqs, 0, 1, lambda x, hook: donor[torch.arange(x.shape[1]) % len(donor)][None])
    assert float(result["target_logprob"][0, 0]) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("positions", ["prompt", "targets", "last_prompt"])
def test_positions(tiny_model: Any, positions: str) -> None:
    model, seqs = tiny_model("llama", "bridge"), ragged()
    result = ml.ablate_mlps(model, seqs, positions=positions, layers=[1], progress=False)
    for row, prefix in enumerate(seqs.prefix_len.tolist()):
        last = int(seqs.lengths[row]) - 1
        where = {"prompt": range(prefix), "targets": range(prefix - 1, last), "last_prompt": [prefix - 1]}[
            positions
        ]

        def edit(x: torch.Tensor, hook: Any, where: Any = where) -> torch.Tensor:
            x = x.clone()
            x[:, list(where)] = 0
            return x

        want = by_hand(model, seqs, row, 1, edit)
        assert float(result["target_logprob"][row, 0]) == pytest.approx(want, abs=1e-5)


def test_plots_one_line_over_layers(tiny_model: Any) -> None:
    result = ml.ablate_mlps(tiny_model("gpt_neox", "bridge"), ragged(), progress=False)
    lines = [t for t in result.plot("target_logprob").data if t.mode == "lines+markers"]
    assert [list(line.x) for line in lines] == [[0, 1, 2]]
    assert np.allclose(lines[0].y, result["target_logprob"].mean("sequence"))


def test_bad_input(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    with pytest.raises(OptionError, match="mode='zeros'"):
        ml.ablate_mlps(model, seqs, mode="zeros")
    with pytest.raises(OptionError, match="positions='prefix'"):
        ml.ablate_mlps(model, seqs, positions="prefix")
    with pytest.raises(SiteError, match="layer 3 does not exist"):
        ml.ablate_mlps(model, seqs, layers=[3])
    with pytest.raises(SequenceError, match="at least two reference sequences"):
        ml.ablate_mlps(model, seqs[:1], mode="resample")
