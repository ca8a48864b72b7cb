"""`NgramReference` against counts made by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlens.errors import EmptySetError, OptionError
from memlens.recall.criteria.ngrams import NgramReference
from tests.sequences.vocabularies import byte_level
from tests.tiny import tiny_tokenizer

CORPUS = ["a b t", "c b u", "c b u", "d"]


def by_hand(texts: Sequence[str], history: Sequence[str], word: str) -> float:
    """Witten-Bell straight from the formula, with dictionaries."""
    rows = [text.split() for text in texts]
    if not history:
        counts = Counter(w for row in rows for w in row)
        lower = 1 / (len(counts) + 1)
    else:
        n = len(history)
        counts = Counter(
            row[i + n] for row in rows for i in range(len(row) - n) if row[i : i + n] == list(history)
        )
        lower = by_hand(texts, history[1:], word)
    total = sum(counts.values())
    return lower if not total else (counts[word] + len(counts) * lower) / (total + len(counts))


def test_the_formula() -> None:
    reference = NgramReference(CORPUS, order=3)
    # V = 6 words (a b t c u d), N = 10; after "b": u u t
    of_t = (1 + 6 / 7) / (10 + 6)
    after_b = (1 + 2 * of_t) / (3 + 2)
    assert reference.probability(["x"], ["t"])[0] == pytest.approx(of_t)
    assert reference.probability(["b"], ["t"])[0] == pytest.approx(after_b)
    assert reference.probability(["a b"], ["t"])[0] == pytest.approx((1 + after_b) / 2)
    assert reference.probability(["a b"], ["never"])[0] == pytest.approx((6 / 7 / 16) * 2 / 5 / 2)


@given(
    st.lists(st.lists(st.sampled_from("abcd"), max_size=6).map(" ".join), min_size=1, max_size=5),
    st.lists(st.sampled_from("abcde"), max_size=4),
    st.integers(1, 4),
)
def test_any_corpus_as_by_dictionaries_and_sums_to_one(
    texts: list[str], words: list[str], order: int
) -> None:
    if not any(text.split() for text in texts):
        return
    reference = NgramReference(texts, order=order)
    vocabulary = sorted({w for text in texts for w in text.split()})
    history = words[-(order - 1) :] if order > 1 else []
    known = [i for i, w in enumerate(history) if w not in vocabulary]
    history = history[known[-1] + 1 :] if known else history
    asked = [*vocabulary, "unknown"]
    found = reference.probability([" ".join(words)] * len(asked), asked)
    np.testing.assert_allclose(found, [by_hand(texts, history, w) for w in asked], rtol=1e-12)
    assert found.sum() == pytest.approx(1)


def test_a_tie_predicts_nothing_and_an_unknown_word_is_never_predicted() -> None:
    reference = NgramReference(["one of a t", "two of a u"], order=4)
    asked = ["one of a", "of a", "a", "two of a", "two of a"]
    assert reference.answer(asked, ["t", "t", "u", "u", "never"]).top1.tolist() == [1, 0, 0, 1, 0]
    assert NgramReference(["a"], order=1).answer([""], ["never"]).top1.tolist() == [0]


def test_n_grams_do_not_cross_texts() -> None:
    reference = NgramReference(["a b", "c d"], order=2)
    assert reference.probability(["b"], ["c"])[0] == reference.probability(["x"], ["c"])[0]


def test_words_without_punctuation_and_case() -> None:
    reference = NgramReference(["Kick the bucket, Tom!"], order=3)
    assert reference.predict(["kick THE", "the bucket"]) == ["bucket", "tom"]
    assert NgramReference(["Kick the Bucket"], lowercase=False).predict(["Kick the"]) == ["Bucket"]


def test_tokens_of_a_tokenizer_from_texts_and_from_ids() -> None:
    tokenizer = tiny_tokenizer()
    of_ids = NgramReference(np.array([[1, 2, 3], [4, 2, 5], [4, 2, 5]]), order=3, tokenizer=tokenizer)
    of_text = NgramReference(["w1 w2 w3", "w4 w2 w5", "w4 w2 w5"], order=3, tokenizer=tokenizer)
    for reference in (of_ids, of_text):
        assert reference.predict(["w1 w2", "w2", "w77 w2"]) == ["w3", "w5", "w5"]
        assert reference.answer(["w1 w2", "w2"], ["w3", "w3"]).top1.tolist() == [1, 0]
    np.testing.assert_array_equal(
        of_ids.probability(["w1 w2"] * 2, ["w3", "w99"]), of_text.probability(["w1 w2"] * 2, ["w3", "w99"])
    )


def test_the_target_is_the_first_token_of_the_word() -> None:
    tokenizer = byte_level()
    text = "turn a blind tunnelling"
    reference = NgramReference([text], order=3, tokenizer=tokenizer)
    answer = reference.answer(["turn a blind"], ["tunnelling"])
    assert answer.top1.tolist() == [1]
    assert len(tokenizer(" tunnelling", add_special_tokens=False)["input_ids"]) > 1


def test_baselines() -> None:
    reference = NgramReference(CORPUS, order=3)
    found = reference.baselines(["a b"], ["t"])
    assert found["unigram_prob"][0] == pytest.approx(by_hand(CORPUS, [], "t"))
    assert found["bigram_prob"][0] == pytest.approx(by_hand(CORPUS, ["b"], "t"))
    assert found["trigram_prob"][0] == pytest.approx(by_hand(CORPUS, ["a", "b"], "t"))
    assert found["pmi"][0] == pytest.approx(np.log(by_hand(CORPUS, ["b"], "t") / by_hand(CORPUS, [], "t")))
    short = NgramReference(CORPUS, order=2).baselines(["a b"], ["t"])
    assert short["pmi"] == found["pmi"]
    assert np.isnan(short["trigram_prob"]).all()


def test_refusals() -> None:
    with pytest.raises(OptionError, match="order=0"):
        NgramReference(CORPUS, order=0)
    with pytest.raises(EmptySetError, match="no words"):
        NgramReference([])
    for order in (0, 3):
        with pytest.raises(OptionError, match=f"order={order}: this reference"):
            NgramReference(CORPUS, order=2).probability(["a"], ["b"], order=order)


def test_names_say_what_was_counted_and_defaults_are_four_words_in_lower_case() -> None:
    plain = NgramReference(["A b c d e", "a b"])
    assert plain.name == "4-gram of 7 words"
    assert plain.order == 4
    asked = (["x b c d", "b c d"], ["e", "e"])
    same = NgramReference(["A b c d e", "a b"], order=4, lowercase=True, tokenizer=None, name=None)
    assert plain.probability(*asked).tolist() == same.probability(*asked).tolist()
    long = NgramReference(["a b c d e", "x b c d"], order=5)
    assert long.probability(["a b c d"], ["e"]) > long.probability(["a b c d"], ["e"], order=4)
    assert plain.predict(["a b c d"]) == ["e"]
    assert NgramReference([[1, 2, 3]], order=2, tokenizer=tiny_tokenizer()).name == "2-gram of 3 tokens"
    assert NgramReference(["a"], name="mine").name == "mine"
    cased = NgramReference(["A a"], lowercase=False)
    assert cased.probability(["x"], ["A"])[0] == cased.probability(["x"], ["a"])[0]
    assert NgramReference(["A a"]).probability(["x"], ["A"])[0] > cased.probability(["x"], ["A"])[0]


def test_of_several_most_likely_words_the_first_is_given() -> None:
    assert NgramReference(["b c", "a d"]).predict(["", "nothing known"]) == ["b", "b"]


def test_token_ids_come_as_arrays_or_lists_and_unknown_ids_are_unknown() -> None:
    tokenizer, rows = tiny_tokenizer(), [[1, 2, 3], [4, 2, 5], [4, 2, 5]]
    made = [
        NgramReference(corpus, order=3, tokenizer=tokenizer)
        for corpus in (rows, tuple(rows), np.array(rows), iter(rows), [np.array(row) for row in rows])
    ]
    prompts, targets = ["w1 w2", "w0 w2", "w9 w2", "w99"], ["w3", "w5", "w0", "w99"]
    expected = made[0].probability(prompts, targets)
    for other in made[1:]:
        assert other.probability(prompts, targets).tolist() == expected.tolist()
    # w0 is below the largest id and never occurs; w99 is above it: both are as unlikely as any unknown word
    assert made[0].probability([""] * 2, ["w0", "w99"]).tolist() == [pytest.approx(5 / 6 / (9 + 5))] * 2
    long = NgramReference(np.array([1, 2, 3, 1, 2]), order=2, tokenizer=tokenizer)
    assert long.probability(["w3"], ["w1"])[0] > long.probability(["w3"], ["w2"])[0]
    apart = NgramReference(np.array([[1, 2, 3], [1, 2, 4]]), order=2, tokenizer=tokenizer)
    assert apart.probability(["w3"], ["w1"])[0] == apart.probability([""], ["w1"])[0]


def test_answers_are_predictions_and_logarithms_without_passes() -> None:
    reference = NgramReference(CORPUS, order=3)
    answer = reference.answer(["a b", "c b"], ["t", "t"], batch_size=1, progress=False)
    assert answer.n_passes == 0
    assert answer.top1.tolist() == [1, 0]
    np.testing.assert_allclose(np.exp(answer.logprob), reference.probability(["a b", "c b"], ["t", "t"]))
    bare = NgramReference(CORPUS, order=1).baselines(["a b"], ["t"])
    assert np.isnan([bare["bigram_prob"][0], bare["trigram_prob"][0], bare["pmi"][0]]).all()
    with pytest.raises(EmptySetError, match="no words"):
        NgramReference(["", " "])
