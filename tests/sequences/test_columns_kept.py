"""What the readers keep of a source: its columns and theirs, its rows in order, and no more than asked."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from memlens.errors import SequenceError, VocabularyError
from memlens.sequences.readers.idioms import DEFECTS, idiom_defects
from memlens.sequences.readers.knowledge import fact_sequences, identifier_sequences
from memlens.sequences.readers.load import load_sequences
from tests.sequences.vocabularies import byte_level, model_with
from tests.tiny import tiny_tokenizer

INDEX = [5, 3, 9]
CLOZE = ["subject", "relation", "target", "text", "prompt", "object_in_subject", "ambiguous"]
FORMS: dict[str, tuple[dict[str, list[Any]], set[str]]] = {
    "tokens": ({"tokens": [[1, 2, 3]] * 3, "prefix_len": [1, 2, 1], "note": list("abc")}, {"note", "text"}),
    "padded": (
        {"input_ids": [[7, 1, 2, 3]] * 3, "attention_mask": [[0, 1, 1, 1]] * 3, "token_type_ids": [[0]] * 3},
        {"text"},
    ),
    "text": ({"text": ["a b c", "d e", "f g"], "prefix_len": [1, 1, 1], "id": list("xyz")}, {"text"}),
    "prompts": ({"prompt": ["a b", "c", "d"], "suffix": [" e", " f", " g"]}, {"prompt", "suffix", "text"}),
    "idioms": (
        {"idiom": ["for crying out loud", "grind to a halt", "turn a blind eye"], "note": list("abc")},
        {"text", "prompt", "target", "n_words", "note", *DEFECTS},
    ),
    "clozes": (
        {
            "masked_sentence": ["A is in [MASK].", "B is in [MASK].", "C is in [MASK]."],
            "obj_label": list("xyz"), "sub_label": list("ABC"), "predicate_id": ["P"] * 3, "other": [1, 2, 3],
        },
        {*CLOZE, "n_target_tokens", "one_token", "obj_label", "sub_label", "predicate_id", "other"},
    ),
    "identifiers": (
        {"label": list("ABC"), "identifier": ["01", "02", "03"], "frequency": [1, 2, 3]},
        {"label", "identifier", "frequency", "text", "prompt", "target", "template"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_table_has_its_own_columns_and_those_of_its_form_whatever_its_index(form: str) -> None:
    content, expected = FORMS[form]
    options: dict[str, Any] = {"prefix_len": 1} if form == "padded" else {}
    seqs = load_sequences(pd.DataFrame(content, index=INDEX), tokenizer=byte_level(), **options)
    assert set(seqs.table.columns) == {"id", *expected}
    assert len(seqs.table.columns) == 1 + len(expected)
    plain = load_sequences(pd.DataFrame(content), tokenizer=byte_level(), **options)
    assert seqs.rows() == plain.rows()
    pd.testing.assert_frame_equal(seqs.table, plain.table)
    last = load_sequences(pd.DataFrame(content, index=INDEX), tokenizer=byte_level(), limit=2, **options)
    assert last.rows() == plain.rows()[:2]


@pytest.mark.parametrize("target", ["first_token", "word"])
@pytest.mark.parametrize("form", ["idioms", "clozes"])
def test_a_target_of_several_tokens_is_cut_where_one_is_asked_for(form: str, target: str) -> None:
    content: dict[str, list[Any]] = {
        "idioms": {"idiom": ["a bolt out of the xyzzy", "come zqx"]},
        "clozes": {
            "masked_sentence": ["a bolt out of the [MASK].", "come [MASK]."],
            "obj_label": ["xyzzy", "zqx"],
        },
    }[form]
    tokenizer = byte_level()
    seqs = load_sequences(pd.DataFrame(content), tokenizer=tokenizer, target=target)
    whole = [tokenizer(f"{p} {t}")["input_ids"] for p, t in seqs.table[["prompt", "target"]].values.tolist()]
    assert all(len(row) > n + 1 for row, n in zip(whole, seqs.prefix_len.tolist(), strict=True))
    assert seqs.rows() == (
        whole
        if target == "word"
        else [row[: n + 1] for row, n in zip(whole, seqs.prefix_len.tolist(), strict=True)]
    )
    assert seqs.attrs["target"] == target


def test_defects_are_listed_by_kind_then_row() -> None:
    rows = ["virtually impossible to find", "in the end", "someone's red straw", "a blue straw"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seqs = load_sequences(pd.DataFrame({"idiom": rows}, index=[8, 6, 4, 2]), tokenizer=byte_level())
    found = idiom_defects(seqs)
    assert list(found.columns) == ["row", "id", "text", "defect", "why"]
    assert found[["row", "text", "defect"]].values.tolist() == [
        [0, rows[0], "definition"],
        [1, rows[1], "stop_word_prompt"],
        [2, rows[2], "placeholder"],
    ]
    assert found["why"].tolist() == [DEFECTS[defect] for defect in found["defect"]]
    assert found["id"].tolist() == [seqs.ids[row] for row in found["row"]]


def test_no_more_rows_are_taken_than_asked_for() -> None:
    taken: list[int] = []

    def endless() -> Iterator[dict[str, Any]]:
        for number in itertools.count():
            taken.append(number)
            yield {"tokens": [number, 1, 2]}

    stream = datasets.IterableDataset.from_generator(endless)
    assert load_sequences(stream, prefix_len=1, limit=3).rows() == [[k, 1, 2] for k in range(3)]
    assert len(taken) < 10
    taken.clear()
    assert len(load_sequences((row["tokens"] for row in endless()), prefix_len=1, limit=2)) == 2
    assert len(taken) == 2


@pytest.mark.parametrize("as_array", [True, False])
def test_the_first_id_outside_the_vocabulary_is_named(as_array: bool) -> None:
    model = model_with(tiny_tokenizer(), d_vocab=101)

    def load(rows: list[list[int]]) -> Any:
        return load_sequences(np.array(rows) if as_array else rows, model, prefix_len=1, on_eos="keep")

    assert load([[0, 1, 100], [100, 0, 3]]).rows() == [[0, 1, 100], [100, 0, 3]]
    with pytest.raises(VocabularyError, match=r"row 1, position 2 holds the token id 101, but.*101 entries"):
        load([[0, 1, 2], [0, 100, 101]])
    with pytest.raises(
        VocabularyError, match="row 0, position 1 holds the token id -1, but ids are 0 or more"
    ):
        load([[0, -1, 101], [0, 1, 2]])
    with pytest.raises(VocabularyError, match=r"row 0, position 0.*no vocabulary is that large"):
        load_sequences([[2**31, 1, 2]], prefix_len=1)
    assert load_sequences([[2**31 - 1, 1, 2]], prefix_len=1).rows() == [[2**31 - 1, 1, 2]]


@pytest.mark.parametrize("as_array", [True, False])
def test_rows_that_begin_or_end_with_padding_are_told(as_array: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    rows = [[tokenizer.pad_token_id, 1, 2], [1, tokenizer.pad_token_id, 2], [1, 2, tokenizer.pad_token_id]]
    with pytest.warns(UserWarning, match=r"2 rows begin or end with the padding token.*rows 0, 2;"):
        load_sequences(np.array(rows) if as_array else rows, tokenizer=tokenizer, prefix_len=1)
    tokenizer.pad_token = tokenizer.eos_token
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_sequences([[tokenizer.eos_token_id, 1, 2]], tokenizer=tokenizer, prefix_len=1)


def test_a_sequence_needs_one_token_after_its_prefix() -> None:
    rows = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    found = load_sequences(rows, prefix_len=2, on_short="drop")
    assert (found.rows(), found.attrs["n_dropped_short"]) == ([[1, 2, 3], [6, 7, 8, 9]], 1)
    with pytest.raises(
        SequenceError, match=r"1 sequence is not longer than its prefix, it is row 1 with 2 tokens"
    ):
        load_sequences(rows, prefix_len=2)
    with pytest.warns(UserWarning, match="1 rows are empty"):
        found = load_sequences([[], *rows], prefix_len=[5, 2, 1, 3])
    assert found.prefix_len.tolist() == [2, 1, 3]
    assert found.attrs["empty_rows"] == "0"
    assert load_sequences([list(range(34))]).prefix_len.tolist() == [32]
    cut = load_sequences(rows, prefix_len=1, max_targets=2)
    assert cut.rows() == [[1, 2, 3], [4, 5], [6, 7, 8]]
    for wrong in (2.0, [1, 2], "many"):
        with pytest.raises(SequenceError, match="does not fit: give one whole number"):
            load_sequences(rows, prefix_len=wrong)  # type: ignore[arg-type]


def test_drawn_prefixes_reach_every_place_and_the_seed_is_kept() -> None:
    rows = [[1, 2, 3, 4, 5]] * 300
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_sequences(rows, prefix_len="drawn", seed=3)
        other = load_sequences(rows, prefix_len="drawn", seed=4)
    counts = np.bincount(found.prefix_len.numpy(), minlength=6)
    assert counts[[0, 5]].tolist() == [0, 0]
    assert (abs(counts[1:5] - 75) < 30).all()
    assert (found.attrs["prefix_len"], found.attrs["seed"]) == ("drawn", 3)
    assert found.prefix_len.tolist() != other.prefix_len.tolist()


def test_a_set_says_what_it_was_read_from(tmp_path: Path) -> None:
    facts, numbers = (pd.DataFrame(FORMS[form][0]) for form in ("clozes", "identifiers"))
    for read, frame in ((fact_sequences, facts), (identifier_sequences, numbers)):
        frame.to_csv(tmp_path / "list.csv", index=False)
        found = [
            read(source, tokenizer=byte_level(), name="mine") for source in (frame, tmp_path / "list.csv")
        ]
        assert [seqs.attrs["source"] for seqs in found] == ["DataFrame", "list.csv"]
        assert found[0].rows() == found[1].rows()
        assert found[0].attrs["name"] == "mine"
