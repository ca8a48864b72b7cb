"""Texts come back from every format letter by letter, whatever program wrote the file."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memlens.errors import FileFormatError
from memlens.sequences.readers.load import load_sequences
from memlens.sequences.readers.registry import read_file
from tests.sequences.vocabularies import byte_level

TEXTS = [
    *("NA", "null", "nan", "None", "N/A", "-", "TRUE", "1.0", "007", "1e5", "inf", "#N/A"),
    *("two\u2028lines", "two\u2029parts", "next\u0085line", "form\x0cfeed", "a\x1cb\x1db\x1eb", "line\vtab"),
    *(
        "a\nb",
        "\ttab",
        " spaces  ",
        'a "quoted" one',
        "comma, here",
        "it's",
        "back\\slash",
        "\ufeffmark inside",
    ),
    *("Zürich 東京", "\U0001f600", "e\u0301", "zero\u200bwidth", "right\u200fleft"),
]


def write(path: Path, texts: list[str], encoding: str) -> Path:
    if path.suffix == ".csv":
        with path.open("w", encoding=encoding, newline="") as file:
            rows = csv.writer(file)
            rows.writerows([["text", "copies"], *([text, 3] for text in texts)])
    elif path.suffix == ".jsonl":
        lines = [json.dumps({"text": text, "copies": 3}, ensure_ascii=False) for text in texts]
        path.write_bytes(("\n".join(lines) + "\n").encode(encoding))
    else:
        pd.DataFrame({"text": texts, "copies": 3}).to_parquet(path)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".CSV", ".JSONL"])
def test_every_letter_comes_back(suffix: str, encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"x{suffix.lower()}", TEXTS, encoding).rename(tmp_path / f"y{suffix}")
    table = read_file(path)[0]
    assert list(table.columns) == ["text", "copies"]  # a byte order mark is no part of the first name
    assert table["text"].tolist() == TEXTS
    seqs = load_sequences(path, tokenizer=byte_level(), prefix_len=1, on_short="drop")
    assert set(seqs.texts) <= set(TEXTS)
    assert len(seqs) > 20
    assert seqs.table["copies"].tolist() == [3] * len(seqs)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1), min_size=1
    )
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_any_text_comes_back(suffix: str, tmp_path: Path, texts: list[str]) -> None:
    found = read_file(write(tmp_path / f"x{suffix}", texts, "utf-8"))[0]["text"]
    as_text = [str(text) for text in found]
    if suffix != ".csv":  # a column of numbers is read as numbers, from a table without types
        assert found.tolist() == texts
    elif found.dtype == object or isinstance(found.dtype, pd.StringDtype):
        assert as_text == texts


def test_lines_of_json_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff"a\u2028b"\r\n\r\n"c\u0085d"\n   \n"e\x7ff"'.encode())
    assert read_file(path)[0] == ["a\u2028b", "c\u0085d", "e\x7ff"]


def test_an_empty_cell_is_missing_and_a_column_of_identifiers_is_text(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,identifier,count\na b,007,1\n,,\nNA NA,NA,3\n")
    with pytest.warns(UserWarning, match="1 rows are empty"):
        seqs = load_sequences(path, tokenizer=byte_level(), prefix_len=1)
    assert seqs.texts == ["a b", "NA NA"]
    assert seqs.table["identifier"].tolist() == ["007", "NA"]


@pytest.mark.parametrize("n", [4096, 4097])
def test_a_table_has_at_most_4096_columns(n: int, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(",".join(map(str, range(n))) + "\n" + ",".join(["a"] * n) + "\n")
    if n == 4096:
        assert read_file(path)[0].shape == (1, n)
    else:
        with pytest.raises(FileFormatError, match="over 4096 columns"):
            read_file(path)
