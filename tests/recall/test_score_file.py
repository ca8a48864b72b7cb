"""Scores of a source larger than memory: those of a single call, resumed where a run was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import memlens as ml
from memlens.errors import EmptySetError, OptionError, OtherRunError, ResultError, SequenceError
from memlens.recall import RecallScores, score_file, score_to_file
from memlens.sequences.readers.portions import sequence_portions
from memlens.sequences.set import SequenceSet
from tests.devices import dev
from tests.tiny import tiny_huggingface_model, tiny_tokenizer

ROWS = np.random.default_rng(0).integers(3, 90, (11, 12))


@pytest.fixture(scope="module")
def model() -> Any:
    hf = tiny_huggingface_model("gpt_neox")
    return ml.load_model(hf, tokenizer=tiny_tokenizer(), device=dev(), check_weights=False)


def _frame(n: int = 11) -> pd.DataFrame:
    copies = [None if i < 4 else i for i in range(n)]
    return pd.DataFrame({"tokens": ROWS[:n].tolist(), "prefix_len": 6, "copies": copies})


def _sources(folder: Path) -> dict[str, Any]:
    np.save(folder / "rows.npy", ROWS)
    frame = _frame()
    frame.to_parquet(folder / "rows.parquet")
    frame.to_csv(folder / "rows.csv", index=False)
    lines = [json.dumps({"tokens": row.tolist()}) for row in ROWS]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    from datasets import Dataset

    return {
        **{name: folder / f"rows.{name}" for name in ("npy", "parquet", "csv", "jsonl")},
        "list": ROWS.tolist(),
        "generator": (row.tolist() for row in ROWS),
        "dataset": Dataset.from_dict({"tokens": ROWS.tolist()}),
        "streamed": Dataset.from_dict({"tokens": ROWS.tolist()}).to_iterable_dataset(),
        "frame": frame,
    }


def test_every_source_gives_the_same_rows_as_when_it_is_read_whole(tmp_path: Path) -> None:
    for name, source in _sources(tmp_path).items():
        sets = list(sequence_portions(source, size=4, prefix_len=6))
        assert [len(seqs) for seqs in sets] == [4, 4, 3], name
        assert [i for seqs in sets for i in seqs.ids] == [str(i) for i in range(11)], name
        np.testing.assert_array_equal(np.concatenate([seqs.tokens for seqs in sets]), ROWS, name)
        assert {seqs.attrs["source"] for seqs in sets} == {f"rows.{name}"} or not isinstance(source, Path)


def test_a_limit_and_dropped_rows_count_over_the_whole_source(tmp_path: Path) -> None:
    for source in _sources(tmp_path).values():
        assert [len(s) for s in sequence_portions(source, size=4, limit=6, prefix_len=6)] == [4, 2]
    rows = [[1, 2, 3], [4], [5], [6], [7, 8, 9], [3, 2, 1]]
    found = list(sequence_portions(rows, size=2, prefix_len=2, on_short="drop"))
    assert [seqs.ids for seqs in found] == [["0"], ["4", "5"]]


def test_texts_and_named_columns_are_read_in_portions(tmp_path: Path, model: Any) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(f"the cat number {i} sat on the mat" for i in range(5)))
    options: Any = {"prefix_len": 2, "on_eos": "keep"}  # which unknown words become
    whole = ml.load_sequences(tmp_path / "texts.txt", model, **options)
    parts = list(sequence_portions(tmp_path / "texts.txt", model, 2, **options))
    assert [text for part in parts for text in part.texts or ()] == whole.texts
    frame = pd.DataFrame({"name": ["a", "b"], "body": ["the cat sat", "on the mat"]})
    options |= {"text_column": "body", "id_column": "name", "prefix_len": 1}
    assert [s.ids for s in sequence_portions(frame, model, 1, **options)] == [["a"], ["b"]]


def test_errors_name_the_rows(tmp_path: Path) -> None:
    with pytest.raises(SequenceError, match=r"in rows 2 to 3 of list: .*not longer"):
        list(sequence_portions([[1, 2, 3], [4, 5, 6], [7], [8, 9, 1]], size=2, prefix_len=2))
    with pytest.raises(OptionError, match="size=0"):
        list(sequence_portions(ROWS, size=0))
    with pytest.raises(OptionError, match="one number for all rows"):
        list(sequence_portions(ROWS, prefix_len=[1] * 11))


def test_scores_are_those_of_a_single_call(tmp_path: Path, model: Any) -> None:
    frame = _frame()
    whole = ml.score_recall(model, ml.load_sequences(frame, model), progress=False)
    path = score_to_file(model, frame, tmp_path / "scores.parquet", size=4, progress=False)
    found = RecallScores.load(path)
    pd.testing.assert_frame_equal(found.table, whole.table, check_exact=False, rtol=1e-5, atol=1e-5)
    assert found.sequences.ids == whole.sequences.ids
    assert {**found.attrs} == {**whole.attrs}
    assert pq.ParquetFile(path).num_row_groups == 3
    assert not (tmp_path / "scores.parquet.parts").exists()


def test_a_set_is_scored_as_it_is_unless_it_is_to_be_read_otherwise(tmp_path: Path, model: Any) -> None:
    seqs = ml.load_sequences(_frame(5), model, on_eos="keep").with_attrs(origin="by hand")
    options: Any = {"size": 2, "generate": False, "progress": False}
    found = RecallScores.load(score_to_file(model, seqs, tmp_path / "a.parquet", **options))
    assert found.sequences.attrs == seqs.attrs
    assert found.sequences.ids == seqs.ids
    whole = ml.score_recall(model, seqs, generate=False, progress=False).table
    pd.testing.assert_frame_equal(found.table, whole, check_exact=False, rtol=1e-5, atol=1e-5)
    path = score_to_file(model, seqs, tmp_path / "b.parquet", reading={"limit": 3}, **options)
    assert RecallScores.load(path).sequences.ids == seqs.ids[:3]


def test_a_run_that_was_stopped_continues(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "scores.parquet", []
    score_recall = score_file.score_recall

    def counted(model: Any, seqs: SequenceSet, **options: Any) -> RecallScores:
        calls.append(seqs.ids[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score_recall(model, seqs, **options)

    monkeypatch.setattr(score_file, "score_recall", counted)
    with pytest.raises(KeyboardInterrupt):
        score_to_file(model, ROWS, out, size=4, reading={"prefix_len": 6}, progress=False)
    assert not out.exists()
    with pytest.raises(OtherRunError, match="the options of scoring"):
        score_to_file(model, ROWS, out, size=4, reading={"prefix_len": 6}, generate=False, progress=False)
    with pytest.raises(ResultError, match="made from other sequences"):
        score_to_file(model, ROWS[::-1], out, size=4, reading={"prefix_len": 6}, progress=False)
    score_to_file(model, ROWS, out, size=4, reading={"prefix_len": 6}, progress=False)
    assert calls == ["0", "4", "8", "8"]
    assert len(RecallScores.load(out)) == 11


def test_what_identifies_the_scores_and_each_portion_is_compared(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, tokenizer = tmp_path / "scores.PARQUET", tiny_tokenizer()
    folder = tmp_path / "scores.PARQUET.parts"

    def score(source: Any = None, **changed: Any) -> Path:
        usual = {"size": 2, "reading": {"tokenizer": tokenizer}, "generate": False, "progress": False}
        return score_to_file(model, _frame(4) if source is None else source, out, **usual | changed)

    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(score_file, "join_parquet", stopped)
        with pytest.raises(KeyboardInterrupt):
            score()
    first, second = sorted(folder.glob("*.parquet"))
    monkeypatch.setattr(score_file, "score_recall", stopped)  # from here on nothing is scored
    for what, changed in {
        "the options of scoring": {"generate": True},
        "the options of reading": {"reading": {"tokenizer": tokenizer, "limit": 4}},
        "the size of portions": {"size": 3},
    }.items():
        with pytest.raises(OtherRunError, match=rf"another scoring \(different: {what}\)"):
            score(**changed)
    weight = next(model.parameters()).data
    before = weight[3].clone()
    weight[3] += 1
    with pytest.raises(OtherRunError, match=r"different: the model\)"):
        score()
    weight[3] = before
    with monkeypatch.context() as context:
        context.setattr(score_file, "_VERSION", score_file._VERSION + 1)
        with pytest.raises(OtherRunError):
            score()
    for others in (_frame(4).assign(prefix_len=5), _frame(4).assign(id=list("abcd")), _frame(4)[::-1]):
        with pytest.raises(ResultError, match=rf"{first.name} was made from other sequences"):
            score(others)
    for damaged in (b"", second.read_bytes()[:-50]):
        whole = second.read_bytes()
        second.write_bytes(damaged)
        with pytest.raises(ResultError, match=second.name):
            score()
        second.write_bytes(whole)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").unlink()
    with pytest.raises(ResultError, match=r"holds no manifest\.json of a scoring"):
        score()
    (folder / "manifest.json").write_text(manifest)
    assert score(reading={"tokenizer": tiny_tokenizer()}) == out  # a tokenizer shows in what it reads
    assert len(RecallScores.load(out)) == 4


def test_one_bar_counts_sequences(tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options: Any = {"size": 2, "reading": {"prefix_len": 6}, "generate": False}
    score_to_file(model, ROWS[:5], tmp_path / "a.parquet", progress=False, **options)
    assert capsys.readouterr().err == ""
    score_to_file(model, ROWS[:5], tmp_path / "b.parquet", **options)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.startswith("\rscoring: 0sequence [")
    assert "\rscoring: 5sequence [" in shown


def test_ids_that_occur_again_get_a_suffix(tmp_path: Path, model: Any) -> None:
    frame = _frame(6).assign(id=["a", "b", "c", "a", "d", "e"])
    with pytest.warns(UserWarning, match="1 ids occur again"):
        path = score_to_file(model, frame, tmp_path / "scores.parquet", size=3, progress=False)
    assert RecallScores.load(path).sequences.ids == ["a", "b", "c", "a-2", "d", "e"]


def test_what_cannot_be_scored_is_refused_before_the_work(tmp_path: Path, model: Any) -> None:
    with pytest.raises(OptionError, match="suffix of out"):
        score_to_file(model, ROWS, tmp_path / "scores.csv", progress=False)
    with pytest.raises(EmptySetError):
        score_to_file(model, ROWS[:0], tmp_path / "scores.parquet", progress=False)
