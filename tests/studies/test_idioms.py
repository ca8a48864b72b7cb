"""The idiom study on the bundled model: every number of its tables is recomputed from what it saved."""

from __future__ import annotations

import html
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

import memlens as ml
from memlens.errors import ColumnError, OptionError
from memlens.results.kinds import reading
from memlens.results.result import Result
from memlens.studies.idioms import study as idioms
from memlens.studies.idioms.findings import (
    knocked_out,
    recall_by_frequency,
    recall_by_subset,
    recalled,
    rises_with_frequency,
)
from memlens.studies.idioms.unfolding import MISSED, NATURAL, RECALLED
from memlens.studies.running import StudyRun
from tests.report.pages import sentences

SMALL = ml.studies.IdiomOptions(
    max_items=6,
    max_controls=5,
    max_others=4,
    top_k=(1, 10),
    windows=(1, 2),
    lens_steps=3,
    lens_batch_size=4,
    n_resamples=200,
)
CONTROL = "matched_natural_text"


@pytest.fixture(scope="module")
def pythia() -> Any:
    return ml.load_model("zoo/pythia-s")


def study(model: Any, out: Path, options: ml.studies.IdiomOptions = SMALL, **given: Any) -> StudyRun:
    text = ml.load_sequences("zoo:heldout", model, prefix_len=1)
    expressions = ml.load_sequences("zoo:expressions", model)
    return ml.studies.study_idioms(
        model, expressions, out, text=text, options=options, progress=False, **given
    )


@pytest.fixture(scope="module")
def run(pythia: Any, tmp_path_factory: pytest.TempPathFactory) -> StudyRun:
    return study(
        pythia,
        tmp_path_factory.mktemp("idioms"),
        facts=ml.load_sequences("zoo:facts", pythia)[::3],
        identifiers=ml.load_sequences("zoo:identifiers", pythia)[::2],
        references=[ml.recall.NgramReference(["the miller sold the old lantern", "a kettle in winter"])],
        train_lens=True,
        command="memlens run idioms",
    )


@pytest.fixture(scope="module")
def folder(run: StudyRun) -> Path:
    return run.report.parent


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(folder / f"{name}.parquet")


def test_all_parts_ran_and_found_something(run: StudyRun, folder: Path) -> None:
    assert run.failures == {}
    titles = [finding.title for finding in run.findings]
    for name in ("Idioms", "Facts"):
        for part in (
            "what is recalled",
            "from promotion to boosting (logit lens)",
            "from promotion to boosting (tuned lens)",
            "how much is boosting",
            "recalled beside matched predictions",
            "the layer whose neurons recall depends on",
            "early against late layers",
            "the recall criteria",
        ):
            assert f"{name}: {part}" in titles
    assert "Identifiers: what is recalled" in titles
    page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    for title in (
        "Every knock-out of the top k",
        "The two phases",
        "Identifiers recalled",
        "lens_batch_size",
    ):
        assert title.lower() in page.lower()
    assert "Dominant neurons: Ranked by activation times norm. In the localization benchmark" in page


def test_the_split_is_the_model_s_own_prediction(pythia: Any, folder: Path) -> None:
    recall = table(folder, "idioms_recall")
    seqs = ml.load_sequences("zoo:expressions", pythia).first_targets()
    hits = []
    for row, n in zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True):
        logits = pythia(np_row(row[:n]))
        hits.append(int(logits[0, -1].argmax()) == row[n])
    assert recall["exact_match"].astype(bool).tolist() == hits
    decoded = ml.load_result(folder / "idioms_decoding.nc")
    counts = pd.Series(decoded["group"].values).value_counts()
    assert (counts[RECALLED], counts[MISSED]) == (sum(hits), len(hits) - sum(hits))
    assert counts[NATURAL] == len(hits)


def np_row(row: list[int]) -> Any:
    import torch

    return torch.tensor([row])


def test_phases_are_those_of_the_saved_decoding(folder: Path) -> None:
    decoded = ml.load_result(folder / "idioms_decoding.nc").data.sel(stream="resid_post")
    phases = table(folder, "idioms_phases_logit").set_index(["token", "group", "quantity"])
    for group in (RECALLED, NATURAL):
        rank = decoded["predicted_rank"].values[decoded["group"].values == group][..., 0]
        on_top = np.median(rank, axis=0) == 0
        boundary = phases.loc[("predicted", group, "boundary")]
        assert boundary["value"] == np.argmax(on_top)
        assert boundary["low"] <= boundary["value"] <= boundary["high"]
        stable = [next(i for i in range(len(row)) if (row[i:] == 0).all()) for row in rank]
        assert phases.loc[("predicted", group, "stable_promotion"), "value"] == pytest.approx(np.mean(stable))
        assert phases.loc[("predicted", group, "stable_promotion"), "n"] == len(rank)


def test_matched_pairs_are_alike_and_compared_in_pairs(folder: Path) -> None:
    matched = ml.load_result(folder / f"idioms_{CONTROL}.nc").data
    mine, theirs = (
        matched.isel(sequence=matched["group"].values == g) for g in (RECALLED, f"matched {NATURAL}")
    )
    final = [part["predicted_probability"].values[:, -1, 0] for part in (mine, theirs)]
    assert len(final[0]) == len(final[1]) >= 2
    assert np.abs(final[0] - final[1]).max() <= SMALL.probability_caliper + 1e-6
    rows = table(folder, "idioms_matched")
    row = rows[(rows["control"] == NATURAL) & (rows["quantity"] == "boost")].iloc[0]
    gaps = mine["boost"].values[:, 0] - theirs["boost"].values[:, 0]
    assert row["difference"] == pytest.approx(np.nanmean(gaps))
    assert row["pairs"] == len(gaps)
    assert row["low"] <= row["difference"] <= row["high"]
    assert (rows["p_corrected"] >= rows["p"] - 1e-12).all()


def test_knock_out_table_has_every_cell_with_wilson_s_interval(folder: Path) -> None:
    result = ml.load_result(folder / "idioms_knock_out_top.nc")
    rows = table(folder, "idioms_knock_out_top")
    flips = result["prediction_flipped"]
    assert set(flips["selection"].values) == {"dominant", "random", "norm_matched"}
    recalled = rows[rows["group"] == RECALLED]
    assert len(recalled) == 3 * 2 * (6 + 5)  # selections x k x windows of one and of two layers
    row = recalled[(recalled["selection"] == "dominant") & (recalled["k"] == 10) & (recalled["layer"] == 0)]
    row = row[row["window"] == 2].iloc[0]
    hits = flips.sel(selection="dominant", k=10, layer=0, window=2).values
    low, high = proportion_confint(hits.sum(), len(hits), method="wilson")
    assert (row["flipped"], row["n"]) == (pytest.approx(hits.mean()), 6)
    assert (row["flipped_low"], row["flipped_high"]) == (pytest.approx(low, abs=1e-9), pytest.approx(high))
    cost = result.effect("target_logprob").sel(selection="dominant", k=10, layer=0, window=2)
    assert row["logprob_change"] == pytest.approx(float(cost.mean()), abs=1e-6)
    random = recalled[(recalled["selection"] == "random") & (recalled["k"] == 10)]
    assert (random["n"] == 5).all()
    again = flips.sel(selection="random", k=10, layer=2, window=1)
    cell = random[(random["layer"] == 2) & (random["window"] == 1)].iloc[0]
    assert cell["flipped"] == pytest.approx(float(again.mean(skipna=True)))
    others = rows[rows["group"] != RECALLED]
    assert set(others["group"]) == {MISSED, NATURAL}
    assert set(others["selection"]) == {"dominant"}


def test_early_against_late_is_the_mean_over_windows_of_each_item(run: StudyRun, folder: Path) -> None:
    flips = ml.load_result(folder / "idioms_knock_out_top.nc")["prediction_flipped"].sel(
        selection="dominant", k=10
    )
    gaps = []
    for item in flips.transpose("sequence", "layer", "window"):
        early = [item.sel(layer=s, window=w) for w in (1, 2) for s in range(6) if s + w <= 3]
        late = [item.sel(layer=s, window=w) for w in (1, 2) for s in range(6) if s >= 3 and s + w <= 6]
        gaps.append(float(np.mean(early) - np.mean(late)))
    finding = next(f for f in run.findings if f.title == "Idioms: early against late layers")
    assert finding.estimate == pytest.approx(np.mean(gaps))
    assert "random" in (finding.control or "")


def test_the_same_call_again_does_only_what_is_missing(pythia: Any, run: StudyRun, tmp_path: Path) -> None:
    shutil.copytree(run.report.parent, tmp_path, dirs_exist_ok=True)
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweeps/*/*") if path.suffix == ".nc"}
    before = {p.name: pd.read_parquet(p) for p in tmp_path.glob("*.parquet")}
    parts = {p for p in (tmp_path / "sweeps").rglob("*") if p.is_file() and p.name != "result.nc"}
    stamps = {p: p.stat().st_mtime_ns for p in parts}
    again = study(pythia, tmp_path)  # without facts and identifiers, which add nothing to the idioms' part
    assert parts
    assert shards
    assert {p: p.stat().st_mtime_ns for p in parts} == stamps
    told = {f.title: f.statement for f in run.findings}
    assert len(again.findings) >= 6
    assert [f.statement for f in again.findings] == [told[f.title] for f in again.findings]
    tables = {p.name: pd.read_parquet(p) for p in tmp_path.glob("idioms_*.parquet")}
    assert len(tables) >= 6
    for name, frame in tables.items():
        pd.testing.assert_frame_equal(frame, before[name])


def test_a_part_that_fails_costs_only_itself(
    pythia: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("memlens.studies.idioms.unfolding.knock_out_neurons", broken)
    run = study(pythia, tmp_path)
    assert run.failures == {"idioms: knock-outs": "RuntimeError: out of memory"}
    assert (tmp_path / "idioms_decoding.nc").exists()
    assert "out of memory" in run.report.read_text(encoding="utf-8")


def test_nothing_recalled_is_said_and_ends_there(pythia: Any, tmp_path: Path) -> None:
    recall = ml.score_recall(pythia, ml.load_sequences("zoo:expressions", pythia), progress=False)
    missed = recall.sequences[(recall.table["exact_match"] == 0).to_numpy()]
    run = ml.studies.study_idioms(pythia, missed, tmp_path, options=SMALL, progress=False)
    assert run.failures == {}
    assert run.findings[0].estimate == 0
    assert not (tmp_path / "idioms_decoding.nc").exists()
    said = sentences(run.report)
    assert said["found"] == f"The model predicts the target of 0 of {len(missed)} idioms."
    assert said["compared"].startswith("Nothing: there is no control")


def test_the_report_opens_with_what_was_found(run: StudyRun) -> None:
    said = sentences(run.report)
    assert "The model predicts the target of " in said["found"]
    assert "most dominant neurons" in said["found"]
    assert "the end of recalled idioms is predicted" in said["compared"]
    assert said["found"].count(";") <= 2  # it stays one sentence, however many kinds of items there are


def test_a_knock_out_is_described_by_what_its_figure_shows(folder: Path) -> None:
    for name in ("idioms_knock_out_top", "idioms_knock_out_non_top"):
        result = ml.load_result(folder / f"{name}.nc")
        assert "prediction flipped" in reading(result)
        assert "prediction flipped" in result.plot().data[0].hovertemplate
        assert "target log-prob" in reading(result, "target_logprob")


def test_recall_rises_with_frequency_and_identifiers_are_whole(run: StudyRun, folder: Path) -> None:
    recall = table(folder, "idioms_recall")
    finding = next(f for f in run.findings if f.title == "Idioms: recall against copies")
    rho = stats.spearmanr(recall["copies"], recall["exact_match"]).statistic
    assert finding.estimate == pytest.approx(rho)
    assert finding.low is not None
    assert finding.low > 0
    bins = table(folder, "idioms_by_copies")
    assert bins["n"].sum() == len(recall)
    lowest = recall[recall["copies"] == recall["copies"].min()]
    hits = (
        f"({lowest['copies'].iloc[0]:.0f}), {lowest['exact_match'].sum():.0f} of {len(lowest)} are recalled"
    )
    assert f"Of the idioms with the fewest copies {hits}" in finding.statement
    assert bins["recalled"].iloc[-1] > bins["recalled"].iloc[0]
    identifiers = table(folder, "identifiers_recall")
    assert (identifiers["n_targets"] > 1).all() if "n_targets" in identifiers else True


def test_subsets_are_counted_where_they_stand_beside_their_size() -> None:
    frame = pd.DataFrame({"exact_match": [0, 1, 1, 1], "relation": ["home", "home", "trade", "trade"]})
    assert recalled("facts", frame).control == "relation home: 1 of 2; relation trade: 2 of 2"


def test_where_nothing_varies_no_correlation_is_promised() -> None:
    frame = pd.DataFrame({"exact_match": [0, 0, 0, 0], "copies": [0, 0, 1, 1]})
    finding = rises_with_frequency("facts", frame, "copies", 0)
    assert finding.number == ""
    said = "Of the facts with the fewest copies (0), 0 of 2 are recalled, of those with the most (1), 0 of 2."
    assert said in finding.statement
    assert "not vary enough for a correlation" in finding.statement
    varied = rises_with_frequency("facts", frame.assign(exact_match=[0, 0, 0, 1]), "copies", 0)
    assert "of those with the most (1), 1 of 2. The number is Spearman's" in varied.statement


def flipped(share: float, n: int = 20, **coords: Any) -> xr.DataArray:
    hits = (np.arange(n) < share * n).astype(float)[:, None, None]
    places = {"sequence": [f"{share}-{i}" for i in range(n)], "layer": [0], "window": [1]}
    return xr.DataArray(hits, places, ("sequence", "layer", "window"))


def test_other_predictions_that_flip_as_often_are_controls_too() -> None:
    own, random = flipped(0.8), flipped(0.0).assign_coords(sequence=flipped(0.8)["sequence"])
    k = {"k": [10]}
    values = xr.concat([own, random], xr.DataArray(["dominant", "random"], dims="selection")).expand_dims(k)
    result = Result.create(xr.Dataset({"prediction_flipped": values}), kind="neuron_knockout")
    others = {
        MISSED: Result.create(
            xr.Dataset({"prediction_flipped": flipped(0.9).expand_dims(k)}), kind="neuron_knockout"
        )
    }
    alone = next(knocked_out("idioms", result, {}, 0)).statement
    assert "That is more than with random neurons" in alone
    beside = next(knocked_out("idioms", result, others, 0)).statement
    assert f"That is not clearly more than with {MISSED}, the strictest control" in beside


def test_frequency_bins_and_subsets_by_hand() -> None:
    frame = pd.DataFrame({"exact_match": [0, 0, 1, 1, 1, 0], "copies": [1, 1, 2, 2, 4, 4]})
    bins = recall_by_frequency(frame, "copies")
    assert bins[["from", "to", "n", "recalled"]].to_numpy().tolist() == [
        [1, 1, 2, 0],
        [2, 2, 2, 1],
        [4, 4, 2, 0.5],
    ]
    halves = recall_by_frequency(frame, "copies", bins=2)
    assert halves[["from", "to", "n"]].to_numpy().tolist() == [[1, 2, 4], [4, 4, 2]]
    flags = frame.assign(hard_to_guess=[True] * 3 + [False] * 3, frequent_target_ind=[True, False] * 3)
    subsets = recall_by_subset(flags).set_index("subset")
    assert subsets.loc["all", ["n", "recalled"]].tolist() == [6, 0.5]
    assert subsets.loc["hard to guess (flag)", ["n", "recalled"]].tolist() == [3, pytest.approx(1 / 3)]
    assert subsets.loc["hard to guess and content-word target (flags)", "n"] == 2


def test_items_are_left_out_by_their_columns(pythia: Any, tmp_path: Path) -> None:
    texts = ml.load_sequences("zoo:expressions", pythia).table["text"].tolist()[130:]
    pd.DataFrame({"idiom": [*texts, "for a very long time"]}).to_json(
        tmp_path / "idioms.jsonl", orient="records", lines=True
    )
    with pytest.warns(UserWarning, match="1 rows are dictionary definitions"):
        seqs = ml.load_sequences(tmp_path / "idioms.jsonl", pythia)
    options = ml.studies.IdiomOptions(**{**vars(SMALL), "knock_out": False, "leave_out": ("definition",)})
    run = ml.studies.study_idioms(pythia, seqs, tmp_path / "run", options=options, progress=False)
    assert run.failures == {}
    assert any("Fewer than two recalled idioms have a control" in f.statement for f in run.findings)
    assert len(table(tmp_path / "run", "idioms_recall")) == len(texts) == len(seqs) - 1
    defects = table(tmp_path / "run", "idioms_defects")
    assert "for a very long time" in defects["text"].tolist()
    with pytest.raises(ColumnError, match="'definitoin'"):
        ml.studies.study_idioms(
            pythia, seqs, tmp_path, options=ml.studies.IdiomOptions(leave_out=("definitoin",))
        )


def test_bad_options_are_named() -> None:
    with pytest.raises(OptionError, match="lacks 'resid_post'"):
        ml.studies.IdiomOptions(streams=("mlp_out",))
    with pytest.raises(OptionError, match="lacks 'dominant'"):
        ml.studies.IdiomOptions(selections=("random",))
    with pytest.raises(OptionError, match="max_items=0"):
        ml.studies.IdiomOptions(max_items=0)
    with pytest.raises(OptionError, match="probability_caliper=0"):
        ml.studies.IdiomOptions(probability_caliper=0)


def test_the_study_s_name_is_public() -> None:
    assert ml.studies.study_idioms is idioms.study_idioms


def test_hooks_of_the_model_stay_as_they_were(pythia: Any, run: StudyRun) -> None:
    """Every instrument leaves as many hooks as it found, however often it runs."""

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pythia.modules())

    seqs, before = ml.load_sequences("zoo:expressions", pythia)[:4], hooks()
    for _ in range(3):
        ml.decode_residual(pythia, seqs, progress=False)
        ml.knock_out_neurons(pythia, seqs, top_k=2, windows=2, progress=False)
    assert run.failures == {}
    assert hooks() == before


@pytest.mark.slow
def test_the_criteria_tell_planted_expressions_from_text(
    pythia: Any, shipped_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of the corpus itself, every planted expression takes its whole prompt, and text seldom does."""
    monkeypatch.setattr("memlens.organisms.training.zoo.zoo_corpus", lambda name: shipped_corpus)
    from memlens.studies.idioms.command import criteria_options, ngram_references

    expressions = ml.load_sequences("zoo:expressions", pythia)
    text = ml.sequences.natural_controls(
        ml.load_sequences("zoo:heldout", pythia, prefix_len=1), expressions, tokenizer=pythia.tokenizer
    )
    text = text[np.flatnonzero(text.table["target"].str.split().str.len().to_numpy() == 1)][::2]
    expressions = expressions[::2]
    references, options = (
        ngram_references(pythia, None, zoo=True),
        criteria_options(ml.recall.CriteriaOptions(), 0, zoo=True),
    )
    theirs, ours = (
        ml.recall.score_criteria(seqs, references, probed=pythia, options=options, progress=False)
        for seqs in (text, expressions)
    )
    planted = expressions.table["copies"].to_numpy() > 0
    passed = ours.passes()
    assert passed.loc[planted, "tested"].all()
    assert not passed.loc[~planted, "tested"].any()
    assert passed.loc[planted, "irreducible"].mean() > 0.95
    assert passed.loc[planted, "single_target"].all()
    score = np.concatenate([ours.score()[planted], theirs.score()])
    area = ml.stats.roc_area(score, np.arange(len(score)) < planted.sum())
    assert area.low > 0.8
