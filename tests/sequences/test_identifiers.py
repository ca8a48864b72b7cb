from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from memlens.errors import ColumnError, OptionError, SequenceError
from memlens.sequences.readers.knowledge import identifier_sequences
from memlens.sequences.readers.load import load_sequences
from tests.sequences.vocabularies import byte_level

FRAME = pd.DataFrame(
    {"label": ["the cat", "the mat"], "identifier": ["00417", "482193"], "popularity": [3, 9]}
)


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"numbers{suffix}"
    if suffix == ".csv":
        FRAME.to_csv(path, index=False)
    elif suffix == ".parquet":
        FRAME.to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, FRAME.to_dict("records"))))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_leading_zeros_are_kept_and_the_continuation_is_the_identifier(tmp_path: Path, suffix: str) -> None:
    tokenizer = byte_level()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seqs = load_sequences(write(tmp_path, suffix), tokenizer=tokenizer)
    assert seqs.texts == ["The number of the cat is 00417", "The number of the mat is 482193"]
    assert seqs.table["identifier"].tolist() == ["00417", "482193"]
    assert seqs.table["popularity"].tolist() == [3, 9]
    for row, n, number in zip(seqs.rows(), seqs.prefix_len.tolist(), seqs.table["identifier"], strict=True):
        assert tokenizer.decode(row[n:]).strip() == number
        assert tokenizer.decode(row[:n]).strip() + " " + number == tokenizer.decode(row)
    again = identifier_sequences(write(tmp_path, suffix), tokenizer=tokenizer)
    assert again.rows() == seqs.rows()


def test_columns_and_templates_are_the_caller_s(tmp_path: Path) -> None:
    path = tmp_path / "phones.csv"
    path.write_text("who,phone\nthe cat,007\nthe mat,012\n")
    options = {"label_column": "who", "identifier_column": "phone", "tokenizer": byte_level()}
    seqs = identifier_sequences(path, template="Call {label} at {identifier}.", **options)
    assert seqs.texts == ["Call the cat at 007", "Call the mat at 012"]
    own = FRAME.assign(template=["{label}: {identifier}", "{label} has {identifier}"])
    assert load_sequences(own, tokenizer=byte_level()).texts == ["the cat: 00417", "the mat has 482193"]
    both = identifier_sequences(own, tokenizer=byte_level(), template="{label} = {identifier}")
    assert both.texts == ["the cat = 00417", "the mat = 482193"]


def test_numbers_become_digits_and_other_things_are_refused() -> None:
    numbers = FRAME.assign(identifier=[417, 482193])
    assert load_sequences(numbers, tokenizer=byte_level()).table["target"].tolist() == ["417", "482193"]
    with pytest.raises(SequenceError, match=r"row 1 has the identifier 4\.5"):
        load_sequences(FRAME.assign(identifier=["1", 4.5]), tokenizer=byte_level())
    with pytest.raises(SequenceError, match="row 0 has the identifier ''"):
        load_sequences(FRAME.assign(identifier=["", "1"]), tokenizer=byte_level())
    with pytest.raises(SequenceError, match="row 1 has an empty label"):
        load_sequences(FRAME.assign(label=["a", " "]), tokenizer=byte_level())


def test_labels_with_several_identifiers_and_repeated_pairs_are_left_out() -> None:
    more = pd.DataFrame({"label": ["the cat", "the mat", "an eye"], "identifier": ["1", "482193", "5"]})
    with pytest.warns(UserWarning, match="3 of 5 pairs are left out: 1 repeated; 2 with several identifiers"):
        seqs = load_sequences(pd.concat([FRAME, more]), tokenizer=byte_level())
    assert seqs.table["label"].tolist() == ["the mat", "an eye"]
    assert seqs.attrs["n_left_out"] == 3


def test_wrong_templates_and_columns_are_named(tmp_path: Path) -> None:
    for template in ("{label} is", "{identifier} is {label}", "{label} has {identifier} coins"):
        with pytest.raises(OptionError, match="does not contain a label and then its identifier"):
            identifier_sequences(FRAME, tokenizer=byte_level(), template=template)
    with pytest.raises(ColumnError, match=r"no column 'lable'.*Did you mean 'label'"):
        identifier_sequences(FRAME, tokenizer=byte_level(), label_column="lable")
    np.save(tmp_path / "ids.npy", np.ones((2, 3), dtype=np.int64))
    with pytest.raises(SequenceError, match="holds no table"):
        identifier_sequences(tmp_path / "ids.npy", tokenizer=byte_level())
