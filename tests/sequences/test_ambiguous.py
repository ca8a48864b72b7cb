"""Input that could mean two things is refused, and the message says what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import memlens as ml
from memlens.errors import MemlensError

_ROW = [5, 6, 7, 8]


def _mask(*mask: Any) -> dict[str, Any]:
    return {"input_ids": [_ROW], "attention_mask": [list(mask)]}


TABLES: dict[str, tuple[Any, str]] = {
    "two columns of one name": (
        pd.DataFrame([["a b", "c d"]], columns=pd.Index(["text", "text"])),
        "two columns are named 'text'",
    ),
    "truth values among ids": ([[True, 6, 7, 8]], r"row 0 is '\[True"),
    "truth values in a column": (pd.DataFrame({"tokens": [[True, 6, 7, 8]]}), "list of integer ids"),
    "NumPy's truth values": (pd.DataFrame({"tokens": [[np.True_, 6, 7, 8]]}), "list of integer ids"),
    "numbers of packed sequences in a mask": (_mask(1, 1, 2, 2), "holds 2: .* packed"),
    "negative mask": (_mask(1, 1, 1, -1), "holds -1"),
    "mask with a gap": (_mask(1, 0, 1, 1), "has a gap"),
    "half a mask": (_mask(1, 1, 1), "an attention_mask of 3"),
}


@pytest.mark.parametrize("what", TABLES)
def test_ambiguous_tables_and_lists_are_refused(what: str) -> None:
    source, words = TABLES[what]
    with pytest.raises(MemlensError, match=words):
        ml.load_sequences(source, prefix_len=2)


FILES = {
    "a header twice": ("a.csv", "tokens,tokens\n5 6 7 8,9 9 9 9\n", "two columns 'tokens'"),
    "one behind a byte order mark": ("a.csv", "\ufefftokens,tokens\n5 6,9 9\n", "two columns 'tokens'"),
    "a row with more fields": ("a.csv", "tokens\n5 6 7 8,9 9 9 9\n", "more fields than its first line"),
    "a later row with more": ("a.csv", "tokens\n5 6 7 8\n5 6 7 8,9\n", "Expected 1 fields in line 3"),
    "a key twice": ("a.jsonl", '{"tokens": [5, 6, 7, 8], "tokens": [9, 9, 9, 9]}\n', "'tokens' occurs twice"),
    "truth values": ("a.jsonl", '{"tokens": [true, 6, 7, 8]}\n', "list of integer ids"),
}


@pytest.mark.parametrize("what", FILES)
def test_ambiguous_files_are_refused_by_name(what: str, tmp_path: Path) -> None:
    name, content, words = FILES[what]
    (tmp_path / name).write_text(content)
    with pytest.raises(MemlensError, match=words) as caught:
        ml.load_sequences(tmp_path / name, prefix_len=2)
    assert name in str(caught.value)


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path: Path) -> None:
    column = pa.array([_ROW])
    pq.write_table(pa.Table.from_arrays([column, column], names=["tokens", "tokens"]), tmp_path / "a.parquet")
    with pytest.raises(MemlensError, match=r"a\.parquet.*named 'tokens'|a\.parquet.*Duplicate|tokens"):
        ml.load_sequences(tmp_path / "a.parquet", prefix_len=2)


def test_quoted_commas_missing_cells_and_blank_lines_of_csv_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\n\ntokens,note\n"5, 6, 7, 8","a, b"\n5 6 7 9\n')
    found = ml.load_sequences(tmp_path / "a.csv", prefix_len=2)
    assert found.rows() == [[5, 6, 7, 8], [5, 6, 7, 9]]
    assert found.table["note"].iloc[0] == "a, b"
