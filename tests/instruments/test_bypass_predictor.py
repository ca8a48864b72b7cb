"""The cheap predictor of a bypass: what it is, and how its agreement with effects is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import spearmanr

import memlens as ml
from memlens.errors import ResultError, SiteError
from memlens.forward.hooks import hook_name
from memlens.instruments.bypass.predictor import ov_gains
from tests.small import CASES, ragged


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_it_is_attention_to_others_times_gain(tiny_model: Any, family: str, backend: str) -> None:
    """Against the patterns of plain forwards of each sequence alone, and the bounds' float64 numbers."""
    model, seqs = tiny_model(family, backend), ragged()
    found = ml.bypass.predictor(model, seqs, progress=False)
    layers = range(len(model.blocks))
    gains = ov_gains(model, layers)
    names = [hook_name("pattern", n) for n in layers]
    for i, row in enumerate(seqs.rows()):
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([row]), names_filter=names)
        at = (seqs.target_positions[i] - 1)[seqs.target_mask[i]]
        for n in layers:
            others = 1 - cache[names[n]][0].diagonal(dim1=-2, dim2=-1)[:, at].double()
            want = float((others * gains[n][:, None]).sum(0).mean())
            assert float(found["predictor"][i, n]) == pytest.approx(want, rel=1e-5)
            assert float(found["attention_to_others"][i, n]) == pytest.approx(float(others.mean()), abs=1e-6)
    exact = ml.bypass.bounds(model, seqs, progress=False)["predictor"]
    for i in range(len(seqs)):
        at = (seqs.target_positions[i] - 1)[seqs.target_mask[i]].numpy()
        want = exact.isel(sequence=i, position=at).mean("position")
        assert np.allclose(found["predictor"][i], want, rtol=1e-4)


def test_the_gain_is_the_norm_of_a_head_s_ov_matrix(tiny_model: Any) -> None:
    model = tiny_model("llama_gqa", "bridge")
    attention = model.original_model.model.layers[1].self_attn
    o, v = (getattr(attention, f"{n}_proj").original_component.weight.detach().double() for n in "ov")
    for head in range(4):
        ov = o[:, 8 * head : 8 * head + 8] @ v[8 * (head // 2) : 8 * (head // 2) + 8]
        want = float(torch.linalg.matrix_norm(ov, ord=2))
        assert float(ov_gains(model, [1])[1][head]) == pytest.approx(want, rel=1e-5)


def made(values: Any, **more: Any) -> ml.Result:
    dims = ("sequence", "layer")
    data = {"predictor": (dims, np.array(values, dtype=float)), **more}
    coords = {"sequence": [str(i) for i in range(len(values))], "layer": list(range(len(values[0])))}
    return ml.Result.create(xr.Dataset(data, coords), kind="bypass_predictor")


def test_agreement_is_the_rank_correlation_of_means_with_harm_counted_as_positive() -> None:
    generator = np.random.default_rng(0)
    predicted = generator.random((20, 6))
    effect = -(predicted**2) + 0.3 * generator.standard_normal((20, 6))
    base = generator.standard_normal(20)
    dims = ("sequence", "layer")
    measured = made(
        predicted, target_logprob=(dims, base[:, None] + effect), target_logprob_baseline=("sequence", base)
    )
    found = ml.bypass.predictor_agreement(made(predicted), measured)
    want = spearmanr(predicted.mean(0), -effect.mean(0)).statistic
    assert found.value == pytest.approx(want)
    assert found.low < found.value
    assert (found.n_layers, found.n_sequences) == (6, 20)
    exact = ml.bypass.predictor_agreement(made(predicted), made(predicted), "predictor")
    assert exact.value == pytest.approx(1)
    assert "rank correlation of predictor and predictor over 6 layers: 1 [1, 1]" in str(exact)
    again = ml.bypass.predictor_agreement(made(predicted), measured, level=0.5)
    assert found.low < again.low


def test_effects_and_bounds_of_a_model_can_be_set_against_it(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neo", "bridge"), ragged()
    predicted = ml.bypass.predictor(model, seqs, progress=False)
    effects = ml.bypass_attention(model, seqs, progress=False)
    bounds = ml.bypass.bounds(model, seqs, progress=False)
    for measured, metric in ((effects, "target_logprob"), (bounds, "kl"), (bounds, "max_logit_change")):
        found = ml.bypass.predictor_agreement(predicted, measured, metric, predictor="relative_predictor")
        assert -1 <= found.low <= found.value <= found.high <= 1


def test_bad_input(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neo", "bridge"), ragged()
    predicted = ml.bypass.predictor(model, seqs, progress=False)
    with pytest.raises(SiteError, match="layer 9"):
        ml.bypass.predictor(model, seqs, layers=[9])
    with pytest.raises(ResultError, match="same sequences"):
        ml.bypass.predictor_agreement(predicted, ml.bypass_attention(model, seqs[:2], progress=False))
    few = ml.bypass.predictor(model, seqs, layers=[0, 1], progress=False)
    with pytest.raises(ResultError, match="same layers"):
        ml.bypass.predictor_agreement(few, ml.bypass_attention(model, seqs, progress=False))
    with pytest.raises(ResultError, match="2 layers cannot be ranked"):
        ml.bypass.predictor_agreement(few, few, "predictor")
