"""Guess or recall: overlap with the prefix, the thresholds by name, and the classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memlens as ml
from memlens.errors import OptionError
from memlens.recall.taxonomy import TaxonomyRules, prefix_overlap, taxonomy_columns
from tests.recall.test_near_texts import plain_common
from tests.small import ragged

NOTHING = {"prefix_rouge_l": 0.1, "prefix_rouge_3": 0.0, "repeated_share": 0.0, "step_share": 0.0}


def test_overlap_is_that_of_the_definitions() -> None:
    found = prefix_overlap(
        [[1, 2, 3, 4, 1, 2, 3], [5], [7, 8]], [[1, 2, 3, 1, 2, 3, 1, 2, 3], [6, 5], [8, 7, 8]]
    )
    assert found["prefix_rouge_l"].tolist() == pytest.approx([6 / 9, 0.5, 2 / 3])
    # Of seven runs the prefix has 1-2-3 twice; it occurs three times.
    assert found["prefix_rouge_3"][0] == pytest.approx(2 / 7)
    assert np.isnan(found["prefix_rouge_3"][1])
    assert found["prefix_rouge_3"][2] == 0.0


@pytest.mark.parametrize("name", ["prefix_rouge_l", "prefix_rouge_3", "repeated_share", "step_share"])
def test_each_rule_alone_makes_a_guess_from_its_threshold_on(name: str) -> None:
    field = {"repeated_share": "repeated", "step_share": "step"}.get(name, name.removeprefix("prefix_"))
    rules = TaxonomyRules(**{field: 0.6})
    flags = []
    for value in (0.59, 0.6, np.nan):
        columns = {key: np.array([value if key == name else low] * 2) for key, low in NOTHING.items()}
        overlap = {key: columns.pop(key) for key in ("prefix_rouge_l", "prefix_rouge_3")}
        found = taxonomy_columns(np.array([1, 0]), overlap, columns, rules)
        assert found["guessed"][1] == found["recollected"][1] == 0  # not memorized
        flags.append((int(found["guessed"][0]), int(found["recollected"][0])))
    assert flags == [(0, 1), (1, 0), (0, 1)]
    assert rules.settings()[f"guess_{field}"] == 0.6


def test_scoring_gives_the_columns_with_and_without_the_trivial_ones(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "bridge")
    greedy = ml.score_recall(model, ragged(), progress=False).table["generated"].tolist()
    rows = [prefix + own for prefix, own in zip(ragged().halves()[0], greedy, strict=True)]
    seqs = ml.SequenceSet.from_tokens([*rows, *ragged().rows()], [*ragged().prefix_len.tolist()] * 2)
    full = ml.score_recall(model, seqs, progress=False)
    alone = ml.score_recall(model, seqs, metrics=["taxonomy"], progress=False)
    assert "repeated_share" not in alone.table
    for name in ("prefix_rouge_l", "prefix_rouge_3", "guessed", "recollected"):
        pd.testing.assert_series_equal(full.table[name], alone.table[name])
    table = full.table
    assert (
        (table["guessed"] + table["recollected"]).tolist()
        == table["exact_match"].tolist()
        == [1] * 4 + [0] * 4
    )
    strict = ml.recall.TaxonomyRules(rouge_l=0.0)
    all_guessed = ml.score_recall(model, seqs, taxonomy=strict, progress=False)
    assert all_guessed.table["guessed"].tolist() == table["exact_match"].tolist()
    assert all_guessed.attrs["guess_rouge_l"] == 0.0
    classes = ml.recall.recall_classes(all_guessed.table).tolist()
    assert classes == ["guess"] * 4 + ["not memorized"] * 4
    assert set(full.summary()["metric"]) >= {"guessed", "recollected"}
    assert full.to_result()["recollected"].attrs["units"] == "0 or 1"


def test_classes_need_their_columns() -> None:
    with pytest.raises(OptionError, match="'copies'"):
        ml.recall.recall_classes(pd.DataFrame({"guessed": [1], "recollected": [0]}), above=5)
    with pytest.raises(OptionError, match="'guessed'"):
        ml.recall.recall_classes(pd.DataFrame({"copies": [1]}))
    with pytest.raises(OptionError, match="rouge_l"):
        TaxonomyRules(rouge_l=1.5)


few = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@settings(deadline=None)
@given(st.lists(st.tuples(few, few), min_size=1, max_size=4))
def test_overlap_equals_a_plain_search(pairs: list[tuple[list[int], list[int]]]) -> None:
    prefixes, truth = (list(side) for side in zip(*pairs, strict=True))
    found = prefix_overlap(prefixes, truth)
    for i, (prefix, target) in enumerate(pairs):
        texts = ([str(token) for token in row] for row in (prefix, target))
        assert found["prefix_rouge_l"][i] == pytest.approx(plain_common(*texts) / len(target))
        runs = [[tuple(row[k : k + 3]) for k in range(len(row) - 2)] for row in (prefix, target)]
        shared = sum(min(side.count(run) for side in runs) for run in set(runs[1]))
        expected = shared / len(runs[1]) if runs[1] else np.nan
        assert found["prefix_rouge_3"][i] == pytest.approx(expected, nan_ok=True)


def test_classes_by_flags_and_copies() -> None:
    table = pd.DataFrame(
        {"guessed": [0, 1, 0, 0], "recollected": [0, 0, 1, 1], "copies": [9, 1, 5, 6]}, index=list("abcd")
    )
    plain = ml.recall.recall_classes(table)
    assert plain.name == "recall_class"
    assert plain.to_dict() == {"a": "not memorized", "b": "guess", "c": "recall", "d": "recall"}
    assert ml.recall.recall_classes(table, above=5).to_dict() == {**plain.to_dict(), "c": "few copies"}
    assert ml.recall.recall_classes(table, above=0).to_dict() == plain.to_dict()
    assert ml.recall.recall_classes(table, above=6).to_dict() == {
        **plain.to_dict(), "c": "few copies", "d": "few copies"
    }  # fmt: skip
    for name in ("guessed", "recollected"):
        with pytest.raises(OptionError, match=f"no column '{name}': score with metrics that include"):
            ml.recall.recall_classes(table.drop(columns=name))


def test_default_thresholds() -> None:
    assert TaxonomyRules().settings() == {
        "guess_rouge_l": 0.5, "guess_rouge_3": 0.5, "guess_repeated": 0.75, "guess_step": 0.75
    }  # fmt: skip
