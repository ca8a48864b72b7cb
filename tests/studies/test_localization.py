"""The main job on the bundled model, and what it does when a part fails."""

from __future__ import annotations

import html
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import memlens as ml
from memlens.errors import DonorError, NonFiniteError, OptionError, VocabularyError
from memlens.report.from_directory import report_from_directory
from memlens.results.result import Result
from memlens.results.statistics.estimates import chosen_site, mean_estimate, ratio_estimate, share_estimate
from memlens.results.statistics.intervals import halves
from memlens.studies.localization import findings
from memlens.studies.localization import study as localization
from memlens.studies.running import StudyRun
from tests.report.pages import sentences

SMALL = ml.studies.LocalizeOptions(
    max_sequences=6,
    max_patched=3,
    max_positions=6,
    explored_memorized=2,
    explored_controls=1,
    ranked_sequences=2,
)
SHORT = replace(SMALL, explored_memorized=0, explored_controls=0, ranked_sequences=1, most_forwards=0)
"""Without the explorer and most rankings, of the same sweeps."""


@pytest.fixture(scope="module")
def pythia() -> Any:
    return ml.load_model("zoo/pythia-s")


@pytest.fixture(scope="module")
def planted(pythia: Any) -> ml.SequenceSet:
    seqs = ml.load_sequences("zoo", pythia)
    copies = seqs.table["copies"].to_numpy()
    return seqs[np.flatnonzero(np.isin(copies, [1, 256]))]


@pytest.fixture(scope="module")
def run(pythia: Any, planted: ml.SequenceSet, tmp_path_factory: pytest.TempPathFactory) -> StudyRun:
    folder = tmp_path_factory.mktemp("run")
    return ml.localize(pythia, planted, folder, options=SMALL, progress=False, command="memlens demo")


def test_five_findings_with_numbers_and_controls(run: StudyRun) -> None:
    assert run.failures == {}
    assert len(run.findings) == 5
    for finding in run.findings:
        assert finding.estimate is not None
        assert finding.low is not None
        assert finding.high is not None
        assert finding.low <= finding.estimate <= finding.high
    for finding in run.findings[1:]:
        assert "matched control" in (finding.control or "")
    assert "untrained twin" in (run.findings[3].control or "")


def test_what_is_recalled_is_what_was_planted_often(run: StudyRun, planted: ml.SequenceSet) -> None:
    table = ml.RecallScores.load(run.report.parent / "recall.parquet").table
    copies = planted.table["copies"].to_numpy()
    assert (table["exact_match"].to_numpy() == (copies == 256)).mean() > 0.95
    assert run.findings[0].estimate == pytest.approx(table["exact_match"].mean())


def test_results_are_saved_and_labelled(run: StudyRun) -> None:
    folder = run.report.parent
    heads = ml.load_result(folder / "head_ablation.nc")
    assert heads["target_logprob"].dims == ("sequence", "layer", "head")
    assert set(np.unique(heads["group"])) == {"memorized", "matched control"}
    bypass = ml.load_result(folder / "attention_bypass.nc")
    assert set(np.unique(bypass["group"])) == {"memorized", "matched control", "untrained twin"}
    recorded = json.loads((folder / "run.json").read_text())
    assert recorded["settings"]["max_sequences"] == 6
    assert recorded["settings"]["model"]["model"] == "zoo/pythia-s"
    assert recorded["command"] == "memlens demo"


def test_finding_equals_a_plain_computation(run: StudyRun, pythia: Any, planted: ml.SequenceSet) -> None:
    """The head finding, by hand: one plain forward with and without the head, on the reported half."""
    heads = ml.load_result(run.report.parent / "head_ablation.nc")
    ids = [
        i for i, g in zip(heads["sequence"].values, heads["group"].values, strict=True) if g == "memorized"
    ]
    choose, report = halves(len(ids), SMALL.seed)
    rows = [planted.ids.index(i) for i in ids]
    effect = ml.ablate_heads(pythia, planted[rows], engine="reference", progress=False).effect(
        "target_logprob"
    )
    means = effect.isel(sequence=choose).mean("sequence").values
    layer, head = np.unravel_index(means.argmin(), means.shape)
    assert f"head {head} of layer {layer}" in run.findings[2].statement
    assert run.findings[2].estimate == pytest.approx(
        float(effect.isel(sequence=report)[:, layer, head].mean()), abs=1e-4
    )


def test_report_shows_everything(run: StudyRun) -> None:
    text = run.report.read_text(encoding="utf-8")
    for finding in run.findings:
        assert html.escape(finding.title).replace("&#x27;", "&#39;") in text
    assert "memlens demo" in text
    assert report_from_directory(run.report.parent).read_text(encoding="utf-8").count("<h2") == text.count(
        "<h2"
    )


def test_the_report_explores_some_of_both_groups(run: StudyRun, pythia: Any, planted: ml.SequenceSet) -> None:
    payload = json.loads((run.report.parent / "explorer.explorer.json").read_text(encoding="utf-8"))
    labels = [sequence["label"] for sequence in payload["sequences"]]
    assert [label.split(" · ")[2] for label in labels] == ["memorized", "memorized", "matched control"]
    assert [label.split(" · ")[1] == "memorization score 100%" for label in labels] == [True, True, False]
    ids = [sequence["id"] for sequence in payload["sequences"]]
    heads = ml.load_result(run.report.parent / "head_ablation.nc")
    effect = heads.effect("target_logprob").sel(sequence=ids[0])
    assert np.allclose(payload["sequences"][0]["heads"], effect.values, atol=1e-3)
    edits = [edit["name"] for edit in payload["sequences"][2]["edited"]]
    assert edits[:6] == [f"bypass L{layer}" for layer in range(6)]
    assert len(edits) == 6 + 3 + 1
    text = run.report.read_text(encoding="utf-8")
    assert "Look at single sequences" in text
    assert len(text.encode()) < 8_000_000


def test_the_explorer_can_be_left_out(pythia: Any, planted: ml.SequenceSet, tmp_path: Path) -> None:
    few = replace(SHORT, max_sequences=2, max_patched=1, max_positions=2, untrained_control=False)
    run = ml.localize(pythia, planted, tmp_path, options=few, progress=False)
    assert not (tmp_path / "explorer.explorer.json").exists()
    assert "Look at single sequences" not in run.report.read_text(encoding="utf-8")
    with pytest.raises(OptionError, match="explored_controls=-1"):
        ml.studies.LocalizeOptions(explored_controls=-1)


def test_a_step_that_fails_loses_nothing(
    run: StudyRun, pythia: Any, planted: ml.SequenceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise NonFiniteError("layer 3 is NaN")

    shutil.copytree(run.report.parent / "sweeps", tmp_path / "sweeps")
    monkeypatch.setattr(localization, "bypass_attention", broken)
    other = ml.localize(pythia, planted, tmp_path, options=SHORT, progress=False)
    assert other.failures == {"attention bypass": "layer 3 is NaN"}
    assert [f.title for f in other.findings] == [
        "What is recalled",
        "When the prediction is made",
        "Which head matters most",
        "How deep the cue stays at its place",
    ]
    assert (tmp_path / "head_ablation.nc").exists()
    assert (tmp_path / "activation_patching.nc").exists()
    assert "layer 3 is NaN" in other.report.read_text(encoding="utf-8")


def test_nothing_recalled_still_gives_a_report(pythia: Any, planted: ml.SequenceSet, tmp_path: Path) -> None:
    rare = planted[np.flatnonzero(planted.table["copies"].to_numpy() == 1)]
    run = ml.localize(pythia, rare, tmp_path, progress=False)
    assert len(run.findings) == 1
    assert "too few to localize" in run.findings[0].statement
    said = sentences(run.report)
    assert (
        said["found"]
        == f"The model repeats 0 of {len(rare)} sequences word for word, too few to look for a place."
    )
    assert said["compared"].startswith("Nothing, since there are too few recalled sequences")


def test_the_report_opens_with_what_was_found(run: StudyRun, planted: ml.SequenceSet) -> None:
    said, by = sentences(run.report), {finding.title: finding for finding in run.findings}
    layer = by["Which layer's attention recall needs"]
    assert f"{len(planted)} given sequences" in said["asked"]
    assert by["What is recalled"].plain in said["found"].replace("The model", "the model")
    assert layer.plain in said["found"]
    assert f"{layer.low:.3g} to {layer.high:.3g} nats per token" in said["sure"]
    assert f": that{layer.statement.rpartition('. That')[2]}" in layer.beside
    assert layer.beside[1:] in said["compared"]


def test_a_second_run_replaces_the_first(
    run: StudyRun, pythia: Any, planted: ml.SequenceSet, tmp_path: Path
) -> None:
    shutil.copytree(run.report.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "notes.txt").write_text("mine")
    assert (tmp_path / "head_ablation.nc").exists()
    rare = planted[np.flatnonzero(planted.table["copies"].to_numpy() == 1)]
    ml.localize(pythia, rare, tmp_path, progress=False)
    assert not (tmp_path / "head_ablation.nc").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_wrong_vocabulary_is_refused_before_anything_is_written(pythia: Any, tmp_path: Path) -> None:
    seqs = ml.SequenceSet.from_tokens([[1, 2, 5000]], 1)
    with pytest.raises(VocabularyError, match="5000"):
        ml.localize(pythia, seqs, tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_one_target_corrupts_the_token_before_the_last(
    pythia: Any, planted: ml.SequenceSet, tmp_path: Path
) -> None:
    short = ml.load_sequences("zoo", pythia, max_targets=1)
    few = short[np.flatnonzero(np.isin(short.table["copies"].to_numpy(), [1, 256]))]
    options = replace(SHORT, max_sequences=4, untrained_control=False)
    run = ml.localize(pythia, few, tmp_path, options=options, progress=False)
    assert run.failures == {}
    patched = ml.load_result(tmp_path / "activation_patching.nc")
    memorized = patched.data.isel(sequence=patched["group"].values == "memorized")
    at_layer_0 = memorized["normalized_effect"].sel(layer=0)
    assert np.nanmin(at_layer_0.sel(position=30)) == pytest.approx(1, abs=1e-3)
    assert float(np.nanmax(abs(at_layer_0.sel(position=31)))) == pytest.approx(0, abs=1e-3)


def test_halves_are_disjoint_and_seeded() -> None:
    a, b = halves(9, 3)
    assert sorted([*a, *b]) == list(range(9))
    assert np.array_equal(halves(9, 3)[0], a)
    assert not np.array_equal(halves(9, 4)[0], a)


def test_chosen_site_and_estimates() -> None:
    values = np.zeros((4, 2, 3))
    values[:2, 1, 2] = -1
    values[2:, 0, 0] = -5
    data = xr.Dataset(
        {"m": (("sequence", "layer", "head"), values), "m_baseline": ("sequence", np.zeros(4))},
        {"sequence": list("abcd"), "layer": [4, 7], "head": [0, 1, 2]},
    )
    result = Result.create(data, kind="head_ablation")
    assert chosen_site(result, "m", np.array([0, 1])) == {"layer": 7, "head": 2}
    assert chosen_site(result, "m", np.array([2, 3])) == {"layer": 4, "head": 0}
    estimate = mean_estimate(xr.DataArray([1.0, 2.0, 3.0, np.nan], dims="sequence"))
    assert (estimate.value, estimate.n) == (2.0, 3)
    assert estimate.low < 2 < estimate.high
    share = share_estimate(xr.DataArray([1.0] * 8, dims="sequence"))
    assert (share.value, share.high) == (1.0, pytest.approx(1.0))
    assert 0.6 < share.low < 0.7
    ratio = ratio_estimate(
        xr.DataArray([1.0, 0.0], dims="sequence"), xr.DataArray([1.0, 3.0], dims="sequence")
    )
    assert ratio.value == 0.25


def test_head_table_is_sorted_and_corrected(run: StudyRun) -> None:
    heads = ml.load_result(run.report.parent / "head_ablation.nc")
    groups = {
        name: Result(heads.data.isel(sequence=heads["group"].values == name))
        for name in ("memorized", "matched control")
    }
    table = findings.head_table(groups, 0, most=10)
    assert table["effect_mean"].is_monotonic_increasing
    assert (table["effect_low"] <= table["effect_mean"]).all()
    assert table["p_corrected"].between(0, 1).all()


def test_every_ranking_says_what_the_benchmark_found_of_its_method(run: StudyRun) -> None:
    told = json.loads((run.report.parent / "run.json").read_text())
    notes = {table["name"]: table["note"] for table in told["tables"]}
    for name in ("heads", "ranked_head", "ranked_neuron", "ranked_layer_mlp", "ranked_layer_attention"):
        assert notes[name].startswith("Ranked by ")
        assert "In the localization benchmark" in notes[name]
        assert " of pythia (chance" in notes[name]
    titles = {table["name"]: table["title"] for table in told["tables"]}
    assert (titles["ranked_head"], titles["ranked_layer_mlp"]) == ("Heads: ranked", "MLPs: ranked")
    mlps = pd.read_parquet(run.report.parent / "ranked_layer_mlp.parquet")
    assert list(mlps) == ["layer", "score"]
    table = pd.read_parquet(run.report.parent / "ranked_neuron.parquet")
    assert len(table) == 20
    assert table["score"].is_monotonic_decreasing
    assert "mean-of-other-heads ablation finds" in told["explorers"][0]["caption"]


def test_a_second_run_computes_nothing_again_and_other_options_stand_beside(
    run: StudyRun, pythia: Any, planted: ml.SequenceSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.report.parent, tmp_path, dirs_exist_ok=True)
    kept = {path.name for path in (tmp_path / "sweeps").iterdir()}
    assert {"heads_memorized", "bypass_untrained_twin", "patching_memorized", "recall"} <= kept
    with monkeypatch.context() as patch:
        for name in ("memlens.sweeps.run.run_batches", "memlens.studies.running.score_recall"):
            patch.setattr(name, lambda *_, **__: pytest.fail("it is computed again"))
        again = ml.localize(pythia, planted, tmp_path, options=SMALL, progress=False)
    assert again.findings == run.findings
    assert not again.failures
    zeroed = ml.localize(pythia, planted, tmp_path, options=replace(SMALL, head_mode="zero"), progress=False)
    now = {path.name for path in (tmp_path / "sweeps").iterdir()}
    assert not zeroed.failures
    assert now - kept == {"heads_memorized-2", "heads_matched_control-2"}
    assert zeroed.findings[2] != run.findings[2]
    assert zeroed.findings[3] == run.findings[3]


def test_heads_from_a_donor(pythia: Any, planted: ml.SequenceSet, tmp_path: Path) -> None:
    few = planted[::8]
    options = replace(SMALL, donor="zoo/pythia-s-clean", head_mode="donor", explored_memorized=0)
    run = ml.localize(pythia, few, tmp_path, options=options, progress=False)
    assert run.failures == {}
    found = [ml.load_result(tmp_path / f"{name}.nc") for name in ("head_ablation", "donor_patching")]
    assert np.allclose(*(r["target_logprob"] for r in found), atol=1e-6)
    assert "Heads taken from zoo/pythia-s-clean" in run.report.read_text()
    with pytest.raises(OptionError, match="head_mode='donor' needs"):
        replace(SMALL, head_mode="donor")
    with pytest.raises(DonorError, match="4 layers"):
        ml.localize(pythia, few, tmp_path, options=replace(SMALL, donor="zoo/pythia-xs"), progress=False)
