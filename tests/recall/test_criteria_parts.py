"""The parts of `score_criteria`: edited prompts, sub-scores from answers, and decisions, each by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memlens as ml
from memlens.errors import OptionError
from memlens.recall.criteria import text
from memlens.recall.criteria.options import NEUTRAL_CONTEXTS, SHIFTED_CONTEXTS
from memlens.recall.criteria.scores import (
    answer_columns,
    edit_share,
    keeps,
    logprob_columns,
    mean_over_references,
    part_columns,
)
from memlens.recall.criteria.text import Swaps, make_edits, text_columns
from tests.recall.test_criteria import Rule, frame, score

NAN = np.nan


class Other:
    """Gives two substitutes for every word, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, list[str]]] = []

    def of(self, word: str, place: int, sequence: list[str]) -> list[str]:
        self.asked.append((word, place, sequence))
        return [f"{word}1", f"{word}2"]


def test_every_edited_prompt_by_hand() -> None:
    swaps: Any = Other()
    edits = make_edits(
        ["a b  c", "x"],
        ["t", "u"],
        max_suffix=1,
        swaps=swaps,
        contexts={"neutral": ["So", "So\n"], "odd": []},
    )
    expected = [
        (0, "full", 0, "", "", "a b  c", "t"),
        (0, "suffix", 1, "", "", "c", "t"),
        (0, "deletion", 0, "a", "", "b c", "t"),
        (0, "deletion", 1, "b", "", "a c", "t"),
        (0, "deletion", 2, "c", "", "a b", "t"),
        (0, "substitution", 0, "a", "a1", "a1 b c", "t"),
        (0, "substitution", 0, "a", "a2", "a2 b c", "t"),
        (0, "substitution", 1, "b", "b1", "a b1 c", "t"),
        (0, "substitution", 1, "b", "b2", "a b2 c", "t"),
        (0, "substitution", 2, "c", "c1", "a b c1", "t"),
        (0, "substitution", 2, "c", "c2", "a b c2", "t"),
        (0, "neutral", 0, "", "So", "So a b  c", "t"),
        (0, "neutral", 1, "", "So\n", "So\na b  c", "t"),
        (1, "full", 0, "", "", "x", "u"),
        (1, "neutral", 0, "", "So", "So x", "u"),
        (1, "neutral", 1, "", "So\n", "So\nx", "u"),
    ]
    assert list(edits) == ["row", "kind", "index", "word", "replacement", "prompt", "target"]
    assert list(edits.itertuples(index=False, name=None)) == expected
    assert swaps.asked == [(w, i, ["a", "b", "c", "t"]) for i, w in enumerate("abc")]
    for most, kept in ((2, ["c", "b c"]), (3, ["c", "b c"]), (9, ["c", "b c"])):  # never the whole prompt
        found = make_edits(["a b c"], ["t"], max_suffix=most, swaps=swaps, contexts={})
        suffixes = found[found["kind"] == "suffix"]
        assert suffixes["prompt"].tolist() == kept
        assert suffixes["index"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("word", "like", "dressed"),
    [
        ("dog", "cat", "dog"), ("dog", "Cat", "Dog"), ("dog", "CAT", "DOG"), ("dog", "I", "Dog"),
        ("dog", "cat,", "dog,"), ("dog", "(Cat)", "(Dog)"), ("dog", "“CAT!”", "“DOG!”"),
        ("dog", "don’t", "dog"), ("dog", "can't.", "dog."),
    ],
)  # fmt: skip
def test_substitutes_wear_capitals_and_punctuation(word: str, like: str, dressed: str) -> None:
    assert text._dressed(word, like) == dressed


counts = st.dictionaries(st.sampled_from("abcdefghij"), st.integers(1, 3), min_size=1)


@settings(deadline=None)
@given(counts, st.integers(1, 3), st.integers(1, 4), st.sampled_from("abcxyz"))
def test_substitutes_are_the_nearest_in_frequency_that_are_not_in_the_sequence(
    counts: dict[str, int], pool: int, n: int, word: str
) -> None:
    """With n of at least all candidates, the draw is all of them: the pool by a plain ranking."""
    rank = {w: (c, text.crc32(w.encode()), w) for w, c in counts.items()}
    own = (counts.get(word, 0), text.crc32(word.encode()), word)
    below = sorted(w for w in rank if rank[w] < own)
    below = sorted(below, key=lambda w: rank[w])[-pool:]
    above = sorted((w for w in rank if rank[w] >= own), key=lambda w: rank[w])[: pool + 1]
    near = set(below + above) - {word, "a"}
    assert set(Swaps(counts, pool=pool, n=99, seed=0).of(word, 0, [word, "a"])) == near
    some = Swaps(counts, pool=pool, n=n, seed=0).of(word, 0, [word, "a"])
    assert len(some) == len(set(some)) == min(n, len(near))


def test_the_draw_depends_on_seed_sequence_and_place_alone() -> None:
    counts = {f"{a}{b}": 1 for a in "abcdefgh" for b in "abcdefgh"}
    drawn = [
        Swaps(counts, pool=20, n=9, seed=seed).of("aa", place, [*rest, "aa"])
        for seed, place, rest in ((0, 0, ["x"]), (0, 0, ["x"]), (1, 0, ["x"]), (0, 1, ["x"]), (0, 0, ["y"]))
    ]
    assert drawn[0] == drawn[1]
    assert all(drawn[0] != other for other in drawn[2:])
    mixed = {"Dog,": 2.0, "dog": 1.0, "it's": 1.0, "well-known": 1.0, "42": 9.0, "a1": 9.0, "--": 9.0}
    assert set(Swaps(mixed, pool=9, n=9, seed=0).of("cat", 0, ["cat"])) == {"dog", "it's", "well-known"}
    assert Swaps(mixed, pool=1, n=9, seed=0)._counts == {"dog": 3, "it's": 1, "well-known": 1}


def test_leaks_and_frequencies_of_targets() -> None:
    table = pd.DataFrame({"prompt": ["the dogs bark", "we bark, barks bark"], "target": ["Dog.", "barked"]})
    found = text_columns(table, None, None, 5.5)
    assert found["lexical_leak"].tolist() == [True, True]
    assert found["leak_word"].tolist() == ["dogs", "bark,"]  # the first
    assert np.isnan(found["target_frequency"]).all()
    assert np.isnan(found["max_similarity"]).all()
    assert found["similar_word"].tolist() == ["", ""]
    # Zipf is the logarithm of the occurrences per billion words: 1,000 per million are 6.
    table = pd.DataFrame({"prompt": ["x"] * 4, "target": ["owl,", "elk", "gnu", "The"]})
    found = text_columns(table, {"Owl": 999, "owl": 1, "elk": 100, "rest": 998_900}, None, 6.0)
    assert found["target_frequency"].tolist() == pytest.approx([1000, 100, 0, 0])
    assert found["common_target"].tolist() == [True, False, False, True]
    assert text_columns(table, {"owl": 1000, "rest": 999_000}, None, 6.01)["common_target"].tolist() == [
        False, False, False, True
    ]  # fmt: skip


def test_similarity_is_the_largest_cosine_and_its_word() -> None:
    vectors = {"a": [1.0, 0.0], "b": [3.0, 4.0], "c": [0.0, 2.0], "zero": [0.0, 0.0]}
    table = pd.DataFrame({"prompt": ["B, C a", "zero x", "a c", "C"], "target": ["c", "c", "x", "c."]})
    found = text_columns(table, None, vectors, 5.5)
    np.testing.assert_allclose(found["max_similarity"], [1.0, NAN, NAN, 1.0])
    assert found["similar_word"].tolist() == ["C", "", "", "C"]
    table = pd.DataFrame({"prompt": ["a b"], "target": ["c"]})
    found = text_columns(table, None, vectors, 5.5)
    assert (found["max_similarity"][0], found["similar_word"][0]) == (pytest.approx(0.8), "b")


EDITS = pd.DataFrame(
    [
        (0, "full", 0, ""), (0, "suffix", 1, ""), (0, "suffix", 2, ""), (0, "suffix", 3, ""),
        (0, "deletion", 0, "p"), (0, "deletion", 1, "q"), (0, "deletion", 2, "r"), (0, "deletion", 3, "s"),
        (0, "substitution", 0, "p"), (0, "neutral", 0, ""), (0, "shifted", 0, ""), (0, "shifted", 1, ""),
        (1, "full", 0, ""), (1, "neutral", 0, ""),
    ],
    columns=["row", "kind", "index", "word"],
)  # fmt: skip
TOP1 = np.array([
    [1, 0, 1, 1, NAN, 1, 0, 0, 1, 1, 0, 1, 0, NAN],
    [1, 0, 0, 1, NAN, 1, 1, 0, 0, 1, 0, 0, 1, NAN],
])  # fmt: skip
LOGPROB = np.array([
    [-1.0, -8, -4, -2, NAN, -3, -5, -9, -2, -1, -4, -2, -6, NAN],
    [-3.0, -6, -8, -2, NAN, -3, -3, -9, -4, -1, -6, -4, -2, NAN],
])  # fmt: skip


def test_shares_and_means_over_references_and_edits() -> None:
    share = mean_over_references(TOP1)
    np.testing.assert_allclose(share, [1, 0, 0.5, 1, NAN, 1, 0.5, 0, 0.5, 1, 0, 0.5, 0.5, NAN])
    one = np.array([[NAN, 1.0], [0.5, 0.0]])
    assert mean_over_references(one).tolist() == [0.5, 0.5]
    np.testing.assert_allclose(edit_share(EDITS, share, ["deletion"], 3), [0.5, NAN, NAN])
    np.testing.assert_allclose(edit_share(EDITS, share, ("full", "neutral"), 3), [1, 0.5, NAN])


def test_an_edit_keeps_the_target_by_prediction_or_by_threshold() -> None:
    def kept(least: int, threshold: float | None) -> list[float]:
        return keeps(EDITS, TOP1, LOGPROB, least=least, threshold=threshold).tolist()

    np.testing.assert_equal(kept(1, None), [1, 0, 1, 1, NAN, 1, 1, 0, 1, 1, 0, 1, 1, NAN])
    np.testing.assert_equal(kept(2, None), [1, 0, 0, 1, NAN, 1, 0, 0, 0, 1, 0, 0, 0, NAN])
    # parts by likelihood (above e^-3.5), the whole prompt and contexts by prediction as before
    np.testing.assert_equal(kept(1, np.exp(-3.5)), [1, 0, 0, 1, NAN, 1, 1, 0, 1, 1, 0, 1, 1, NAN])
    np.testing.assert_equal(kept(2, np.exp(-3.5)), [1, 0, 0, 1, NAN, 1, 0, 0, 0, 1, 0, 0, 0, NAN])
    edits, half = EDITS[1:2], np.array([[np.log(0.5)]])
    assert keeps(edits, np.zeros((1, 1)), half, least=1, threshold=0.5).tolist() == [0]  # more than that
    unasked = np.array([[NAN], [1.0]])
    assert keeps(edits, unasked, np.log(unasked / 2), least=1, threshold=0.4).tolist() == [1]
    assert keeps(edits, unasked, np.log(unasked / 2), least=2, threshold=0.4).tolist() == [0]


def test_sub_scores_by_hand() -> None:
    kept = keeps(EDITS, TOP1, LOGPROB, least=1, threshold=None)
    found = part_columns(EDITS, kept, 2)
    expected = {
        "sufficient_suffix": [2, NAN],
        "deletion_share": [2 / 3, NAN],
        "substitution_share": [1, NAN],
        "context_share": [2 / 3, NAN],
        "neutral_share": [1, NAN],
        "shifted_share": [0.5, NAN],
    }
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, err_msg=name)

    found = answer_columns(EDITS, TOP1, LOGPROB, 2, 3)
    e = np.exp
    expected = {
        "full_top1": [1, 0.5],
        "full_logprob": [-2, -4],
        "suffix_1": [0, NAN],
        "suffix_1_prob": [(e(-8) + e(-6)) / 2, NAN],
        "suffix_2": [0.5, NAN],
        "suffix_2_prob": [(e(-4) + e(-8)) / 2, NAN],
        "suffix_3": [1, NAN],
        "suffix_3_prob": [e(-2), NAN],
        "crucial_place": [3, NAN],
        "crucial_effect": [-9 + 2, NAN],
    }
    assert set(found) == {*expected, "crucial_word"}
    assert found["crucial_word"].tolist() == ["s", ""]
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, err_msg=name)
    assert "suffix_3" not in answer_columns(EDITS, TOP1, LOGPROB, 2, 2)

    found = logprob_columns(EDITS, LOGPROB, 2)
    parts = [-7, -6, -2, -3, -4, -9, -3]  # suffixes, deletions that could be asked, the substitution
    np.testing.assert_allclose(found["whole_logprob"], [np.mean([-2, -1, -5, -3]), -4])
    np.testing.assert_allclose(found["part_logprob_max"], [max(parts), NAN])
    np.testing.assert_allclose(found["part_logprob_mean"], [np.mean(parts), NAN])


def decided(**columns: Any) -> ml.recall.CriteriaScores:
    """Scores of sequences that pass everything, but for the given columns."""
    n = len(next(iter(columns.values())))
    passing: dict[str, Any] = {
        "sufficient_suffix": NAN, "deletion_share": 0.0, "substitution_share": 0.0, "lexical_leak": False,
        "max_similarity": NAN, "common_target": False, "full_top1": 1.0, "context_share": 1.0,
        "corpus_count": NAN, "corpus_share": NAN,
    }  # fmt: skip
    table = pd.DataFrame({"id": [str(i) for i in range(n)], **{k: [v] * n for k, v in passing.items()}})
    return ml.recall.CriteriaScores(table.assign(**columns), pd.DataFrame(), pd.DataFrame())


CRITERIA = ["irreducible", "no_leak", "single_target", "uncommon_target", "tested", "all"]
# Columns whose first row just passes by default and whose second just does not, and what that decides.
BOUNDARIES: list[tuple[dict[str, list[Any]], str | None, set[str]]] = [
    ({"sufficient_suffix": [NAN, 4]}, "suffix", {"irreducible", "all"}),
    ({"deletion_share": [0.0, 0.01]}, "deletion", {"irreducible", "all"}),
    ({"deletion_share": [NAN, 0.01]}, "deletion", {"irreducible", "all"}),
    ({"substitution_share": [0.0, 0.01]}, "substitution", {"irreducible", "all"}),
    ({"lexical_leak": [False, True]}, "lexical", {"no_leak", "all"}),
    ({"max_similarity": [0.75, 0.76]}, "similar", {"no_leak", "all"}),
    ({"common_target": [False, True]}, "common", {"uncommon_target"}),
    ({"full_top1": [0.5, 0.49]}, None, {"tested"}),
    ({"context_share": [0.9, 0.89]}, None, {"single_target", "all"}),
    ({"context_share": [0.0, 0.89], "full_top1": [0.4, 0.5]}, None, {"single_target", "all"}),
    ({"corpus_share": [0.9, 0.89], "corpus_count": [5, 5]}, None, {"single_target", "all"}),
    ({"corpus_share": [0.5, 0.5], "corpus_count": [4, 5]}, None, {"single_target", "all"}),
]


@pytest.mark.parametrize(("columns", "violated", "failed"), BOUNDARIES)
def test_decisions_at_their_default_thresholds(
    columns: dict[str, list[Any]], violated: str | None, failed: set[str]
) -> None:
    scores = decided(**columns)
    violations = scores.violations()
    assert list(violations) == ["id", "suffix", "deletion", "substitution", "lexical", "similar", "common"]
    for kind in list(violations)[1:]:
        assert violations[kind].tolist() == [False, kind == violated], kind
    passes = scores.passes()
    assert list(passes) == ["id", *CRITERIA]
    assert violations["id"].tolist() == passes["id"].tolist() == ["0", "1"]
    for name in CRITERIA:
        first = name != "tested" or columns.get("full_top1", [1])[0] >= 0.5
        assert passes[name].tolist() == [first, name not in failed], name
    assert (
        repr(scores)
        == f"CriteriaScores(2 sequences, {2 - ('all' in failed)} pass all criteria; references: )"
    )


def test_thresholds_are_options_and_shares_are_checked() -> None:
    scores = decided(
        deletion_share=[0.3], substitution_share=[0.4], max_similarity=[0.9], context_share=[0.5],
        corpus_share=[0.4], corpus_count=[9], full_top1=[0.3],
    )  # fmt: skip
    strict = scores.passes(min_known=0.2).iloc[0]
    assert [strict[name] for name in CRITERIA] == [False, False, False, True, True, False]
    limits: dict[str, float] = {"max_deletion": 0.3, "max_substitution": 0.4, "max_similarity": 0.9}
    loose = scores.passes(min_context=0.5, min_corpus_share=0.4, min_known=0.3, **limits).iloc[0]
    assert loose["all"]
    assert scores.passes(min_corpus_count=10, min_known=0.31, **limits).iloc[0]["single_target"]
    assert not scores.violations(max_deletion=1, max_substitution=1, max_similarity=2).iloc[0, 1:].any()
    assert scores.violations(max_deletion=0.29, max_substitution=0.39)[["deletion", "substitution"]].all(None)
    for name in ("max_deletion", "max_substitution"):
        for value in (-0.1, 1.1):
            with pytest.raises(OptionError, match=rf"{name}={value} is not a share in \[0, 1\]"):
                scores.violations(**{name: value})
    with pytest.raises(OptionError, match="part='min'"):
        scores.score(part="min")


DOCUMENTED = {
    "max_suffix": 4, "part_threshold": None, "min_references": 1, "substitutes": 1, "pool": 10,
    "neutral_contexts": NEUTRAL_CONTEXTS, "shifted_contexts": SHIFTED_CONTEXTS, "common_zipf": 5.5,
    "prepend_bos": "auto", "allow_probed_reference": False, "batch_size": None, "seed": 0,
}  # fmt: skip


def test_default_options_and_lead_ins() -> None:
    rule = Rule(lambda p, t: 1)
    scores = score(frame("we turn a very blind old eye", "an owl sat on red soft grass"), rule)
    assert {name: scores.settings[name] for name in DOCUMENTED} == DOCUMENTED
    for leads, end in ((NEUTRAL_CONTEXTS, (",", ":")), (SHIFTED_CONTEXTS, (".",))):
        assert len(set(leads)) == 3
        for lead in leads:  # a sentence, or the beginning of one
            assert lead[0].isupper()
            assert lead[1:] == lead[1:].lower()
            assert lead.endswith(end)
    for row in (0, 1):
        assert scores.edits[scores.edits["row"] == row].groupby("kind").size().to_dict() == {
            "full": 1, "suffix": 4, "deletion": 6, "substitution": 6, "neutral": 3, "shifted": 3
        }  # fmt: skip
    assert scores.settings["n_prompts"] == len(
        set(zip(scores.edits["prompt"], scores.edits["target"], strict=True))
    )
    assert set(scores.by_reference["reference"]) == {"rule"}
    own = [name for name in scores.by_reference if name not in ("id", "reference")]
    pd.testing.assert_frame_equal(scores.by_reference[own], scores.table[own])
    assert [name for name in scores.table if name.startswith("suffix_")] == [
        f"suffix_{k}{kind}" for k in (1, 2, 3, 4) for kind in ("", "_prob")
    ]


def test_bootstrap_options_of_a_calibration_have_documented_defaults() -> None:
    rng = np.random.default_rng(0)
    leaks = rng.random(40) < 0.5
    scores = decided(lexical_leak=leaks, max_similarity=rng.random(40))
    table = scores.table.assign(similarity_ind=leaks ^ (rng.random(40) < 0.2))
    scores = ml.recall.CriteriaScores(table, pd.DataFrame(), pd.DataFrame())
    flags = {"lexical": "similarity_ind"}
    found = ml.recall.calibrate_criteria(scores, flags)
    documented: dict[str, Any] = {"level": 0.95, "n_resamples": 2000, "seed": 0}
    pd.testing.assert_frame_equal(found, ml.recall.calibrate_criteria(scores, flags, **documented))
    for change in ({"level": 0.8}, {"n_resamples": 2001}, {"seed": 1}):
        assert not found.equals(ml.recall.calibrate_criteria(scores, flags, **change)), change
    assert (found["decision"][0], found["flag"][0]) == ("lexical", "similarity_ind")
    assert scores.settings == {}
