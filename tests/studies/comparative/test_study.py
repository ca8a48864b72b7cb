"""The comparative study on small models: its tables are recomputed from what it saved, and from the model."""

from __future__ import annotations

import html
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import memlens as ml
from memlens.errors import EmptySetError, OptionError, UnfinishedError
from memlens.models.provenance import describe, remember
from memlens.recall.scores import RecallScores
from memlens.studies.comparative import config as comparative_config
from memlens.studies.comparative import measure as comparative_measure
from memlens.studies.comparative.analyze.heads import expected_jaccard
from memlens.studies.comparative.analyze.profiles import layer_profile, on_grid
from memlens.studies.comparative.findings import CLAIMS
from memlens.studies.comparative.options import CONTROL, MEMORIZED
from memlens.studies.comparative.store import SavedModel, saved_models
from memlens.studies.running import StudyRun
from tests.report.pages import sentences

SMALL = ml.studies.ComparativeOptions(
    max_compressed=3,
    compression_budget=5,
    alphas=(0.0, 0.5),
    noise_draws=1,
    max_examined=6,
    heads_per_domain=4,
    n_splits=6,
    n_resamples=100,
    n_permutations=99,
)


@pytest.fixture(scope="module")
def pythia() -> Any:
    return ml.load_model("zoo/pythia-s")


@pytest.fixture(scope="module")
def sequences(pythia: Any) -> ml.SequenceSet:
    """Of three domains five sequences of many copies, three of few and two that were never planted."""
    seqs = ml.load_sequences("zoo", pythia)
    rows = []
    for domain in ("code", "table", "text"):
        part = seqs.table[seqs.table["domain"] == domain]
        for copies, n in ((256, 5), (2, 3), (0, 2)):
            rows += part.index[part["copies"] == copies][:n].tolist()
    return seqs[rows]


def shaken(model: Any, size: float, seed: int, name: str) -> Any:
    """A copy of a model with a little noise on its weights."""
    copy, generator = deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part, parameter in copy.named_parameters():
            if ".qkv." in part:
                continue  # a bridge computes with q, k and v, and refuses edits of both them and their source
            parameter += size * parameter.std() * torch.randn(parameter.shape, generator=generator)
    remember(copy, model=name, revision="")
    return copy


@pytest.fixture(scope="module")
def entries(pythia: Any) -> list[ml.studies.StudyModel]:
    own = [ml.studies.StudyModel("zoo/pythia-s", family="first", model=pythia)]
    for i, family in enumerate(("first", "second", "second"), 1):
        model = shaken(pythia, 0.03 if family == "first" else 0.06, i, f"copy-{i}")
        own.append(ml.studies.StudyModel(f"copy-{i}", family=family, model=model))
    return own


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparative")


@pytest.fixture(scope="module")
def run(entries: list[ml.studies.StudyModel], sequences: ml.SequenceSet, out: Path) -> StudyRun:
    return ml.studies.study_comparative(
        entries, sequences, out, options=SMALL, command="memlens run comparative", progress=False
    )


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(folder / f"{name}.parquet")


def saved(folder: Path, label: str) -> SavedModel:
    return next(model for model in saved_models(folder / "models") if model.label == label)


def test_all_parts_ran_and_every_claim_is_judged(run: StudyRun, out: Path) -> None:
    assert run.failures == {}
    titles = [finding.title.partition(":")[0] for finding in run.findings]
    assert titles == [claim.title for claim in CLAIMS.values()]
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    for words in (
        "Rate and size", "Compression of prompts", "Signatures of families", "Every model", "noise_draws",
        "What the paper found", "Overlap of important heads", "How alike profiles are",
    ):  # fmt: skip
        assert words in page
    assert "cannot be shown" not in page  # no figure or table was lost
    assert "cannot be read" not in page
    models = table(out, "models")
    assert len(models) == 4
    assert models["rate"].between(0, 1).all()
    assert models["corpus"].tolist().count("the zoo's") == 1


def test_rates_are_the_model_s_own(run: StudyRun, out: Path, pythia: Any, sequences: ml.SequenceSet) -> None:
    hits = []
    for row, n in zip(sequences.rows(), sequences.prefix_len.tolist(), strict=True):
        said = pythia(torch.tensor([row]))[0, n - 1 : -1].argmax(-1).tolist()
        hits.append(said == row[n:])
    row = table(out, "rates").set_index("model").loc["zoo/pythia-s"]
    assert row["memorized"] == sum(hits)
    assert row["rate"] == pytest.approx(np.mean(hits))
    recall = RecallScores.load(saved(out, "zoo/pythia-s").path / "recall.parquet").table
    depth = table(out, "depth")
    own = depth[depth["model"] == "zoo/pythia-s"].set_index("k")["rate"]
    assert own[32] == pytest.approx(recall["exact_match"].mean())
    assert own[5] == pytest.approx((recall["matching_prefix"] >= 5).mean())
    spread = table(out, "score_spread")
    whole = spread[(spread["model"] == "zoo/pythia-s") & (spread["part"] == "1")]["n"].item()
    assert whole == (recall["memorization_score"] == 1).sum()


def test_compression_is_that_of_the_prompts_that_work(run: StudyRun, out: Path) -> None:
    works = saved(out, "zoo/pythia-s").result("compression")["works"]
    lengths = works["prompt_tokens"].values
    fewest = [lengths[row == 1].min() / 32 for row in works.values]
    row = table(out, "compression").set_index("model").loc["zoo/pythia-s"]
    assert row["n"] == len(fewest) == 3
    assert row["ratio"] == pytest.approx(np.mean(fewest))
    assert row["up_to_half"] == pytest.approx(np.mean(np.array(fewest) <= 0.5))


def test_noise_of_strength_0_changes_nothing_and_rates_fall(run: StudyRun, out: Path) -> None:
    noise = table(out, "noise").set_index(["model", "alpha"])
    rates = table(out, "rates").set_index("model")
    for label in rates.index:
        assert noise.loc[(label, 0.0), "rate"] == pytest.approx(rates.loc[label, "rate"])
        assert noise.loc[(label, 0.5), "rate"] <= noise.loc[(label, 0.0), "rate"]
        clean = noise.loc[(label, 0.0)]
        assert clean["rate"] <= clean["leading"] <= clean["accuracy"] + 1e-6
        assert clean["leading"] <= rates.loc[label, "mean_m"] + 1e-6
    recovery = table(out, "recovery")
    assert recovery.loc[recovery["alpha"] == 0, "recovery"].abs().max() < 1e-5
    assert recovery.loc[recovery["alpha"] == 0.5, "at_noise"].max() < 0.99
    data = saved(out, "copy-1").result("recovery").data.sel(alpha=0.5)
    labels = data["group"].values
    values = (data["similarity"].isel(layer=-1) - data["similarity_at_noise"]).values
    gap = table(out, "recovery_gaps").set_index(["model", "alpha"]).loc[("copy-1", 0.5)]
    assert gap["pairs"] == (labels == CONTROL).sum()
    assert gap["gap"] == pytest.approx(values[labels == MEMORIZED].mean() - values[labels == CONTROL].mean())


def test_controls_are_matched_and_not_memorized(run: StudyRun, out: Path) -> None:
    model = saved(out, "zoo/pythia-s")
    m = model.recall.table.set_index("id")["memorization_score"]
    groups = model.groups
    assert (m[groups.loc[groups["group"] == MEMORIZED, "id"]] == 1).all()
    controls = groups[groups["group"] == CONTROL]
    assert (m[controls["id"]] < 0.5).all()
    assert set(controls["matched_to"]) <= set(groups.loc[groups["group"] == MEMORIZED, "id"])


def test_decoding_curve_is_the_mean_over_sequences_and_targets(run: StudyRun, out: Path) -> None:
    data = saved(out, "copy-2").result("decoding").data
    part = data.isel(sequence=data["group"].values == MEMORIZED)
    by_hand = part["probability"].mean(("sequence", "target")).values
    curves = table(out, "decoding")
    own = curves[(curves["model"] == "copy-2") & (curves["group"] == MEMORIZED) & (curves["token"] == "true")]
    assert own["mean"].to_numpy() == pytest.approx(by_hand, abs=1e-6)
    row = table(out, "bursts").set_index(["model", "group"]).loc[("copy-2", MEMORIZED)]
    assert row["burst"] == pytest.approx((np.diff(by_hand).argmax() + 2) / 6)
    assert row["before_last"] == pytest.approx(by_hand[-2], abs=1e-6)


def test_head_importance_is_what_the_mean_of_the_others_costs(
    run: StudyRun, out: Path, pythia: Any, sequences: ml.SequenceSet
) -> None:
    result = saved(out, "zoo/pythia-s").result("heads")
    name = str(result["sequence"].values[0])
    row = sequences.rows()[sequences.ids.index(name)]

    def replace_head(z: torch.Tensor, hook: Any) -> torch.Tensor:
        others = [h for h in range(8) if h != 3]
        z[:, :, 3] = z[:, :, others].mean(2)
        return z

    tokens = torch.tensor([row])
    plain = pythia(tokens)
    ablated = pythia.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", replace_head)])
    targets = torch.tensor(row[32:])
    gaps = [
        logits[0, 31:-1].log_softmax(-1)[torch.arange(32), targets].mean().item()
        for logits in (plain, ablated)
    ]
    found = result.effect("target_logprob").isel(sequence=0).sel(layer=1, head=3)
    assert float(found) == pytest.approx(gaps[1] - gaps[0], abs=1e-4)


def test_overlap_of_heads_by_hand(run: StudyRun, out: Path) -> None:
    result = saved(out, "zoo/pythia-s").result("heads")
    loss = -result.effect("target_logprob").transpose("sequence", "layer", "head").values
    labels = result["domain"].values
    sets = {}
    for domain in sorted(set(labels)):
        mean = loss[labels == domain].mean(0).ravel()
        sets[domain] = set(np.argsort(-mean)[:10])  # a fifth of 48, rounded up
    pairs = {(a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in combinations(sets, 2)}
    overlap = table(out, "head_overlap")
    own = overlap[overlap["model"] == "zoo/pythia-s"].set_index(["statistic", "null"])
    across = own.loc[("across domains", "heads anywhere")]
    assert across["value"] == pytest.approx(np.mean(list(pairs.values())))
    assert across["exact"] == pytest.approx(expected_jaccard(48, 10))
    universal = set.intersection(*sets.values())
    assert own.loc[("universal", "heads anywhere"), "value"] == pytest.approx(len(universal) / 48)
    row = table(out, "universal_heads").set_index("model").loc["zoo/pythia-s"]
    assert row["universal"] == len(universal)
    assert row["by_chance"] == pytest.approx(48 * (10 / 48) ** 3)
    shown = table(out, "head_pairs")
    shown = shown[shown["model"] == "zoo/pythia-s"].set_index(["domain", "other"])["jaccard"].to_dict()
    assert shown == pytest.approx(pairs)


def test_profiles_and_families_by_hand(run: StudyRun, out: Path) -> None:
    labels = [c for c in table(out, "profile_similarity") if c != "model"]
    grids = []
    for label in labels:
        loss = -saved(out, label).result("heads").effect("target_logprob")
        profile = layer_profile(loss.mean("sequence").transpose("layer", "head").values)
        shown = table(out, "profiles")
        assert shown.loc[shown["model"] == label, "mean"].to_numpy() == pytest.approx(profile)
        grids.append(on_grid(profile, 100))
    similarity = table(out, "profile_similarity")[labels].to_numpy()
    i, j = 0, 2
    cosine = grids[i] @ grids[j] / np.linalg.norm(grids[i]) / np.linalg.norm(grids[j])
    assert similarity[i, j] == pytest.approx(cosine)
    families = {"zoo/pythia-s": 0, "copy-1": 0, "copy-2": 1, "copy-3": 1}
    same = [
        similarity[a, b] for a, b in combinations(range(4), 2) if families[labels[a]] == families[labels[b]]
    ]
    rows = table(out, "family_test_families").set_index("statistic")
    assert rows.loc["within", "value"] == pytest.approx(np.mean(same))
    assert rows.loc["accuracy", "n"] == 4
    assert (out / "family_test_untrained.parquet").exists()
    assert len(table(out, "family_predicted")) == 4


def test_another_model_is_added_and_only_it_is_computed(
    run: StudyRun,
    entries: list[ml.studies.StudyModel],
    sequences: ml.SequenceSet,
    pythia: Any,
    tmp_path: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored: list[str] = []
    some = sequences[:20]
    real = comparative_measure.score_recall

    def counting(model: Any, *args: Any, **options: Any) -> Any:
        scored.append(str(describe(model)["model"]))
        return real(model, *args, **options)

    monkeypatch.setattr(comparative_measure, "score_recall", counting)
    quick = replace(SMALL, measures=("recall", "heads"), untrained=False)
    first = ml.studies.study_comparative(entries[:1], some, tmp_path, options=quick, progress=False)
    second = ml.studies.study_comparative(entries[:2], some, tmp_path, options=quick, progress=False)
    assert scored == ["zoo/pythia-s", "copy-1"]
    assert first.failures == second.failures == {}
    assert len(table(tmp_path, "models")) == 2
    # Without loading anything, from the folder alone.
    third = ml.studies.study_comparative([], {}, tmp_path, options=quick, include_saved=True, progress=False)
    assert third.failures == {}
    assert len(table(tmp_path, "models")) == 2
    assert scored == ["zoo/pythia-s", "copy-1"]
    assert not (tmp_path / "other_options.parquet").exists()
    # Another option of one measure makes that measure anew; the other model's is named.
    heads = saved(tmp_path, "copy-1").path / "heads.nc"
    before = heads.stat().st_mtime_ns
    changed = replace(quick, heads_per_domain=3)
    fourth = ml.studies.study_comparative(
        entries[1:2], some, tmp_path, options=changed, include_saved=True, progress=False
    )
    assert fourth.failures == {}
    other = table(tmp_path, "other_options")
    assert other[["model", "measure", "option", "measured_with", "this_run"]].to_numpy().tolist() == [
        ["zoo/pythia-s", "heads", "heads_per_domain", "4", "3"]
    ]
    assert not list((tmp_path / "models").glob("*/sweeps/*"))
    assert scored == ["zoo/pythia-s", "copy-1"]
    assert heads.stat().st_mtime_ns > before
    assert ml.load_result(heads).data.sizes["sequence"] == 6


def test_one_model_that_recalls_nothing_and_one_that_is_not_there(
    sequences: ml.SequenceSet, pythia: Any, tmp_path: Path
) -> None:
    from memlens.organisms.training.architectures import untrained_like

    blank = ml.studies.StudyModel("blank", family="first", model=untrained_like(pythia, seed=3))
    run = ml.studies.study_comparative(
        [blank, "zoo/nowhere"], sequences[:20], tmp_path, options=SMALL, progress=False
    )
    assert list(run.failures) == ["zoo/nowhere"]
    assert "nowhere" in run.failures["zoo/nowhere"]
    verdicts = table(tmp_path, "claims")
    assert set(verdicts["verdict"]) <= {"not tested", "undecided", "does not hold", "holds"}
    by = dict(zip(CLAIMS, verdicts["verdict"], strict=True))
    for claim in ("size", "compressible", "recovery", "burst", "in_domain", "signature"):
        assert by[claim] == "not tested"
    model = saved(tmp_path, "blank")
    assert not model.has("heads")
    assert "too few" in model.parts["decoding"]["note"]
    page = html.unescape(run.report.read_text(encoding="utf-8"))
    assert "No model has enough memorized sequences" in page
    said = sentences(run.report)
    tested = int((verdicts["verdict"] != "not tested").sum())
    holds = int((verdicts["verdict"] == "holds").sum())
    assert f"findings, {tested} could be tested here: {holds} hold" in said["found"]
    assert said["hides"].endswith("What failed is missing: zoo/nowhere.")


def test_twins_have_rows_and_no_part_in_families(
    sequences: ml.SequenceSet, pythia: Any, tmp_path: Path
) -> None:
    twin = ml.studies.StudyModel("zoo/pythia-s-clean", model=shaken(pythia, 0.01, 9, "zoo/pythia-s-clean"))
    quick = replace(SMALL, measures=("recall", "heads"), untrained=False)
    run = ml.studies.study_comparative(
        [pythia, twin], sequences[:20], tmp_path, options=quick, progress=False
    )
    assert run.failures == {}
    models = table(tmp_path, "models").set_index("model")
    assert models["control"].to_dict() == {"zoo/pythia-s": False, "zoo/pythia-s-clean": True}
    assert models["family"].tolist() == ["pythia", "pythia"]
    assert table(tmp_path, "profiles")["model"].unique().tolist() == ["zoo/pythia-s"]
    alone = ml.studies.study_comparative(
        [twin], sequences[:30], tmp_path / "alone", options=quick, progress=False
    )
    assert alone.failures == {}
    assert set(table(tmp_path / "alone", "claims")["verdict"]) == {"not tested"}


def test_checkpoints_are_followed(
    sequences: ml.SequenceSet, pythia: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    steps = {10: shaken(pythia, 1.0, 1, "early"), 20: pythia, 30: shaken(pythia, 0.05, 2, "late")}
    monkeypatch.setattr(
        comparative_config,
        "load_model",
        lambda name, checkpoint_step=None, **options: steps[checkpoint_step],
    )
    entry = ml.studies.StudyModel("zoo/pythia-s", model=pythia, checkpoints=(30, 10, 20))
    quick = replace(SMALL, measures=("recall", "training"))
    some = sequences[:20]
    run = ml.studies.study_comparative([entry], some, tmp_path, options=quick, progress=False)
    assert run.failures == {}
    found = table(tmp_path, "training").set_index("step")
    hits = {
        step: ml.score_recall(model, some, generate=False, metrics=(), progress=False).table["exact_match"]
        for step, model in steps.items()
    }
    assert found["rate"].to_dict() == pytest.approx({step: h.mean() for step, h in hits.items()})
    events = table(tmp_path, "training_events").set_index("copies").loc["all"]
    ever = np.stack([hits[s] for s in (10, 20, 30)]).any(0)
    assert events["ever"] == ever.sum()
    assert events["ever_forgotten"] == pytest.approx(((hits[20] == 1) & (hits[30] == 0)).sum() / ever.sum())


def test_bad_requests_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(EmptySetError, match="no models"):
        ml.studies.study_comparative([], "zoo", tmp_path)
    with pytest.raises(OptionError, match="named twice"):
        ml.studies.study_comparative(["zoo/pythia-s", "zoo/pythia-s"], "zoo", tmp_path)
    wrong: list[dict[str, Any]] = [
        {"alphas": (0.1,)}, {"profile": "median"}, {"noise_draws": 0}, {"top_fraction": 1.5},
        {"measures": ("everything",)}, {"min_per_domain": 1}, {"unmemorized_below": 0.0},
    ]  # fmt: skip
    for bad in wrong:
        with pytest.raises(OptionError):
            ml.studies.ComparativeOptions(**bad)
    assert not (tmp_path / "run.json").exists()


def test_a_store_keeps_what_was_made_from_the_same(tmp_path: Path) -> None:
    made: list[str] = []

    def work() -> None:
        made.append("once")

    store = SavedModel(tmp_path / "m", {"label": "m", "family": "f", "control": False})
    store.make("recall", "key", work)
    store.make("recall", "key", work)
    again = SavedModel(tmp_path / "m", {"label": "m", "family": "f", "control": False})
    again.make("recall", "key", work)
    assert made == ["once"]
    again.make("recall", "other", work)
    assert len(made) == 2
    with pytest.raises(ValueError, match="on purpose"):
        again.make("heads", "key", lambda: (_ for _ in ()).throw(ValueError("on purpose")))
    assert not SavedModel(tmp_path / "m").has("heads")
    newer = SavedModel(tmp_path / "n", {"label": "m", "family": "g", "control": False})
    newer.make("recall", "key", work)
    assert [model.family for model in saved_models(tmp_path)] == ["g"]
    (tmp_path / "m" / "model.json").write_text("{")
    with pytest.raises(ml.errors.ResultError, match="damaged"):
        SavedModel(tmp_path / "m")


def test_models_measured_by_workers_and_in_shares(sequences: ml.SequenceSet, tmp_path: Path) -> None:
    """What workers save of a model is what one process saves; what fails there is told here."""
    options = replace(SMALL, measures=("recall", "noise"), noise_per_domain=2, n_permutations=9)
    models = ["zoo/pythia-xs", str(tmp_path / "missing")]
    study = partial(ml.studies.study_comparative, models, sequences[::4], options=options, progress=False)
    with ThreadPoolExecutor(1) as executor:
        found = study(tmp_path / "many", executor=executor)
    with pytest.raises(UnfinishedError, match=r"1 of 2 parts .* missing: .*missing"):
        study(tmp_path / "shares", part=(0, 2))
    shared = study(tmp_path / "shares", part=(1, 2))
    assert list(found.failures) == list(shared.failures) == [str(tmp_path / "missing")]
    many, shares = (next((tmp_path / name / "models").glob("zoo-*")) for name in ("many", "shares"))
    noise = [ml.load_result(folder / "noise.nc").data.drop_attrs() for folder in (many, shares)]
    assert noise[0].identical(noise[1])
    assert RecallScores.load(many / "recall.parquet").table.equals(
        RecallScores.load(shares / "recall.parquet").table
    )
    assert not list(tmp_path.rglob("*.measured.json"))
