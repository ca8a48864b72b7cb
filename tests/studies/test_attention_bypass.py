"""The attention-bypass study on the bundled model: its numbers are recomputed from what it saved."""

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
import torch
from statsmodels.stats.proportion import proportion_confint

import memlens as ml
from memlens.errors import EmptySetError, OptionError, UnfinishedError
from memlens.organisms.corpus.corpus import Corpus
from memlens.results.groups import quartiles
from memlens.results.kinds import reading
from memlens.results.statistics.intervals import halves
from memlens.studies.bypass.findings import scaling
from memlens.studies.bypass.layers import METRICS
from memlens.studies.running import StudyRun
from tests.cli.test_commands import call
from tests.report.pages import sentences

SMALL = ml.studies.BypassOptions(
    max_sequences=20,
    max_free_running=6,
    control_sequences=8,
    bounds_sequences=2,
    joint_sequences=12,
    joint_questions=8,
    exact_layers=1,
    exact_pool=2,
    greedy_size=2,
    n_random=2,
    n_resamples=200,
)
TASKS = ["agreement", "cloze", "entity", "arithmetic"]


@pytest.fixture(scope="module")
def pythia() -> Any:
    return ml.load_model("zoo/pythia-s")


@pytest.fixture(scope="module")
def found(pythia: Any, shipped_corpus: Corpus) -> ml.recall.MemorizedSet:
    rows = shipped_corpus.rows[:3000]
    return ml.recall.build_memorized_set(pythia, rows, n=24, seed=1, block_size=512, progress=False)


@pytest.fixture(scope="module")
def inputs(pythia: Any, found: ml.recall.MemorizedSet) -> ml.studies.BypassInputs:
    return ml.studies.BypassInputs(pythia, found, ml.tasks.local_tasks("zoo", pythia, names=TASKS, n=20))


@pytest.fixture(scope="module")
def run(inputs: ml.studies.BypassInputs, tmp_path_factory: pytest.TempPathFactory) -> StudyRun:
    def smaller() -> ml.studies.BypassInputs:
        few = [task.take(slice(0, 10)) for task in inputs.tasks]
        memorized = inputs.groups["memorized"][:10]
        return ml.studies.BypassInputs(inputs.model, memorized, tasks=few, name="the same, less")

    return ml.studies.study_attention_bypass(
        inputs.model, inputs.sequences, tmp_path_factory.mktemp("bypass"), tasks=inputs.tasks,
        others=[smaller],
        options=SMALL, progress=False, command="memlens run bypass",
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(run: StudyRun) -> Path:
    return run.report.parent


def test_all_parts_ran_and_stand_in_the_report(run: StudyRun, folder: Path) -> None:
    assert run.failures == {}
    titles = [finding.title for finding in run.findings]
    assert titles == [
        "What is recited",
        "Which layer's attention recall needs",
        "The most selective layer",
        "From one model to the next",
        "Late against early layers",
        "Language against reasoning",
        "The most selective set of layers",
        "Single heads",
        "What is special to memorized text",
        "Bypass against removal, late layers",
        "What any residual stack does",
        "Bounds",
    ]
    page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    for words in (
        "Recitation against ability",
        "Other interventions on each layer",
        "Area under the frontier",
        "joint_questions",
    ):
        assert words in page
    assert "Ranked by attention bypass. In the localization benchmark attention bypass finds" in page
    for finding in run.findings:
        assert finding.control or finding.title in ("Bounds", "From one model to the next")


def test_findings_count_and_name_what_they_are_about(run: StudyRun, folder: Path) -> None:
    sentences(run.report)
    by = {finding.title: finding for finding in run.findings}
    bounds = ml.load_result(folder / "bounds.nc")
    n = int(bounds["slack"].notnull().sum())
    assert f"None of {n} bounds is exceeded" in by["Bounds"].statement
    assert f"All {n} measured changes lie within" in reading(bounds)
    assert "relative predictor on this model" in str(by["Bounds"].control)
    gaps = pd.read_parquet(folder / "quartiles.parquet").query(
        "what == 'language minus reasoning' and measure == 'relative_drop'"
    )
    clear = [f"part {row.part}" for row in gaps.itertuples() if row.low > 0 or row.high < 0] or ["no part"]
    assert f"excludes 0 at {' and '.join(clear)}." in by["Language against reasoning"].statement
    assert "MLP zero" in by["What is special to memorized text"].statement


def test_exact_match_under_a_bypass_is_that_of_a_plain_forward(
    pythia: Any, inputs: ml.studies.BypassInputs, folder: Path
) -> None:
    blocks = ml.load_result(folder / "blocks.nc").data
    mine = blocks.isel(sequence=blocks["group"].values == "memorized")
    assert set(METRICS) <= set(mine.data_vars)
    ids = mine["sequence"].values.tolist()
    rows = [inputs.groups["memorized"].table["id"].tolist().index(i) for i in ids]
    tokens = inputs.groups["memorized"].tokens[rows]
    assert len(ids) == 20
    for layer in (0, 4):
        with torch.no_grad(), ml.bypassed(pythia, layer):
            logits = pythia(tokens)[:, 31:-1]
        right = logits.argmax(-1) == tokens[:, 32:]
        np.testing.assert_array_equal(mine["exact_match"].sel(layer=layer), right.all(1).float())
        np.testing.assert_allclose(mine["target_accuracy"].sel(layer=layer), right.float().mean(1), atol=1e-6)
        spread = logits.log_softmax(-1)
        entropy = -(spread.exp() * spread).sum(-1).sum(-1)
        np.testing.assert_allclose(mine["completion_entropy"].sel(layer=layer), entropy, rtol=1e-4)


def test_controls_are_those_matched_to_the_chosen_sequences(
    inputs: ml.studies.BypassInputs, folder: Path
) -> None:
    blocks = ml.load_result(folder / "blocks.nc").data
    chosen = blocks["sequence"].values[blocks["group"].values == "memorized"].tolist()
    table = inputs.groups["not memorized"].table.set_index("id")
    others = blocks["sequence"].values[blocks["group"].values == "not memorized"].tolist()
    assert others
    assert set(table.loc[others, "matched_to"]) <= set(chosen)


def above_chance(tasks: Any) -> list[str]:
    """The tasks whose accuracy without a bypass is above chance by 0.05 with Wilson's interval."""
    found = []
    for name in TASKS:
        mine = tasks.isel(sequence=tasks["task"].values == name)
        right, n = float(mine["accuracy_baseline"].sum()), mine.sizes["sequence"]
        if proportion_confint(right, n, method="wilson")[0] > float(mine["chance"].values[0]) + 0.05:
            found.append(name)
    return found


def test_the_selective_layer_is_chosen_on_one_half_and_scored_on_the_other(
    run: StudyRun, folder: Path
) -> None:
    blocks = ml.load_result(folder / "blocks.nc").data
    mine = blocks.isel(sequence=blocks["group"].values == "memorized")
    tasks = ml.load_result(folder / "tasks.nc").data
    scores, counted = [], above_chance(tasks)
    for part in (0, 1):
        half = mine.isel(sequence=halves(mine.sizes["sequence"], 0)[part])
        removed = 1 - half["exact_match"].mean("sequence") / half["exact_match_baseline"].mean()
        costs = []
        for number, name in enumerate(TASKS):
            place = np.flatnonzero(tasks["task"].values == name)
            some = tasks.isel(sequence=place[halves(len(place), number)[part]])
            base, chance = float(some["accuracy_baseline"].mean()), float(some["chance"].values[0])
            if name in counted:
                costs.append(((base - some["accuracy"].mean("sequence")) / (base - chance)).values)
        scores.append(removed.values - np.max(costs, axis=0))
    best = int(np.argmax(scores[0]))
    finding = next(f for f in run.findings if f.title == "The most selective layer")
    assert f"layer {best} " in finding.statement
    assert finding.estimate == pytest.approx(scores[1][best], abs=1e-6)
    table = pd.read_parquet(folder / "selectivity.parquet")
    own = table[table["model"] == "zoo/pythia-s"]
    np.testing.assert_allclose(own["selectivity"], scores[1], atol=1e-6)
    assert set(table["model"]) == {"zoo/pythia-s", "the same, less"}


def test_quartiles_are_means_over_their_layers(folder: Path) -> None:
    rows = pd.read_parquet(folder / "quartiles.parquet").set_index(["what", "measure", "part"])
    blocks = ml.load_result(folder / "blocks.nc").data
    exact = blocks["exact_match"].values[blocks["group"].values == "memorized"].mean(0)
    tasks = ml.load_result(folder / "tasks.nc").data
    for part, layers in enumerate(quartiles(6), 1):
        row = rows.loc[("recitation", "relative_drop", part)]
        assert row["mean"] == pytest.approx(np.mean([1 - exact[layer] for layer in layers]))
        assert row["low"] - 1e-9 <= row["mean"] <= row["high"] + 1e-9
        drops = {}
        for name in above_chance(tasks):
            some = tasks.isel(sequence=tasks["task"].values == name)
            base, chance = float(some["accuracy_baseline"].mean()), float(some["chance"].values[0])
            lost = base - some["accuracy"].mean("sequence").values[layers]
            drops[name] = np.mean(lost / base), np.mean(lost / (base - chance))
        for i, measure in enumerate(("relative_drop", "relative_drop_chance_corrected")):
            language = np.mean([drops[n][i] for n in ("agreement", "cloze") if n in drops])
            reasoning = np.mean([drops[n][i] for n in ("entity", "arithmetic") if n in drops])
            assert rows.loc[("language", measure, part), "mean"] == pytest.approx(language)
            gap = rows.loc[("language minus reasoning", measure, part), "mean"]
            assert gap == pytest.approx(language - reasoning)


def test_free_decoding_is_the_score_under_the_bypass(
    pythia: Any, inputs: ml.studies.BypassInputs, folder: Path
) -> None:
    result = ml.load_result(folder / "free_running.nc")
    ids = result["sequence"].values.tolist()
    rows = [inputs.groups["memorized"].table["id"].tolist().index(i) for i in ids]
    seqs = inputs.groups["memorized"][rows]
    tokens, eos = seqs.tokens[:, :32], pythia.tokenizer.eos_token_id
    with ml.bypassed(pythia, 5), torch.no_grad():
        for _ in range(32):
            logits = pythia(tokens)[:, -1]
            logits[:, eos] = -torch.inf
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    new = tokens[:, 32:]
    assert result.settings["ban_eos"] is True
    share = (new == seqs.tokens[:, 32:]).float().mean(1)
    np.testing.assert_allclose(result["memorization_score"].sel(layer=5), share, atol=1e-6)
    assert (result["exact_match"] == (result["memorization_score"] == 1)).all()


def test_the_table_of_controls_is_the_saved_edits(folder: Path) -> None:
    edits = ml.load_result(folder / "edits_by_group.nc").data
    table = pd.read_parquet(folder / "controls.parquet").set_index(["edit", "part"])
    effect = edits["target_logprob"] - edits["target_logprob_baseline"]
    for edit in ("identity", "uniform", "mlp_mean"):
        for group in ("memorized", "predictable", "untrained weights"):
            mine = effect.isel(sequence=edits["group"].values == group).sel(edit=edit, layer=[1, 2])
            assert table.loc[(edit, 2), group] == pytest.approx(float(mine.mean()), abs=1e-6)
    heads = ml.load_result(folder / "heads.nc")
    lost = heads.effect("target_logprob").mean("head").sel(layer=[1, 2]).mean()
    assert table.loc[("single head", 2), "memorized"] == pytest.approx(float(lost), abs=1e-6)
    row = table.loc[("identity", 1)]
    assert row["minus predictable low"] <= row["minus predictable"] <= row["minus predictable high"]
    assert 0 < row["minus predictable p_corrected"] <= 1
    depth = pd.read_parquet(folder / "depth.parquet").set_index(["edit", "group"])
    sizes = np.abs(effect.isel(sequence=edits["group"].values == "untrained weights").sel(edit="zero"))
    order = pd.Series(sizes.mean("sequence").values).corr(pd.Series(range(6)), method="spearman")
    assert depth.loc[("zero", "untrained weights"), "correlation"] == pytest.approx(order)


def test_late_bypass_is_set_against_removal(run: StudyRun, folder: Path) -> None:
    edits = ml.load_result(folder / "edits_by_group.nc").data
    mine = edits.isel(sequence=edits["group"].values == "memorized").sel(layer=[4, 5])
    gap = (mine["target_logprob"].sel(edit="identity") - mine["target_logprob"].sel(edit="mean")).mean(
        "layer"
    )
    finding = next(f for f in run.findings if f.title == "Bypass against removal, late layers")
    assert finding.estimate == pytest.approx(float(gap.mean()), abs=1e-6)
    assert finding.low is not None
    assert finding.low < float(gap.mean()) < (finding.high or 0)
    whole = mine["target_logprob"].sel(edit="identity") - mine["target_logprob_baseline"]
    if (finding.high or 0) < 0 and float(gap.mean()) < 0.5 * float(whole.mean()):
        assert "not the loss of what attention brings in" in finding.statement
    assert "predictable" in (finding.control or "")


def test_a_killed_run_is_taken_up(
    inputs: ml.studies.BypassInputs, run: StudyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run that is killed at the other edits leaves: a copy of the whole run without them."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    shutil.copytree(run.report.parent, tmp_path, dirs_exist_ok=True)
    done = {p.name for p in (tmp_path / "sweeps").iterdir()}
    lost = {name for name in done if name.startswith("edits_")}
    assert lost < done
    for name in lost:
        shutil.rmtree(tmp_path / "sweeps" / name)
    with monkeypatch.context() as patch:
        patch.setattr("memlens.studies.bypass.sides.control_edits", killed)
        with pytest.raises(KeyboardInterrupt):
            ml.studies.study_attention_bypass(
                inputs.model, inputs.sequences, tmp_path, tasks=inputs.tasks, options=SMALL, progress=False
            )
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")}
    assert stamps
    options = replace(SMALL, bounds_sequences=0)
    again = ml.studies.study_attention_bypass(
        inputs.model, inputs.sequences, tmp_path, tasks=inputs.tasks, options=options, progress=False
    )
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert {p.name for p in (tmp_path / "sweeps").iterdir()} == done
    skipped = ("From one model to the next", "Bounds")  # need the other model; are computed anew in any case
    expected = [f.statement for f in run.findings if f.title not in skipped]
    assert [f.statement for f in again.findings] == expected


@pytest.mark.slow
def test_two_parts_give_what_one_process_gives_to_the_byte(
    inputs: ml.studies.BypassInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three runs of the study, two of them shares."""
    monkeypatch.setattr("memlens.sweeps.shards._SHARD_FLOPS", {"cpu": 0.0, "cuda": 0.0})
    options = replace(
        SMALL, max_sequences=6, free_running=False, control_sequences=4, bounds_sequences=0,
        exact_layers=6, joint_sequences=4, joint_questions=4, edits=("identity",), untrained_control=False,
        n_resamples=50,
    )  # fmt: skip
    other = ml.studies.BypassInputs(
        inputs.model, inputs.groups["memorized"][:4], inputs.tasks[:1], "the same, less"
    )

    def study(out: Path, **part: Any) -> StudyRun:
        return ml.studies.study_attention_bypass(
            inputs.model, inputs.sequences, out, tasks=inputs.tasks, others=iter([lambda: other]),
            options=options, progress=False, **part,
        )  # fmt: skip

    many = tmp_path / "many"
    with pytest.raises(UnfinishedError) as missing:
        study(many, part=(0, 2))
    # Whole sweeps of one part, parts of larger ones, and both sweeps of the search's first round.
    for name in ("blocks_not_memorized", "heads_memorized", "sets/recall_0", "sets/tasks_0"):
        assert f"many/sweeps/{name} " in str(missing.value)
    assert not (many / "report.html").exists()
    assert study(many, part=(1, 2)).failures == {}
    one = study(tmp_path / "one")
    names = sorted(path.relative_to(many) for path in many.rglob("*.npz"))
    assert names == sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.npz"))
    assert len(names) > 20
    for name in names:
        assert (many / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    runs = [json.loads((folder / "run.json").read_text()) for folder in (many, tmp_path / "one")]
    assert runs[0]["findings"] == runs[1]["findings"]
    assert len(one.findings) == len(runs[0]["findings"]) > 8


def test_a_part_that_fails_costs_only_itself(
    pythia: Any, inputs: ml.studies.BypassInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("memlens.studies.bypass.layers.evaluate_tasks", broken)
    options = ml.studies.BypassOptions(
        **{**vars(SMALL), "joint_sequences": 0, "edits": (), "heads": False, "free_running": False}
    )
    run = ml.studies.study_attention_bypass(
        inputs.model, inputs.sequences, tmp_path, tasks=inputs.tasks, options=options, progress=False
    )
    assert run.failures == {"tasks": "RuntimeError: out of memory"}
    assert "out of memory" in run.report.read_text(encoding="utf-8")
    assert [f.title for f in run.findings][-1] == "Bounds"


def test_without_controls_nothing_is_called_special(pythia: Any, found: Any, tmp_path: Path) -> None:
    options = ml.studies.BypassOptions(**{**vars(SMALL), "bounds_sequences": 0, "heads": False})
    run = ml.studies.study_attention_bypass(
        pythia, found.memorized[:8], tmp_path, options=options, progress=False
    )
    assert "no tasks were given" in run.report.read_text(encoding="utf-8")
    special = next(f for f in run.findings if f.title == "What is special to memorized text")
    assert special.estimate is None
    assert "No control text" in special.statement
    said = sentences(run.report)
    assert "The unchanged model recites 8 of the 8 examined sequences" in said["found"]
    assert "no control text was given" in said["compared"]


def test_bad_inputs_are_refused(pythia: Any, found: ml.recall.MemorizedSet) -> None:
    with pytest.raises(EmptySetError, match="3 memorized sequences"):
        ml.studies.BypassInputs(pythia, found.memorized[:3])
    with pytest.raises(OptionError, match="Did you mean 'not memorized'"):
        ml.studies.BypassInputs(pythia, {"memorized": found.memorized, "notmemorized": found.unmemorized})
    with pytest.raises(OptionError, match="edits"):
        ml.studies.BypassOptions(edits=("zero",))
    with pytest.raises(OptionError, match="quartiles=1"):
        ml.studies.BypassOptions(quartiles=1)
    with pytest.raises(OptionError, match="mode"):
        ml.studies.BypassOptions(mode="uniform")


def test_scaling_speaks_of_each_model_s_chosen_layer() -> None:
    table = pd.DataFrame(
        {
            "model": ["a"] * 4 + ["b"] * 4,
            "layer": [0, 1, 2, 3] * 2,
            "selectivity_chosen": [0, 0, 1, 0, 0, 0, 0, 1],
            "selectivity": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
            "selectivity_low": [0.0] * 8,
            "selectivity_high": [1.0] * 8,
            "removed": [1, 1, 1, 0.5, 1, 1, 1, 0.25],
            "cost": [0.9] * 7 + [0.0],
        }
    )
    words = scaling(table, 4).statement
    assert "a: layer 2 of 4, selectivity 0.3 [" in words
    assert "b: layer 3 of 4, selectivity 0.8 [" in words
    assert "remove 0.25 and cost 0.00" in words


def test_the_command_runs_on_saved_sequences(found: ml.recall.MemorizedSet, tmp_path: Path) -> None:
    found.save(tmp_path / "set")
    args = ["run", "bypass", "--model", "zoo/pythia-s", "--out", str(tmp_path / "out"), "-q"]
    given = [*args, "--memorized", str(tmp_path / "set"), "--tasks", "local", "--questions", "6"]
    small = ["--max-sequences", "8", "--control-sequences", "4", "--joint-sequences", "0", "--bounds", "0"]
    code, shown, error = call(*given, *small, "--no-free-running", "--no-heads")
    assert code == 0, error
    assert "The most selective layer" in shown
    assert (tmp_path / "out" / "report.html").is_file()
    code, _, error = call(*given, "--corpus", "x.npy")
    assert code == 2
    assert "--corpus and --memorized both say what is recited" in error
    code, _, error = call(*args, "--part", "0/2")
    assert code == 2
    assert "scan it first" in error
