from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import memlens as ml
from memlens.errors import OptionError, SequenceError
from memlens.results.statistics.intervals import mean_interval
from tests.devices import dev
from tests.small import ragged


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return ml.load_model("zoo/pythia-s", device=dev()), ml.load_model("zoo/pythia-xs", device=dev())


@pytest.fixture(scope="module")
def found(pair: tuple[Any, Any]) -> ml.recall.CounterfactualScores:
    seqs = ml.load_sequences("zoo", pair[0])
    rows = [i for i, copies in enumerate(seqs.table["copies"]) if copies in (0, 16, 256)]
    return ml.recall.counterfactual_memorization(*pair, seqs[rows[::4]], progress=False)


def test_the_difference_is_that_of_two_recall_scores(
    pair: tuple[Any, Any], found: ml.recall.CounterfactualScores
) -> None:
    scores = [ml.score_recall(model, found.trained.sequences, metrics=(), progress=False) for model in pair]
    for metric in ("target_accuracy", "exact_match", "memorization_score", "target_logprob"):
        seen, unseen = (s.table[metric].to_numpy(dtype=float) for s in scores)
        assert np.array_equal(found.table[metric], seen)
        assert np.array_equal(found.table[f"{metric}_clean"], unseen)
        assert np.array_equal(found.table[f"{metric}_counterfactual"], seen - unseen)
    assert found.attrs["model"] == "zoo/pythia-s"
    assert found.attrs["clean_model"] == "zoo/pythia-xs"
    assert len(found) == len(found.trained) == len(found.clean)
    gap = found.table["target_accuracy_counterfactual"].mean()
    models = "zoo/pythia-s minus zoo/pythia-xs"
    assert repr(found) == (
        f"CounterfactualScores({len(found)} sequences, {models}: {gap:+.2f} of the tokens)"
    )


def test_means_by_copies_are_those_of_the_rows_inside_their_intervals(
    found: ml.recall.CounterfactualScores,
) -> None:
    means = found.means().set_index("copies")
    assert list(means.index) == [0, 16, 256]
    for copies, row in means.iterrows():
        rows = found.table[found.table["copies"] == copies]
        assert row["n"] == len(rows)
        assert row["counterfactual"] == pytest.approx(rows["target_accuracy_counterfactual"].mean())
        assert row["counterfactual"] == pytest.approx(row["trained"] - row["clean"])
        assert row["low"] <= row["counterfactual"] <= row["high"]
    # both know what stands there 256 times; 16 copies are enough for the larger model only
    assert abs(means.at[256, "counterfactual"]) < 0.05
    assert means.at[16, "low"] > 0.1


def test_swapping_the_models_turns_the_sign(
    pair: tuple[Any, Any], found: ml.recall.CounterfactualScores
) -> None:
    turned = ml.recall.counterfactual_memorization(
        *pair[::-1], found.trained.sequences, generate=False, progress=False
    )
    name = "target_accuracy_counterfactual"
    assert np.array_equal(turned.table[name], -found.table[name])
    assert "memorization_score" not in turned.table
    assert turned.means("domain", metric="exact_match")["n"].sum() == len(turned)


def test_what_cannot_be_compared_is_refused(
    pair: tuple[Any, Any], found: ml.recall.CounterfactualScores, tiny_model: Callable[..., Any]
) -> None:
    with pytest.raises(OptionError, match="the same model"):
        ml.recall.counterfactual_memorization(pair[0], pair[0], ragged())
    with pytest.raises(SequenceError):
        ml.recall.counterfactual_memorization(
            pair[0], tiny_model("gpt_neox"), found.trained.sequences, progress=False
        )
    with pytest.raises(OptionError, match=r"metric='exact'.*exact_match"):
        found.means(metric="exact")
    with pytest.raises(OptionError, match="by='copy'"):
        found.means("copy")


def made_up_pair(n: int = 24) -> ml.recall.CounterfactualScores:
    rng = np.random.default_rng(0)
    seqs = ml.SequenceSet.from_tokens([[1, 2, 3]] * n, 1)
    table = pd.DataFrame({"id": seqs.ids, "copies": [4, 1, 2] * (n // 3), "domain": ["b", "a"] * (n // 2)})
    for metric in ("target_accuracy", "exact_match"):
        seen, unseen = rng.random((2, n))
        table[metric], table[f"{metric}_clean"] = seen, unseen
        table[f"{metric}_counterfactual"] = seen - unseen
    scores = ml.RecallScores(pd.DataFrame(index=range(n)), seqs)
    return ml.recall.CounterfactualScores(table, scores, scores)


def test_means_have_documented_defaults_and_bootstrap_intervals_of_the_difference() -> None:
    found = made_up_pair()
    means = found.means()
    assert list(means) == ["copies", "n", "trained", "clean", "counterfactual", "low", "high"]
    documented: dict[str, Any] = {"metric": "target_accuracy", "level": 0.95, "n_resamples": 2000, "seed": 0}
    pd.testing.assert_frame_equal(means, found.means("copies", **documented))
    for change in ({"level": 0.9}, {"n_resamples": 2001}, {"seed": 1}, {"metric": "exact_match"}):
        assert not means.equals(found.means(**{**documented, **change})), change
    options: dict[str, Any] = {"level": 0.8, "n_resamples": 300, "seed": 5}
    for by, groups in (("copies", [1, 2, 4]), ("domain", ["a", "b"])):
        table = found.means(by, metric="exact_match", **options)
        assert table[by].tolist() == groups
        for group, row in table.set_index(by).iterrows():
            rows = found.table[found.table[by] == group]
            difference = xr.DataArray(rows["exact_match_counterfactual"].to_numpy(), dims="sequence")
            expected = mean_interval(difference, method="bootstrap", **options).values
            assert [row["counterfactual"], row["low"], row["high"]] == pytest.approx(expected.tolist())
            assert row["n"] == len(rows)
            assert row["trained"] == pytest.approx(rows["exact_match"].mean())
            assert row["clean"] == pytest.approx(rows["exact_match_clean"].mean())


def test_models_without_names_are_called_what_they_are() -> None:
    found = made_up_pair()
    assert found.attrs == {}
    gap = found.table["target_accuracy_counterfactual"].mean()
    assert repr(found) == (
        f"CounterfactualScores(24 sequences, a model minus its twin: {gap:+.2f} of the tokens)"
    )
    with pytest.raises(OptionError, match=r"metric='memorization_score'"):
        found.means(metric="memorization_score")


def test_the_set_s_columns_are_kept_and_batches_passed_on(tiny_model: Callable[..., Any]) -> None:
    models = [tiny_model(family, "bridge") for family in ("gpt_neox", "llama")]
    seqs = ragged().with_table(ragged().table.assign(domain=list("abcd")))
    found = ml.recall.counterfactual_memorization(*models, seqs, batch_size=3, progress=False)
    assert found.table["domain"].tolist() == list("abcd")
    assert found.table["id"].tolist() == seqs.ids
    metrics = ("target_accuracy", "exact_match", "memorization_score", "target_logprob")
    kinds = ("", "_clean", "_counterfactual")
    assert list(found.table)[-12:] == [metric + kind for metric in metrics for kind in kinds]
    assert found.trained.attrs["batch_size"] == found.clean.attrs["batch_size"] == 3
    assert (found.trained.attrs["metrics"], found.clean.attrs["metrics"]) == ("", "")
    assert found.attrs == {**found.trained.attrs, "clean_model": found.clean.attrs["model"]}
    assert found.table["exact_match"].dtype == float
