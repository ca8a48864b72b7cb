from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from memlens.errors import ColumnError, SequenceError, SourceNotFoundError, VocabularyError
from memlens.recall.corpus.windows import Block, open_windows, shuffled
from memlens.recall.matching import match_controls
from memlens.sequences.set import SequenceSet


@pytest.mark.parametrize("n", [1, 2, 3, 15, 16, 17, 1000, 4097])
def test_shuffled_is_a_permutation(n: int) -> None:
    for seed in range(3):
        assert sorted(shuffled(np.arange(n), n, seed).tolist()) == list(range(n))


def test_shuffled_is_a_function_of_each_index_and_of_the_seed() -> None:
    whole = shuffled(np.arange(5000), 5000, 7)
    assert shuffled(np.arange(40, 60), 5000, 7).tolist() == whole[40:60].tolist()
    assert (whole == shuffled(np.arange(5000), 5000, 8)).mean() < 0.01
    assert abs(np.corrcoef(whole, np.arange(5000))[0, 1]) < 0.05
    # Neighbours of a random order are a third of the range apart.
    assert np.abs(np.diff(whole)).mean() / 5000 == pytest.approx(1 / 3, abs=0.02)


def plain_place(index: int, n: int, seed: int) -> int:
    """Where an index goes, by Python's own numbers: six rounds on two halves, again until it is below n."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = [int(key) for key in np.random.default_rng(seed).integers(0, 2**63, 6, dtype=np.uint64)]
    value = index
    while True:
        left, right = value >> half, value & (2**half - 1)
        for key in keys:
            mixed = (right + key) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ mixed >> 31) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ (mixed ^ mixed >> 29) & (2**half - 1)
        value = left << half | right
        if value < n:
            return value


@pytest.mark.parametrize("n", [1, 2, 5, 16, 17, 700])
def test_a_seed_s_order_stays_so_that_scans_of_earlier_versions_go_on(n: int) -> None:
    for seed in (0, 9):
        assert shuffled(np.arange(n), n, seed).tolist() == [plain_place(i, n, seed) for i in range(n)]


def test_a_corpus_too_large_to_shuffle_in_memory() -> None:
    n = 10**12
    found = shuffled(np.arange(1000), n, 0)
    assert len(set(found.tolist())) == 1000
    assert found.min() >= 0
    assert found.max() < n
    assert found.mean() / n == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("n", "limit", "sizes"), [(10, None, [4, 4, 2]), (10, 6, [4, 2]), (10, 8, [4, 4])])
def test_blocks_hold_every_window_once(n: int, limit: int | None, sizes: list[int]) -> None:
    array = np.arange(3 * n).reshape(n, 3)
    for source in (array, array.tolist(), iter(array.tolist())):
        blocks = list(open_windows(source, 2, None, None).blocks(0, 4, limit))
        assert [len(block) for block in blocks] == sizes
        rows = np.concatenate([block.row for block in blocks])
        assert len(set(rows.tolist())) == sum(sizes)
        tokens = np.concatenate([block.tokens for block in blocks])
        assert tokens.tolist() == array[rows, :2].tolist()
        assert [block.whole for block in blocks] == [limit != 6 or size == 4 for size in sizes]


def test_each_kind_of_source_says_what_it_is() -> None:
    rows = [[1, 2, 3], [4, 5, 6]]
    sources = {"array": np.array(rows), "rows": rows, "stream": iter(rows)}
    assert {name: open_windows(source, 2, None, None).kind for name, source in sources.items()} == {
        name: name for name in sources
    }


def test_windows_of_a_memory_map_are_read_where_they_stand(tmp_path: Path) -> None:
    np.save(tmp_path / "corpus.npy", np.arange(60, dtype=np.uint16).reshape(4, 15))
    windows = open_windows(tmp_path / "corpus.npy", 5, 4, None)
    assert windows.n_rows == 4 * 3
    for block in windows.blocks(3, 5):
        for ids, row, start in zip(block.tokens, block.row, block.start, strict=True):
            assert ids.tolist() == list(range(15 * row + start, 15 * row + start + 5))
            assert start % 4 == 0


def test_matching_on_a_further_column_is_optimal() -> None:
    counts, differs = np.arange(50), 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        ours, pool = (
            SequenceSet.from_tokens(
                rng.integers(0, 50, (n, 6)), 3, table=pd.DataFrame({"x": rng.normal(size=n)})
            )
            for n in (3, 6)
        )
        found = match_controls(ours, pool, counts, n_per=1, seed=0, also=["x"])
        raw = [
            np.stack([np.log1p(s.tokens.numpy()).mean(1), s.table["x"].to_numpy()], 1) for s in (ours, pool)
        ]
        a, b = (values / np.concatenate(raw).std(0) for values in raw)
        cost = np.abs(a[:, None] - b[None]).sum(-1)
        best = min(permutations(range(6), 3), key=lambda chosen: cost[range(3), chosen].sum())
        assert found.controls.tokens.tolist() == pool.tokens[list(best)].tolist()
        assert list(found.balance.index) == ["length", "prefix_len", "frequency", "x"]
        plain = match_controls(ours, pool, counts, n_per=1, seed=0)
        differs += plain.controls.tokens.tolist() != found.controls.tokens.tolist()
    assert differs >= 4


rows_of_ids = st.lists(st.lists(st.integers(0, 9), max_size=9), min_size=1, max_size=8)


def plain_windows(row: list[int], length: int, stride: int | None) -> list[tuple[int, list[int]]]:
    """Where the windows of a row begin, and their ids."""
    starts = [0] if stride is None else range(0, len(row), stride)
    return [(s, row[s : s + length]) for s in starts if s + length <= len(row)]


@settings(deadline=None)
@given(
    rows_of_ids, st.integers(1, 4), st.one_of(st.none(), st.integers(1, 5)), st.integers(1, 5), st.booleans()
)
def test_windows_of_rows_equal_a_plain_loop(
    rows: list[list[int]], length: int, stride: int | None, size: int, stream: bool
) -> None:
    windows = open_windows(iter(rows) if stream else rows, length, stride, None)
    assert windows.n_rows == (None if stream else len(rows))
    assert windows.table is None
    blocks = list(windows.blocks(3, size))
    found = sorted(
        (row, start, ids)
        for block in blocks
        for row, start, ids in zip(
            block.row.tolist(), block.start.tolist(), block.tokens.tolist(), strict=True
        )
    )
    every = [(i, s, ids) for i, row in enumerate(rows) for s, ids in plain_windows(row, length, stride)]
    assert found == every
    n_read = [min(size, len(rows) - start) for start in range(0, len(rows), size)]
    assert [block.n_rows for block in blocks] == n_read
    assert sum(block.n_short for block in blocks) == sum(len(row) < length for row in rows)
    assert all(block.whole for block in blocks)
    assert {part.dtype for b in blocks for part in (b.tokens, b.row, b.start)} == {np.dtype(np.int64)}


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(4, 12), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 5)))
def test_windows_of_arrays_equal_a_plain_loop(n: int, width: int, length: int, stride: int | None) -> None:
    table = np.arange(n * width, dtype=np.int32).reshape(n, width)
    for array, step in ((table, stride), (table.ravel(), length if stride is None else stride)):
        windows = open_windows(array, length, stride, None)
        rows = array.reshape(-1, array.shape[-1]).tolist()
        every = [(i, s, ids) for i, row in enumerate(rows) for s, ids in plain_windows(row, length, step)]
        assert windows.n_rows == len(every)
        (block,) = windows.blocks(0, len(every) + 1)
        parts = (block.row.tolist(), block.start.tolist(), block.tokens.tolist())
        assert sorted(zip(*parts, strict=True)) == every
        assert (block.n_rows, block.n_short, len(block)) == (len(every), 0, len(every))
        assert block.tokens.dtype == np.int64


def test_limits_cut_a_scan_and_the_last_block_says_so() -> None:
    rows = [[i, i] for i in range(10)]
    for limit, sizes in ((None, [4, 4, 2]), (9, [4, 4, 1]), (8, [4, 4]), (4, [4]), (3, [3]), (99, [4, 4, 2])):
        for source in (rows, iter(rows), np.array(rows)):
            blocks = list(open_windows(source, 2, None, None).blocks(0, 4, limit))
            assert [block.n_rows for block in blocks] == sizes
            full = [size == 4 or limit in (None, 99) for size in sizes]
            assert [block.whole for block in blocks] == full
    assert not list(open_windows(iter([]), 2, None, None).blocks(0, 4))


def test_each_block_is_in_an_order_of_its_own_that_the_seed_decides() -> None:
    def starts(seed: int) -> list[list[int]]:
        blocks = open_windows(iter([list(range(40))] * 2), 2, 1, None).blocks(seed, 1)
        return [block.start.tolist() for block in blocks]

    first, second = starts(0)
    assert sorted(first) == sorted(second) == list(range(39))
    assert len({tuple(first), tuple(second), tuple(range(39)), tuple(starts(1)[0])}) == 4
    assert starts(0) == [first, second]
    expected = [np.random.default_rng([0, start]).permutation(39).tolist() for start in (0, 1)]
    assert [first, second] == expected  # so that scans of older versions go on


def test_a_block_is_identified_by_ids_rows_and_places() -> None:
    ids, row, start = np.array([[1, 2], [3, 4]]), np.array([0, 1]), np.array([0, 5])
    block = Block(ids, row, start, 2, 0)
    assert block.whole
    same = Block(np.asfortranarray(ids.astype(np.int32)), row.astype(np.int16), start, 9, 9, whole=False)
    assert same.fingerprint == block.fingerprint
    assert len(block.fingerprint) == 32
    others = [
        Block(ids + 1, row, start, 2, 0),
        Block(ids, row + 1, start, 2, 0),
        Block(ids, row, start + 1, 2, 0),
    ]
    assert len({block.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_rows_of_every_kind_and_the_column_of_ids() -> None:
    rows = [[1, 2, 3], [4, 5, 6]]
    table = pd.DataFrame({"mine": rows, "tokens": [row[::-1] for row in rows]})
    records = [{"mine": row, "tokens": row[::-1]} for row in rows]
    dataset = Dataset.from_dict({"mine": rows, "tokens": [row[::-1] for row in rows]})
    tensors = [torch.tensor(row, requires_grad=False) for row in rows]
    for source in (table, records, iter(records), dataset):
        for column, expected in (("mine", rows), (None, [row[::-1] for row in rows])):
            if column is None and not isinstance(source, list | pd.DataFrame | Dataset):
                continue  # already read
            (block,) = open_windows(source, 3, None, column).blocks(0, 9)
            assert sorted(block.tokens.tolist()) == sorted(expected)
    for source in (tensors, iter(tensors), torch.tensor(rows), [np.array(row, np.uint8) for row in rows]):
        (block,) = open_windows(source, 3, None, None).blocks(0, 9)
        assert sorted(block.tokens.tolist()) == rows
    seqs = SequenceSet.from_tokens([[1, 2, 3], [4, 5]], 1, table=pd.DataFrame({"domain": ["a", "b"]}))
    windows = open_windows(seqs, 2, None, None)
    assert windows.table is not None
    assert windows.table["domain"].tolist() == ["a", "b"]
    assert windows.n_rows == 2
    for source in (pd.DataFrame({"x": rows}), [{"x": row} for row in rows]):
        with pytest.raises(ColumnError, match=r"no column of token ids: .*x; name it in tokens_column"):
            list(open_windows(source, 2, None, None).blocks(0, 9))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([[1, 2], [[3, 4]]], r"row 1 of the corpus is int64 of shape \(1, 2\)"),
        ([[1, 2], [0.5, 1.5]], r"row 1 of the corpus is float64 of shape \(2,\)"),
        ([[1, 2], 7], r"row 1 of the corpus is int64 of shape \(\)"),
    ],
)
def test_rows_without_ids_are_named(rows: list[Any], words: str) -> None:
    for source in (rows, iter(rows)):
        with pytest.raises(SequenceError, match=words):
            list(open_windows(source, 2, None, None).blocks(0, 9))


def test_the_first_row_with_a_negative_id_is_named() -> None:
    for source in ([[1, 2], [3, -4]], iter([[1, 2], [3, -4]]), np.array([[1, 2], [3, -4]])):
        with pytest.raises(VocabularyError, match="row 1 of the corpus has a negative token id"):
            list(open_windows(source, 2, None, None).blocks(0, 9))
    assert len(list(open_windows([[], [0, 0]], 2, None, None).blocks(0, 9))) == 1  # empty rows are short rows


def test_arrays_without_ids_or_windows_are_refused() -> None:
    for array in (np.zeros((2, 3)), np.zeros((2, 2, 2), int), np.array(3), np.array([[True, False]])):
        with pytest.raises(SequenceError, match=r"give \[row, token\] or \[token\] integers"):
            open_windows(array, 2, None, None)
    lengths = {1: "", 2: ": give prefix_len=1 and suffix_len=1", 5: ": give prefix_len=2 and suffix_len=3"}
    for longest, fits in lengths.items():
        words = f"the longest row of the corpus has {longest} tokens, and 6 are needed{fits}\\."
        with pytest.raises(SequenceError, match=words):
            open_windows(np.zeros((3, longest), int), 6, None, None)
    assert open_windows(np.zeros((3, 2), np.uint8), 2, None, None).n_rows == 3
    for source in ("text.npy", Path("nowhere.npy"), "nowhere.NPY"):
        with pytest.raises(SourceNotFoundError, match="there is no file"):
            open_windows(source, 2, None, None)
    for source in ({"a": [1]}, b"bytes", 5, None):
        with pytest.raises(SequenceError, match=f"a {type(source).__name__} is not a corpus"):
            open_windows(source, 2, None, None)
