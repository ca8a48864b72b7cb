from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

import memlens as ml
from memlens.errors import ResultError
from memlens.results.result import Result
from memlens.results.statistics.intervals import ratio_interval, restored_share
from tests.report import synthetic
from tests.tiny import random_tokens


def _patched(rng: np.random.Generator, n: int = 20) -> Result:
    corrupt, clean = rng.normal(-3, 1, n), rng.normal(-0.5, 0.2, n)
    patched = corrupt[:, None, None] + rng.random((n, 3, 4)) * (clean - corrupt)[:, None, None]
    patched[: n // 2, :, 3] = np.nan  # shorter sequences have no such position
    data = xr.Dataset(
        {
            "m": (("sequence", "layer", "position"), patched),
            "m_clean": ("sequence", clean),
            "m_corrupt": ("sequence", corrupt),
        },
        {"kind": ("sequence", np.arange(n) % 3), "layer": np.arange(3)},
    )
    return Result.create(data, kind="activation_patching")


def test_the_share_is_the_ratio_of_sums_of_those_that_have_the_site() -> None:
    result = _patched(np.random.default_rng(0))
    share = restored_share(result)["restored_share"]
    data = result.data
    for layer in range(3):
        for position in range(4):
            here = data["m"].values[:, layer, position]
            kept = np.isfinite(here)
            gained = (here - data["m_corrupt"].values)[kept].sum()
            lost = (data["m_clean"] - data["m_corrupt"]).values[kept].sum()
            row = share.sel(layer=layer).isel(position=position)
            assert row.sel(statistic="mean") == pytest.approx(gained / lost)
            assert row.sel(statistic="low") < gained / lost < row.sel(statistic="high")
            assert int(row["n_restored_share"]) == kept.sum()


def test_the_interval_is_the_bootstrap_over_sequences_of_both_sums() -> None:
    result = _patched(np.random.default_rng(1))
    part = (result["m"] - result["m_corrupt"]).isel(layer=1, position=0)
    whole = result["m_clean"] - result["m_corrupt"]
    found = ratio_interval(part, whole, n_resamples=4000, seed=3)
    rng, rows = np.random.default_rng(5), len(part)
    draws = [rng.integers(0, rows, rows) for _ in range(4000)]
    plain = [part.values[d].sum() / whole.values[d].sum() for d in draws]
    np.testing.assert_allclose(found.values[1:], np.quantile(plain, [0.025, 0.975]), atol=0.01)
    assert found.equals(ratio_interval(part, whole, n_resamples=4000, seed=3))


def test_many_sites_are_taken_in_blocks_with_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _patched(np.random.default_rng(7))
    whole = restored_share(result)
    monkeypatch.setattr(
        "memlens.results.statistics.intervals._BLOCK_BYTES", 8 * 2000 * 5
    )  # 5 sites at a time
    xr.testing.assert_allclose(restored_share(result), whole, rtol=1e-12)


def test_sequences_that_hardly_lost_anything_do_not_rule_the_share() -> None:
    result = _patched(np.random.default_rng(2))
    before = restored_share(result)["restored_share"].sel(statistic="mean")
    data = result.data.copy(deep=True)
    data["m_clean"][0] = data["m_corrupt"][0] + 1e-6
    ratios = (data["m"] - data["m_corrupt"]) / (data["m_clean"] - data["m_corrupt"])
    after = restored_share(Result(data))["restored_share"].sel(statistic="mean")
    assert float(abs(ratios.mean("sequence")).max()) > 1e3
    assert float(abs(after - before).max()) < 0.2


def test_groups_are_taken_apart() -> None:
    result = _patched(np.random.default_rng(3))
    share = restored_share(result, group="kind")["restored_share"]
    assert share.dims == ("kind", "statistic", "layer", "position")
    one = Result(result.data.isel(sequence=result["kind"].values == 1))
    np.testing.assert_allclose(
        share.isel(kind=1).values, restored_share(one)["restored_share"].values, equal_nan=True
    )


def test_other_dimensions_are_averaged_inside_each_sequence() -> None:
    result = _patched(np.random.default_rng(4))
    whole = Result(result.data.isel(position=slice(0, 3)))
    share = restored_share(whole, ("sequence", "position"))["restored_share"]
    by_hand = Result(whole.data.assign(m=whole["m"].mean("position")))
    np.testing.assert_allclose(share.values, restored_share(by_hand)["restored_share"].values)


def test_one_sequence_has_a_share_and_no_interval() -> None:
    result = Result(_patched(np.random.default_rng(5)).data.isel(sequence=[19]))
    share = restored_share(result)["restored_share"]
    assert np.isfinite(share.sel(statistic="mean")).all()
    assert np.isnan(share.sel(statistic=["low", "high"])).all()


def test_what_has_no_two_runs_is_an_error() -> None:
    with pytest.raises(ResultError, match="no metric measured in a clean and in a corrupt run"):
        restored_share(synthetic.head_ablation())
    with pytest.raises(ResultError, match="'margin' not measured"):
        restored_share(_patched(np.random.default_rng(6)), metric="margin")


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_patching_everything_restores_everything(tiny_model: Any, direction: str) -> None:
    model = tiny_model("gpt_neox", "hooked")
    clean = ml.SequenceSet.from_tokens(random_tokens(6, 10), 5)
    patched = ml.patch_activations(
        model, clean, ml.corrupt(clean, positions=[-2], seed=0), positions=[3],
        metrics=("target_logprob",), direction=direction, progress=False,
    )  # fmt: skip
    for row in range(6):  # one by one: on average this corruption of an untrained model changes nothing
        share = restored_share(Result(patched.data.isel(sequence=[row])))["restored_share"]
        at_layer_0 = float(share.sel(statistic="mean", layer=0, position=3))
        assert at_layer_0 == pytest.approx(1.0 if direction == "denoising" else 0.0, abs=1e-4)


def test_a_corruption_that_changed_too_little_gives_no_share() -> None:
    lost = np.array([0.3, -0.3, 0.2, -0.19])  # together 0.01, with resamples on both sides of 0
    gained = np.array([0.1, 0.0, 0.01, 0.0])  # the ratio of the sums is 11
    data = {"m": gained, "m_clean": lost, "m_corrupt": np.zeros(4)}
    result = Result.create(
        xr.Dataset({name: ("sequence", values) for name, values in data.items()}), kind="activation_patching"
    )
    assert np.isnan(restored_share(result)["restored_share"]).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_share_lies_inside_its_interval(seed: int) -> None:
    rng = np.random.default_rng(seed)
    part, whole = rng.standard_t(1.5, 5), rng.normal(1, 1, 5)
    value, low, high = ratio_interval(
        *(xr.DataArray(a, dims="sequence") for a in (part, whole)), n_resamples=200
    ).values
    assert low <= value <= high or np.isnan([value, low, high]).all()


def test_the_figure_shows_the_share_over_sequences_and_the_ratio_of_one() -> None:
    result = synthetic.activation_patching()
    fig = result.plot()
    share = restored_share(result)["restored_share"].sel(statistic="mean")
    np.testing.assert_allclose(fig.data[0].z, share.values)
    one = result.plot(sequence="seq-003")
    np.testing.assert_allclose(one.data[0].z, result["normalized_effect"].isel(sequence=3).values)
    by_copies = result.plot(group="copies", method="bootstrap").layout.updatemenus[1].buttons
    assert [button.label for button in by_copies] == [f"copies: {n}" for n in (0, 1, 4, 16, 64, 256)]
    asked = result.plot("normalized_effect")
    np.testing.assert_allclose(asked.data[0].z, result["normalized_effect"].mean("sequence").values)
