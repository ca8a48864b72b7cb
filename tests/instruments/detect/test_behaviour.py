"""Behaviour neurons: those that go with a label; steering moves exactly them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import memlens as ml
from memlens.errors import EmptySetError, OptionError, ResultError, SiteError
from memlens.instruments.detect.behaviour import correlations
from memlens.instruments.detect.groups import mean_over_targets
from memlens.results.kinds import reading
from tests.instruments.detect.test_separation import random_set


@pytest.fixture
def sets() -> tuple[Any, Any]:
    return random_set(8, 0, 50, "a", 0), random_set(6, 50, 100, "b", 1)


def test_correlations_and_p_are_those_of_scipy(tiny_model: Callable[..., Any], sets: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    options = ml.detect.BehaviourOptions(share=0.1, n_splits=0)
    found = ml.detect.behaviour_neurons(model, *sets, options=options, progress=False)
    acts = np.concatenate([mean_over_targets(model, s, "mlp_post", [0, 1, 2], progress=False) for s in sets])
    label = np.arange(14) < 8
    raw = [[stats.pearsonr(acts[:, i, j], label) for j in range(64)] for i in range(3)]
    rho = np.array([[one.statistic for one in layer] for layer in raw])
    np.testing.assert_allclose(found["rho"], rho, atol=1e-5)
    p = np.array([[one.pvalue for one in layer] for layer in raw])
    adjusted = stats.false_discovery_control(p.ravel()).reshape(p.shape)
    np.testing.assert_allclose(found["p"], adjusted, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(found["mean_difference"], acts[:8].mean(0) - acts[8:].mean(0), atol=1e-5)
    assert int(found["chosen"].sum()) == round(0.1 * rho.size)
    least = np.abs(rho)[found["chosen"].values == 1].min()
    assert least >= np.abs(rho)[found["chosen"].values == 0].max()
    chosen = found["chosen"].values == 1
    np.testing.assert_allclose(
        found["projection"], (acts[:, chosen] * np.sign(rho[chosen])).mean(1), atol=1e-5
    )


def test_a_constant_neuron_goes_with_nothing() -> None:
    acts = np.ones((4, 1, 2))
    acts[:, 0, 1] = [1, 1, 0, 0]
    assert correlations(acts, np.array([True, True, False, False])).tolist() == [[0.0, 1.0]]


def test_the_choice_is_stable_where_the_behaviours_differ(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "bridge")
    far = ml.detect.behaviour_neurons(
        model, random_set(20, 0, 10, "a", 0), random_set(20, 90, 100, "b", 1), progress=False
    )
    same = ml.detect.behaviour_neurons(
        model, random_set(20, 0, 100, "a", 0), random_set(20, 0, 100, "b", 1), progress=False
    )
    assert float(far["overlap"].mean()) > 3 * float(far["overlap_shuffled"].mean())
    assert float(same["overlap"].mean()) < 0.2
    assert "with shuffled labels" in reading(far)
    assert far.plot(most=5).data[0].x.size == 5


@pytest.mark.parametrize("site", ["mlp_post", "mlp_out"])
def test_steering_adds_the_mean_difference_at_chosen_neurons(
    tiny_model: Callable[..., Any], sets: Any, site: str
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    options = ml.detect.BehaviourOptions(share=0.05, site=site)
    found = ml.detect.behaviour_neurons(model, *sets, options=options, progress=False)
    seen: dict[int, torch.Tensor] = {}
    name = "mlp.hook_post" if site == "mlp_post" else "hook_mlp_out"
    zero = [(f"blocks.{i}.{name}", lambda x, hook: 0 * x) for i in range(3)]

    def look(layer: int) -> Any:
        return (f"blocks.{layer}.{name}", lambda x, hook: seen.__setitem__(layer, x.detach()))

    for random in (None, 1):
        edit = ml.detect.steered(model, found, -2.0, random=random)
        order = ml.Intervention("all", [*zero, *edit.hooks, *map(look, range(3))])
        with ml.applied(model, order):
            model(sets[0].tokens[:2])
        got = np.stack([seen[i][1, 4].numpy() for i in range(3)])
        wanted = -2.0 * np.where(found["chosen"] == 1, found["mean_difference"], 0)
        if random is None:
            np.testing.assert_allclose(got, wanted, atol=1e-5)
        else:
            assert not np.allclose(got, wanted, atol=1e-3)
            np.testing.assert_allclose(np.sort(np.abs(got)), np.sort(np.abs(wanted)), atol=1e-5)


def test_the_curve_is_the_sweep_of_the_doses(tiny_model: Callable[..., Any], sets: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    found = ml.detect.behaviour_neurons(model, *sets, progress=False)
    curve = ml.detect.steering_curve(model, found, sets[0][:3], [3.0, 0.0], n_random=2, progress=False)
    assert curve["direction"].values.tolist() == ["behaviour", "random 0", "random 1"]
    np.testing.assert_allclose(curve.effect("target_logprob").sel(alpha=0.0), 0, atol=1e-6)
    with ml.applied(model, ml.detect.steered(model, found, 3.0)):
        scored = ml.score_recall(model, sets[0][:3], generate=False, metrics=(), progress=False)
    np.testing.assert_allclose(
        curve["target_logprob"].sel(alpha=3.0, direction="behaviour"),
        scored.table["target_logprob"],
        atol=1e-5,
    )
    assert "random shifts of equal size" in reading(curve, "target_logprob")
    assert len(curve.plot("target_logprob").data) == 6
    assert curve.plot("target_logprob", group="prefix_len").data


def test_wrong_arguments_are_refused(tiny_model: Callable[..., Any], sets: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    with pytest.raises(EmptySetError):
        ml.detect.behaviour_neurons(model, sets[0], sets[1][:0])
    found = ml.detect.behaviour_neurons(model, *sets, progress=False)
    with pytest.raises(SiteError, match="found among 64, and this model has 96"):
        ml.detect.steered(tiny_model("gpt_neo", "bridge"), found, 1.0)
    with pytest.raises(OptionError, match="alpha=nan is no finite number"):
        ml.detect.steered(model, found, float("nan"))
    with pytest.raises(OptionError, match="different"):
        ml.detect.steering_doses(model, found, [1.0, 1.0])
    recall = ml.score_recall(model, sets[0], generate=False, progress=False).to_result()
    with pytest.raises(ResultError, match="recall"):
        ml.detect.steered(model, recall, 1.0)
