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


def _mean_likelihood(
    model: Any, prefix: list[int], continuation: list[int], banned: int | None = None
) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prefix + continuation]))[0].double()
    if banned is not None:
        logits[:, banned] = -torch.inf
    logprobs = logits.log_softmax(-1)
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


def test_alternatives_of_every_form_and_a_banned_token_count_as_in_the_definition(
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model)[2::3]
    forms: list[Any] = [
        [[3, 4], [5, 6, 7]],
        ([3, 4], np.array([5, 6, 7])),
        np.array(["w3 w4", "w5 w6 w7"], object),
    ]
    options: dict[str, Any] = {"metrics": ("likelihood",), "generate": False, "progress": False}
    found = [
        score_recall(model, seqs.with_table(seqs.table.assign(alternatives=[given] * 3)), **options)
        for given in forms
    ]
    assert found[0].table["truth_ratio"].notna().all()
    for other in found[1:]:
        np.testing.assert_allclose(other.table["truth_ratio"], found[0].table["truth_ratio"], rtol=1e-6)
    whole = seqs.with_table(seqs.table.assign(alternatives=[forms[0]] * 3))
    parts = score_recall(model, whole, batch_size=1, **options)
    np.testing.assert_allclose(parts.table["truth_ratio"], found[0].table["truth_ratio"], rtol=1e-4)

    banned = score_recall(model, whole, ban_eos=True, **options).table["truth_ratio"]
    eos = model.tokenizer.eos_token_id
    for i, (prefix, true) in enumerate(zip(*seqs.halves(), strict=True)):
        likely = [_mean_likelihood(model, prefix, other, eos) for other in forms[0]]
        expected = np.mean(likely) / _mean_likelihood(model, prefix, true, eos)
        assert banned[i] == pytest.approx(expected, rel=1e-4)
    assert np.abs(banned - found[0].table["truth_ratio"]).max() > 1e-4
    assert "truth_ratio" not in score_recall(model, whole, **{**options, "metrics": ("sampling",)}).table
    none = seqs.with_table(seqs.table.assign(alternatives=[None, np.nan, "w3 w4"]))  # no lists
    assert score_recall(model, none, **options).table["truth_ratio"].isna().all()


@pytest.mark.parametrize("wrong", [[], "", 7, None, np.zeros(0, int)])
def test_an_alternative_without_tokens_is_named_by_its_row(
    tiny_model: Callable[..., Any], wrong: Any
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model)[2::3]
    seqs = seqs.with_table(seqs.table.assign(alternatives=[None, [[3]], [[4], wrong]]))
    with pytest.raises(SequenceError, match=r"row 2 has the alternative .*as texts or as lists of ids"):
        score_recall(model, seqs, generate=False, progress=False)
