"""Local intrinsic dimension: points on manifolds of known dimension, and a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import ResultError
from memlens.instruments.detect.dimension import intrinsic_dimension
from memlens.results.kinds import reading
from tests.instruments.detect.test_separation import random_set


def by_loop(point: np.ndarray, references: np.ndarray, k: int) -> float:
    distances = sorted(math.dist(point, other) for other in references)[:k]
    logs = [math.log(d / distances[-1]) for d in distances]
    return -1 / (sum(logs) / len(logs))


def test_it_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    points, references = rng.normal(size=(5, 7)), rng.normal(size=(30, 7))
    for k in (None, 10, 30):
        wanted = [by_loop(p, references, k or 29) for p in points]
        np.testing.assert_allclose(intrinsic_dimension(points, references, k), wanted, rtol=1e-9)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_points_of_a_manifold_have_its_dimension(dimension: int) -> None:
    """Uniform in a ball of d dimensions, embedded in 20: the distances from the center give d."""
    rng = np.random.default_rng(dimension)
    directions = rng.normal(size=(4000, dimension))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    ball = directions * rng.random((4000, 1)) ** (1 / dimension)
    basis = np.linalg.qr(rng.normal(size=(20, dimension)))[0]
    found = intrinsic_dimension(np.zeros((1, 20)), ball @ basis.T)
    assert found[0] == pytest.approx(dimension, rel=0.08)


def test_equal_and_vanishing_distances() -> None:
    same = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert intrinsic_dimension(np.zeros((1, 2)), same).tolist() == [2.0]  # infinite: the width
    assert intrinsic_dimension(np.zeros((1, 3)), np.zeros((4, 3))).tolist() == [0.0]
    with_itself = np.array([[0.0], [1.0], [2.0], [3.0]])
    assert intrinsic_dimension(np.zeros((1, 1)), with_itself).tolist() == [0.0]
    with pytest.raises(ResultError, match="1 references"):
        intrinsic_dimension(np.zeros((1, 2)), np.ones((1, 2)))


@pytest.mark.parametrize(("at", "position"), [("last_target", 10), ("first_target", 5)])
def test_points_and_references_are_those_of_the_cache(
    tiny_model: Callable[..., Any], at: Any, position: int
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    recalled, matched = random_set(5, 0, 30, "a", 0), random_set(8, 0, 100, "b", 1)
    options = ml.detect.DimensionOptions(layers=(0, 2), at=at, neighbours=3)
    found = ml.detect.local_dimension(model, recalled, matched, options=options, progress=False)
    assert found["group"].values.tolist() == ["recalled"] * 5 + ["matched"] * 4
    assert found.settings["n_references"] == 4
    held_out = set(found["sequence"].values[5:].tolist())
    references = matched[[i for i, name in enumerate(matched.ids) if name not in held_out]]
    for i, layer in enumerate((0, 2)):
        name = f"blocks.{layer}.hook_resid_post"
        points, others = (
            model.run_with_cache(torch.as_tensor(s.tokens))[1][name][:, position].detach().numpy()
            for s in (recalled, references)
        )
        wanted = [by_loop(p, others, 3) for p in points.astype(float)]
        np.testing.assert_allclose(found["lid"].values[:5, i], wanted, rtol=1e-3)
    assert found.plot().data
    assert "among 4 references" in reading(found)


def test_another_model_gives_the_references(tiny_model: Callable[..., Any]) -> None:
    model, other = tiny_model("gpt_neox", "bridge"), tiny_model("gpt_neox_sequential", "bridge")
    groups = random_set(4, 0, 30, "a", 0), random_set(12, 0, 100, "b", 1)
    own = ml.detect.local_dimension(model, *groups, progress=False)
    same = ml.detect.local_dimension(model, *groups, reference_model=model, progress=False)
    twin = ml.detect.local_dimension(model, *groups, reference_model=other, progress=False)
    np.testing.assert_array_equal(own["lid"], same["lid"])
    assert not np.allclose(own["lid"], twin["lid"])
    assert own.settings["reference_model"] is None is not twin.settings["reference_model"]


@pytest.mark.parametrize(("n_recalled", "n_matched"), [(1, 1), (2, 2), (2, 4)])
def test_one_or_two_pairs_are_refused(
    tiny_model: Callable[..., Any], n_recalled: int, n_matched: int
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    recalled, matched = random_set(n_recalled, 0, 90, "r", 0), random_set(n_matched, 0, 90, "m", 1)
    with pytest.raises(ResultError, match=f"of {n_matched} matched sequences .* takes 3 references"):
        ml.detect.local_dimension(model, recalled, matched, progress=False)


def test_few_sequences_have_a_dimension_and_no_interval(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "bridge")
    found = ml.detect.local_dimension(
        model, random_set(1, 0, 90, "r", 0), random_set(5, 0, 90, "m", 1), progress=False
    )
    assert np.isfinite(found["lid"]).all()
    assert found["area"].sel(statistic=["low", "high"]).isnull().all()
    assert "no interval" in reading(found)
