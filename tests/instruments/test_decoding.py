"""Logit lens and direct logit attribution against independent computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import memlens as ml
from memlens.errors import EmptySetError, OptionError, SequenceError, SiteError
from tests.small import CASES, ragged


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_last_layer_is_the_model(tiny_model: Any, family: str, backend: str) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    data = ml.decode_residual(model, seqs, progress=False, batch_size=3).data
    with torch.no_grad():
        logits = model(seqs.tokens)
    for row in range(len(seqs)):
        for t, p in enumerate(range(int(seqs.prefix_len[row]), int(seqs.lengths[row]))):
            here = logits[row, p - 1]
            target = seqs.tokens[row, p]
            prob = here.softmax(-1)
            last = data.isel(sequence=row, target=t, layer=-1)
            assert float(last.probability) == pytest.approx(prob[target].item(), abs=1e-5)
            assert int(last["rank"]) == int((here > here[target]).sum())
            assert int(last.predicted_rank) == 0
            assert float(last.predicted_probability) == pytest.approx(prob.max().item(), abs=1e-5)
            assert float(last.entropy) == pytest.approx(-(prob * prob.log()).sum().item(), abs=1e-4)
            assert float(last.kl_to_final) == pytest.approx(0, abs=1e-6)
        beyond = data.isel(sequence=row).probability.values[:, int(seqs.n_targets[row]) :]
        assert np.isnan(beyond).all()


def test_a_middle_layer_by_hand(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neo", "bridge"), ragged()
    data = ml.decode_residual(model, seqs, progress=False).data
    row, t = 1, 2
    position = int(seqs.prefix_len[row]) + t
    with torch.no_grad():
        _, cache = model.run_with_cache(seqs.tokens)
        hf = model.original_model
        here = hf.lm_head(
            hf.transformer.ln_f(cache["blocks.1.hook_resid_post"][row, position - 1][None, None])
        )[0, 0]
        final = model(seqs.tokens)[row, position - 1].log_softmax(-1)
    logp = here.log_softmax(-1)
    cell = data.isel(sequence=row, target=t).sel(layer=1)
    assert float(cell.probability) == pytest.approx(logp[seqs.tokens[row, position]].exp().item(), abs=1e-6)
    want = torch.nn.functional.kl_div(logp, final, log_target=True, reduction="sum").item()
    assert float(cell.kl_to_final) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_cache_gives_the_same(tiny_model: Any, backend: str) -> None:
    model, seqs = tiny_model("olmo2", backend), ragged()
    with torch.no_grad():
        _, cache = model.run_with_cache(seqs.tokens)
    streams = ("resid_post", "resid_mid", "mlp_out", "attn_out")
    own = ml.decode_residual(model, seqs, streams=streams, progress=False).data
    given_ = ml.decode_residual(model, seqs, streams=streams, cache=cache, progress=False).data
    assert own.probability.dims == ("sequence", "stream", "layer", "target")
    assert np.allclose(own.probability, given_.probability, atol=1e-5, equal_nan=True)
    a = ml.attribute_logits(model, seqs, progress=False).data
    b = ml.attribute_logits(model, seqs, cache=cache, progress=False).data
    assert np.allclose(a.head_logit, b.head_logit, atol=1e-5)
    with pytest.raises(SequenceError, match=r"make the cache from sequences\.tokens"):
        ml.decode_residual(model, seqs[:2], cache=cache, progress=False)
    with pytest.raises(SiteError, match="the cache has no"):
        ml.decode_residual(model, seqs, cache={}, progress=False)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=8).map(lambda ranks: [*ranks, 0]),
    st.lists(st.floats(0.01, 1), min_size=9, max_size=9),
)
def test_promotion_layers(ranks: list[int], probs: list[float]) -> None:
    probability = torch.tensor(probs[: len(ranks)], dtype=torch.float64)
    out = ml.lens.promotion_layers(torch.tensor(ranks)[:, None].double(), probability[:, None])
    first = ranks.index(0)
    stable = max((i + 1 for i, r in enumerate(ranks) if r != 0), default=0)
    assert int(out["first_promotion"]) == first
    assert int(out["stable_promotion"]) == stable
    assert float(out["boost"]) == pytest.approx(probs[len(ranks) - 1] - probs[stable])
    assert float(out["promotion_share"]) == pytest.approx(probs[stable] / probs[len(ranks) - 1])


def test_never_promoted_is_nan() -> None:
    out = ml.lens.promotion_layers(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.3], [0.1]]))
    assert int(out["first_promotion"]) == 0
    assert all(torch.isnan(out[k]).all() for k in ("stable_promotion", "boost", "promotion_share"))


@pytest.mark.parametrize(("family", "backend"), CASES)
@pytest.mark.parametrize("baseline", ["mean_logit", "none"])
def test_attribution_adds_up(tiny_model: Any, family: str, backend: str, baseline: str) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    data = ml.attribute_logits(model, seqs, baseline=baseline, progress=False, batch_size=3).data
    parts = data.embedding + data.attn.sum("layer") + data.mlp.sum("layer") + data.bias
    assert float(abs(parts - data.total).max()) < 1e-4
    assert float(abs(data.head_logit.sum("head") + data.attn_bias - data.attn).max()) < 1e-4
    with torch.no_grad():
        logits = model(seqs.tokens)
    row = 1
    places = range(int(seqs.prefix_len[row]), int(seqs.lengths[row]))
    want = np.mean(
        [
            (
                logits[row, p - 1, seqs.tokens[row, p]]
                - (logits[row, p - 1].mean() if baseline == "mean_logit" else 0)
            ).item()
            for p in places
        ]
    )
    assert float(data.total[row]) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "olmo", "olmo2", "olmo3"])
def test_heads_alone_make_the_attention_where_there_is_no_bias(tiny_model: Any, family: str) -> None:
    data = ml.attribute_logits(tiny_model(family, "bridge"), ragged(), progress=False).data
    assert float(abs(data.attn_bias).max()) < 1e-5
    assert float(abs(data.attn).max()) > 1e-3


def test_a_head_by_hand(tiny_model: Any) -> None:
    """The credit of a head of the last layer is what its absence takes from the logit, the norm held."""
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(1)
    data = ml.attribute_logits(model, seqs, baseline="none", progress=False).data
    hf = model.original_model
    with torch.no_grad():
        _, cache = model.run_with_cache(seqs.tokens)
        weight = hf.gpt_neox.layers[2].attention.dense.weight
        final, norm = cache["blocks.2.hook_resid_post"], hf.gpt_neox.final_layer_norm
        head = cache["blocks.2.attn.hook_z"][:, :, 1] @ weight[:, 8:16].T
        std = (final.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        part = (head - head.mean(-1, keepdim=True)) / std * norm.original_component.weight
        credit = (part @ hf.get_output_embeddings().weight.T)[0]
    places = range(int(seqs.prefix_len[0]), int(seqs.lengths[0]))
    want = np.mean([credit[p - 1, seqs.tokens[0, p]].item() for p in places])
    assert float(data.head_logit.sel(layer=2, head=1)[0]) == pytest.approx(want, abs=1e-5)


def test_bad_input(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    with pytest.raises(OptionError, match="stream='resid'"):
        ml.decode_residual(model, seqs, streams=("resid",))
    with pytest.raises(SiteError, match="no 'resid_mid'"):
        ml.decode_residual(model, seqs, streams=("resid_mid",))
    with pytest.raises(EmptySetError):
        ml.decode_residual(model, seqs[[]], progress=False)
    for work in (ml.decode_residual, ml.attribute_logits):
        with pytest.raises(SequenceError, match="token id 5000"):
            work(model, ml.SequenceSet.from_tokens([[1, 5000, 2]], 1))
        with pytest.raises(SequenceError, match="65 tokens"):
            work(model, ml.SequenceSet.from_tokens([list(range(65))], 1))
    with pytest.raises(OptionError, match="baseline='mean'"):
        ml.attribute_logits(model, seqs, baseline="mean")
