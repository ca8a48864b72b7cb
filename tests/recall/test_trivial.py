"""Continuations by rule: each share against a plain loop, and made-up texts that are or are not trivial."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from memlens.errors import OptionError
from memlens.recall.score import score_recall
from memlens.recall.trivial import TrivialRules, _flag, trivial_continuations
from memlens.sequences.set import SequenceSet
from tests.recall.sets import graded
from tests.tiny import tiny_tokenizer

rows_of_few = st.lists(st.integers(0, 4), min_size=2, max_size=14)


def plain_shares(row: list[int], prefix_len: int, max_period: int) -> tuple[float, float]:
    """`repeated_share` and `step_share` of token ids, token by token."""
    targets = range(prefix_len, len(row))
    repeated, stepping = [0.0], [0.0]
    for p in range(1, max_period + 1):
        repeated.append(sum(j >= p and row[j] == row[j - p] for j in targets) / len(targets))
        good = [j for j in targets if j >= 2 * p and row[j] - row[j - p] == row[j - p] - row[j - 2 * p]]
        if any(row[j] != row[j - p] for j in good):
            stepping.append(len(good) / len(targets))
    return max(repeated), max(stepping)


@settings(deadline=None)
@given(st.lists(rows_of_few, min_size=1, max_size=5), st.integers(1, 12), st.data())
def test_shares_equal_a_plain_loop(rows: list[list[int]], max_period: int, data: st.DataObject) -> None:
    cuts = [data.draw(st.integers(1, len(row) - 1)) for row in rows]
    seqs = SequenceSet.from_tokens(rows, cuts)
    table = trivial_continuations(seqs, rules=TrivialRules(max_period=max_period))
    for i, (row, cut) in enumerate(zip(rows, cuts, strict=True)):
        repeated, stepping = plain_shares(row, cut, max_period)
        assert table["repeated_share"][i] == pytest.approx(repeated)
        assert table["step_share"][i] == pytest.approx(stepping)
        target = row[cut:]
        assert table["type_token_ratio"][i] == pytest.approx(len(set(target)) / len(target))
        held = [
            n for n in range(1, len(target) + 1) for j in range(len(target) - n + 1)
            if any(row[k : k + n] == target[j : j + n] for k in range(cut - n + 1))
        ]  # fmt: skip
        assert table["copied_share"][i] == pytest.approx(max(held, default=0) / len(target))


class Letters(PreTrainedTokenizerBase):
    """A token is a character."""

    def __init__(self) -> None: ...

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        return ["".join(map(chr, row)) for row in sequences]


def of_text(prefix: str, continuation: str, **options: Any) -> dict[str, Any]:
    seqs = SequenceSet.from_tokens([[ord(c) for c in prefix + continuation]], len(prefix))
    return trivial_continuations(seqs, tokenizer=Letters(), **options).iloc[0].to_dict()


@pytest.mark.parametrize(
    ("prefix", "continuation"),
    [
        ("row 8, row 9, ", "row 10, row 11, row 12, "),
        ("a[98] = 0;\na[99] = 0;\n", "a[100] = 0;\na[101] = 0;\n"),
        ("1,10\n2,20\n", "3,30\n4,40\n5,50\n"),
        ("2000 1990 1980 1970 ", "1960 1950 1940 1930"),
    ],
)
def test_texts_that_count_on_are_explained_whole(prefix: str, continuation: str) -> None:
    found = of_text(prefix, continuation)
    assert found["step_share"] == 1
    assert found["trivial"]


def test_character_by_character_a_carry_hides_the_step() -> None:
    prefix, continuation = "row 8, row 9, ", "row 10, row 11, row 12, "
    ids_only = trivial_continuations(
        SequenceSet.from_tokens([[ord(c) for c in prefix + continuation]], len(prefix))
    )
    assert ids_only["step_share"][0] < 0.75


def test_other_rules_and_what_is_not_trivial() -> None:
    assert of_text("to be or not to be", ", or not to be")["trivial"]  # 13 of 14 characters were there
    assert of_text("xyz", "ababababab")["repeated_share"] == 0.8
    assert of_text("xyz", "ababababab")["trivial"]
    found = of_text("Call me ", "Ishmael. Some years ago")
    assert not found["trivial"]
    assert found["step_share"] < 0.1
    # Numbers that count among words that do not repeat.
    found = of_text("1 apple, 2 pears, ", "3 plums, 4 walnuts, 5 quinces")
    assert found["step_share"] < 0.3
    assert not found["trivial"]


def test_short_continuations_are_trivial_only_where_they_stand_in_the_prefix() -> None:
    seqs = SequenceSet.from_tokens([[1, 2, 3, 2], [1, 2, 3, 9], [1, 2, 3, 4]], 3)
    table = trivial_continuations(seqs)
    assert table["trivial"].tolist() == [True, False, False]
    assert table["step_share"].tolist() == [0, 0, 1]


def test_thresholds_are_parameters_and_are_recorded(tiny_model: Any) -> None:
    seqs = SequenceSet.from_tokens([[7, 7, 1, 2, 1, 5, 1, 8]], 2)
    assert trivial_continuations(seqs)["repeated_share"].tolist() == [pytest.approx(2 / 6)]
    loose = TrivialRules(repeated=0.3)
    assert not trivial_continuations(seqs)["trivial"][0]
    table = trivial_continuations(seqs, rules=loose)
    assert table["trivial"][0]
    assert table.attrs["trivial_repeated"] == 0.3
    model = tiny_model("llama", "bridge")
    recall = score_recall(model, seqs, rules=loose, progress=False)
    assert recall.table["trivial"].tolist() == [True]
    assert {k: v for k, v in recall.attrs.items() if str(k).startswith("trivial_")} == loose.settings()
    for name in ("copied", "distinct", "repeated", "step"):
        with pytest.raises(OptionError, match=f"{name}=1.5"):
            TrivialRules(**{name: 1.5})
    with pytest.raises(OptionError, match="max_period=0"):
        TrivialRules(max_period=0)


def test_scoring_adds_the_same_columns(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model)
    scored = score_recall(model, seqs, metrics=["trivial"], generate=False, progress=False).table
    table = trivial_continuations(seqs, tokenizer=tiny_tokenizer())
    for name in table.columns:
        np.testing.assert_array_equal(scored[name], table[name])


units = st.lists(st.sampled_from(["a", "bb", "é", ",", "1", "2", "3", "4", "10", "07", " ", "_"]), max_size=7)


def plain_text_share(prefix: str, continuation: str, max_period: int) -> float:
    """`step_share` of a text, unit by unit: only numbers may step, the share is of characters."""
    found = [(m.group(), m.end()) for m in re.finditer(r"\d+|[^\W\d]+|[^\s\w]", prefix + continuation)]
    words = [word for word, _ in found]
    weight = [len(word) * (end > len(prefix)) for word, end in found]

    def steps(j: int, p: int) -> int | None:
        """The step to unit j, or None where it does not go on as before."""
        three = [words[j], words[j - p], words[j - 2 * p]]
        if all(word.isdecimal() for word in three):
            a, b, c = map(int, three)
            return a - b if a - b == b - c else None
        same = [word for word in three if word == three[0]]
        return 0 if len(same) == 3 else None

    shares = [0.0]
    for p in range(1, max_period + 1):
        good = {j: steps(j, p) for j in range(2 * p, len(words))}
        on = [j for j, step in good.items() if step is not None]
        if any(good[j] and weight[j] for j in on):
            shares.append(sum(weight[j] for j in on) / max(sum(weight), 1))
    return max(shares)


@settings(deadline=None, max_examples=200)
@given(units, units.filter(lambda found: bool("".join(found))), st.integers(1, 5))
def test_steps_of_texts_equal_a_plain_loop(before: list[str], after: list[str], max_period: int) -> None:
    prefix, continuation = "".join(before) or "x", "".join(after)
    row = [ord(c) for c in prefix + continuation]
    rules = TrivialRules(max_period=max_period)
    share = of_text(prefix, continuation, rules=rules)["step_share"]
    of_ids = plain_shares(row, len(prefix), max_period)[1]
    expected = plain_text_share(prefix, continuation, max_period)
    assert share == pytest.approx(max(of_ids, expected))


@pytest.mark.parametrize(("digits", "share"), [(15, 1.0), (16, 0.0)])
def test_longer_numbers_than_fifteen_digits_are_words(digits: int, share: float) -> None:
    start = int("9" * 4 + "0" * (digits - 4))
    counted = [f"{start + 7 * i}," for i in range(6)]
    row = TokenRow(counted)
    found = trivial_continuations(row.seqs(3), tokenizer=row, rules=TrivialRules(max_period=2))
    assert found["step_share"][0] == share


def test_texts_without_three_numbers_take_no_step() -> None:
    """Of no rows at all, a tokenizer decodes one empty text."""
    tokenizer = tiny_tokenizer()
    assert tokenizer.batch_decode([]) == [""]
    found = trivial_continuations(SequenceSet.from_tokens([[3, 14]], 1), tokenizer=tokenizer)
    assert found["step_share"].tolist() == [0.0]


class TokenRow(PreTrainedTokenizerBase):
    """A token is a word of a list, in an order without steps."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def seqs(self, prefix_len: int) -> SequenceSet:
        return SequenceSet.from_tokens([[i * i for i in range(len(self.words))]], prefix_len)

    def batch_decode(self, sequences: Any, *args: Any, **kwargs: Any) -> list[str]:
        return ["".join(self.words[round(token**0.5)] for token in row) for row in sequences]


def flagged(rules: TrivialRules, n: int, run: int, **shares: float) -> bool:
    columns = {"type_token_ratio": 1.0, "repeated_share": 0.0, "step_share": 0.0, **shares}
    arrays = {name: np.array([value]) for name, value in columns.items()}
    arrays["copied_share"] = np.array([run / n])
    return bool(_flag(arrays, np.array([run]), np.array([n]), rules)[0])


def test_each_rule_holds_from_its_default_threshold_on() -> None:
    rules = TrivialRules()
    assert rules.settings() == {
        "trivial_copied": 0.5,
        "trivial_distinct": 0.2,
        "trivial_repeated": 0.75,
        "trivial_step": 0.75,
        "trivial_min_tokens": 4,
        "trivial_max_period": 16,
    }
    for name, held, missed in (
        ("type_token_ratio", 0.2, 0.21),
        ("repeated_share", 0.75, 0.74),
        ("step_share", 0.75, 0.74),
    ):
        assert flagged(rules, 4, 0, **{name: held})
        assert not flagged(rules, 3, 0, **{name: held})  # fewer than min_tokens
        assert not flagged(rules, 4, 0, **{name: missed})
    assert flagged(rules, 8, 4)  # half of it, and min_tokens
    assert not flagged(rules, 9, 4)  # less than half
    assert not flagged(rules, 6, 3)  # half of it, but only three tokens
    assert flagged(rules, 3, 3)  # all of it
    assert flagged(TrivialRules(copied=0.25, min_tokens=2), 8, 2)


def test_default_period_reaches_sixteen() -> None:
    for period, share in ((16, 1.0), (17, 0.0)):
        row = list(range(period)) * 2
        found = trivial_continuations(SequenceSet.from_tokens([row], period))
        assert found["repeated_share"].tolist() == [share]
        assert list(found) == [
            "id", "copied_share", "type_token_ratio", "repeated_share", "step_share", "trivial"
        ]  # fmt: skip
