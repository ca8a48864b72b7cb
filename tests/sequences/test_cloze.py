from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from memlens.errors import ColumnError, EmptySetError, OptionError, SequenceError
from memlens.sequences.readers.knowledge import fact_sequences
from memlens.sequences.readers.load import load_sequences
from tests.sequences.vocabularies import byte_level, metaspace


def record(subject: str, target: str, sentence: str, **more: Any) -> dict[str, Any]:
    return {
        "uuid": f"u-{subject}",
        "sub_label": subject,
        "obj_label": target,
        "masked_sentences": [sentence],
        **more,
    }


ROWS = [
    record("the cat", "mat", "the cat sat on the [MASK] ."),
    record("a blind eye", "turn", "a blind eye and a [MASK]"),
]


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("make", [byte_level, metaspace], ids=["byte level", "metaspace"])
def test_the_prompt_is_the_text_before_the_mask_and_the_object_the_target(tmp_path: Path, make: Any) -> None:
    tokenizer = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seqs = load_sequences(write(tmp_path, ROWS), tokenizer=tokenizer, target="word")
    assert seqs.texts == ["the cat sat on the mat", "a blind eye and a turn"]
    assert seqs.table["prompt"].tolist() == ["the cat sat on the", "a blind eye and a"]
    assert seqs.table["target"].tolist() == ["mat", "turn"]
    assert seqs.table["subject"].tolist() == ["the cat", "a blind eye"]
    assert seqs.ids == ["u-the cat", "u-a blind eye"]
    for row, n, text, prompt in zip(
        seqs.rows(), seqs.prefix_len.tolist(), seqs.texts, seqs.table["prompt"], strict=True
    ):
        assert tokenizer.decode(row) == text
        assert tokenizer.decode(row[:n]) == prompt
    assert seqs.attrs["n_left_out"] == 0


def test_columns_of_the_same_names_as_the_set_s_own_are_replaced() -> None:
    other = {"text": "t", "prompt": "p", "tokens": "1 2", "prefix_len": 9, "kept": "k"}
    bare, seqs = (
        fact_sequences(pd.DataFrame([row | more for row in ROWS]), tokenizer=byte_level(), target="word")
        for more in ({}, other)
    )
    assert seqs.table["kept"].tolist() == ["k"] * len(seqs)
    pd.testing.assert_frame_equal(seqs.table.drop(columns="kept"), bare.table)
    assert seqs.rows() == bare.rows()


def test_first_token_keeps_one_and_the_columns_tell_how_many_there_are(tmp_path: Path) -> None:
    tokenizer, path = byte_level(), write(tmp_path, ROWS)
    whole = load_sequences(path, tokenizer=tokenizer, target="word")
    first = load_sequences(path, tokenizer=tokenizer)
    assert first.n_targets.tolist() == [1, 1]
    assert first.table["n_target_tokens"].tolist() == whole.n_targets.tolist()
    assert first.table["one_token"].tolist() == [n == 1 for n in whole.n_targets.tolist()]
    assert [row[: int(n) + 1] for row, n in zip(whole.rows(), whole.prefix_len, strict=True)] == first.rows()


def test_what_cannot_be_asked_is_left_out_and_counted_in_one_warning(tmp_path: Path) -> None:
    rows = [
        *ROWS,
        record("s1", "cat", "the [MASK] sat on the mat ."),
        record("s2", "cat", "the mat has no mask"),
        record("s3", "cat", "[MASK] and [MASK]"),
        record("s4", "cat", "[MASK] ."),
        record("s5", "", "the cat sat on a [MASK]"),
        record("the cat", "mat", "the cat sat on the [MASK] !"),
    ]
    with pytest.warns(UserWarning, match="left out") as caught:
        seqs = load_sequences(write(tmp_path, rows), tokenizer=byte_level())
    assert len(caught) == 1
    said = (
        "1 without an object; 2 without exactly one mask; 1 with words after the object; "
        "1 with nothing before the object; 1 repeated"
    )
    assert str(caught[0].message) == f"6 of 8 cloze sentences are left out: {said}"
    assert (seqs.attrs["n_left_out"], seqs.attrs["left_out"]) == (6, said)
    assert len(seqs) == 2


@pytest.mark.parametrize("relation", ["predicate_id", "relation", "pred"])
def test_subjects_with_several_objects_are_left_out_or_marked(tmp_path: Path, relation: str) -> None:
    rows = [
        record("the cat", "mat", "the cat sat on the [MASK]", **{relation: "P1"}),
        record("the cat", "eye", "the cat has an [MASK]", **{relation: "P1"}),
        record("the cat", "halt", "the cat came to a [MASK]", **{relation: "P2"}),
        record("the dog", "mat", "the dog sat on the [MASK]", **{relation: "P1"}),
    ]
    path = write(tmp_path, rows)
    with pytest.warns(UserWarning, match="2 with several objects"):
        seqs = fact_sequences(path, tokenizer=byte_level())
    assert seqs.table["target"].tolist() == ["halt", "mat"]
    assert seqs.table["relation"].tolist() == ["P2", "P1"]
    kept = fact_sequences(path, tokenizer=byte_level(), keep_ambiguous=True)
    assert kept.table["ambiguous"].tolist() == [True, True, False, False]
    assert len(set(kept.ids)) == 4


def test_one_prompt_with_several_objects_is_ambiguous_without_names() -> None:
    frame = pd.DataFrame(
        {
            "masked_sentence": ["it is a [MASK]", "it is a [MASK] .", "that is a [MASK]"],
            "obj_label": ["a", "b", "c"],
        }
    )
    with pytest.warns(UserWarning, match="2 with several objects"):
        assert load_sequences(frame, tokenizer=byte_level()).table["target"].tolist() == ["c"]


def test_an_object_inside_its_subject_is_marked() -> None:
    rows = [record("Mat of Cats", "mat", "it is the [MASK]"), record("a dog", "mat", "here is the [MASK]")]
    seqs = load_sequences(pd.DataFrame(rows), tokenizer=byte_level())
    assert seqs.table["object_in_subject"].tolist() == [True, False]


def test_objects_of_several_tokens_are_left_out_when_asked() -> None:
    tokenizer = byte_level()
    frame = pd.DataFrame([*ROWS, record("x", "zyzzyva", "the cat sat on a [MASK]")])
    counts = load_sequences(frame, tokenizer=tokenizer).table.set_index("target")["n_target_tokens"]
    assert counts["zyzzyva"] > 1 == counts["mat"]
    with pytest.warns(UserWarning, match="with an object of several tokens"):
        seqs = fact_sequences(frame, tokenizer=tokenizer, one_token=True, target="word")
    assert set(seqs.n_targets.tolist()) == {1}
    assert set(seqs.table["target"]) == set(counts[counts == 1].index)


def test_templates_of_the_file_of_the_caller_and_of_each_relation() -> None:
    frame = pd.DataFrame(
        {
            "sub_label": ["the cat", "an eye"],
            "obj_label": ["mat", "halt"],
            "predicate_id": ["P1", "P2"],
            "template": ["[X] sat on the [Y] .", "[X] came to a [Y] ."],
        }
    )
    own = load_sequences(frame, tokenizer=byte_level())
    assert own.texts == ["the cat sat on the mat", "an eye came to a halt"]
    bare = frame.drop(columns="template")
    one = fact_sequences(bare, tokenizer=byte_level(), template="[X] has a [Y]")
    assert one.texts == ["the cat has a mat", "an eye has a halt"]
    each = fact_sequences(bare, tokenizer=byte_level(), template={"P1": "[X] on [Y]", "P2": "[X] to [Y]"})
    assert each.texts == ["the cat on mat", "an eye to halt"]
    with pytest.raises(SequenceError, match="none for the relation 'P2'"):
        fact_sequences(bare, tokenizer=byte_level(), template={"P1": "[X] on [Y]"})
    renamed = bare.rename(columns={"sub_label": "s", "obj_label": "o", "predicate_id": "r"})
    names = {"subject_column": "s", "object_column": "o", "relation_column": "r"}
    again = fact_sequences(renamed, tokenizer=byte_level(), template="[X] has a [Y]", **names)
    assert again.texts == one.texts
    assert again.table["relation"].tolist() == ["P1", "P2"]


def test_a_record_of_several_sentences_gives_a_sequence_each(tmp_path: Path) -> None:
    sentences = ["the cat sat on the [MASK]", "the cat has a [MASK]"]
    rows = [{**ROWS[0], "masked_sentences": sentences, "evidences": [{"x": 1}]}]
    seqs = load_sequences(write(tmp_path, rows), tokenizer=byte_level())
    assert seqs.texts == ["the cat sat on the mat", "the cat has a mat"]
    assert seqs.ids == ["u-the cat", "u-the cat-2"]
    assert "evidences" not in seqs.table
    assert load_sequences(seqs.to_parquet(tmp_path / "s.parquet")).texts == seqs.texts
    as_json = pd.DataFrame([{**ROWS[0], "masked_sentences": json.dumps(sentences)}])
    assert load_sequences(as_json, tokenizer=byte_level()).texts == seqs.texts


def test_wrong_records_and_options_are_named() -> None:
    frame = pd.DataFrame(ROWS)
    with pytest.raises(ColumnError, match="no column 'thing'"):
        fact_sequences(frame, tokenizer=byte_level(), object_column="thing")
    with pytest.raises(ColumnError, match="no column 'thing' of relations"):
        fact_sequences(frame, tokenizer=byte_level(), relation_column="thing")
    with pytest.raises(ColumnError, match="masked sentences or templates"):
        fact_sequences(frame.drop(columns="masked_sentences"), tokenizer=byte_level())
    with pytest.raises(SequenceError, match=r"row 0 of column 'masked_sentence' is '5'"):
        fact_sequences(pd.DataFrame({"masked_sentence": [5], "obj_label": ["a"]}), tokenizer=byte_level())
    with pytest.raises(OptionError, match="target='last'"):
        fact_sequences(frame, tokenizer=byte_level(), target="last")
    with pytest.raises(EmptySetError, match="none of 1 cloze sentences can be used: 1 with words after"):
        fact_sequences(pd.DataFrame([record("s", "cat", "the [MASK] sat")]), tokenizer=byte_level())
    with pytest.raises(SequenceError, match="needs a tokenizer"):
        fact_sequences(frame)


@pytest.mark.parametrize("missing", ["sub_label", "predicate_id"])
def test_records_without_a_subject_or_a_relation_are_not_of_one_fact(missing: str) -> None:
    rows = {
        "masked_sentence": ["A lies in [MASK].", "B lies in [MASK]."],
        "obj_label": ["Rome", "Oslo"],
        "sub_label": ["A", "A"],
        "predicate_id": ["P", "P"],
    }
    both = pd.DataFrame(rows)
    with pytest.raises(EmptySetError, match="2 with several objects"):
        load_sequences(both, tokenizer=byte_level())
    for frame in (both.drop(columns=missing), both.assign(**{missing: ""})):
        assert load_sequences(frame, tokenizer=byte_level()).table["ambiguous"].tolist() == [False, False]
