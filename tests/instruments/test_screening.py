"""Screening: what is chosen, that what is verified is exact, and that the agreement is counted right."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

import memlens as ml
from memlens.errors import OptionError, SequenceError, SiteError
from memlens.instruments.screen import screening as module
from memlens.instruments.screen.instruments import screen_of
from memlens.instruments.screen.screening import Verified, agreement_table, bfloat16_time, recall_of_top
from memlens.results.statistics.agreement import rank_correlation
from tests.small import CASES, corrupted, ragged

RECALL, SHARE = "recall of exact top k", "share of the rest above the screened median"


def exact_neurons(model: Any, seqs: ml.SequenceSet, layer: int, neuron: int) -> float:
    def cut(x: Any, hook: Any) -> Any:
        x = x.clone()
        x[..., neuron] = 0
        return x

    edit = ml.Intervention("cut", [(f"blocks.{layer}.mlp.hook_post", cut)])
    return float(ml.sweep(model, seqs, [edit], progress=False).effect("target_logprob").mean())


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_verified_heads_are_the_exact_sweeps(tiny_model: Any, family: str, backend: str) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    found = ml.screen_then_verify(
        model, seqs, instrument="head_ablation", top_k=4, n_random=3, n_resamples=100, progress=False
    )
    whole = (
        ml.ablate_heads(model, seqs, mode="zero", progress=False).effect("target_logprob").mean("sequence")
    )
    estimate = found.estimate.effect("target_logprob").mean("sequence")
    for _, row in found.table.iterrows():
        where = {"layer": row["layer"], "head": row["head"]}
        assert row["exact"] == pytest.approx(float(whole.sel(where)), abs=1e-5)
        assert row["estimate"] == pytest.approx(float(estimate.sel(where)), abs=1e-9)
        assert row["exact_low"] <= row["exact"] <= row["exact_high"]
    assert found.table["chosen"].value_counts().to_dict() == {"screened": 4, "random": 3}
    assert sorted(found.table.query("chosen == 'screened'")["rank_estimate"]) == [1, 2, 3, 4]
    assert found.n_sites == whole.size
    order = abs(found.table["exact"]).tolist()
    assert order == sorted(order, reverse=True)


def test_all_verified_gives_the_true_agreement(tiny_model: Any) -> None:
    model, clean = tiny_model("llama_gqa", "bridge"), ragged()
    corrupt = corrupted(clean)
    options: dict[str, Any] = {"site": "z", "over": "head", "progress": False}
    found = ml.screen_then_verify(
        model, clean, corrupt, top_k=5, verify="all", method="attribution_patching", **options
    )
    cheap = ml.attribute_gradients(model, clean, corrupt, **options)
    exact = ml.patch_activations(model, clean, corrupt, **options)
    a, b = (r.effect("target_logprob").mean("sequence").values.ravel() for r in (cheap, exact))
    got = found.agreement
    assert got.loc["rank correlation, all sites", "value"] == pytest.approx(spearmanr(a, b).statistic)
    common = set(np.argsort(-abs(a))[:5]) & set(np.argsort(-abs(b))[:5])
    assert got.loc[RECALL, "value"] == pytest.approx(len(common) / 5)
    assert got.loc[RECALL, "n_sites"] == found.n_sites == 12
    assert "normalized_effect" in found.exact.data
    for name in ("rank correlation, all sites", RECALL):
        assert got.loc[name, "low"] <= got.loc[name, "value"] <= got.loc[name, "high"]


@pytest.mark.parametrize("instrument", ["neuron_ablation", "neuron_patching"])
def test_neurons(tiny_model: Any, instrument: str) -> None:
    model, clean = tiny_model("starcoder2", "bridge"), ragged()
    corrupt = corrupted(clean) if instrument == "neuron_patching" else None
    found = ml.screen_then_verify(
        model, clean, corrupt, instrument=instrument, top_k=6, n_random=6, layers=[0, 2], progress=False
    )
    assert found.n_sites == 2 * 64
    assert set(found.table["layer"]) <= {0, 2}
    row = found.table.iloc[0]
    if instrument == "neuron_ablation":
        want = exact_neurons(model, clean, int(row["layer"]), int(row["neuron"]))
        assert row["exact"] == pytest.approx(want, abs=1e-5)
    means = found.table.groupby("chosen")["exact"].apply(lambda x: abs(x).mean())
    assert means["screened"] > 2 * means["random"]
    assert found.agreement.loc["rank correlation, screened", "value"] > 0.5


def test_mlps(tiny_model: Any) -> None:
    model, clean = tiny_model("gpt_neox", "bridge"), ragged()
    found = ml.screen_then_verify(
        model, clean, instrument="mlp_ablation", verify="all", n_resamples=100, progress=False
    )
    whole = ml.ablate_mlps(model, clean, progress=False).effect("target_logprob").mean("sequence")
    for _, row in found.table.iterrows():
        assert row["exact"] == pytest.approx(float(whole.sel(layer=row["layer"])), abs=1e-5)


def test_mean_ablation_of_neurons(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    found = ml.screen_then_verify(
        model, seqs, instrument="neuron_ablation", mode="mean", positions="targets", top_k=3, n_random=0,
        progress=False,
    )  # fmt: skip
    assert found.table["exact"].abs().min() > 0
    assert np.isnan(found.agreement.loc[RECALL, "value"])  # nothing of the rest was looked at
    assert SHARE not in found.agreement.index


def test_positions_and_ragged_sets(tiny_model: Any) -> None:
    model, clean = tiny_model("olmo", "bridge"), ragged()
    found = ml.screen_then_verify(
        model, clean, corrupted(clean), positions=[2, 13], layers=[0, 1], top_k=2, n_random=2, batch_size=2,
        direction="noising", rank_by="decrease", progress=False,
    )  # fmt: skip
    by_position = found.table.set_index("position")["n"]
    lengths = clean.lengths.numpy() - 1
    for position, n in by_position.items():
        assert n == int((lengths > position).sum())
    assert found.table["exact"].is_monotonic_increasing


@pytest.mark.parametrize("rank_by", ["decrease", "increase"])
def test_ranking_by_sign(tiny_model: Any, rank_by: str) -> None:
    model, seqs = tiny_model("olmo", "bridge"), ragged()
    found = ml.screen_then_verify(
        model, seqs, instrument="head_ablation", rank_by=rank_by, top_k=3, n_random=0, progress=False
    )
    every = found.estimate.effect("target_logprob").mean("sequence").values.ravel()
    sign = -1 if rank_by == "decrease" else 1
    assert sorted(sign * found.table["estimate"]) == pytest.approx(sorted(sign * every)[-3:])


def test_a_seed_draws_the_random_sites(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()

    def drawn(seed: int) -> set[tuple[int, int]]:
        table = ml.screen_then_verify(
            model, seqs, instrument="neuron_ablation", top_k=2, n_random=5, seed=seed, steps=1, progress=False
        ).table.query("chosen == 'random'")
        return set(zip(table["layer"], table["neuron"], strict=True))

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_figures_and_words(tiny_model: Any) -> None:
    model, clean = tiny_model("gpt_neox", "bridge"), ragged()
    found = ml.screen_then_verify(
        model, clean, corrupted(clean), instrument="neuron_patching", top_k=3, n_random=2, progress=False
    )
    fig = found.plot()
    assert isinstance(fig, go.Figure)
    assert sum(len(trace.x) for trace in fig.data if trace.mode == "markers") == 5
    assert "recall of the exact top k" in fig.layout.title.subtitle.text
    assert "5 verified" in repr(found)
    assert isinstance(found.exact.plot(), go.Figure)
    assert isinstance(found.estimate.plot(), go.Figure)


@pytest.mark.parametrize(("family", "backend"), CASES[:2])
def test_a_screen_in_bfloat16_runs_every_site_and_verifies_in_the_models_precision(
    tiny_model: Any, family: str, backend: str
) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    before = [(p.dtype, p.data_ptr()) for p in model.parameters()]
    found = ml.screen_then_verify(
        model, seqs, instrument="head_ablation", precision="bfloat16", top_k=4, verify="all", n_resamples=50,
        metrics=("exact_match", "target_logprob"), progress=False,
    )  # fmt: skip
    assert [(p.dtype, p.data_ptr()) for p in model.parameters()] == before
    whole = ml.ablate_heads(model, seqs, mode="zero", progress=False)
    assert found.metric == "exact_match"  # which has no gradient
    found = ml.screen_then_verify(
        model, seqs, instrument="head_ablation", precision="bfloat16", top_k=4, verify="all", n_resamples=50,
        progress=False,
    )  # fmt: skip
    assert found.estimate.settings["precision"] == "bfloat16"
    assert found.n_sites == whole["target_logprob"][0].size == len(found.table)
    want = whole.effect("target_logprob")
    rough, exact = (
        r.effect("target_logprob").reindex_like(want).values for r in (found.estimate, found.exact)
    )
    assert exact == pytest.approx(want.values, abs=1e-5)
    assert 1e-5 < np.abs(rough - exact).max() < 0.1
    assert found.agreement.loc["rank correlation, all sites", "value"] > 0.8


def test_a_screen_in_bfloat16_patches_positions_and_neurons(tiny_model: Any) -> None:
    model, clean = tiny_model("olmo", "bridge"), ragged()
    corrupt = corrupted(clean)
    options: dict[str, Any] = {"precision": "bfloat16", "top_k": 3, "n_random": 2, "progress": False}
    found = ml.screen_then_verify(
        model, clean, corrupt, positions=[2, 13], layers=[0, 1], direction="noising", **options
    )
    assert found.n_sites == 4
    lengths = clean.lengths.numpy() - 1
    for position, n in found.table.set_index("position")["n"].items():
        assert n == int((lengths > position).sum())
    assert found.table["estimate"].to_numpy() == pytest.approx(found.table["exact"].to_numpy(), abs=0.1)
    mlps = ml.screen_then_verify(model, clean, instrument="mlp_ablation", layers=[0, 2], **options)
    assert sorted(mlps.table["layer"]) == [0, 2]
    found = ml.screen_then_verify(
        model, clean, corrupt, instrument="neuron_patching", layers=[2], donor=deepcopy(model), **options
    )
    assert found.n_sites == model.cfg.d_mlp
    assert found.table["chosen"].tolist().count("random") == 2


def test_where_bfloat16_is_slower_a_screen_says_so(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(2)
    assert 0 < bfloat16_time(model, rows=2, repeats=1) < np.inf
    options: dict[str, Any] = {"instrument": "head_ablation", "layers": [0], "top_k": 1, "n_random": 0}
    for share, warned in ((2.5, True), (0.5, False)):
        caplog.clear()
        monkeypatch.setattr(module, "bfloat16_time", lambda model, share=share: share)
        ml.screen_then_verify(model, seqs, precision="bfloat16", progress=False, **options)
        assert ("2.5 times as long in bfloat16 as in torch.float32" in caplog.text) == warned


@given(st.integers(1, 6), st.integers(0, 9), st.integers(0, 10_000))
def test_recall_with_every_site_is_the_overlap(k: int, rest: int, seed: int) -> None:
    score = np.random.default_rng(seed).permutation(k + rest).astype(float)
    screened = np.arange(k + rest) < k
    recall, missed = recall_of_top(score, screened, rest)
    top = set(np.argsort(-score)[:k])
    assert recall == pytest.approx(len(top & set(range(k))) / k)
    assert int(missed) == len(top) - round(float(recall) * k)


def test_recall_of_a_sample_is_right_on_average() -> None:
    """Half of the rest's sites are drawn: the mean over draws is close to the recall with all of them."""
    rng = np.random.default_rng(0)
    k, rest = 20, 80
    score = rng.normal(size=k + rest) + np.where(np.arange(k + rest) < k, 1.2, 0)
    screened = np.arange(k + rest) < k
    true, _ = recall_of_top(score, screened, rest)
    found = []
    for _ in range(400):
        drawn = np.concatenate([np.arange(k), k + rng.permutation(rest)[:40]])
        found.append(float(recall_of_top(score[drawn], screened[drawn], rest)[0]))
    assert 0.2 < float(true) < 0.9
    assert np.mean(found) == pytest.approx(float(true), abs=0.03)


def test_rank_correlation_is_scipys() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, (7, 12)).astype(float), rng.normal(size=(7, 12))
    want = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert rank_correlation(a, b) == pytest.approx(want)
    assert np.isnan(rank_correlation(a[:, :2], b[:, :2])).all()


def test_intervals_hold_what_they_should() -> None:
    """One number a sequence and site: with true means known, the intervals mostly hold the true agreement."""
    k, rest, drawn = 6, 60, 30
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        mean = rng.normal(size=k + rest)
        guess = mean + 0.7 * rng.normal(size=k + rest)
        order = np.argsort(-abs(guess))
        mean, guess = mean[order], guess[order]
        true = len(set(np.argsort(-abs(mean))[:k]) & set(range(k))) / k
        exact = mean + 0.5 * rng.normal(size=(30, k + rest))
        some = np.concatenate([np.arange(k), k + rng.permutation(rest)[:drawn]])
        data = Verified(
            np.broadcast_to(guess, exact.shape)[:, some], exact[:, some], some < k, k + rest, np.abs
        )
        row = agreement_table(data, level=0.95, n_resamples=200, seed=0).loc[RECALL]
        held += row["low"] - 1e-9 <= true <= row["high"] + 1e-9
    assert held >= 36


def test_bad_input(tiny_model: Any) -> None:
    model, clean = tiny_model("gpt_neox", "bridge"), ragged()
    corrupt = corrupted(clean)
    for options, error, words in (
        ({"instrument": "patch"}, OptionError, "unknown instrument 'patch'"),
        ({"instrument": "patching"}, SequenceError, "needs corrupt sequences"),
        ({"instrument": "head_ablation", "corrupt": corrupt}, SequenceError, "does not use corrupt"),
        ({"instrument": "head_ablation", "site": "z"}, OptionError, "does not use site='z'"),
        ({"instrument": "head_ablation", "top_k": 0}, OptionError, "top_k=0"),
        ({"instrument": "head_ablation", "n_random": -1}, OptionError, "n_random=-1"),
        ({"instrument": "head_ablation", "rank_by": "size"}, OptionError, "rank_by='size'"),
        ({"instrument": "head_ablation", "verify": "some"}, OptionError, "verify='some'"),
        ({"instrument": "head_ablation", "level": 95}, OptionError, "level=95"),
        ({"instrument": "head_ablation", "layers": [7]}, SiteError, "layer 7 does not exist"),
        ({"instrument": "neuron_ablation", "mode": "mean_of_other_heads"}, OptionError, "needs site='z'"),
        ({"instrument": "attention_bypass"}, OptionError, "has no gradient estimate"),
        ({"instrument": "head_ablation", "precision": "int8"}, OptionError, "precision='int8'"),
        ({"corrupt": corrupt, "precision": "bfloat16", "steps": 2}, OptionError, "belong to gradients"),
        ({"corrupt": corrupt, "metrics": ("exact_match",)}, OptionError, "has no gradient"),
        ({"corrupt": corrupt, "site": "resid_mid"}, SiteError, "no site 'resid_mid'"),
    ):
        with pytest.raises(error, match=words):
            ml.screen_then_verify(model, clean, progress=False, **options)


def test_the_registry_s_instruments_give_what_they_declare(tiny_model: Any) -> None:
    """Each runs on the same sequences; its result has the declared kind and dimension."""
    model, clean = tiny_model("gpt_neox", "bridge"), ragged()
    names = ml.instruments.INSTRUMENTS.names()
    assert {"head_ablation", "mlp_ablation", "attention_bypass", "patching", "neuron_ablation"} <= set(names)
    for tool in ml.instruments.INSTRUMENTS.values():
        if tool.run is not None:
            pair = (corrupted(clean),) if tool.pairs else ()
            result = tool.run(model, clean, *pair, progress=False)
            assert result.kind == tool.kind
            assert tool.ranks == "site" or tool.ranks in result.data.dims


def test_a_new_instrument_is_screened_by_its_name(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered outside memlens' own modules, with the screen of head ablation."""
    own = ml.instruments.INSTRUMENTS["head_ablation"]
    ml.instruments.register_instrument("mine", ranks="head", kind=own.kind, screen=own.screen)
    try:
        options: dict[str, Any] = {"top_k": 2, "n_random": 0, "progress": False}
        model, clean = tiny_model("gpt_neox", "bridge"), ragged()
        mine, theirs = (
            ml.screen_then_verify(model, clean, instrument=name, **options)
            for name in ("mine", "head_ablation")
        )
        assert mine.table.equals(theirs.table)
        with pytest.raises(OptionError, match="instrument='mine' does not use mode='mean'"):
            ml.screen_then_verify(model, clean, instrument="mine", mode="mean", **options)
        monkeypatch.setattr(
            module, "screen_of", lambda *args, **given: replace(screen_of(*args, **given), cells=None)
        )
        with pytest.raises(OptionError, match="instrument='mine' does not list its sites"):
            ml.screen_then_verify(model, clean, instrument="mine", precision="bfloat16", **options)
        with pytest.raises(OptionError, match=r"weights are torch\.bfloat16 already"):
            ml.screen_then_verify(
                deepcopy(model).to(torch.bfloat16), clean, instrument="mine", precision="bfloat16", **options
            )
        with pytest.raises(OptionError, match="measures nothing"):
            ml.instruments.register_instrument("nothing", ranks="head", kind=own.kind)
        with pytest.raises(OptionError, match=r"ranks='heads' is not known.*Did you mean 'head'"):
            ml.instruments.register_instrument("nothing", ranks="heads", kind=own.kind, screen=own.screen)
        with pytest.raises(OptionError, match="unknown kind of result 'no_kind'"):
            ml.instruments.register_instrument("nothing", ranks="head", kind="no_kind", screen=own.screen)
    finally:
        del ml.instruments.INSTRUMENTS._items["mine"]
