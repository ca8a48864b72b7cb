"""The search for shorter prompts by the definitions, over made-up answers that no model has to give."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlens.recall import compression as module
from memlens.recall.compression import delete_greedily, prompt_compression
from memlens.recall.extraction import Halves, _lengths, extraction_curve, first_tokens
from memlens.recall.score import score_recall
from memlens.sequences.set import SequenceSet
from tests.recall.sets import graded

prefixes = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1, max_size=4)
budgets = st.one_of(st.none(), st.integers(1, 30))


def chance(row: int, prompt: Sequence[int], salt: int) -> float:
    """A number that looks random and depends on its arguments alone; few values, so that some are equal."""
    return crc32(repr((row, list(prompt), salt)).encode()) % 8 / 8


class Answers:
    """Stands in for `score_prompts`, and keeps what was asked."""

    def __init__(self, share: float) -> None:
        self.share, self.asked, self.options = share, list[tuple[int, list[int]]](), list[Any]()

    def works(self, row: int, prompt: Sequence[int]) -> bool:
        return chance(row, prompt, 0) < self.share

    def __call__(self, model: Any, halves: Halves, prompts: Any, **options: Any) -> dict[str, np.ndarray]:
        self.asked += [(row, list(kept)) for row, kept in prompts]
        self.options.append(options)
        return {
            "exact_match": np.array([float(self.works(row, kept)) for row, kept in prompts]),
            "target_logprob": np.array([chance(row, kept, 1) for row, kept in prompts]),
        }


def plain_deletion(
    answers: Answers, row: int, prefix: list[int], budget: int | None
) -> tuple[list[int], bool, list[list[int]]]:
    """The remaining places, whether none of them can go, and the prompts tried, as the docstring says."""
    left, tried = list(range(len(prefix))), list[list[int]]()
    while len(left) > 1:
        fewer = [[p for p in left if p != place] for place in left]
        allowed = len(fewer) if budget is None else budget - len(tried)
        if allowed < 1:
            return left, False, tried
        fewer, all_tried = fewer[:allowed], allowed >= len(fewer)
        prompts = [[prefix[p] for p in places] for places in fewer]
        tried += prompts
        good = [i for i, prompt in enumerate(prompts) if answers.works(row, prompt)]
        if not good:
            return left, all_tried, tried
        left = fewer[max(good, key=lambda i: (chance(row, prompts[i], 1), -i))]
    return left, True, tried


@settings(deadline=None, max_examples=150)
@given(prefixes, budgets, st.sampled_from([0.2, 0.5, 0.8]))
def test_deletion_is_the_search_of_its_docstring_within_the_budget(
    rows: list[list[int]], budget: int | None, share: float
) -> None:
    answers, bar = Answers(share), SimpleNamespace(total=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "score_prompts", answers)
        options: dict[str, Any] = {"batch_size": 3, "bar": bar}
        wanted = list(range(0, len(rows), 2))
        found = delete_greedily(None, Halves([], rows, []), wanted, budget, options)
    expected = [plain_deletion(answers, row, rows[row], budget) for row in wanted]
    assert found == [(left, complete) for left, complete, _ in expected]
    tried = [(row, prompt) for row, (*_, prompts) in zip(wanted, expected, strict=True) for prompt in prompts]
    assert sorted(answers.asked) == sorted(tried)
    assert bar.total == 5 + len(tried)
    assert all(given is options or given == options for given in answers.options)


@given(st.integers(1, 60), budgets)
def test_the_lengths_tried_are_spread_evenly_up_to_the_whole(n: int, budget: int | None) -> None:
    lengths = [*module._tried(n, budget), n]
    assert len(lengths) == (n if budget is None else min(budget, n))
    if len(lengths) > 1:
        assert lengths[0] == 1
        gaps = np.diff(lengths)
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1


@settings(deadline=None, max_examples=100)
@given(prefixes, st.booleans(), budgets, st.sampled_from([0.2, 0.6]))
def test_one_end_is_kept_as_the_definitions_say(
    rows: list[list[int]], last: bool, budget: int | None, share: float
) -> None:
    answers, bar = Answers(share), SimpleNamespace(total=0)
    halves, recalled = Halves([], rows, []), list(range(0, len(rows), 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "score_prompts", answers)
        arrays, coords = module._one_end(None, halves, recalled, last, budget, {"bar": bar})
    longest = max(map(len, rows))
    assert coords == {"prompt_tokens": list(range(1, longest + 1))}
    assert bar.total == len(answers.asked)
    for i, row in enumerate(rows):
        tried = [*module._tried(len(row), budget), len(row)] if i in recalled else []
        expected = np.full(longest, np.nan)
        for c in tried:
            kept = row[-c:] if last else row[:c]
            expected[c - 1] = c == len(row) or answers.works(i, kept)
        np.testing.assert_array_equal(arrays["works"][1][i], expected)
        good = [c for c in tried if expected[c - 1] == 1]
        stable = [c for c in tried if all(expected[d - 1] == 1 for d in tried if d >= c)]
        assert arrays["fewest_tokens"][1][i] == pytest.approx(min(good, default=np.nan), nan_ok=True)
        assert arrays["stable_tokens"][1][i] == pytest.approx(min(stable, default=np.nan), nan_ok=True)


@given(st.integers(1, 400))
def test_default_lengths_double_from_eight_and_end_with_the_longest(longest: int) -> None:
    expected, length = [], 8
    while length < longest:
        expected.append(length)
        length *= 2
    assert _lengths(None, longest) == [*expected, longest]


def test_given_lengths_are_put_in_order() -> None:
    assert _lengths((5, 1, 3), 5) == [1, 3, 5]


def test_only_a_beginning_of_text_token_that_leaves_something_is_pinned() -> None:
    for attrs, shortest, pinned in (({}, 3, 0), ({"prepend_bos": True}, 2, 1), ({"prepend_bos": True}, 1, 0),
                                    ({"prepend_bos": False}, 3, 0)):  # fmt: skip
        seqs = SequenceSet.from_tokens([[1, 2, 3, 4]] * 2, [shortest, 3], attrs=attrs)
        assert first_tokens(seqs) == pinned


@pytest.mark.parametrize("measure", [extraction_curve, prompt_compression])
def test_a_set_read_with_a_beginning_of_text_token_keeps_it(measure: Any, tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model)[::3]
    plain, begun = (
        measure(model, each, progress=False) for each in (seqs, seqs.with_attrs(prepend_bos=True))
    )
    pinned = measure(model, seqs, pinned=1, progress=False)
    assert (plain.settings["pinned"], begun.settings["pinned"], pinned.settings["pinned"]) == (0, 1, 1)
    assert begun.data.equals(pinned.data)
    assert not begun.data.equals(plain.data)
    assert begun.settings["sequences"] == {"prepend_bos": True}
    unpinned = measure(model, seqs.with_attrs(prepend_bos=True), pinned=0, progress=False)
    assert unpinned.data.equals(plain.data)


def test_settings_of_a_curve_and_of_a_compression(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model, n=6)
    curve = extraction_curve(model, seqs, [3, 1], progress=False)
    own = ("prefix_lengths", "method", "budget", "pinned", "sequences")
    assert {n: curve.settings[n] for n in own if n in curve.settings} == {
        "prefix_lengths": [1, 3], "pinned": 0, "sequences": {}
    }  # fmt: skip
    found = prompt_compression(model, seqs, progress=False)
    assert {n: found.settings[n] for n in own if n in found.settings} == {
        "method": "keep_last", "budget": None, "pinned": 0, "sequences": {}
    }  # fmt: skip
    assert (curve.kind, found.kind) == ("extraction_curve", "prompt_compression")
    assert curve.data.attrs["model"] == found.data.attrs["model"] == score_recall(
        model, seqs, generate=False, progress=False
    ).attrs["model"]  # fmt: skip


def test_all_metrics_of_a_prompt_are_those_of_scoring_it(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model)
    curve = extraction_curve(model, seqs, [1, 3], batch_size=2, progress=False)
    for k in (1, 3):
        parts = zip(*seqs.halves(), strict=True)
        cut = SequenceSet.from_tokens([prefix[-k:] + rest for prefix, rest in parts], k)
        table = score_recall(model, cut, metrics=(), generate=False, progress=False).table
        for name in ("exact_match", "matching_prefix", "target_accuracy", "target_logprob"):
            np.testing.assert_allclose(curve[name].sel(prefix_len=k), table[name], atol=1e-5, err_msg=name)
