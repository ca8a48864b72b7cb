"""What a finding says of its controls: the strictest of them decides, and the sentence names it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate
from memlens.studies.bypass.findings import heads_against_layers
from memlens.studies.bypass.findings import special as special_to_memorized
from memlens.studies.comparative.analyze.profiles import FamilyTest
from memlens.studies.comparative.findings import CLAIMS, RULES, judge_all
from memlens.studies.contrasts import against_controls, strictest
from memlens.studies.idioms.findings import matched_promotion
from memlens.studies.localization.findings import CONTROL, MEMORIZED, UNTRAINED, strongest_head

RNG = np.random.default_rng(0)


def values(mean: float, n: int = 24, **coords: Any) -> xr.DataArray:
    noise = RNG.normal(size=n)
    return xr.DataArray(mean + 0.1 * (noise - noise.mean()), dims="sequence", coords=coords)


def test_the_strictest_control_decides_and_is_named() -> None:
    own = values(-2.0)
    found = strictest(own, {"easy": values(0.0), "alike": values(-2.0)}, sign=-1)
    assert found is not None
    assert (found.control, found.clear) == ("alike", False)
    assert "not clearly more harm than with alike" in against_controls(found, "more harm than")
    both = strictest(own, {"easy": values(0.0), "hard": values(-1.0)}, sign=-1)
    assert both is not None
    assert (both.control, both.clear) == ("hard", True)
    assert both.difference.value == pytest.approx(-1.0)
    assert both.p < 0.05
    wrong_way = strictest(own, {"worse": values(-3.0)}, sign=-1)
    assert wrong_way is not None
    assert not wrong_way.clear


def test_a_control_without_an_interval_is_named_only_where_all_others_are_clear() -> None:
    """Two pairs do not decide beside a control that is known to be alike, but they do beside clear ones."""
    own = values(-2.0, match=("sequence", np.arange(24)))
    few = {gap: values(-2.0 + gap, n=2, match=("sequence", np.arange(2))) for gap in (1.0, 2.0)}
    named = {"alike": values(-2.0), "far": few[2.0], "two": few[1.0], "clear": values(0.0)}
    for left_out, expected in (((), "alike"), (("alike",), "two"), (("alike", "two"), "far")):
        for names in (list(named), list(named)[::-1]):
            found = strictest(own, {name: named[name] for name in names if name not in left_out}, sign=-1)
            assert found is not None
            assert (found.control, found.clear) == (expected, False)
    assert "(no interval: n = 2)" in against_controls(found, "more than")


def test_no_control_is_said() -> None:
    assert strictest(values(-2.0), {}, sign=-1) is None
    assert strictest(values(-2.0), {"one": values(0.0, n=1)}, sign=-1) is None
    assert "no control" in against_controls(None, "more than")


def ablated(effect: float, n: int = 24) -> Result:
    """A result in which one head of four has an effect."""
    table = np.zeros((n, 2, 2)) + 0.01 * RNG.normal(size=(n, 2, 2))
    table[:, 1, 0] += effect
    data = xr.Dataset(
        {
            "target_logprob": (("sequence", "layer", "head"), table),
            "target_logprob_baseline": ("sequence", np.zeros(n)),
            "exact_match": (("sequence", "layer", "head"), np.ones((n, 2, 2))),
            "exact_match_baseline": ("sequence", np.ones(n)),
        },
        {"sequence": [f"s{i}" for i in range(n)], "layer": [0, 1], "head": [0, 1]},
    )
    return Result.create(data, kind="head_ablation")


@pytest.mark.parametrize(
    ("control", "said"), [(-0.5, "is more harm than"), (-1.0, "is not clearly more harm")]
)
def test_the_head_that_matters_most_is_compared_with_the_strictest_control(control: float, said: str) -> None:
    results = {MEMORIZED: ablated(-1.0), CONTROL: ablated(control), UNTRAINED: ablated(0.0)}
    statement = strongest_head(results, 0).statement
    assert "head 0 of layer 1" in statement
    assert said in statement
    assert f"with {CONTROL}, the strictest control" in statement
    statement = heads_against_layers(results, None, 0).statement
    assert said in statement


def test_a_head_without_controls_says_so() -> None:
    assert "no control" in strongest_head({MEMORIZED: ablated(-1.0)}, 0).statement


def overlaps(layered_p: float, layered: float) -> pd.DataFrame:
    rows = []
    for model, value in (("a", 0.25), ("b", 0.3), ("c", 0.35)):
        row = {
            "model": model,
            "family": model,
            "statistic": "universal",
            "value": value,
            "low": value - 0.05,
            "high": value + 0.05,
        }
        rows.append({**row, "null": "heads anywhere", "exact": 0.04, "null_mean": 0.04, "p_above": 0.001})
        rows.append(
            {
                **row,
                "null": "heads inside their layers",
                "exact": np.nan,
                "null_mean": layered,
                "p_above": layered_p,
            }
        )
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("p", "verdict"), [(0.3, "undecided"), (0.001, "holds"), (0.99, "does not hold")])
def test_universal_heads_are_judged_by_the_null_inside_layers(p: float, verdict: str) -> None:
    sentence, number, control, found, counted = RULES["overlap"](CLAIMS["universal"], overlaps(p, 0.28))  # pyright: ignore[reportGeneralTypeIssues]
    assert (found, counted) == (verdict, "models")
    assert "heads inside their layers" in sentence
    assert number.value == pytest.approx(0.3 - 0.28)
    assert f"{0 if p > 0.05 else 3} of 3 models" in control


def test_the_exact_null_decides_where_it_is_the_stricter_one() -> None:
    table = overlaps(0.001, 0.02)
    table.loc[table["null"] == "heads anywhere", "exact"] = 0.31
    sentence, number, _, found, _ = RULES["overlap"](CLAIMS["universal"], table)  # pyright: ignore[reportGeneralTypeIssues]
    assert found == "undecided"
    assert "heads anywhere" in sentence
    assert number.value == pytest.approx(0.3 - 0.31)


@pytest.mark.parametrize(("twin", "verdict"), [(0.2, "holds"), (0.65, "undecided")])
def test_what_untrained_twins_do_as_well_is_undecided(twin: float, verdict: str) -> None:
    rows = [
        {
            "model": "m",
            "family": "f",
            "group": group,
            "burst": mean,
            "low": mean - 0.05,
            "high": mean + 0.05,
            "n": 9,
        }
        for group, mean in (("memorized", 0.7), ("untrained twin", twin))
    ]
    sentence, *_, found, _ = RULES["pooled"](CLAIMS["burst"], pd.DataFrame(rows))  # pyright: ignore[reportGeneralTypeIssues]
    assert found == verdict
    assert ("Untrained twins, the strictest control" in sentence) == (verdict == "undecided")


def family_tests(p: float, accuracy_p: float, accuracy: float) -> FamilyTest:
    rows = [
        {
            "statistic": name,
            "value": value,
            "null_mean": 0.2,
            "null_low": 0.1,
            "null_high": 0.3,
            "p": p_,
            "n": 6,
        }
        for name, value, p_ in (("difference", 0.4, p), ("accuracy", accuracy, accuracy_p))
    ]
    return FamilyTest(pd.DataFrame(rows), pd.DataFrame(), 90)


def test_models_assigned_to_their_family_are_counted() -> None:
    tests = {"families": family_tests(0.01, 0.01, 5 / 6), "untrained": family_tests(0.5, 0.4, 0.5)}
    signature = judge_all({}, tests, Estimate(0.3, 0.2, 0.4, 6))
    control = next(item.control for item in signature if item.claim == "signature")
    assert "assigns 5 of 6 models to their family (shuffled 1.2 on average, p" in str(control)


@pytest.mark.parametrize(
    ("difference_p", "accuracy_p", "untrained", "verdict", "named"),
    [
        (0.01, 0.01, (0.5, 0.4), "holds", "similarity"),
        (0.01, 0.30, (0.5, 0.4), "undecided", "leave-one-out"),
        (0.01, 0.01, (1.0, 0.01), "undecided", "untrained twins"),
        (0.30, 0.01, (0.5, 0.4), "undecided", "similarity"),
    ],
)
def test_a_signature_has_to_hold_against_labels_and_untrained_twins(
    difference_p: float, accuracy_p: float, untrained: tuple[float, float], verdict: str, named: str
) -> None:
    tests = {
        "families": family_tests(difference_p, accuracy_p, 0.9),
        "untrained": family_tests(0.5, untrained[1], untrained[0]),
    }
    judged = {item.claim: item for item in judge_all({}, tests, Estimate(0.3, 0.2, 0.4, 6))}["signature"]
    assert judged.verdict == verdict
    assert named in judged.found


def promotion(*rows: tuple[str, float, float, float, float]) -> pd.DataFrame:
    columns = ["control", "difference", "low", "high", "p"]
    return pd.DataFrame(rows, columns=columns).assign(quantity="stable_promotion", pairs=20)


def test_earlier_promotion_is_earlier_than_every_control() -> None:
    clear, unclear = ("not recalled", -1.0, -1.5, -0.5, 0.001), ("natural text", -0.1, -0.6, 0.4, 0.7)
    statement = matched_promotion("idioms", promotion(clear, unclear)).statement
    assert "not clearly earlier or later" in statement
    assert "natural text, the strictest control" in statement
    both = matched_promotion("idioms", promotion(clear, ("natural text", -0.5, -0.8, -0.2, 0.01)))
    assert "good earlier than" in both.statement
    assert both.estimate == -0.5
    opposite = matched_promotion("idioms", promotion(clear, ("natural text", 1.5, 1.0, 2.0, 0.01)))
    assert "not clearly" in opposite.statement


def test_special_to_memorized_text_means_against_every_control() -> None:
    row = {"edit": "identity", "part": 1, "layers": "0 to 1", "memorized": -2.0}
    easy = {"not memorized": 0.0, "minus not memorized": -2.0, "minus not memorized low": -2.5}
    easy |= {"minus not memorized high": -1.5, "minus not memorized p_corrected": 0.01}
    hard = {"predictable": -1.9, "minus predictable": -0.1, "minus predictable low": -0.6}
    hard |= {"minus predictable high": 0.4, "minus predictable p_corrected": 0.6}
    finding = special_to_memorized(pd.DataFrame([{**row, **easy, **hard}]))
    assert "does not clearly harm memorized text more than predictable text" in finding.statement
    assert "identity 0 of 1" in finding.statement
    assert finding.estimate == -0.1
    alone = special_to_memorized(pd.DataFrame([{**row, **easy}]))
    assert "harms memorized text more than not memorized text" in alone.statement
    assert "identity 1 of 1" in alone.statement
