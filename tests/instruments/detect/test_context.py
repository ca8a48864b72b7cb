"""In context or in weights: the sets built by hand, effects against head ablation, and who wins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import memlens as ml
from memlens.errors import EmptySetError, OptionError, ResultError, SequenceError
from memlens.instruments.detect.context.patching import patched_pairs
from memlens.results.kinds import reading
from memlens.sequences.set import SequenceSet
from tests.instruments.detect.test_separation import random_set
from tests.small import ragged

BACKENDS = ["hooked", "bridge"]
NO_SEPARATOR = ml.detect.ContextOptions(separator="")


def two() -> SequenceSet:
    return SequenceSet.from_tokens([[1, 2, 3, 4, 5], [11, 12, 13, 14, 15]], 3)


def test_the_three_sets_are_those_made_by_hand(tiny_model: Callable[..., Any]) -> None:
    options = ml.detect.ContextOptions(separator=(7, 8))
    built = ml.detect.context_sets(tiny_model("gpt_neox", "bridge"), two(), options=options)
    assert built.alone.rows() == two().rows()
    assert built.repeated.rows() == [
        [1, 2, 3, 4, 5, 7, 8, 1, 2, 3, 4, 5],
        [11, 12, 13, 14, 15, 7, 8, 11, 12, 13, 14, 15],
    ]
    assert built.conflict.rows() == [
        [1, 2, 3, 14, 15, 7, 8, 1, 2, 3, 4, 5],
        [11, 12, 13, 4, 5, 7, 8, 11, 12, 13, 14, 15],
    ]
    for seqs in (built.repeated, built.conflict):
        assert seqs.prefix_len.tolist() == [10, 10]
        assert torch.equal(seqs.target_ids, two().target_ids)
    copied = built.repeated.target_positions - torch.from_numpy(built.lag)[:, None]
    assert torch.equal(built.repeated.tokens.gather(1, copied), two().target_ids)
    assert [s.halves()[1] for s in built.with_wrong_targets()] == [[[14, 15], [4, 5]]] * 3


def test_a_text_separator_is_tokenized_and_a_prepended_token_stays_first(
    tiny_model: Callable[..., Any],
) -> None:
    seqs = two().with_attrs(prepend_bos=True)
    options = ml.detect.ContextOptions(separator="w7")
    built = ml.detect.context_sets(tiny_model("gpt_neox", "bridge"), seqs, options=options)
    assert built.repeated.rows()[0] == [1, 2, 3, 4, 5, 7, 2, 3, 4, 5]
    copied = built.repeated.target_positions - torch.from_numpy(built.lag)[:, None]
    assert torch.equal(built.repeated.tokens.gather(1, copied), two().target_ids)


def test_wrong_continuations_have_the_same_length_and_are_never_the_own(
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    rows = [[1, 2, 3, 4], [1, 5, 6, 7], [1, 2, 9], [1, 2, 8], [1, 2, 8, 8]]
    seqs = SequenceSet.from_tokens(rows, [2, 2, 2, 2, 2])
    built = ml.detect.context_sets(model, seqs, options=NO_SEPARATOR)
    own = seqs.halves()[1]
    assert sorted(map(tuple, built.wrong)) == sorted(map(tuple, own))
    assert all(len(a) == len(b) and a != b for a, b in zip(own, built.wrong, strict=True))
    alike = SequenceSet.from_tokens([[1, 2, 3], [4, 5, 3]], 2)
    with pytest.raises(SequenceError, match="too few differ"):
        ml.detect.context_sets(model, alike, options=NO_SEPARATOR)
    shuffle = ml.detect.ContextOptions(separator="", wrong="shuffle")
    one = ml.detect.context_sets(model, two()[:1], options=shuffle)
    assert one.wrong == [[5, 4]]
    with pytest.raises(SequenceError, match="row 2 repeats"):
        ml.detect.context_sets(model, seqs[[0, 1, 4]], options=shuffle)


def test_sequences_that_do_not_fit_twice_are_refused_or_left_out(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "bridge")
    n = model.cfg.n_ctx
    half, wide = n // 2, np.arange(n // 2 + 1) % 50
    seqs = SequenceSet.from_tokens([wide[:half].tolist(), (wide[:half] + 1).tolist(), wide.tolist()], 4)
    with pytest.raises(SequenceError, match=f"1 of 3 sequences are too long .* row 2 takes {2 * half + 2}"):
        ml.detect.context_sets(model, seqs, options=NO_SEPARATOR)
    drop = ml.detect.ContextOptions(separator="", too_long="drop", layers=(0,))
    with pytest.warns(UserWarning, match="row 2"):
        built = ml.detect.context_sets(model, seqs, options=drop)
    assert built.alone.ids == ["0", "1"]
    assert built.repeated.lengths.tolist() == [2 * half] * 2
    with pytest.warns(UserWarning, match="left out"):
        found = ml.detect.context_or_weights(model, seqs, options=drop, progress=False)
    assert found.settings["n_left_out"] == 1
    with pytest.raises(EmptySetError, match="none is left"):
        ml.detect.context_sets(model, seqs[2:], options=drop)
    with pytest.raises(EmptySetError):
        ml.detect.context_or_weights(model, seqs[:0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_effects_and_attention_are_those_of_the_sets(tiny_model: Callable[..., Any], backend: str) -> None:
    model, seqs = tiny_model("gpt_neox", backend), random_set(4, 0, 90, "a", 0)
    options = ml.detect.ContextOptions(separator=(3,), mode="zero", layers=(1,))
    found = ml.detect.context_or_weights(model, seqs, options=options, progress=False)
    built = ml.detect.context_sets(model, seqs, options=options)
    for condition, each in zip(("alone", "repeated", "conflict"), built, strict=True):
        here = found.data.sel(condition=condition)
        wanted = ml.ablate_heads(model, each, mode="zero", layers=[1], progress=False)
        np.testing.assert_array_equal(here["target_logprob"], wanted["target_logprob"])
        for row in range(4):
            tokens, start = torch.tensor([each.rows()[row]]), int(each.prefix_len[row])
            logits = model(tokens).detach()[0]
            logprob = logits.log_softmax(-1)[range(start - 1, tokens.shape[1] - 1), tokens[0, start:]]
            assert float(here["target_logprob_baseline"][row]) == pytest.approx(
                float(logprob.mean()), abs=1e-4
            )
            wrong = torch.tensor([[*each.rows()[row][:start], *built.wrong[row]]])
            logits = model(wrong).detach()[0]
            logprob = logits.log_softmax(-1)[range(start - 1, wrong.shape[1] - 1), wrong[0, start:]]
            assert float(here["wrong_logprob"][row]) == pytest.approx(float(logprob.mean()), abs=1e-4)
            if condition == "alone":
                assert here["copy_attention"].isnull().all()
                continue
            name = "blocks.1.attn.hook_pattern"
            pattern = model.run_with_cache(tokens, names_filter=[name])[1][name][0].detach()
            # The continuation starts at 6 in the text of 12 tokens, and again after 12 + 1 + 6.
            shares = [float(pattern[2, 18 + i, 6 + i]) for i in range(6)]
            assert float(here["copy_attention"][row, 0, 2]) == pytest.approx(np.mean(shares), abs=1e-5)
            first = [float(pattern[2, 18 + i, 0]) for i in range(6)]
            assert float(here["first_share"][row, 0, 2]) == pytest.approx(np.mean(first), abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_sets_equal_their_sequences_alone(tiny_model: Callable[..., Any], backend: str) -> None:
    model, seqs = tiny_model("gpt_neox", backend), ragged().first_targets(2)
    together = ml.detect.context_or_weights(model, seqs, options=NO_SEPARATOR, progress=False)
    for row in range(len(seqs)):
        one = SequenceSet.from_tokens([seqs.rows()[row]], int(seqs.prefix_len[row]))
        options = ml.detect.ContextOptions(separator="", wrong="shuffle")
        alone = ml.detect.context_or_weights(model, one, options=options, progress=False)
        for name in ("target_logprob", "copy_attention", "mean_distance"):
            a, b = (r[name].sel(condition="repeated").values for r in (together, alone))
            np.testing.assert_allclose(a[row], b[0], atol=1e-4)


def test_gradients_estimate_the_same(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), random_set(3, 0, 90, "a", 0)
    options = ml.detect.ContextOptions(separator="", effects="gradients", mode="zero", steps=4)
    found = ml.detect.context_or_weights(model, seqs, options=options, progress=False)
    repeated = ml.detect.context_sets(model, seqs, options=options).repeated
    wanted = ml.instruments.attribute_ablation(model, repeated, mode="zero", steps=4, progress=False)
    np.testing.assert_allclose(
        found.effect("target_logprob").sel(condition="repeated"), wanted.effect("target_logprob"), atol=1e-5
    )


def made(own: list[float], wrong: list[float], copies: list[int] | None = None) -> ml.Result:
    """A result of one head, whose effect is -1 alone and -3 where the text is repeated."""
    n = len(own)
    base = np.stack([np.full(n, -2.0), np.full(n, -0.5), own], 1)
    effect = np.array([-1.0, -3.0, 0.0]) + 0.125 * np.arange(n)[:, None] * np.array([0, 1, 0])
    before = np.where(np.arange(n) == 3, -1.0, -9.0)
    dims = ("sequence", "condition")
    data = xr.Dataset(
        {
            "target_logprob": ((*dims, "layer", "head"), (base + effect)[..., None, None]),
            "target_logprob_baseline": (dims, base),
            "wrong_logprob": (dims, np.stack([before, base[:, 0], wrong], 1)),
        },
        {"sequence": [f"s{i}" for i in range(n)], "condition": ["alone", "repeated", "conflict"],
         "layer": [0], "head": [0]},
    )  # fmt: skip
    if copies is not None:
        data = data.assign_coords(copies=("sequence", copies))
    return ml.Result.create(data, kind="context_or_weights")


def test_who_wins_is_counted_by_copies() -> None:
    result = made([-1.0, -3.0, -5.0, -1.0, -1.0], [-2.0, -2.0, -2.0, -4.0, -0.5], [1, 1, 1, 9, 9])
    table = ml.detect.which_wins(result)
    assert table["copies"].tolist() == [1, 9]
    assert table["n"].tolist() == [3, 2]
    assert table["context_wins"].tolist() == pytest.approx([2 / 3, 1 / 2])
    assert table["memorized"].tolist() == pytest.approx([-3.0, -1.0])
    assert table["wrong"].tolist() == pytest.approx([-2.0, -2.25])
    assert table["memorized_alone"].tolist() == [-2.0, -2.0]
    assert table["wins_alone"].tolist() == [0.0, 0.5]
    assert np.isfinite(table["low"][0])
    assert np.isnan(table[["low", "high"]].iloc[1]).all()
    whole = ml.detect.which_wins(made([-1.0, -3.0], [-2.0, -2.0]))
    assert whole[["copies", "context_wins"]].values.tolist() == [["all", 0.5]]


@pytest.mark.parametrize("n", [1, 2])
def test_few_sequences_have_no_interval(n: int) -> None:
    result = made([-1.0] * n, [-2.0] * n, [4] * n)
    difference = ml.detect.condition_difference(result).mean_ci(metric="target_logprob", of="effect")
    value, low, high = difference["target_logprob"].sel(statistic=["mean", "low", "high"]).values.ravel()
    assert value == pytest.approx(-2.0 + 0.0625 * (n - 1))
    assert np.isnan([low, high]).all()
    assert np.isnan(ml.detect.which_wins(result)[["low", "high"]]).all(axis=None)
    assert "too few" in reading(result)
    if n == 1:
        with pytest.raises(ResultError, match="at least two"):
            ml.detect.context_heads(result)
    else:
        assert np.isnan(ml.detect.context_heads(result)["low"]).all()


def test_heads_are_compared_by_pairs_and_with_a_control() -> None:
    result = made([-1.0] * 5, [-2.0] * 5)
    found = ml.detect.context_heads(result)
    assert found.attrs["paired"]
    assert found["difference"].item() == pytest.approx(-1.75)
    assert found["low"].item() < -1.75 < found["high"].item()
    reverse = ml.detect.context_heads(result, first="alone", second="repeated")
    assert reverse["difference"].item() == pytest.approx(1.75)
    control = made([-1.0] * 3, [-2.0] * 3)
    beyond = ml.detect.context_heads(result, control=control)
    assert beyond["difference"].item() == pytest.approx(-1.75 + 1.875)
    assert not beyond.attrs["paired"]


def test_a_result_is_read_drawn_and_saved(tiny_model: Callable[..., Any], tmp_path: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), random_set(4, 0, 90, "a", 0, copies=[1, 1, 2, 2])
    found = ml.detect.context_or_weights(model, seqs, options=NO_SEPARATOR, progress=False)
    assert "In the conflict the context wins" in reading(found)
    difference = ml.detect.condition_difference(found)
    assert "(repeated less alone) for head" in reading(difference)
    reverse = ml.detect.condition_difference(found, "alone", "repeated")
    assert "(alone less repeated)" in reading(reverse, "mean_distance")
    assert (reverse["mean_distance"] == -difference["mean_distance"]).all()
    figure: Any = found.plot("target_logprob")
    wanted = difference.effect("target_logprob").mean("sequence")
    np.testing.assert_allclose(np.asarray(figure.data[0].z, float), wanted, atol=1e-5)
    figure = found.plot("copy_attention", condition="repeated")
    wanted = found["copy_attention"].sel(condition="repeated").mean("sequence")
    np.testing.assert_allclose(np.asarray(figure.data[0].z, float), wanted, atol=1e-5)
    loaded = ml.load_result(found.save(tmp_path / "context.nc"))
    assert loaded.settings == found.settings
    assert loaded.settings["wrong"] == "other_sequence"


@pytest.mark.parametrize("backend", BACKENDS)
def test_patched_pairs_and_effects_are_those_of_patching(
    tiny_model: Callable[..., Any], backend: str
) -> None:
    model, seqs = tiny_model("gpt_neox", backend), random_set(4, 0, 90, "a", 0)
    options = ml.detect.ContextOptions(separator=(3,), layers=(0, 1))
    built = ml.detect.context_sets(model, seqs, options=options)
    pairs = patched_pairs(built, options)
    other = ml.corrupt(seqs, "other_sequence", seed=0)
    assert pairs["alone"][1].rows() == other.rows()
    # 12 tokens of text, the separator, and then the changed prefix with the own continuation.
    assert [row[:13] for row in pairs["repeated"][1].rows()] == [[*row, 3] for row in seqs.rows()]
    assert [row[13:] for row in pairs["repeated"][1].rows()] == other.rows()
    assert pairs["copied"][1] is built.conflict
    found = ml.detect.context_patching(model, seqs, options=options, progress=False)
    for condition, (clean, corrupt) in pairs.items():
        here = found.data.sel(condition=condition)
        for name, site, over in (
            ("target_logprob", "z", "head"), ("attn_logprob", "attn_out", "layer"),
            ("mlp_logprob", "mlp_out", "layer"),
        ):  # fmt: skip
            wanted = ml.patch_activations(
                model, clean, corrupt, site=site, over=over, direction="noising", layers=[0, 1],
                progress=False,
            )  # fmt: skip
            np.testing.assert_allclose(here[name], wanted["target_logprob"], atol=1e-6)
            for run in ("clean", "corrupt"):
                values = wanted[f"target_logprob_{run}"]
                np.testing.assert_allclose(here[f"{name}_{run}"], values, atol=1e-6)
    base = found["target_logprob_baseline"]
    np.testing.assert_array_equal(base, found["target_logprob_clean"])
    clean = ml.detect.context_or_weights(model, seqs, options=options, progress=False)
    np.testing.assert_allclose(
        base.sel(condition=["alone", "repeated"]),
        clean["target_logprob_baseline"].sel(condition=["alone", "repeated"]),
        atol=1e-5,
    )


def test_patching_the_other_way_starts_from_the_corrupt_run(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), random_set(3, 0, 90, "a", 0).with_attrs(prepend_bos=True)
    options = ml.detect.ContextOptions(separator="", wrong="shuffle", layers=(2,))
    found = ml.detect.context_patching(model, seqs, options=options, direction="denoising", progress=False)
    np.testing.assert_array_equal(found["attn_logprob_baseline"], found["attn_logprob_corrupt"])
    corrupt = patched_pairs(ml.detect.context_sets(model, seqs, options=options), options)["repeated"][1]
    for row, own in zip(corrupt.rows(), seqs.rows(), strict=True):
        assert row[:12] == own  # the prepended token is not repeated: 11 tokens follow
        assert sorted(row[12:17]) == sorted(own[1:6])
        assert row[12:17] != own[1:6]
        assert row[17:] == own[6:]
    with pytest.raises(OptionError, match="direction='both'"):
        ml.detect.context_patching(model, seqs, direction="both")


def test_patching_is_compared_read_and_drawn(tiny_model: Callable[..., Any], tmp_path: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), random_set(4, 0, 90, "a", 0)
    found = ml.detect.context_patching(model, seqs, options=NO_SEPARATOR, progress=False)
    heads = ml.detect.context_heads(found)
    effect = found.effect("target_logprob")
    wanted = (effect.sel(condition="repeated") - effect.sel(condition="alone")).mean("sequence")
    np.testing.assert_allclose(heads["difference"], wanted, atol=1e-6)
    layers = ml.detect.context_heads(found, "mlp_logprob", first="copied", second="alone")
    assert layers["difference"].dims == ("layer",)
    with pytest.raises(OptionError, match="condition='conflict'"):
        ml.detect.context_heads(found, first="conflict")
    share = ml.stats.restored_share(found, metric="attn_logprob")["restored_share"]
    assert share.dims == ("statistic", "condition", "layer")
    said = reading(found, "attn_logprob")
    assert "copied: " in said
    assert "Of 3 layers, the effect of patching on the target log-prob, attention patched differs" in said
    figure: Any = found.plot("mlp_logprob", condition="alone")
    drawn = np.asarray(figure.data[-1].y, float)
    wanted = found.effect("mlp_logprob").sel(condition="alone").mean("sequence")
    np.testing.assert_allclose(drawn, wanted, atol=1e-5)
    loaded = ml.load_result(found.save(tmp_path / "patching.nc"))
    assert "noising" in reading(loaded)
