"""Heads together: joint edits by hand, additivity, rankings, and when recall goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, ResultError, SiteError
from memlens.instruments.ablate.heads import head_set_ablations, rank_heads
from tests.small import largest_difference, ragged, spread

SETS = {"none": [], "one": [(1, 2)], "layer": [(1, 0), (1, 3)], "two layers": [(0, 1), (2, 0), (2, 3)]}
MODES = ("mean_of_other_heads", "zero", "mean", "resample")


@pytest.mark.parametrize(("family", "backend", "mode"), spread(MODES, each=2))
def test_fast_equals_reference(tiny_model: Any, family: str, backend: str, mode: str) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    edits = head_set_ablations(model, seqs, {k: v for k, v in SETS.items() if v}, mode=mode)
    fast, plain = (
        ml.sweep(model, seqs, edits, ("target_logprob", "margin"), engine=engine, progress=False)
        for engine in ("fast", "reference")
    )
    assert largest_difference(fast, plain) < 1e-5
    assert float(abs(plain.effect("target_logprob")).min("intervention").max()) > 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_set_of_one_is_the_head_alone(tiny_model: Any, mode: str) -> None:
    model, seqs = tiny_model("llama_gqa", "bridge"), ragged()
    alone = ml.ablate_heads(model, seqs, mode=mode, layers=[1], heads=[2], seed=3, progress=False)
    sets = head_set_ablations(model, seqs, {"one": [(1, 2)], "none": []}, mode=mode, seed=3)
    got = ml.sweep(model, seqs, sets, progress=False)["target_logprob"]
    assert np.allclose(got[:, 0], alone["target_logprob"][:, 0, 0], atol=1e-6)
    assert np.allclose(got[:, 1], alone.baseline("target_logprob"), atol=1e-6)


@pytest.mark.parametrize("positions", ["all", "targets"])
def test_heads_that_stay_give_the_mean(tiny_model: Any, positions: str) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    (edit,) = head_set_ablations(model, seqs, {"a": [(1, 0), (1, 3)]}, positions=positions)

    def by_hand(z: torch.Tensor, hook: Any) -> torch.Tensor:
        out = z.clone()
        at = torch.zeros(z.shape[:2], dtype=torch.bool)
        for row in range(len(z)):
            start = int(seqs.prefix_len[row]) - 1 if positions == "targets" else 0
            stop = int(seqs.lengths[row]) - 1 if positions == "targets" else z.shape[1]
            at[row, start:stop] = True
        mean = (z[:, :, 1] + z[:, :, 2]) / 2
        for head in (0, 3):
            out[:, :, head] = torch.where(at[..., None], mean, z[:, :, head])
        return out

    plain = ml.Intervention("by hand", [("blocks.1.attn.hook_z", by_hand)])
    got = ml.sweep(model, seqs, [edit, plain], ("target_logprob",), engine="reference", progress=False)
    assert np.allclose(got["target_logprob"][:, 0], got["target_logprob"][:, 1], atol=1e-6)


def test_a_whole_layer_is_zero(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    whole = [(1, head) for head in range(model.cfg.n_heads)]
    edits = [head_set_ablations(model, seqs, {m: whole}, mode=m)[0] for m in ("mean_of_other_heads", "zero")]
    values = ml.sweep(model, seqs, edits, progress=False)["target_logprob"]
    assert np.allclose(values[:, 0], values[:, 1], atol=1e-6)


def test_pairs_and_their_interaction(tiny_model: Any) -> None:
    model, seqs = tiny_model("olmo", "bridge"), ragged()
    heads = [(0, 1), (2, 3), (2, 0)]
    result = ml.instruments.ablate_head_pairs(model, seqs, heads, mode="zero", progress=False)
    values = result["target_logprob"]
    assert values.dims == ("sequence", "head_a", "head_b")
    assert np.array_equal(values, values.transpose("sequence", "head_b", "head_a"))
    for i, (layer, head) in enumerate(heads):
        one = ml.ablate_heads(model, seqs, mode="zero", layers=[layer], heads=[head], progress=False)
        assert np.allclose(values[:, i, i], one["target_logprob"][:, 0, 0], atol=1e-6)
    (both,) = head_set_ablations(model, seqs, {"both": heads[:2]}, mode="zero")
    want = ml.sweep(model, seqs, [both], progress=False)["target_logprob"][:, 0]
    assert np.allclose(values[:, 0, 1], want, atol=1e-6)
    extra = values[:, 0, 1] - values[:, 0, 0] - values[:, 1, 1] + result.baseline("target_logprob")
    assert np.allclose(result["interaction"][:, 1, 0], extra, atol=1e-6)
    assert bool(result["interaction"][:, [0, 1], [0, 1]].isnull().values[:, [0, 1], [0, 1]].all())
    assert bool(result["interaction"][:, 0, 2].notnull().all())


def test_ranking_is_by_mean_effect(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    result = ml.ablate_heads(model, seqs, progress=False)
    order = rank_heads(result)
    effects = [float(result.effect("target_logprob").sel(layer=a, head=b).mean()) for a, b in order]
    assert effects == sorted(effects)
    assert len(set(order)) == 3 * model.cfg.n_heads
    with pytest.raises(ResultError, match="does not rank heads"):
        rank_heads(ml.bypass_attention(model, seqs, progress=False))


def test_cumulative_ends_with_every_head(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    alone = ml.ablate_heads(model, seqs, mode="zero", progress=False)
    result = ml.instruments.ablate_heads_cumulatively(
        model, seqs, alone, mode="zero", n_random=2, progress=False
    )
    total = 3 * model.cfg.n_heads
    assert result["n_ablated"].values.tolist() == [1, 2, 3, 4, 6, 8, total]
    last = result["target_logprob"].sel(n_ablated=total)
    assert np.allclose(last, last[:, :1], atol=1e-6)  # all heads: whatever the order
    every = {"all": [(layer, h) for layer in range(3) for h in range(model.cfg.n_heads)]}
    want = ml.sweep(model, seqs, head_set_ablations(model, seqs, every, mode="zero"), progress=False)
    assert np.allclose(last[:, 0], want["target_logprob"][:, 0], atol=1e-6)
    first = result["target_logprob"].sel(order="ranked", n_ablated=1)
    layer, head = rank_heads(alone)[0]
    assert np.allclose(first, alone["target_logprob"].sel(layer=layer, head=head), atol=1e-6)
    again = ml.instruments.ablate_heads_cumulatively(
        model, seqs, alone, mode="zero", n_random=2, progress=False
    )
    assert again.data.drop_attrs().identical(result.data.drop_attrs())


def test_recall_of_the_zoo_goes_sooner_by_rank_than_by_chance() -> None:
    model = ml.load_model("zoo/pythia-s")
    recalled = ml.score_recall(model, ml.load_sequences("zoo", model)[:120], progress=False).memorized()[:24]
    ranking = ml.ablate_heads(model, recalled[:12], progress=False)
    result = ml.instruments.ablate_heads_cumulatively(model, recalled[12:], ranking, progress=False)
    assert float(result.baseline("exact_match").min()) == 1
    lost = result["heads_until_lost"]
    chance = lost.sel(order=[o for o in lost["order"].values if o != "ranked"])
    assert float(lost.sel(order="ranked").mean()) < float(chance.mean())
    row, n = 3, int(lost.sel(order="ranked")[3])
    exact = result["exact_match"].sel(order="ranked")[row]
    assert float(exact.sel(n_ablated=n)) == 0
    assert bool((exact.where(exact["n_ablated"] < n, drop=True) == 1).all())


def test_whole_results_are_kept_in_a_folder(tiny_model: Any, tmp_path: Any) -> None:
    model, seqs, heads = tiny_model("gpt_neox", "bridge"), ragged(), [(0, 1), (2, 3)]
    pairs = ml.instruments.ablate_head_pairs(model, seqs, heads, out=tmp_path / "a", progress=False)
    lost = ml.instruments.ablate_heads_cumulatively(model, seqs, heads, out=tmp_path / "b", progress=False)
    assert ml.load_result(tmp_path / "a" / "result.nc").data.identical(pairs.data)
    assert ml.load_result(tmp_path / "b" / "result.nc").data.identical(lost.data)


def test_figures(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    pairs = ml.instruments.ablate_head_pairs(model, seqs, [(0, 1), (2, 3), (2, 0)], progress=False)
    figure = pairs.plot()
    assert list(figure.data[0].x) == ["L0H1", "L2H3", "L2H0"]
    assert np.allclose(
        np.array(figure.data[0].z, dtype=float), pairs["interaction"].mean("sequence"), equal_nan=True
    )
    lost = ml.instruments.ablate_heads_cumulatively(model, seqs, [(0, 1), (2, 3)], n_random=1, progress=False)
    lines = [trace for trace in lost.plot("target_logprob").data if trace.mode == "lines+markers"]
    assert [trace.name for trace in lines] == ["ranked", "random 0"]
    assert np.allclose(lines[0].y, lost["target_logprob"].sel(order="ranked").mean("sequence"))


def test_bad_input(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    with pytest.raises(OptionError, match="makes no pair"):
        ml.instruments.ablate_head_pairs(model, seqs, [(0, 0)])
    with pytest.raises(SiteError, match="contains a head twice"):
        ml.instruments.ablate_head_pairs(model, seqs, [(0, 0), (0, 0)])
    with pytest.raises(SiteError, match="head 9 does not exist"):
        ml.instruments.ablate_head_pairs(model, seqs, [(0, 0), (0, 9)])
    with pytest.raises(OptionError, match=r"counts=\[5\] of an order of 2 heads"):
        ml.instruments.ablate_heads_cumulatively(model, seqs, [(0, 0), (1, 1)], counts=[5])
