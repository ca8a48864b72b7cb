"""Sets of blocks bypassed together: each set by a plain forward, choices on one half, scores on the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import EmptySetError, OptionError
from memlens.instruments.ablate.branches import attention_ablations
from memlens.instruments.bypass.layer_sets import LayerSetSearch, named_layer_sets
from memlens.results.groups import layers_label, parse_layers, quartiles, take_half
from memlens.results.statistics.intervals import halves
from tests.small import CASES


@pytest.fixture(scope="module")
def pythia() -> Any:
    return ml.load_model("zoo/pythia-s")


@pytest.fixture(scope="module")
def memorized(pythia: Any) -> ml.SequenceSet:
    seqs = ml.load_sequences("zoo", pythia)
    scores = ml.score_recall(pythia, seqs, generate=False, metrics=(), progress=False)
    return scores.memorized()[::8]


@pytest.fixture(scope="module")
def tasks(pythia: Any) -> list[ml.tasks.ChoiceTask]:
    return ml.tasks.local_tasks("zoo", pythia, names=["agreement", "cloze", "entity"], n=16)


@pytest.fixture(scope="module")
def search(pythia: Any, memorized: ml.SequenceSet, tasks: list[ml.tasks.ChoiceTask]) -> LayerSetSearch:
    return ml.bypass.search_layer_sets(
        pythia, memorized, tasks, exact_layers=1, exact_pool=2, greedy_size=3, n_random=3, n_resamples=200,
        progress=False,
    )  # fmt: skip


def test_a_set_s_exact_match_is_that_of_a_plain_forward(
    pythia: Any, memorized: ml.SequenceSet, search: LayerSetSearch
) -> None:
    tokens = memorized.tokens
    at = int(memorized.prefix_len[0])
    for label in ("4-5", "0-2", "3"):
        with ml.bypassed(pythia, parse_layers(label)):
            predicted = pythia(tokens)[:, at - 1 : -1].argmax(-1)
        hits = (predicted == tokens[:, at:]).all(1).float().numpy()
        np.testing.assert_array_equal(search.recall["exact_match"].sel(layers=label), hits)


def test_a_set_s_accuracy_is_that_of_its_own_evaluation(
    pythia: Any, tasks: list[ml.tasks.ChoiceTask], search: LayerSetSearch
) -> None:
    alone = ml.evaluate_tasks(
        pythia, tasks, ml.edits.attention_bypasses(pythia, layers=[[3, 4, 5]]), progress=False
    )
    np.testing.assert_array_equal(
        search.accuracy["accuracy"].sel(layers="3-5"), alone["accuracy"].isel(layers=0)
    )


def test_choices_see_one_half_and_scores_the_other(search: LayerSetSearch) -> None:
    recall, accuracy = search.recall, search.accuracy
    seed = search.settings["seed"]
    for part, column in ((0, "selectivity_chosen"), (1, "selectivity")):
        rows = halves(recall.data.sizes["sequence"], seed)[part]
        half = recall.data.isel(sequence=rows)
        base = float(half["exact_match_baseline"].mean())
        removed = (base - half["exact_match"].mean("sequence")) / base
        cost = []
        for number, name in enumerate(("agreement", "cloze", "entity")):
            place = np.flatnonzero(accuracy["task"].values == name)
            mine = accuracy.data.isel(sequence=place[halves(len(place), seed + number)[part]])
            start, chance = float(mine["accuracy_baseline"].mean()), float(mine["chance"].values[0])
            if name in search.settings["tasks"]:
                cost.append((start - mine["accuracy"].mean("sequence")) / (start - chance))
        wanted = removed - np.max([c.values for c in cost], axis=0)
        np.testing.assert_allclose(search.table[column], wanted, atol=1e-9)
    table = search.table.set_index("layers")
    singles = table[table["kinds"].str.contains("single layer")]
    assert search.best["single layer"] == singles["selectivity_chosen"].idxmax()
    assert search.best["any"] == table["selectivity_chosen"].idxmax()
    suffixes = table.loc[["0-5", "1-5", "2-5", "3-5", "4-5", "5"]]
    assert search.best["suffix"] == suffixes["selectivity_chosen"].idxmax()


def test_greedy_takes_the_best_next_block(search: LayerSetSearch) -> None:
    table = search.table.set_index("layers")
    path = {1: search.best["single layer"]}
    for size in (2, 3):
        before = set(parse_layers(path[size - 1]))
        wider = [layers_label(before | {layer}) for layer in range(6) if layer not in before]
        path[size] = table.loc[wider, "selectivity_chosen"].idxmax()
        assert "greedy" in table.loc[path[size], "kinds"].split(", ")
    assert search.best["greedy"] == table.loc[list(path.values()), "selectivity_chosen"].idxmax()


def test_best_sets_stand_beside_random_ones_of_their_size(search: LayerSetSearch) -> None:
    best = search.best_table().set_index("search")
    table = search.table
    label, size = best.loc["single layer", "layers"], 1
    others = table[(table["size"] == size) & (table["layers"] != label)]["selectivity"]
    assert best.loc["single layer", "random_sets"] == len(others) == 5
    assert best.loc["single layer", "random_mean"] == pytest.approx(others.mean())
    areas = search.areas().set_index("family")
    assert ((areas["low"] <= areas["area"] + 1e-9) & (areas["area"] <= areas["high"] + 1e-9)).all()
    assert areas.loc["any set", "sets"] == len(table)
    assert areas["area"].between(0, 1).all()


def test_a_model_of_few_layers_is_searched_whole(tasks: list[ml.tasks.ChoiceTask]) -> None:
    model = ml.load_model("zoo/pythia-xs")
    often = ml.load_sequences("zoo", model)
    often = often[np.flatnonzero(often.table["copies"] == 256)[:6]]
    few = [task.take(slice(0, 8)) for task in tasks]
    found = ml.bypass.search_layer_sets(model, often, few, n_random=0, n_resamples=20, progress=False)
    assert len(found.sets) == 2**4 - 1
    assert found.best["exact"] == found.best["any"]


def test_a_second_call_does_nothing_again(
    pythia: Any, memorized: ml.SequenceSet, tasks: list[ml.tasks.ChoiceTask], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "exact_layers": 1, "exact_pool": 1, "greedy_size": 2, "n_random": 1, "n_resamples": 20,
        "progress": False, "out": tmp_path,
    }  # fmt: skip
    few = [task.take(slice(0, 6)) for task in tasks]
    first = ml.bypass.search_layer_sets(pythia, memorized[:6], few, **options)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")}
    again = ml.bypass.search_layer_sets(pythia, memorized[:6], few, **options)
    assert stamps
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")} == stamps
    assert again.table.equals(first.table)


def test_bad_searches_are_refused(
    pythia: Any, memorized: ml.SequenceSet, tasks: list[ml.tasks.ChoiceTask]
) -> None:
    with pytest.raises(EmptySetError, match="at least four sequences"):
        ml.bypass.search_layer_sets(pythia, memorized[:3], tasks)
    with pytest.raises(EmptySetError, match="one task"):
        ml.bypass.search_layer_sets(pythia, memorized, [])
    with pytest.raises(OptionError, match="greedy_size=0"):
        ml.bypass.search_layer_sets(pythia, memorized, tasks, greedy_size=0)


def test_labels_and_quartiles() -> None:
    for layers in ([0], [0, 1, 2, 5], [1, 3, 5], list(range(24))):
        assert parse_layers(layers_label(layers)) == layers
    for n in (1, 3, 4, 6, 24, 30):
        parts = quartiles(n)
        assert [layer for part in parts for layer in part] == list(range(n))
        if n % 4 == 0:
            assert {len(part) for part in parts} == {n // 4}
    assert named_layer_sets(3)["prefix"] == [(0,), (0, 1), (0, 1, 2)]


def test_halves_of_tasks_are_cut_within_each(search: LayerSetSearch) -> None:
    first, second = (take_half(search.accuracy, part, 0, within="task") for part in (0, 1))
    assert {*first["sequence"].values} | {*second["sequence"].values} == {*search.accuracy["sequence"].values}
    assert not {*first["sequence"].values} & {*second["sequence"].values}
    assert {name: int((first["task"].values == name).sum()) for name in ("agreement", "cloze")} == {
        "agreement": 8,
        "cloze": 8,
    }


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_attention_that_adds_nothing_is_the_zero_bypass(family: str, backend: str, tiny_model: Any) -> None:
    model = tiny_model(family, backend)
    rows = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()
    seqs = ml.SequenceSet.from_tokens(rows, 5)
    edits = attention_ablations(model, seqs, mode="zero")
    found = ml.sweep(model, seqs, edits, ("target_logprob",), progress=False)
    wanted = ml.bypass_attention(model, seqs, mode="zero", metrics=("target_logprob",), progress=False)
    np.testing.assert_allclose(found["target_logprob"], wanted["target_logprob"], atol=1e-6)
    with pytest.raises(OptionError, match="mean_of_other_heads needs site='z'"):
        attention_ablations(model, seqs, mode="mean_of_other_heads")
