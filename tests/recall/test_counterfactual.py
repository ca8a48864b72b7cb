from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import memlens as ml
from memlens.errors import OptionError, SequenceError
from tests.small import ragged


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return ml.load_model("zoo/pythia-s", device="cpu"), ml.load_model("zoo/pythia-xs", device="cpu")


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
