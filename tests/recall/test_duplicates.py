"""Counts in a corpus against a plain search, the zoo's known copies, and a stand-in for infini-gram."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memlens as ml
from memlens.errors import MemlensError, OptionError, SequenceError, SourceNotFoundError
from memlens.organisms.corpus.corpus import build_corpus
from memlens.recall.corpus import duplicates as module
from memlens.recall.corpus.duplicates import InfiniGram, count_duplicates, count_ngrams, token_counts
from memlens.sequences.set import SequenceSet
from tests.organisms.conftest import TINY_CORPUS

ids = st.integers(0, 2)
ngrams = st.lists(st.lists(ids, min_size=1, max_size=9), min_size=1, max_size=6)


def plain_count(ngram: list[int], documents: list[list[int]]) -> int:
    n = len(ngram)
    return sum(doc[i : i + n] == ngram for doc in documents for i in range(len(doc) - n + 1))


@settings(deadline=None)
@given(ngrams, st.lists(st.lists(ids, max_size=20), max_size=6), st.integers(1, 30))
def test_counts_equal_a_plain_search_whatever_the_blocks(
    wanted: list[list[int]], documents: list[list[int]], block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        found = count_ngrams(wanted, iter(documents))
        assert found.tolist() == [plain_count(n, documents) for n in wanted]
        one = [token for doc in documents for token in doc]
        assert count_ngrams(wanted, np.array(one, dtype=np.int32)).tolist() == [
            plain_count(n, [one]) for n in wanted
        ]
        expected = np.bincount(np.array(one, dtype=int))
        assert token_counts(iter(documents), progress=False).tolist() == expected.tolist()


def test_equal_hashes_of_different_n_grams_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash that is no better than the first token, every count is still right."""
    real = module._window_hashes

    def poor(tokens: np.ndarray, n: int) -> np.ndarray:
        return tokens[: len(real(tokens, n))].astype(np.uint64)

    monkeypatch.setattr(module, "_window_hashes", poor)
    rng = np.random.default_rng(0)
    text = rng.integers(0, 3, 400)
    wanted = [rng.integers(0, 3, 4).tolist() for _ in range(40)]
    assert count_ngrams(wanted, text).tolist() == [plain_count(n, [text.tolist()]) for n in wanted]


def test_hashes_of_windows_rarely_meet() -> None:
    text = np.random.default_rng(0).integers(0, 2, 40_000)
    for n in (17, 32, 63):
        windows = len(np.unique(np.lib.stride_tricks.sliding_window_view(text, n), axis=0))
        assert len(np.unique(module._window_hashes(text, n))) == windows


def test_the_zoo_s_copies_are_found_in_its_corpus() -> None:
    corpus = build_corpus(TINY_CORPUS)
    table = corpus.sequences
    seqs = SequenceSet.from_tokens(
        table["tokens"].tolist(), TINY_CORPUS.prefix_len, table=table[["id", "copies"]]
    )
    found = count_duplicates(seqs, corpus.rows, parts=["sequence", "continuation", "prefix"], progress=False)
    assert found["sequence_count"].tolist() == table["copies"].tolist()
    assert found["continuation_count"].tolist() == table["copies"].tolist()
    assert (found["prefix_count"] >= found["sequence_count"]).all()
    assert set(found["sequence_count"]) == {0, *TINY_CORPUS.copies}
    assert token_counts(corpus.rows, vocab_size=len(corpus.tokenizer), progress=False).tolist() == (
        corpus.token_counts.tolist()
    )


def test_the_bundled_zoo_s_frequencies_serve_to_match_controls() -> None:
    counts = token_counts("zoo")
    assert token_counts("zoo/pythia-s").tolist() == counts.tolist()
    assert counts.sum() == 41_006 * 64  # rows of 64 tokens, as its training record says
    frame = ml.load_sequences("zoo")
    seqs = frame[:40]
    scores = seqs.table.assign(exact_match=[1, 0] * 20, memorization_score=[1.0, 0.0] * 20)
    assert len(ml.RecallScores(scores, seqs).matched_controls(token_counts=counts)) == 20


def test_rows_of_an_array_are_documents_of_their_own() -> None:
    seqs = SequenceSet.from_tokens([[1, 2, 3]], 1)
    array = np.array([[9, 9, 1, 2], [3, 1, 2, 3]])
    assert count_duplicates(seqs, array, progress=False)["sequence_count"].tolist() == [1]
    assert count_duplicates(seqs, array.ravel(), progress=False)["sequence_count"].tolist() == [2]


class Engine:
    """Answers as the package's engine does, from a list."""

    def __init__(self, index_dir: str, eos_token_id: int) -> None:
        self.text = list(map(int, (Path(index_dir) / "ids.txt").read_text().split()))
        self.eos = eos_token_id

    def count(self, input_ids: list[int]) -> dict[str, Any]:
        if self.eos in input_ids:
            return {"error": "input_ids must not hold the end of text"}
        return {"count": plain_count(input_ids, [self.text]), "approx": False}


def test_an_infini_gram_index_counts_in_place_of_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, engine = ModuleType("infini_gram"), ModuleType("infini_gram.engine")
    engine.InfiniGramEngine = Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "infini_gram", package)
    monkeypatch.setitem(sys.modules, "infini_gram.engine", engine)
    (tmp_path / "ids.txt").write_text("1 2 3 1 2 3 5 2")
    index = InfiniGram(tmp_path, eos_token_id=9)
    seqs = SequenceSet.from_tokens([[1, 2, 3], [2, 3, 5], [5, 5]], 1)
    ours = count_duplicates(seqs, [[1, 2, 3, 1, 2, 3, 5, 2]], progress=False)
    pd.testing.assert_frame_equal(count_duplicates(seqs, index, progress=False), ours)
    assert ours["sequence_count"].tolist() == [2, 1, 0]
    counts = Counter([1, 2, 3, 1, 2, 3, 5, 2])
    assert token_counts(index, vocab_size=6, progress=False).tolist() == [counts[i] for i in range(6)]
    with pytest.raises(OptionError, match="vocab_size=None"):
        token_counts(index)
    with pytest.raises(SequenceError, match="n-gram 1: input_ids must not"):
        index.count_ngrams([[1], [9]])
    with pytest.raises(SourceNotFoundError, match="no infini-gram index"):
        InfiniGram(tmp_path / "missing", eos_token_id=9)


def test_a_missing_package_and_bad_corpora_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "infini_gram", None)
    with pytest.raises(OptionError, match="pip install infini-gram"):
        InfiniGram(".", eos_token_id=0)
    seqs = SequenceSet.from_tokens([[1, 2]], 1)
    for corpus in (np.zeros(4), [[1, -1]], [[[1, 2]]], np.zeros((2, 2, 2), int)):
        with pytest.raises(SequenceError, match="one-dimensional lists of token ids"):
            count_duplicates(seqs, corpus, progress=False)
    with pytest.raises(OptionError, match="'continuation'"):
        count_duplicates(seqs, [[1]], parts=["continuations"])
    with pytest.raises(OptionError, match="give a list"):
        count_duplicates(seqs, [[1]], parts="prefix")
    with pytest.raises(SequenceError, match="vocab_size=3"):
        token_counts([[7]], vocab_size=3)
    with pytest.raises(SourceNotFoundError, match="corpus='pile'"):
        token_counts("pile")


@settings(deadline=None)
@given(st.lists(st.lists(ids, max_size=9), max_size=6), st.integers(1, 12), st.integers(1, 5), st.booleans())
def test_blocks_hold_each_token_once_and_windows_whole(
    documents: list[list[int]], size: int, overlap: int, one: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", size)
        corpus: Any = np.array([t for doc in documents for t in doc], dtype=int) if one else documents
        blocks = list(module.corpus_blocks(corpus, overlap))
        default = list(module.corpus_blocks(corpus))
    parted = [token for doc in documents for token in (*doc, *(() if one else (-1,)))]
    assert [token for block, n in blocks for token in block[:n]] == parted
    starts = np.cumsum([0] + [n for _, n in blocks])
    for (block, n), start in zip(blocks, starts, strict=False):
        assert block.tolist() == parted[start : start + n + overlap - 1][: len(block)]
        assert len(block) == min(n + overlap - 1, len(parted) - start)
    assert all(len(block) == n for block, n in default)  # by default a window is one token
    assert [token for block, _ in default for token in block] == parted


def test_default_parts_are_the_continuation_and_the_whole() -> None:
    seqs = SequenceSet.from_tokens([[1, 2, 3], [4, 2, 3]], 1)
    found = count_duplicates(seqs, [[1, 2, 3]], progress=False)
    assert list(found) == ["id", "continuation_count", "sequence_count"]
    every = count_duplicates(seqs, [[1, 2, 3]], parts=("prefix", "sequence"), progress=False)
    assert list(every) == ["id", "prefix_count", "sequence_count"]
    assert every.to_numpy()[:, 1:].tolist() == [[1, 1], [0, 0]]
    assert found["id"].tolist() == seqs.ids
    for parts in ((), []):
        with pytest.raises(OptionError, match="give a list of parts, such as"):
            count_duplicates(seqs, [[1]], parts=parts)
    with pytest.raises(SequenceError, match="n-gram 1 has no token"):
        count_ngrams([[1], []], [[1]])
    assert count_ngrams([], [[1]]).tolist() == []
    assert count_ngrams([[1]], []).tolist() == [0]


def test_counters_are_asked_quietly_and_with_a_bar_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package, engine = ModuleType("infini_gram"), ModuleType("infini_gram.engine")
    engine.InfiniGramEngine = Engine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "infini_gram", package)
    monkeypatch.setitem(sys.modules, "infini_gram.engine", engine)
    (tmp_path / "ids.txt").write_text("1 2 3 1 2 3 5 2")
    index = InfiniGram(str(tmp_path), 9)
    assert index._engine.eos == 9
    seqs = SequenceSet.from_tokens([[1, 2, 3], [2, 3, 5]], 1)
    calls = {
        "4n-gram": (lambda **bar: count_duplicates(seqs, index, **bar), True),
        "6n-gram": (lambda **bar: token_counts(index, vocab_size=6, **bar), True),
        "2n-gram": (lambda **bar: index.count_ngrams([[1], [2]], **bar), False),
        "3n-gram": (lambda **bar: count_ngrams([[1], [2], [5]], index, **bar), False),
    }
    capsys.readouterr()
    for said, (call, by_default) in calls.items():
        for bar, shown in (({}, by_default), ({"progress": True}, True), ({"progress": False}, False)):
            call(**bar)
            err = capsys.readouterr().err
            n = said.partition("n-gram")[0]
            assert ("counting: 100%" in err and f"{n}/{n}" in err and "n-gram" in err) == shown, (said, bar)
    assert index.count_ngrams([[1, 2], [5]]).dtype == np.int64
    assert count_ngrams([[1, 2], [5]], [[1, 2]]).dtype == np.int64


def test_counts_of_a_longer_vocabulary_end_with_zeros() -> None:
    assert token_counts([[1, 1], [3]], vocab_size=6, progress=False).tolist() == [0, 2, 0, 1, 0, 0]
    assert token_counts([[1, 1], [3]], vocab_size=4, progress=False).tolist() == [0, 2, 0, 1]
    with pytest.raises(SequenceError, match=r"contains the token id 3, but vocab_size=3"):
        token_counts([[1, 1], [3]], vocab_size=3, progress=False)
    assert token_counts([], progress=False).tolist() == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no training.json with the counts: train the model again"),
        ('{"corpus": {}}', "train the model again"),
        ('{"corpus": {"token_counts": {"a": 1, "b": 2}}}', r"shape \(2,\).*train the model again"),
        ("{", "train the model again"),
    ],
)
def test_damaged_counts_of_a_model_are_named(
    content: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "zoo_path", lambda name: tmp_path / name)
    (tmp_path / "zoo/mine").mkdir(parents=True)
    if content is not None:
        (tmp_path / "zoo/mine/training.json").write_text(content)
    with pytest.raises(MemlensError, match=f"(?s)zoo/mine.*{words}"):
        token_counts("zoo/mine")
    (tmp_path / "zoo/mine/training.json").write_text(
        '{"corpus": {"token_counts": {"a": [1, 2], "b": [3, 4]}}}'
    )
    assert token_counts("zoo/mine").tolist() == [4, 6]
    for name in ("zoom", "pile/zoo", ""):
        with pytest.raises(SourceNotFoundError, match="is not a corpus: give 'zoo', 'zoo/NAME' or token ids"):
            token_counts(name)
