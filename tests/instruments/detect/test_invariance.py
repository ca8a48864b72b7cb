"""Prediction invariance of stubs and of models, bucket statistics, and similarities of errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import memlens as ml
from memlens.errors import ColumnError, OptionError, ResultError, SequenceError
from memlens.forward.generate import greedy_continuations, sampled_continuations
from memlens.results.kinds import reading
from tests.instruments.detect.test_separation import random_set
from tests.small import ragged


def test_invariance_counts_distinct_answers() -> None:
    assert ml.detect.invariance([[1] * 10, [*range(10)], [1, 2] * 5]).tolist() == [
        1.0,
        0.0,
        pytest.approx(8 / 9),
    ]
    with pytest.raises(OptionError, match="two answers"):
        ml.detect.invariance([[1]])


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_greedy_answers_are_invariant_over_repeats(tiny_model: Callable[..., Any], backend: str) -> None:
    model, seqs = tiny_model("gpt_neox", backend), ragged(6)
    options = ml.detect.InvarianceOptions(over="repeats", n_repeats=4)
    found = ml.detect.prediction_invariance(model, seqs, options=options)
    assert found["invariance"].values.tolist() == [1.0] * 6
    greedy = ml.score_recall(model, seqs, progress=False).table["generated_text"]
    assert found["answer"].isel(run=2).values.tolist() == greedy.tolist()


def test_the_answers_of_a_certain_model_do_not_depend_on_temperature(tiny_model: Callable[..., Any]) -> None:
    """With one logit far above the others all temperatures agree; with equal ones, almost none."""
    model, seqs = tiny_model("gpt_neox", "bridge"), random_set(5, 0, 90, "a", 0)

    def sharpen(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return 1e5 * x

    def flatten(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return 0 * x

    name = "ln_final.hook_normalized" if "ln_final.hook_normalized" in model.hook_dict else "hook_normalized"
    for edit, check in ((sharpen, lambda v: v == 1.0), (flatten, lambda v: v < 0.2)):
        with ml.applied(model, ml.Intervention("stub", [(name, edit)])):
            found = ml.detect.prediction_invariance(model, seqs)
        assert check(float(found["invariance"].mean())), (edit.__name__, float(found["invariance"].mean()))
    assert found["run"].values.tolist() == [i / 10 for i in range(11)]
    assert float(found["n_distinct"].max()) <= 11


def test_sampling_is_drawn_from_the_distribution(tiny_model: Callable[..., Any]) -> None:
    model, one = tiny_model("gpt_neox", "bridge"), random_set(1, 0, 90, "a", 3).first_targets()
    seqs = ml.SequenceSet.from_tokens(one.rows() * 4000, 6)
    options = ml.detect.InvarianceOptions(temperatures=(0.0, 1.0), seed=1)
    found = ml.detect.prediction_invariance(model, seqs, options=options)
    answers = pd.Series(found["answer"].isel(run=1).values).value_counts(normalize=True)
    odds = model(one.tokens[:, :6])[0, -1].detach().softmax(-1)
    top = int(odds.argmax())
    assert answers[f"w{top}"] == pytest.approx(float(odds[top]), abs=0.03)
    assert set(found["answer"].isel(run=0).values.tolist()) == {f"w{top}"}
    again = ml.detect.prediction_invariance(model, seqs, options=options)
    assert (again["answer"] == found["answer"]).all()


def test_choosing_the_likeliest_is_greedy_decoding(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("llama", "bridge"), ragged()
    drawn = sampled_continuations(model, seqs, lambda logits: logits.argmax(-1), batch_size=3)
    assert torch.equal(drawn, greedy_continuations(model, seqs))


def test_prompts_of_the_same_items_are_compared(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), random_set(4, 0, 90, "a", 0)
    options = ml.detect.InvarianceOptions(over="prompts")
    same = ml.detect.prediction_invariance(model, seqs, prompts=[seqs, seqs], options=options)
    assert same["invariance"].values.tolist() == [1.0] * 4
    rows = [[*range(50, 60), *row[6:]] for row in seqs.rows()]
    other = ml.SequenceSet.from_tokens(rows, 10)
    found = ml.detect.prediction_invariance(model, seqs, prompts=[other], options=options)
    own, theirs = (greedy_continuations(model, s) for s in (seqs, other))
    assert found["invariance"].values.tolist() == [
        float((a == b).all()) for a, b in zip(own, theirs, strict=True)
    ]
    with pytest.raises(OptionError, match="go together"):
        ml.detect.prediction_invariance(model, seqs, prompts=[other])
    with pytest.raises(OptionError, match="go together"):
        ml.detect.prediction_invariance(model, seqs, options=options)
    with pytest.raises(SequenceError, match="other continuations"):
        ml.detect.prediction_invariance(model, seqs, prompts=[seqs[[1, 0, 2, 3]]], options=options)


def test_a_result_is_read_drawn_and_saved(tiny_model: Callable[..., Any], tmp_path: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), random_set(4, 0, 90, "a", 0, copies=[1, 1, 2, 2])
    found = ml.detect.prediction_invariance(model, seqs)
    assert "over 11 temperatures" in reading(found)
    assert found.plot().data
    assert found.plot(group=None).data
    loaded = ml.load_result(found.save(tmp_path / "pi.nc"))
    assert (loaded["answer"] == found["answer"]).all()


def test_buckets_are_percentiles_of_unique_counts() -> None:
    rng = np.random.default_rng(0)
    popularity = rng.integers(1, 1000, 3000) ** 2
    value = (rng.random(3000) < popularity / popularity.max()).astype(float)
    found = ml.detect.popularity_buckets(popularity, value, n_permutations=500)
    assert len(found.table) == 50
    assert found.table["n"].sum() == 3000
    edges = np.percentile(np.unique(popularity), np.linspace(0, 100, 51)[1:-1])
    different = pd.Series(popularity).groupby(np.searchsorted(edges, popularity)).nunique()
    assert different.max() - different.min() <= 1
    assert found.pearson == pytest.approx(
        stats.pearsonr(found.table["popularity"], found.table["value"]).statistic
    )
    assert found.spearman == pytest.approx(
        stats.spearmanr(found.table["popularity"], found.table["value"]).statistic
    )
    assert found.pearson > 0.9
    assert found.pearson_p == found.spearman_p == pytest.approx(1 / 501)
    shuffled = ml.detect.popularity_buckets(popularity, rng.permutation(value), n_permutations=500)
    assert shuffled.pearson_p > 0.01


def test_p_values_are_those_of_all_permutations() -> None:
    x, y = [1.0, 2.0, 4.0, 8.0, 9.0], [0.0, 0.2, 0.1, 0.6, 0.5]
    every = [stats.pearsonr(x, p).statistic for p in itertools.permutations(y)]
    own = stats.pearsonr(x, y).statistic
    exact = np.mean([abs(r) >= abs(own) - 1e-12 for r in every])
    found = ml.detect.popularity_buckets(x, y, n_buckets=5, n_permutations=20_000)
    assert found.pearson_p == pytest.approx(exact, abs=0.006)


def test_few_buckets_have_no_correlation_and_unknown_items_are_left_out() -> None:
    found = ml.detect.popularity_buckets([1, 1, 2], [0, 1, 1], n_permutations=10)
    assert len(found.table) == 2
    assert np.isnan([found.pearson, found.pearson_p, found.spearman, found.spearman_p]).all()
    known = ml.detect.popularity_buckets([1, 2, 3, 4], [0, 1, 1, 1], n_buckets=4, n_permutations=10)
    holes = ml.detect.popularity_buckets(
        [1, 2, np.nan, 3, 4, 9], [0, 1, 0, 1, 1, np.nan], n_buckets=4, n_permutations=10
    )
    assert holes.table.equals(known.table)
    assert holes.spearman == known.spearman
    with pytest.raises(ResultError, match="one of each per item"):
        ml.detect.popularity_buckets([1], [1, 2])
    with pytest.raises(OptionError, match="n_buckets"):
        ml.detect.popularity_buckets([1], [1], n_buckets=0)


def test_errors_resemble_what_they_resemble() -> None:
    """Answers that swap neighbours: identifiers one digit off, of labels that share a word."""
    items = pd.DataFrame(
        {
            "label": [f"{color} {animal}" for color in ("red", "blue", "green") for animal in ("cat", "dog")],
            "identifier": ["100", "101", "220", "221", "330", "331"],
        }
    )
    swapped = items["identifier"].to_numpy()[[1, 0, 3, 2, 5, 4]]
    errors = ml.detect.identifier_errors(items, [*swapped[:5], "331"])
    assert errors["row"].tolist() == [0, 1, 2, 3, 4]
    assert errors["distance"].tolist() == [1] * 5
    assert errors["jaccard"].tolist() == pytest.approx([1 / 3] * 5)
    assert errors["cosine"].tolist() == pytest.approx([0.5] * 5)
    found = ml.detect.error_similarity(errors)
    assert found["distance"].value < 0
    assert found["distance"].n == 5
    unknown = ml.detect.identifier_errors(items, ["999", *items["identifier"][1:]])
    assert unknown["answered_label"].tolist() == [None]
    assert np.isnan(ml.detect.error_similarity(unknown)["jaccard"].value)
    trigrams = ml.detect.identifier_errors(items, [*swapped[:5], "331"], units="trigram")
    assert trigrams["jaccard"][0] == pytest.approx(2 / 8)  # "red cat" and "red dog": "red", "ed " of eight
    with pytest.raises(ColumnError, match="identifier"):
        ml.detect.identifier_errors(items[["label"]], swapped)
    with pytest.raises(OptionError, match="one answer per item"):
        ml.detect.identifier_errors(items, swapped[:2])
