"""Edit distance and longest common run against plain loops, and made-up shifts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlens.recall.columns import longest_common_runs, near_verbatim_columns
from memlens.recall.score import score_recall
from tests.recall.sets import graded, plain_greedy

few = st.lists(st.integers(0, 3), min_size=0, max_size=9)


def plain_distance(a: list[int], b: list[int]) -> int:
    table = [[max(i, j) if 0 in (i, j) else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (x != y))
    return table[-1][-1]


def plain_run(a: list[int], b: list[int]) -> tuple[int, int, int]:
    """The longest common run and its first places, by trying every length, longest first."""
    for n in range(min(len(a), len(b)), 0, -1):
        for i in range(len(a) - n + 1):
            for j in range(len(b) - n + 1):
                if a[i : i + n] == b[j : j + n]:
                    return n, i, j
    return 0, -1, -1


@settings(deadline=None)
@given(st.lists(st.tuples(few, few), min_size=1, max_size=6))
def test_columns_equal_a_plain_table_and_search(pairs: list[tuple[list[int], list[int]]]) -> None:
    generated, truth = (list(side) for side in zip(*pairs, strict=True))
    columns = near_verbatim_columns(generated, truth)
    for i, (made, true) in enumerate(pairs):
        assert columns["edit_distance"][i] == plain_distance(made, true)
        starts = (columns["longest_run_at"][i], columns["longest_run_generated_at"][i])
        assert (columns["longest_run"][i], *starts) == plain_run(true, made)
        similarity = 1 - plain_distance(made, true) / max(len(made), len(true), 1)
        assert columns["edit_similarity"][i] == pytest.approx(similarity)


def test_no_pairs_have_no_runs() -> None:
    assert [part.shape for part in longest_common_runs([], [])] == [(0,)] * 3


@pytest.mark.parametrize("backend", ["bridge", "hooked"])
def test_scores_compare_what_plain_decoding_gives(tiny_model: Callable[..., Any], backend: str) -> None:
    model = tiny_model("gpt_neox", backend)
    seqs = graded(model)
    table = score_recall(model, seqs, progress=False).table
    truth = [row[n:] for row, n in zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)]
    for i, (made, true) in enumerate(zip(plain_greedy(model, seqs), truth, strict=True)):
        assert table["edit_distance"][i] == plain_distance(made, true)
        assert table["longest_run"][i] >= table["matching_prefix"][i]
        assert table["edit_similarity"][i] >= table["memorization_score"][i] - 1e-12
        if table["exact_match"][i]:
            assert (table["edit_distance"][i], table["longest_run"][i]) == (0, len(true))
    assert "edit_distance" not in score_recall(model, seqs, generate=False, progress=False).table


def test_a_token_left_out_ruins_m_but_not_the_similarity() -> None:
    truth = list(range(32))
    made = [*truth[1:], 99]
    columns = near_verbatim_columns([made], [truth])
    assert np.mean(np.array(made) == truth) == 0
    assert columns["edit_distance"].tolist() == [2]
    assert columns["edit_similarity"].tolist() == [1 - 2 / 32]
    assert (columns["longest_run"][0], columns["longest_run_at"][0]) == (31, 1)
