"""Extraction strength, ROUGE-L, distances in characters and the truth ratio, each computed another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlens.errors import SequenceError
from memlens.recall.columns import near_verbatim_texts
from memlens.recall.score import score_recall
from memlens.sequences.set import SequenceSet
from tests.recall.sets import graded, plain_greedy
from tests.recall.test_near_verbatim import plain_distance


def plain_common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by the textbook table."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = table[i - 1, j - 1] + 1 if x == y else max(table[i - 1, j], table[i, j - 1])
    return int(table[-1, -1])


words = st.lists(st.sampled_from(["the", "The", "a", "cat.", "dog", ",", "x1"]), max_size=7).map(" ".join)


@settings(deadline=None)
@given(words, words)
def test_texts_are_compared_by_words_and_characters(made: str, true: str) -> None:
    found = {name: values[0] for name, values in near_verbatim_texts([made], [true]).items()}
    a, b = ([w.strip(".,").lower() for w in text.split() if w.strip(".,")] for text in (made, true))
    assert found["rouge_l"] == pytest.approx(plain_common(a, b) / len(b) if b else np.nan, nan_ok=True)
    distance = plain_distance([ord(c) for c in made], [ord(c) for c in true])
    assert found["edit_distance_characters"] == distance
    assert found["edit_similarity_characters"] == pytest.approx(1 - distance / max(len(made), len(true), 1))


def test_extraction_strength_is_what_greedy_decoding_from_every_place_gives(
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model("gpt_neox", "hooked")
    seqs = graded(model)
    found = score_recall(model, seqs, generate=False, progress=False).table["extraction_strength"]
    for i, (row, n) in enumerate(zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)):
        length = len(row) - n
        starts = [SequenceSet.from_tokens([row], n + k) for k in range(length)]
        right = [plain_greedy(model, start) == [row[n + k :]] for k, start in enumerate(starts)]
        needed = right.index(True) if any(right) else length
        assert found[i] == pytest.approx(1 - needed / length)
    assert len(set(found)) > 2


def _mean_likelihood(model: Any, prefix: list[int], continuation: list[int]) -> float:
    with torch.no_grad():
        logprobs = model(torch.tensor([prefix + continuation]))[0].double().log_softmax(-1)
    places = range(len(prefix) - 1, len(prefix) + len(continuation) - 1)
    chosen = [float(logprobs[place, token]) for place, token in zip(places, continuation, strict=True)]
    return float(np.exp(np.mean(chosen)))


def test_truth_ratio_is_the_definition_on_plain_logits(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "hooked")
    seqs = graded(model)
    wrong: list[list[list[int]] | list[str] | None] = [[[3, 4], [5, 6, 7]], ["w3 w9"], None, []]
    given = [*wrong, *[None] * (len(seqs) - 4)]
    seqs = seqs.with_table(seqs.table.assign(alternatives=given))
    table = score_recall(model, seqs, metrics=("likelihood",), generate=False, progress=False).table
    for i, alternatives in enumerate([[[3, 4], [5, 6, 7]], [[3, 9]]]):
        prefix, true = (side[i] for side in seqs.halves())
        likely = [_mean_likelihood(model, prefix, other) for other in alternatives]
        expected = np.mean(likely) / _mean_likelihood(model, prefix, true)
        assert table["truth_ratio"][i] == pytest.approx(expected, rel=1e-4)
    assert table["truth_ratio"][2:].isna().all()
    empty = seqs.with_table(seqs.table.assign(alternatives=[[[]]] * len(seqs)))
    with pytest.raises(SequenceError, match="row 0 has the alternative"):
        score_recall(model, empty, generate=False, progress=False)
