"""Detectors side by side: what a score adds to confounds that do or do not know the label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import memlens as ml
from memlens.errors import OptionError
from memlens.instruments.detect.behaviour import projection
from memlens.instruments.detect.beyond import gain_of
from tests.instruments.detect.test_separation import random_set

OPTIONS = ml.detect.BeyondOptions(confounds=("length",), n_resamples=200)


def known_of(label: np.ndarray, noise: float, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {"length": label + noise * rng.normal(size=len(label)), "copies": rng.random(len(label))}
    )


@pytest.fixture
def groups() -> ml.detect.Groups:
    return ml.detect.Groups.of(random_set(60, 0, 90, "a", 0), random_set(60, 0, 90, "b", 1))


def test_a_score_that_knows_more_adds_and_one_that_knows_nothing_does_not(groups: Any) -> None:
    rng, label = np.random.default_rng(1), groups.recalled
    scores = {"knows": label + 0.5 * rng.normal(size=120), "noise": rng.normal(size=120)}
    table = ml.detect.beyond_confounds(groups, scores, known_of(label, 2.0), options=OPTIONS)
    assert table["baseline"].tolist() == ["confounds", "confounds and copies"] * 2
    knows, noise = (table[table["detector"] == name].iloc[0] for name in ("knows", "noise"))
    assert knows["gain_low"] > 0.05
    assert knows["area"] > 0.85 > 0.8 > knows["baseline_area"] > 0.5
    assert noise["gain_low"] <= 0 <= noise["gain_high"] + 0.02
    assert noise["low"] < 0.5 < noise["high"]
    assert gain_of(knows).excludes(0)


def test_nothing_is_added_to_a_confound_that_decides(groups: Any) -> None:
    label = groups.recalled
    scores = {"same": label.astype(float)}
    table = ml.detect.beyond_confounds(groups, scores, known_of(label, 0.01), options=OPTIONS)
    assert table["baseline_area"].tolist() == [1.0, 1.0]
    assert table[["gain", "gain_low", "gain_high"]].to_numpy().tolist() == [[0.0] * 3] * 2


def test_sequences_without_a_score_are_left_out(groups: Any) -> None:
    label, rng = groups.recalled, np.random.default_rng(0)
    score = np.where(np.arange(120) % 3 == 0, np.nan, rng.normal(size=120))
    known = known_of(label, 1.0)
    table = ml.detect.beyond_confounds(groups, {"some": score}, known, options=OPTIONS)
    assert table[["recalled", "matched"]].iloc[0].tolist() == [40, 40]
    here = np.isfinite(score)
    wanted = stats.spearmanr(score[here], known["copies"][here]).statistic
    assert table["copies_correlation"][0] == pytest.approx(wanted)
    assert table["copies_low"][0] < wanted < table["copies_high"][0]
    with pytest.raises(OptionError, match="'short'"):
        ml.detect.beyond_confounds(groups, {"short": score[1:]}, known, options=OPTIONS)


def test_a_projection_on_the_same_sequences_is_that_of_the_result(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "bridge")
    a, b = random_set(4, 0, 50, "a", 0), random_set(5, 50, 90, "b", 1)
    found = ml.detect.behaviour_neurons(model, a, b, progress=False)
    got = projection(model, found, b, progress=False)
    np.testing.assert_allclose(got, found["projection"].values[4:], atol=1e-5)
