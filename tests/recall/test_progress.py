"""Progress bars are shown unless they are switched off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

import memlens as ml
from memlens.recall.corpus.duplicates import count_duplicates, token_counts
from tests.recall.sets import graded

CORPUS = [[1, 2, 3, 4], [5, 6]]
CALLS: dict[str, Callable[..., Any]] = {
    "scoring: 100% 9/9 seq, decoding: 100% seq": ml.score_recall,
    "shortening: 100% 6/6 prompt": ml.recall.extraction_curve,
    "compressing: 100% 0/9 24/24 prompt": ml.recall.prompt_compression,
    "scanning: 100% 3/3 row memorized=0": lambda model, seqs, **options: ml.recall.build_memorized_set(
        model, np.tile(np.arange(80), (3, 1)), prefix_len=8, suffix_len=8, **options
    ),
    "scoring: 100% seq": lambda model, seqs, **options: ml.recall.score_criteria(
        pd.DataFrame({"prompt": ["w1 w2"], "target": ["w3"]}), model, **options
    ),
    "searching: 8.00token": lambda model, seqs, **options: count_duplicates(seqs, CORPUS, **options),
    "counting: 8.00token": lambda model, seqs, **options: token_counts(CORPUS, **options),
}
"""By what is shown: each bar's words, then its share, counts and unit."""


@pytest.mark.parametrize("words", CALLS)
@pytest.mark.filterwarnings("ignore:none of 3 windows")
def test_bars_are_shown_unless_they_are_switched_off(
    words: str, tiny_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model)
    capsys.readouterr()
    CALLS[words](model, seqs, progress=False)
    assert capsys.readouterr() == ("", "")
    for options in ({"progress": True}, {}):
        CALLS[words](model, seqs, **options)
        shown = capsys.readouterr()
        assert not shown.out
        for said in words.split(", "):
            assert all(part in shown.err for part in said.split()), shown.err


def test_both_models_of_a_comparison_show_their_bars(
    tiny_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [tiny_model(family, "bridge") for family in ("gpt_neox", "llama")]
    capsys.readouterr()
    for options, n_bars in (({}, 2), ({"progress": False}, 0)):
        ml.recall.counterfactual_memorization(*models, graded(models[0], n=3), generate=False, **options)
        assert capsys.readouterr().err.count("3/3") == n_bars
