"""The modular view: counts that are known, and groups that do or do not use the same neurons."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

import memlens as ml
from memlens.errors import OptionError, ResultError
from memlens.instruments.detect.modular import carrying_neurons
from memlens.results.result import Result


def effects(harm: np.ndarray, domains: list[str]) -> Result:
    """A result whose neurons, 2 layers of them, take `harm` (`[seq, neuron]`) from each sequence."""
    shaped = -harm.reshape(len(harm), 2, -1)
    data = xr.Dataset(
        {
            "target_logprob": (("sequence", "layer", "neuron"), shaped - 1.0),
            "target_logprob_baseline": ("sequence", np.full(len(harm), -1.0)),
        },
        {"domain": ("sequence", domains)},
    )
    return Result.create(data, kind="gradient_attribution")


def test_the_fewest_neurons_that_reach_the_share() -> None:
    harm = np.array([[5.0, 3.0, 1.0, 1.0, -9.0]])
    assert [int(carrying_neurons(harm, share).sum()) for share in (0.3, 0.5, 0.8, 0.9, 1.0)] == [
        1,
        1,
        2,
        3,
        4,
    ]
    assert carrying_neurons(harm, 0.8).tolist() == [True, True, False, False, False]
    assert not carrying_neurons(-np.abs(harm)).any()
    with pytest.raises(OptionError, match="share=0"):
        carrying_neurons(harm, 0)


@pytest.fixture
def noise() -> np.ndarray:
    return 0.02 * np.abs(np.random.default_rng(0).normal(size=(40, 40)))


def test_groups_with_their_own_neurons_share_none(noise: np.ndarray) -> None:
    noise[:20, :2] += [6.0, 1.0]
    noise[20:, 30:32] += [6.0, 1.0]
    result = effects(noise, ["text"] * 20 + ["code"] * 20)
    counts, pairs = ml.detect.modular_view(result, share=0.7, n_resamples=99)
    assert dict(zip(counts["group"], counts["neurons"], strict=True)) == {"code": 1, "text": 1}
    assert (counts["of"] == 40).all()
    assert ((counts["low"] <= counts["neurons"]) & (counts["neurons"] <= counts["high"])).all()
    assert pairs["overlap"].tolist() == [0.0]
    assert pairs["p"].tolist() == [0.01]
    assert pairs["null_mean"][0] > 0.5


def test_a_label_that_means_nothing_shares_as_much_as_the_null(noise: np.ndarray) -> None:
    noise[:, [2, 9, 11]] += [3.0, 2.9, 2.8]
    labels = ["a", "b"] * 20
    _, pairs = ml.detect.modular_view(effects(noise, labels), share=0.6, n_resamples=99)
    assert pairs["overlap"].tolist() == [1.0]
    assert pairs["p"].tolist() == [1.0]
    assert pairs["null_low"][0] == pairs["null_high"][0] == 1.0


def test_one_or_two_sequences_give_no_interval_and_no_p(noise: np.ndarray) -> None:
    counts, pairs = ml.detect.modular_view(effects(noise[:5], ["a"] * 3 + ["b"] * 2), n_resamples=20)
    assert np.isnan(counts.set_index("group").loc["b", ["low", "high"]].to_numpy(float)).all()
    assert np.isfinite(counts.set_index("group").loc["a", ["low", "high"]].to_numpy(float)).all()
    assert np.isnan(pairs["p"]).all()


def test_effects_without_neurons_are_refused(noise: np.ndarray) -> None:
    result = effects(noise, ["a"] * 40)
    whole = Result(result.data.sum("neuron", keep_attrs=True))
    with pytest.raises(ResultError, match="single neurons"):
        ml.detect.modular_view(whole)
    with pytest.raises(ResultError, match="no_such"):
        ml.detect.modular_view(result, group="no_such")
    _, pairs = ml.detect.modular_view(result, n_resamples=5)
    assert pairs.empty
    assert pairs.columns.tolist()[:3] == ["a", "b", "overlap"]
