"""What the findings of the causal detectors say of made-up results, and what their plan counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import memlens as ml
from memlens.results.result import Result
from memlens.studies.detectors import findings
from memlens.studies.registry import STUDIES, Call


def curve(own: list[float], random: list[float]) -> Result:
    """Recall of four sequences at the doses -1 and 1, along the behaviour and a random shift."""
    hits = np.array([[[i < 4 * a, i < 4 * b] for a, b in zip(own, random, strict=True)] for i in range(4)])
    data = xr.Dataset(
        {
            "exact_match": (("sequence", "alpha", "direction"), hits.astype(float)),
            "exact_match_baseline": ("sequence", np.ones(4)),
        },
        {"sequence": list("abcd"), "alpha": [-1.0, 1.0], "direction": ["behaviour", "random 0"]},
    )
    return Result.create(data, kind="steering")


def test_steering_names_both_directions_of_the_dose() -> None:
    found = findings.steering(curve([0.25, 0.5], [1.0, 0.75]), None, "generalizing_steering")
    assert found.estimate == -0.75
    assert "α = -1" in found.statement
    assert "toward recalling, -0.25" in found.statement
    assert "changes by not measured" in found.statement


def test_classes_are_compared_by_the_statistic_of_most_heads() -> None:
    row = {
        "a": "not memorized", "b": "recall", "n_a": 9, "n_b": 5, "difference": -0.5, "low": -0.7,
        "high": -0.3, "p": 0.001, "of": 20, "within_difference": 0.25, "within_low": 0.1, "within_high": 0.4,
        "within_p": 0.2, "within_n_a": 4, "within_n_b": 3,
    }  # fmt: skip
    rows = [{**row, "statistic": "first_share", "heads": 2}, {**row, "statistic": "prefix_share", "heads": 7}]
    found = findings.attention_classes(pd.DataFrame(rows))
    assert "first share: 2; prefix share: 7" in found.statement
    assert found.estimate == -0.5
    assert found.control is not None
    assert "0.25 [0.1, 0.4], 7 sequences" in found.control
    guesses = [{**one, "a": "guess", "difference": 3.0} for one in rows]
    assert findings.attention_classes(pd.DataFrame([*rows, *guesses])).estimate == 3.0
    alone = [{**one, "within_n_a": 0, "within_n_b": 0} for one in rows]
    assert "none alike" in str(findings.attention_classes(pd.DataFrame(alone)).control)


def test_modules_without_a_second_group_share_nothing() -> None:
    counts = pd.DataFrame(
        [{"group": "text", "n": 4, "neurons": 5, "low": 4.0, "high": 6.0, "of": 50, "share_of_neurons": 0.1}]
    )
    pairs = pd.DataFrame(columns=["a", "b", "overlap", "null_mean", "p"])
    found = findings.modules(counts, pairs, "domain")
    assert found.estimate == pytest.approx(0.1)
    assert "text 5 [4, 6]" in found.statement
    row = {"a": "text", "b": "code", "overlap": 0.25, "null_mean": 0.5, "p": 0.01}
    both = findings.modules(counts, pd.DataFrame([row, {**row, "p": 0.5}]), "domain")
    assert both.estimate == 0.25
    assert "1 of 2 pairs" in both.statement


def test_the_plan_counts_every_sweep() -> None:
    study: Any = STUDIES["detectors"]
    model = ml.load_model("zoo/pythia-xs")
    where = SimpleNamespace(load=lambda *names, **more: model)
    options = study.options(max_steered=4, max_text=3, max_context=2, context_targets=8)
    table = study.inputs(sequences="zoo").plan(Call(where, options, None)).table.set_index("work")
    heads = 4 * 5
    counted = table[["sequences", "interventions"]].apply(tuple, axis=1).to_dict()
    assert counted == {
        "steer along behaviour neurons": (4, 5 * 4),
        "steer along neurons of recalling or answering": (4, 2 * 4),
        "curvature, recalled": (4, 3 * 2), "curvature, other text": (3, 3 * 2),
        **{f"ablate heads, {name}": (2, heads) for name in ("alone", "repeated", "conflict")},
        **{f"patch heads and layers, {name}": (2, heads + 8) for name in ("alone", "repeated", "copied")},
    }  # fmt: skip
