"""The study of detectors on the smallest bundled model: every part, and what fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import memlens as ml
from memlens.recall.taxonomy import CLASSES
from memlens.studies.detectors import findings
from memlens.studies.detectors.causal import task_table
from memlens.studies.detectors.study import areas_of, mixed_copies
from memlens.studies.running import StudyRun
from tests.report.pages import sentences

SMALL = ml.studies.DetectorOptions(
    max_sequences=12, max_steered=4, max_canaries=6, probed_targets=1, folds=2, alphas=(-4.0, 4.0),
    n_random=1, most_nodes=20, n_permutations=50, least_mixed=2, max_text=6, kept=(0.9,), max_modules=8,
    module_steps=1, n_module_draws=20, max_context=4, context_targets=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return ml.load_model("zoo/pythia-xs")


@pytest.fixture(scope="module")
def inputs(model: Any) -> dict[str, Any]:
    seqs = ml.load_sequences("zoo", model)
    some = seqs[np.flatnonzero(np.isin(seqs.table["copies"].to_numpy(), [1, 64, 256]))]
    return {
        "sequences": some,
        "canaries": ml.load_sequences("zoo:identifiers", model),
        "slots": ml.detect.digit_slots(model, 6),
        "tasks": ml.tasks.local_tasks("zoo", model, names=["agreement", "arithmetic"], n=12),
        "text": ml.load_sequences("zoo:heldout", model)[:12],
    }


@pytest.fixture(scope="module")
def run(model: Any, inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> StudyRun:
    folder = tmp_path_factory.mktemp("detectors")
    return ml.studies.study_detectors(model, out=folder, options=SMALL, progress=False, **inputs)


@pytest.mark.slow
def test_every_part_has_a_finding(run: StudyRun) -> None:
    assert run.failures == {}
    titles = [finding.title for finding in run.findings]
    assert len(titles) == len(set(titles)) == 20
    for finding in run.findings:
        assert finding.estimate is not None
        if finding.low is not None and np.isfinite(finding.low):
            assert finding.low <= finding.estimate <= finding.high + 1e-9
    known = json.loads((run.report.parent / "run.json").read_text())
    kinds = {entry["name"] for entry in known["results"]}
    assert kinds >= {
        "recall", "separation", "inside_copies", "behaviour_neurons", "steering", "local_dimension",
        "attention", "exposure", "prediction_invariance", "attention_classes", "generalizing",
        "generalizing_steering", "curvature", "context", "context_patching",
    }  # fmt: skip
    assert {c["key"] for c in known["citations"]} >= {"dentan2025", "merullo2025"}
    assert "side by side" in run.report.read_text()


@pytest.mark.slow
def test_the_report_opens_with_what_was_found(run: StudyRun) -> None:
    said = sentences(run.report)
    assert re.search(r"sequences word for word; (none of|of) \d+ detectors ", said["found"])
    assert "with matched sequences that are not recalled" in said["compared"].lower()


def test_the_table_has_every_detector_against_both_baselines(run: StudyRun, inputs: dict[str, Any]) -> None:
    table = pd.read_parquet(run.report.parent / "detectors.parquet")
    assert set(table["baseline"]) == {"confounds", "confounds and copies"}
    assert set(table["detector"]) == {
        "probe", "behaviour neurons", "minus local dimension", "attention entropy", "first share",
        "mean distance", "prefix share",
    }  # fmt: skip
    assert (table["recalled"] == 12).all()
    matched = table.groupby("detector")["matched"].first()
    assert 0 < matched["minus local dimension"] < matched["probe"] <= 12  # the others are references
    assert ((table["gain_low"] <= table["gain"]) & (table["gain"] <= table["gain_high"])).all()
    classes = pd.read_parquet(run.report.parent / "classes.parquet")
    assert classes["copies"].tolist() == [1, 64, 256]
    assert classes[list(CLASSES[:3])].to_numpy().sum() == len(inputs["sequences"])
    drawn = areas_of(table)["area"]
    assert drawn["detector"].values.tolist()[-2:] == ["confounds", "confounds and copies"]


@pytest.mark.slow
def test_steering_costs_are_measured_against_the_unchanged_model(
    run: StudyRun, model: Any, inputs: Any
) -> None:
    table = pd.read_parquet(run.report.parent / "steering_tasks.parquet")
    assert set(table["direction"]) == {"behaviour", "random 0"}
    answers = ml.evaluate_tasks(model, inputs["tasks"], progress=False)
    plain = answers["accuracy"].groupby(answers["task"]).mean().to_series()
    assert table["unchanged"].tolist() == pytest.approx(plain[table["task"]].tolist())
    curve = ml.load_result(run.report.parent / "steering.nc")
    doses = ml.detect.steering_doses(
        model, ml.load_result(run.report.parent / "behaviour_neurons.nc"), SMALL.alphas, n_random=1
    )
    cost = ml.evaluate_tasks(model, inputs["tasks"], doses, progress=False)
    again = task_table(cost)
    assert again["mean"].tolist() == pytest.approx(table["mean"].tolist())
    assert curve["alpha"].values.tolist() == [-4.0, 4.0]


@pytest.mark.slow
def test_the_parts_that_change_the_model_are_those_of_the_library(
    run: StudyRun, model: Any, inputs: Any
) -> None:
    place = run.report.parent
    costs = pd.read_parquet(place / "curvature_costs.parquet")
    assert costs[["kept", "entries"]].to_numpy().tolist() == [[0.9, "curvature"], [0.9, "random 0"]]
    assert costs["share_of_entries"].nunique() == 1
    order = np.random.default_rng(0).permutation(12)
    own, other = (inputs["text"][np.sort(order[part::2])] for part in (0, 1))
    edits = ml.detect.curvature_edits(model, own, [0.9])
    wanted = ml.sweep(model, other, edits, progress=False)["target_logprob"].mean("sequence")
    np.testing.assert_allclose(costs["text_logprob"], wanted.values.ravel(), atol=1e-5)
    shared = pd.read_parquet(place / "modules_shared.parquet")
    assert ((shared["overlap"] >= 0) & (shared["overlap"] <= 1)).all()
    groups = pd.read_parquet(place / "generalizing_groups.parquet")
    assert set(groups["compared"]) == {
        "recalled or generalizing", "recalled or matched", "matched or generalizing",
    }  # fmt: skip
    patched = ml.load_result(place / "context_patching.nc")
    assert patched.data.sizes["sequence"] == 4
    assert int(patched["n_targets"].max()) == 8
    found = ml.load_result(place / "context.nc")
    np.testing.assert_allclose(
        patched["target_logprob_clean"].sel(condition="repeated"),
        found["target_logprob_baseline"].sel(condition="repeated"), atol=1e-4,
    )  # fmt: skip


@pytest.mark.slow
def test_sequences_that_are_not_recalled_leave_a_report(model: Any, inputs: Any, tmp_path: Path) -> None:
    rare = inputs["sequences"][:6]
    run = ml.studies.study_detectors(model, rare, tmp_path, options=SMALL, progress=False)
    assert list(run.failures) == ["matched controls"]
    assert [finding.title for finding in run.findings] == ["What is recalled"]
    assert run.report.is_file()


def test_mixed_copies_have_both_recalled_and_others() -> None:
    copies = np.array([1] * 4 + [2] * 5 + [3] * 4)
    hit = np.array([0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0], bool)
    assert mixed_copies(copies, hit, 1) == [2, 3]
    assert mixed_copies(copies, hit, 2) == [2]
    assert mixed_copies(copies, hit, 3) == []


def test_a_finding_says_which_detectors_add_anything() -> None:
    row = {
        "baseline": "confounds", "baseline_area": 0.7, "recalled": 10, "matched": 10,
        "copies_correlation": 0.5, "area": 0.8, "low": 0.7, "high": 0.9,
    }  # fmt: skip
    rows = [
        {**row, "detector": "good", "gain": 0.1, "gain_low": 0.05, "gain_high": 0.2},
        {**row, "detector": "bad", "gain": 0.01, "gain_low": -0.05, "gain_high": 0.1},
        {**row, "detector": "unknown", "gain": 0.02, "gain_low": np.nan, "gain_high": np.nan},
    ]
    found = findings.beyond(pd.DataFrame(rows))
    assert "good adds most" in found.statement
    assert "above 0: good." in found.statement
    assert found.estimate == 0.1
    assert found.plain == "of 3 detectors these add: good, to what the confounds alone tell"
    nothing = findings.beyond(pd.DataFrame(rows[1:]))
    assert nothing.statement.count("above 0: none.") == 1
    assert nothing.plain == "none of 2 detectors clearly adds to what the confounds alone tell"
