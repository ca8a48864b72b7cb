from __future__ import annotations

import pytest

from memlens.sequences.words import STOP_WORDS, bare_word, is_stop_word, stem


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("bygones", "bygone"), ("halts", "halt"), ("stories", "story"), ("tried", "try"), ("boxes", "box"),
        ("running", "runs"), ("hoped", "hope"), ("making", "make"), ("dog's", "dogs"), ("Glasses", "glass"),
        ("calling", "call"), ("dresses", "dress"),
    ],
)  # fmt: skip
def test_forms_of_a_word_have_one_stem(one: str, other: str) -> None:
    assert stem(one) == stem(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("sing", "sin"),
        ("bus", "bu"),
        ("red", "r"),
        ("goats", "sheep"),
        ("is", "i"),
        ("string", "str"),
        ("gave", "give"),
    ],
)
def test_other_words_have_not(one: str, other: str) -> None:
    assert stem(one) != stem(other)


def test_stop_words() -> None:
    assert {"the", "of", "it", "he", "twenty"} <= STOP_WORDS
    assert all(word == bare_word(word) for word in STOP_WORDS)
    assert [is_stop_word(w) for w in ("It,", "that’s", "don't", "can't", "n't", "eye", "'s")] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip
