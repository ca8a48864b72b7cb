"""No input changes its meaning without a word: it is read as it says, or refused, or warned of."""

from __future__ import annotations

import warnings
from collections import UserDict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from memlens.errors import FileFormatError, OptionError, SequenceError, VocabularyError
from memlens.sequences.readers.load import load_sequences
from memlens.sequences.readers.registry import (
    FILES,
    FORMS,
    SOURCES,
    register_file,
    register_form,
    register_source,
)
from tests.sequences.vocabularies import byte_level, metaspace

ROWS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8]]


def padded(side: str, pad: int = 7) -> dict[str, list[list[int]]]:
    width = max(map(len, ROWS))
    fill = [[pad] * (width - len(row)) for row in ROWS]
    zeros = [[0] * len(part) for part in fill]
    ones = [[1] * len(row) for row in ROWS]
    if side == "left":
        pairs = zip(fill, ROWS, strict=True), zip(zeros, ones, strict=True)
    else:
        pairs = zip(ROWS, fill, strict=True), zip(ones, zeros, strict=True)
    return {"input_ids": [a + b for a, b in pairs[0]], "attention_mask": [a + b for a, b in pairs[1]]}


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_mask_marks_as_padding_is_left_out_in_every_form(side: str, tmp_path: Path) -> None:
    columns = padded(side)
    frame = pd.DataFrame(columns)
    frame.to_csv(tmp_path / "x.csv", index=False)
    records = frame.to_dict(orient="records")
    tensors = UserDict({name: torch.tensor(values) for name, values in columns.items()})
    arrays = {name: np.array(values) for name, values in columns.items()}
    data = datasets.Dataset.from_dict(columns)
    for source in (
        frame,
        columns,
        records,
        tensors,
        arrays,
        data,
        tmp_path / "x.csv",
        data.with_format("torch"),
    ):
        seqs = load_sequences(source, prefix_len=2)
        assert seqs.rows() == ROWS
        assert seqs.prefix_len.tolist() == [2, 2, 2]
        assert "attention_mask" not in seqs.table
        assert seqs.mask.sum().item() == 12


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"tokens": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "attention_mask of row 0 has a gap"),
        (
            {"tokens": [[1, 2, 3]], "attention_mask": [[1, 1]]},
            "row 0 has 3 tokens and an attention_mask of 2",
        ),
        ({"tokens": [[1, 2, 3]], "attention_mask": [[0, 1, 1]], "prefix_len": [1]}, "padded at the start"),
    ],
)
def test_masks_that_do_not_tell_are_refused(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(SequenceError, match=words):
        load_sequences(pd.DataFrame(columns), prefix_len=1)


def test_the_output_of_a_tokenizer_is_its_token_ids() -> None:
    tokenizer = byte_level()
    texts = ["the cat sat on the mat", "a blind eye"]
    seqs = load_sequences(tokenizer(texts), tokenizer=tokenizer, prefix_len=1)
    assert seqs.rows() == tokenizer(texts)["input_ids"]
    assert load_sequences(tokenizer(texts[0]), tokenizer=tokenizer, prefix_len=1).rows() == seqs.rows()[:1]
    with pytest.raises(SequenceError, match="different numbers of rows"):
        load_sequences({"tokens": [[1, 2]], "copies": [1, 2]}, prefix_len=1)
    with pytest.raises(SequenceError, match="'text' is a str"):
        load_sequences({"text": "the cat"}, tokenizer=tokenizer)


def test_pairs_records_and_generators() -> None:
    tokenizer = byte_level()
    pairs = [("the cat", " sat on the mat"), ("a blind", " eye")]
    table = pd.DataFrame(pairs, columns=["prompt", "continuation"])
    wanted = load_sequences(table, tokenizer=tokenizer)
    for source in (pairs, iter(pairs), [list(pair) for pair in pairs], table.to_dict(orient="records")):
        seqs = load_sequences(source, tokenizer=tokenizer)
        assert seqs.rows() == wanted.rows()
        assert torch.equal(seqs.prefix_len, wanted.prefix_len)
    halves = [([3, 1], [4, 1, 5]), ([9], [2, 6]), ([5, 3], [5, 8])]
    seqs = load_sequences(halves)
    assert (seqs.rows(), seqs.prefix_len.tolist()) == (ROWS, [2, 1, 2])
    assert load_sequences((row for row in ROWS), prefix_len=1).rows() == ROWS
    endless = iter(lambda: [1, 2, 3], None)
    assert len(load_sequences(endless, prefix_len=1, limit=4)) == 4


@pytest.mark.parametrize("bad", [-100, -1, 2**31, 2**40, 2**70])
def test_ids_that_no_tokenizer_gives_are_named(bad: int) -> None:
    for source in ([[1, 2, 3], [4, 5, bad]], pd.DataFrame({"tokens": [[1, 2, 3], f"4 5 {bad}"]})):
        with pytest.raises(VocabularyError, match=f"row 1, position 2 holds the token id {bad}"):
            load_sequences(source, tokenizer=byte_level(), prefix_len=1)


def test_two_files_are_a_pair_and_other_lists_of_files_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "prefix.npy", tmp_path / "suffix.npy"]
    for path in paths:
        np.save(path, np.arange(6).reshape(2, 3))
    for source in (paths, tuple(paths), [str(path) for path in paths]):
        assert load_sequences(source).rows() == [[0, 1, 2, 0, 1, 2], [3, 4, 5, 3, 4, 5]]
    for source in (["a.jsonl", "b.jsonl"], [str(path) for path in (*paths, paths[0])]):
        with pytest.raises(SequenceError, match="the list contains file names"):
            load_sequences(source, tokenizer=byte_level())


def test_columns_made_on_the_fly_and_chosen_columns_are_read() -> None:
    data = datasets.Dataset.from_dict({"tokens": ROWS, "text": ["a", "b", "c"]})
    cut = data.with_transform(lambda batch: {"tokens": [row[:3] for row in batch["tokens"]]})
    assert load_sequences(cut, prefix_len=1).rows() == [row[:3] for row in ROWS]
    assert load_sequences(cut, prefix_len=1, limit=2).rows() == [row[:3] for row in ROWS[:2]]
    chosen = data.with_format(columns=["tokens"])
    assert list(load_sequences(chosen, prefix_len=1).table) == ["id"]


def test_a_continuation_that_joins_the_last_word_is_warned_of() -> None:
    tokenizer = byte_level()
    with pytest.warns(
        UserWarning, match=r"1 of 2 continuations .*row 1 .*given 'the cat' and asked for ' sat'"
    ):
        load_sequences([("a blind", " eye"), ("the cat s", "at")], tokenizer=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pair in (
            ("the cat ", "sat"),
            ("the cat", " sat"),
            ("the cat", ", it sat"),
            ("the cat.", "It sat"),
        ):
            load_sequences([pair], tokenizer=tokenizer)


def test_there_is_one_token_in_front() -> None:
    tokenizer = metaspace()
    first = tokenizer.bos_token_id
    with pytest.warns(UserWarning, match="1 of 2 sequences begin with the beginning-of-text token"):
        seqs = load_sequences([[first, 5, 6], [5, 6, 7]], tokenizer=tokenizer, prefix_len=2, prepend_bos=True)
    assert seqs.rows() == [[first, 5, 6], [first, 5, 6, 7]]
    assert seqs.prefix_len.tolist() == [2, 3]


def test_padding_without_a_mask_is_warned_of() -> None:
    tokenizer = byte_level()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(7)
    with pytest.warns(UserWarning, match=r"2 rows begin or end with the padding token \(7\)"):
        load_sequences(padded("right")["input_ids"], tokenizer=tokenizer, prefix_len=2)


def test_the_split_of_a_dataset_stands_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_dict({"tokens": ROWS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_sequences("hf:EleutherAI/evals:duped.70m", prefix_len=1)
    load_sequences("hf:EleutherAI/evals", prefix_len=1)
    assert asked == [("EleutherAI/evals", "duped.70m"), ("EleutherAI/evals", "train")]


def test_other_packages_register_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (FILES, SOURCES, FORMS):
        registry.names()
        monkeypatch.setattr(registry, "_items", dict(registry._items))

    @register_file(".ids")
    def read(path: Path, as_text: Any) -> Any:
        return [[int(part) for part in line.split()] for line in path.read_text().splitlines()], {}

    @register_source("range", lambda source: isinstance(source, range))
    def _open(source: range, request: Any) -> Any:
        from memlens.sequences.readers.registry import Opened

        return Opened([list(source)], "a range")

    (tmp_path / "x.ids").write_text("3 1 4\n1 5 9\n")
    assert load_sequences(tmp_path / "x.ids", prefix_len=1).rows() == [[3, 1, 4], [1, 5, 9]]
    seqs = load_sequences(range(5), prefix_len=1)
    assert (seqs.rows(), seqs.attrs["source"]) == ([[0, 1, 2, 3, 4]], "a range")
    with pytest.raises(FileFormatError, match=r"use one of .*\.ids, .*\.npy"):
        load_sequences(tmp_path / "x.fasta")
    with pytest.raises(OptionError, match=r"'\.ids' is registered already"):
        register_file(".ids")(lambda path, as_text: ([], {}))


@pytest.mark.parametrize("suffix", ["ids", ".tar.gz", ".", "a.ids"])
def test_a_suffix_that_no_file_can_have_is_refused(suffix: str) -> None:
    with pytest.raises(OptionError, match="no file name ends in the suffix"):
        register_file(suffix)


@pytest.mark.parametrize(
    "returned",
    [None, ["the cat sat"], pd.DataFrame({"text": ["the cat"]}), (["the cat"], 5), (["a"], {"attrs": 3})],
)
def test_readers_of_other_packages_return_what_they_must(
    returned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for registry in (FILES, SOURCES, FORMS):
        registry.names()
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    register_file(".mine")(lambda path, as_text: returned)
    register_source("mine", lambda source: source is monkeypatch)(lambda source, request: returned)
    register_form("mine", lambda frame: "mine" in frame)(lambda frame, request: returned)
    (tmp_path / "x.mine").write_text("x")
    with pytest.raises(FileFormatError, match=r"x\.mine: the reader of \.mine files returned \w+: it must"):
        load_sequences(tmp_path / "x.mine", prefix_len=1)
    with pytest.raises(SequenceError, match=r"it must return Opened\(content, origin\)"):
        load_sequences(monkeypatch, prefix_len=1)
    with pytest.raises(
        SequenceError, match=r"tables with the columns mine returned .* it must return a Draft"
    ):
        load_sequences(pd.DataFrame({"mine": [1]}), prefix_len=1)
