"""`score_criteria` with references whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import memlens as ml
from memlens.errors import ColumnError, EmptySetError, OptionError, SequenceError
from memlens.recall.criteria.references import Answers
from memlens.recall.criteria.text import Swaps, word_counts
from memlens.sequences.parquet import read_table
from memlens.sequences.set import SequenceSet
from tests.tiny import tiny_tokenizer


@dataclass
class Rule:
    """A reference that predicts the target wherever a rule says so."""

    rule: Callable[[str, str], float]
    name: str = "rule"

    def answer(self, prompts: Sequence[str], targets: Sequence[str], **_: Any) -> Answers:
        self.asked = list(zip(prompts, targets, strict=True))
        gives = np.array([float(self.rule(p, t)) for p, t in self.asked])
        return Answers(gives, np.log(np.where(gives == 1, 0.8, 0.1)) + 0 * gives, 1)


def frame(*texts: str) -> pd.DataFrame:
    pairs = [text.rsplit(" ", 1) for text in texts]
    return pd.DataFrame({"prompt": [p for p, _ in pairs], "target": [t for _, t in pairs]})


def score(texts: Any, references: Any, **options: Any) -> ml.recall.CriteriaScores:
    return ml.recall.score_criteria(texts, references, progress=False, **options)


def test_two_words_suffice() -> None:
    corpus = ml.recall.NgramReference(["p a b t", "c b u", "c b u"], order=4)
    row = score(frame("p a b t"), corpus).table.iloc[0]
    assert (row["full_top1"], row["suffix_1"], row["suffix_2"]) == (1, 0, 1)
    assert row["sufficient_suffix"] == 2
    assert row["suffix_1_prob"] == pytest.approx(corpus.probability(["b"], ["t"])[0])
    assert np.isnan(row["suffix_3"])
    # without "p": "a b" gives t; without "a": "p b" gives u; without "b": "p a" gives b
    assert row["deletion_share"] == pytest.approx(1 / 3)


def test_the_whole_prompt_is_needed() -> None:
    corpus = ml.recall.NgramReference(["one of a t", "two of a u"], order=4)
    scores = score(frame("one of a t"), corpus)
    row = scores.table.iloc[0]
    assert np.isnan(row["sufficient_suffix"])
    assert (row["full_top1"], row["deletion_share"], row["context_share"]) == (1, 0, 1)
    assert scores.passes().iloc[0, 1:].tolist() == [True, True, True, True, True, True]
    without = {
        w: corpus.probability([p], ["t"])[0] for w, p in {"one": "of a", "of": "one a", "a": "one of"}.items()
    }
    assert row["crucial_word"] == min(without, key=lambda w: without[w])
    whole = corpus.probability(["one of a"], ["t"])[0]
    assert row["crucial_effect"] == pytest.approx(np.log(min(without.values()) / whole))
    parts = scores.edits[scores.edits["kind"].isin(["suffix", "deletion", "substitution"])]
    assert scores.score()[0] == pytest.approx(np.log(whole) - parts["logprob"].max())
    assert scores.score(part="mean")[0] == pytest.approx(np.log(whole) - parts["logprob"].mean())
    assert scores.score()[0] > 0


def test_a_sequence_that_no_reference_knows_is_not_tested() -> None:
    scores = score(frame("one of a t"), Rule(lambda p, t: 0))
    passed = scores.passes().iloc[0]
    assert passed["all"]
    assert not passed["tested"]
    assert scores.score()[0] == pytest.approx(0)


def test_every_kind_of_edit_and_its_share() -> None:
    reference = Rule(lambda p, t: "blind" in p.split())
    options = ml.recall.CriteriaOptions(
        neutral_contexts=("I say:",), shifted_contexts=("Rain.", "Tea for two.")
    )
    row = score(frame("turn a blind eye", "make no more noise"), reference, options=options).table.iloc[0]
    assert row["deletion_share"] == pytest.approx(2 / 3)
    assert row["substitution_share"] == pytest.approx(2 / 3)
    assert row["sufficient_suffix"] == 1
    assert row["crucial_word"] == "blind"
    assert row["crucial_place"] == 2
    asked = {p for p, t in reference.asked if t == "eye"}
    expected = {"turn a blind", "blind", "a blind", "turn blind", "turn a"}
    assert expected | {"I say: turn a blind", "Rain. turn a blind", "Tea for two. turn a blind"} < asked
    assert len(asked) == 8 + 3  # and one substitute for each word: "a blind" was asked once
    assert len(reference.asked) == len(set(reference.asked))


def test_contexts_that_change_the_prediction() -> None:
    scores = score(frame("turn a blind eye"), Rule(lambda p, t: p.startswith("turn a blind")))
    row = scores.table.iloc[0]
    assert (row["context_share"], row["neutral_share"], row["shifted_share"]) == (0, 0, 0)
    assert not scores.passes()["single_target"][0]
    some = Rule(lambda p, t: "flour" not in p)
    row = score(frame("turn a blind eye"), some).table.iloc[0]
    assert (row["neutral_share"], row["shifted_share"]) == (1, pytest.approx(2 / 3))
    assert row["context_share"] == pytest.approx(5 / 6)


def test_how_many_references_must_agree() -> None:
    knows, blind, never = (
        Rule(lambda p, t: 1, "knows"), Rule(lambda p, t: "blind" in p, "half"), Rule(lambda p, t: 0, "never")
    )  # fmt: skip
    texts = frame("turn a blind eye")
    table = score(texts, [knows, blind, never]).table
    assert table["full_top1"][0] == pytest.approx(2 / 3)
    assert table["deletion_share"][0] == 1
    two = score(texts, [knows, blind, never], options=ml.recall.CriteriaOptions(min_references=2))
    assert two.table["deletion_share"][0] == pytest.approx(2 / 3)
    assert two.by_reference.set_index("reference")["deletion_share"].to_dict() == {
        "knows": 1,
        "half": pytest.approx(2 / 3),
        "never": 0,
    }
    three = score(texts, [knows, blind, never], options=ml.recall.CriteriaOptions(min_references=3))
    assert three.table["deletion_share"][0] == 0
    with pytest.raises(OptionError, match="min_references=4, but there are 3"):
        score(texts, [knows, blind, never], options=ml.recall.CriteriaOptions(min_references=4))


def test_a_probability_in_place_of_the_prediction() -> None:
    reference = Rule(lambda p, t: len(p.split()) >= 2)
    texts = frame("turn a blind eye")
    for threshold, fewest in ((None, 2), (0.05, 1), (0.5, 2), (0.9, np.nan)):
        options = ml.recall.CriteriaOptions(part_threshold=threshold)
        found = score(texts, reference, options=options).table["sufficient_suffix"][0]
        np.testing.assert_equal(found, fewest)


def test_what_could_not_be_asked_is_not_counted() -> None:
    reference = Rule(lambda p, t: np.nan if p == "a" else 1.0)
    table = score(frame("b a t"), reference).table
    assert np.isnan(table["suffix_1"][0])
    assert np.isnan(table["sufficient_suffix"][0])
    assert table["deletion_share"][0] == 1  # of the other deletion


def test_a_prompt_of_one_word_has_no_parts() -> None:
    scores = score(frame("good morning"), Rule(lambda p, t: 1))
    row = scores.table.iloc[0]
    assert np.isnan([row["sufficient_suffix"], row["deletion_share"], row["substitution_share"]]).all()
    assert np.isnan(scores.score()).all()
    assert row["context_share"] == 1


def test_the_probed_model_is_refused_by_name_and_by_itself() -> None:
    texts, reference = frame("turn a blind eye"), Rule(lambda p, t: 1, "the model")
    for probed in ("the model", reference):
        with pytest.raises(OptionError, match="'the model' is the probed model"):
            score(texts, [Rule(lambda p, t: 0, "other"), reference], probed=probed)
        options = ml.recall.CriteriaOptions(allow_probed_reference=True)
        with pytest.warns(UserWarning, match="judges itself"):
            allowed = score(texts, reference, probed=probed, options=options)
        assert allowed.settings["probed_is_reference"]
    assert not score(texts, reference, probed="another").settings["probed_is_reference"]


def test_the_order_of_sequences_does_not_matter_and_the_seed_decides() -> None:
    texts = frame("turn a blind eye", "grind to a sudden halt", "let the old dog sleep", "one of a kind")
    corpus = ml.recall.NgramReference(texts["prompt"] + " " + texts["target"], order=3)
    forth, again = score(texts, corpus), score(texts, corpus)
    back = score(texts[::-1], corpus)
    ours = forth.table.drop(columns="id")
    pd.testing.assert_frame_equal(ours, again.table.drop(columns="id"))
    pd.testing.assert_frame_equal(ours, back.table.drop(columns="id")[::-1].reset_index(drop=True))
    swapped = forth.edits["replacement"].tolist()
    assert swapped == again.edits["replacement"].tolist()
    other = score(texts, corpus, options=ml.recall.CriteriaOptions(seed=1)).edits["replacement"].tolist()
    assert swapped != other


def test_substitutes_are_as_frequent_and_dressed_alike() -> None:
    counts = {
        "the": 1000,
        "of": 900,
        "and": 800,
        **{f"{c}at": 10 for c in "bcfhmprsv"},
        "zyx": 1,
        "yxz": 1,
        "xzy": 1,
    }
    swaps = Swaps(counts, pool=2, n=5, seed=0)
    assert set(swaps.of("The", 0, ["The", "of"])) == {"And"}
    assert set(swaps.of("zyx,", 1, ["a", "zyx,"])) <= {f"{w}," for w in ("yxz", "xzy", *counts)}
    assert all(word.isupper() for word in swaps.of("CAT", 0, ["CAT"]))
    near = swaps.of("cat", 0, ["cat", "bat"])
    assert "cat" not in near
    assert "bat" not in near
    assert Swaps({}, pool=3, n=1, seed=0).of("cat", 0, ["cat"]) == []
    assert word_counts(["The cat.", "the dog"]) == {"the": 2, "cat": 1, "dog": 1}


def test_leaks_and_common_targets() -> None:
    texts = frame("let bygones be bygones", "as you make it, making", "once upon a time", "day in, day out")
    counts = {"time": 500, "bygones": 1, "making": 499, "day": 10_000}
    table = score(texts, Rule(lambda p, t: 0), corpus_counts=counts).table
    assert table["lexical_leak"].tolist() == [True, True, False, False]
    assert table["leak_word"].tolist() == ["bygones", "make", "", ""]
    assert table["target_frequency"].tolist() == pytest.approx([1e6 / 11e3, 499e6 / 11e3, 500e6 / 11e3, 0])
    assert table["common_target"].tolist() == [False, True, True, True]  # the cut, the cut, the list
    alone = score(texts, Rule(lambda p, t: 0)).table
    assert alone["common_target"].tolist() == [False, False, False, True]
    assert alone["target_frequency"].isna().all()


def test_similarity_from_a_mapping() -> None:
    vectors = {"know": [1.0, 0.0], "you": [0.6, 0.8], "never": [0.0, -2.0], "eye": [0.0, 0.0]}
    table = score(
        frame("you never know", "strange words you", "blind eye"), Rule(lambda p, t: 0), embeddings=vectors
    ).table
    np.testing.assert_allclose(table["max_similarity"], [0.6, np.nan, np.nan])
    assert table["similar_word"].tolist() == ["you", "", ""]
    with pytest.raises(SequenceError, match="shapes"):
        score(frame("you know"), Rule(lambda p, t: 0), embeddings={"you": [1.0], "know": [1.0, 2.0]})


def test_the_share_in_a_corpus() -> None:
    corpus = np.array([[1, 2, 3, 9], [1, 2, 3, 9], [0, 1, 2, 4]])
    table = score(
        frame("w1 w2 w3", "w2 w3 w9", "w7 w8 w9"),
        Rule(lambda p, t: 0),
        corpus=corpus,
        tokenizer=tiny_tokenizer(),
    ).table
    np.testing.assert_allclose(table["corpus_share"], [2 / 3, 1, np.nan])
    assert table["corpus_count"].tolist() == [3, 2, 0]
    with pytest.raises(OptionError, match="corpus= needs tokenizer="):
        score(frame("w1 w2 w3"), Rule(lambda p, t: 0), corpus=corpus)


def test_baselines_from_a_reference_or_beside_it() -> None:
    corpus = ml.recall.NgramReference(["a b t", "c b u"], order=3)
    expected = corpus.baselines(["a b"], ["t"])
    for found in (score(frame("a b t"), corpus), score(frame("a b t"), Rule(lambda p, t: 0), ngrams=corpus)):
        assert {n: found.table[n].tolist() for n in expected} == {n: v.tolist() for n, v in expected.items()}
    assert score(frame("a b t"), Rule(lambda p, t: 0)).table[list(expected)].isna().all(axis=None)


def test_sets_without_text_are_decoded() -> None:
    seqs = SequenceSet.from_tokens([[1, 2, 3, 4], [5, 6, 7, 8]], [3, 2])
    table = score(seqs, Rule(lambda p, t: 0), tokenizer=tiny_tokenizer()).table
    assert table["prompt"].tolist() == ["w1 w2 w3", "w5 w6"]
    assert table["target"].tolist() == ["w4", "w7"]
    assert table["id"].tolist() == seqs.ids
    with pytest.raises(ColumnError, match="no column 'prompt'"):
        score(seqs, Rule(lambda p, t: 0))


def test_bad_tables_and_options() -> None:
    never = Rule(lambda p, t: 0)
    with pytest.raises(SequenceError, match="row 1 has the prompt ' '"):
        score(pd.DataFrame({"prompt": ["a", " "], "target": ["b", "c"]}), never)
    with pytest.raises(SequenceError, match="row 0 has the target 'two words'"):
        score(pd.DataFrame({"prompt": ["a"], "target": ["two words"]}), never)
    with pytest.raises(EmptySetError, match="no sequences"):
        score(pd.DataFrame({"prompt": [], "target": []}), never)
    with pytest.raises(OptionError, match="references is empty"):
        score(frame("a b"), [])
    with pytest.raises(OptionError, match="max_suffix=0"):
        ml.recall.CriteriaOptions(max_suffix=0)
    with pytest.raises(OptionError, match=r"part_threshold=1\.5"):
        ml.recall.CriteriaOptions(part_threshold=1.5)
    with pytest.raises(OptionError, match="max_deletion=2"):
        score(frame("a b"), never).passes(max_deletion=2)


def test_thresholds_decide() -> None:
    scores = score(
        frame("turn a blind eye", "grind to a halt"), Rule(lambda p, t: t == "eye" and p.startswith("turn"))
    )
    share = scores.table["deletion_share"][0]
    assert share == pytest.approx(2 / 3)
    assert scores.violations()["deletion"].tolist() == [True, False]
    assert scores.violations(max_deletion=0.7)["deletion"].tolist() == [False, False]
    assert scores.passes()["irreducible"].tolist() == [False, True]
    assert scores.passes()["tested"].tolist() == [True, False]


def test_names_of_references_are_told_apart() -> None:
    texts = frame("turn a blind eye")
    same = [Rule(lambda p, t: 1), Rule(lambda p, t: 0)]
    assert score(texts, same).settings["references"] == ["rule", "rule-2"]
    named = {"big": same[0], "small": same[1]}
    assert score(texts, named).by_reference["reference"].tolist() == ["big", "small"]


def test_settings_name_what_was_given() -> None:
    texts, rule = frame("turn a blind eye"), Rule(lambda p, t: 1)
    names = ("embeddings", "corpus", "corpus_counts", "ngrams")
    bare = score(texts, rule).settings
    assert [bare[name] for name in names] == ["", "", False, ""]
    tokenizer = tiny_tokenizer()
    given = {"corpus": [[1, 2]], "tokenizer": tokenizer, "corpus_counts": {"a": 3.0}}
    vectors = {"blind": np.ones(2), "eye": np.ones(2)}
    ngrams = ml.recall.NgramReference(["turn a blind eye"], order=2)
    full = score(texts, rule, embeddings=vectors, ngrams=ngrams, **given).settings
    assert [full[name] for name in names] == ["dict", "list", True, ngrams.name]
    assert full["n_passes"] == {"rule": 1}


def test_scores_are_written_and_shown(tmp_path: Path) -> None:
    scores = score(frame("turn a <blind> eye", "one of a kind"), Rule(lambda p, t: 0))
    table, settings = read_table(scores.save(tmp_path / "criteria.parquet"))
    pd.testing.assert_frame_equal(table, scores.table, check_dtype=False)
    assert settings["criteria"]["references"] == ["rule"]
    assert settings["criteria"]["max_suffix"] == 4
    copy = scores.to_frame()
    copy["target"] = "changed"
    assert scores.table["target"][0] == "eye"
    assert repr(scores) == "CriteriaScores(2 sequences, 2 pass all criteria; references: rule)"
    assert "&lt;blind&gt;" in scores._repr_html_()
