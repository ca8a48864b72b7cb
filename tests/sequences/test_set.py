from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlens.errors import ColumnError, FileFormatError, SequenceError, VocabularyError
from memlens.sequences.set import SequenceSet

quick = settings(deadline=None, max_examples=30)


@st.composite
def sets(draw: st.DrawFn) -> SequenceSet:
    rows = draw(st.lists(st.lists(st.integers(0, 50_000), min_size=2, max_size=9), min_size=1, max_size=6))
    prefix = [draw(st.integers(1, len(row) - 1)) for row in rows]
    table = pd.DataFrame(
        {
            "id": [f"s{i}" for i in range(len(rows))],
            "text": draw(st.lists(st.text(max_size=5), min_size=len(rows), max_size=len(rows))),
            "copies": range(len(rows)),
            "where": [list(range(i)) for i in range(len(rows))],
        }
    )
    attrs = draw(st.dictionaries(st.text(max_size=4), st.one_of(st.integers(), st.booleans(), st.text())))
    return SequenceSet.from_tokens(rows, prefix, table=table, attrs=attrs)


def assert_same(a: SequenceSet, b: SequenceSet) -> None:
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.mask, b.mask)
    assert torch.equal(a.prefix_len, b.prefix_len)
    assert a.attrs == b.attrs
    pd.testing.assert_frame_equal(a.table, b.table)


@quick
@given(sets())
def test_prefix_and_targets_make_up_the_sequence(seqs: SequenceSet) -> None:
    for i, row in enumerate(seqs.rows()):
        n = int(seqs.n_targets[i])
        targets = seqs.target_ids[i, :n].tolist()
        assert row[: int(seqs.prefix_len[i])] + targets == row
        assert [row[p] for p in seqs.target_positions[i, :n].tolist()] == targets
        assert seqs.target_ids[i, n:].eq(-1).all()
        assert seqs.target_positions[i, n:].eq(-1).all()
        assert int(seqs.target_mask[i].sum()) == n
    assert seqs.max_targets == max(seqs.n_targets.tolist())


@quick
@given(seqs=sets())
def test_parquet_round_trip_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, seqs: SequenceSet
) -> None:
    path = tmp_path_factory.mktemp("set") / "set.parquet"
    assert_same(SequenceSet.from_parquet(seqs.to_parquet(path)), seqs)
    assert [p.name for p in path.parent.iterdir()] == ["set.parquet"]


@quick
@given(seqs=sets(), data=st.data())
def test_choosing_rows_keeps_their_order_and_facts(seqs: SequenceSet, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(seqs))))
    chosen = seqs[order]
    assert chosen.rows() == [seqs.rows()[i] for i in order]
    assert chosen.ids == [seqs.ids[i] for i in order]
    assert chosen.tokens.shape[1] == max(len(row) for row in chosen.rows())
    keep = np.array([i % 2 == 0 for i in range(len(seqs))])
    for rows in (keep, torch.from_numpy(keep), keep.tolist(), pd.Series(keep), slice(None, None, 2)):
        assert_same(seqs[rows], seqs[np.flatnonzero(keep)])
    assert seqs[::-1].rows() == seqs.rows()[::-1]
    assert seqs[-1].rows() == [seqs.rows()[-1]]


def test_an_empty_choice_is_an_empty_set(tmp_path: Path) -> None:
    empty = SequenceSet.from_tokens([[1, 2, 3]], 1)[[]]
    assert len(empty) == 0
    assert empty.target_ids.shape == (0, 0)
    assert len(SequenceSet.from_parquet(empty.to_parquet(tmp_path / "e.parquet"))) == 0


def test_padding_is_never_part_of_the_content(tmp_path: Path) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0]], dtype=torch.bool)
    a = SequenceSet.from_tokens(torch.tensor([[5, 6, 7, 8, 9]]), 1, mask=mask)
    assert a.tokens.tolist() == [[5, 6, 7, 0, 0]]
    assert_same(SequenceSet.from_parquet(a.to_parquet(tmp_path / "a.parquet")), a)


def test_numpy_attributes_are_saved_as_plain_numbers(tmp_path: Path) -> None:
    seqs = SequenceSet.from_tokens([[1, 2]], 1, attrs={"n": np.int64(3), "x": np.float32(0.5)})
    assert SequenceSet.from_parquet(seqs.to_parquet(tmp_path / "a.parquet")).attrs == {"n": 3, "x": 0.5}


def test_concat_appends_and_refuses_shared_ids() -> None:
    a = SequenceSet.from_tokens([[1, 2, 3]], 1, attrs={"name": "a"})
    b = SequenceSet.from_tokens([[4, 5], [6, 7]], 1, attrs={"name": "b", "k": 1})
    both = a.concat(b, id_suffix="-b")
    assert both.rows() == [[1, 2, 3], [4, 5], [6, 7]]
    assert both.ids == ["0", "0-b", "1-b"]
    assert both.attrs == {"name": "a", "k": 1}
    with pytest.raises(SequenceError, match=r"'0'.*id_suffix"):
        a.concat(b)


def test_uniform() -> None:
    assert SequenceSet.from_tokens([[1, 2, 3], [4, 5, 6]], 1).uniform
    assert not SequenceSet.from_tokens([[1, 2, 3], [4, 5, 6]], [1, 2]).uniform
    assert not SequenceSet.from_tokens([[1, 2, 3], [4, 5]], 1).uniform


def test_the_set_does_not_change_with_the_caller_s_objects() -> None:
    tokens, table = torch.tensor([[1, 2, 3]]), pd.DataFrame({"text": ["a"]})
    seqs = SequenceSet.from_tokens(tokens, 1, table=table)
    tokens[0, 0] = 9
    table.loc[0, "text"] = "b"
    assert seqs.rows() == [[1, 2, 3]]
    assert seqs.texts == ["a"]
    assert "id" not in table


def test_representations_tell_size_and_source_and_escape_text() -> None:
    table = pd.DataFrame({"text": ["<script>alert(1)</script>", "b" * 61]})
    seqs = SequenceSet.from_tokens([[1, 2, 3], [4, 5]], 1, table=table, attrs={"source": "<b>x.npy"})
    assert repr(seqs) == "SequenceSet(2 sequences, prefix 1, continuation 1-2 tokens, from <b>x.npy)"
    html = seqs._repr_html_()
    assert "&lt;script&gt;" in html
    assert "<script>" not in html
    assert "<b>x.npy" not in html
    assert f">{'b' * 60}…<" in html


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: SequenceSet.from_tokens([[1, 2], [3, 4]], [1, 2]),
            SequenceError,
            r"row 1 has 2 tokens and prefix_len=2",
        ),
        (lambda: SequenceSet.from_tokens([[1, 2], [3, 4]], [1, 0]), SequenceError, r"row 1 has prefix_len=0"),
        (
            lambda: SequenceSet.from_tokens([[1, 2], [3, -4]], 1),
            VocabularyError,
            r"row 1 .* -4 at position 1",
        ),
        (lambda: SequenceSet.from_tokens(torch.ones(3), 1), SequenceError, r"shape \(3,\)"),
        (lambda: SequenceSet.from_tokens(torch.ones(2, 3), 1), SequenceError, r"float32"),
        (lambda: SequenceSet.from_tokens([[1, 2]], [1.5]), SequenceError, r"prefix_len is torch.float64"),
        (
            lambda: SequenceSet.from_tokens(
                torch.ones(1, 3).long(), 1, mask=torch.tensor([[True, False, True]])
            ),
            SequenceError,
            "row 0 has a gap",
        ),
        (
            lambda: SequenceSet.from_tokens([[1, 2]], 1, mask=np.ones((1, 3), bool)),
            SequenceError,
            r"mask has shape \(1, 3\), the tokens \(1, 2\)",
        ),
        (
            lambda: SequenceSet.from_tokens([[1, 2]], 1, table=pd.DataFrame({"a": [1, 2]})),
            SequenceError,
            "2 rows for 1 sequences",
        ),
        (
            lambda: SequenceSet.from_tokens([[1, 2]] * 2, 1, table=pd.DataFrame({"id": ["x", "x"]})),
            SequenceError,
            "'x'.*unique",
        ),
        (
            lambda: SequenceSet.from_tokens([[1, 2]], 1, table=pd.DataFrame({"tokens": [3]})),
            ColumnError,
            "'tokens'",
        ),
    ],
)
def test_bad_sets_are_refused_with_row_and_value(make, error, words) -> None:
    with pytest.raises(error, match=words):
        make()


def test_rows_that_do_not_exist() -> None:
    seqs = SequenceSet.from_tokens([[1, 2]], 1)
    with pytest.raises(IndexError, match="row 3 does not exist: the set has 1"):
        seqs[3]
    with pytest.raises(IndexError, match="mask of 2 rows"):
        seqs[[True, False]]
    with pytest.raises(TypeError, match="integer, a slice"):
        seqs[np.array([0.5])]


def test_parquet_files_that_hold_no_set(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_text("not parquet")
    with pytest.raises(FileFormatError, match=r"x\.parquet is damaged, or is not what its name says"):
        SequenceSet.from_parquet(path)
    pd.DataFrame({"tokens": [[1, 2]], "other": [1]}).to_parquet(path)
    with pytest.raises(ColumnError, match="'prefix_len': it has tokens, other"):
        SequenceSet.from_parquet(path)
