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
    "scoring: 100%, decoding: 100%": ml.score_recall,
    "shortening: 100%": ml.recall.extraction_curve,
    "compressing: 100%": ml.recall.prompt_compression,
    "scanning: 100%": lambda model, seqs, progress: ml.recall.build_memorized_set(
        model, np.tile(np.arange(80), (3, 1)), prefix_len=8, suffix_len=8, progress=progress
    ),
    "scoring: 100%": lambda model, seqs, progress: ml.recall.score_criteria(
        pd.DataFrame({"prompt": ["w1 w2"], "target": ["w3"]}), model, progress=progress
    ),
    "searching: 8.00token": lambda model, seqs, progress: count_duplicates(seqs, CORPUS, progress=progress),
    "counting: 8.00token": lambda model, seqs, progress: token_counts(CORPUS, progress=progress),
}


@pytest.mark.parametrize("words", CALLS)
@pytest.mark.filterwarnings("ignore:none of 3 windows")
def test_nothing_is_shown_without_progress(
    words: str, tiny_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model)
    capsys.readouterr()
    CALLS[words](model, seqs, progress=False)
    assert capsys.readouterr() == ("", "")
    CALLS[words](model, seqs, progress=True)
    shown = capsys.readouterr()
    assert not shown.out
    assert all(said in shown.err for said in words.split(", "))
