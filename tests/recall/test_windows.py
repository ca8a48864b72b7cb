from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from memlens.recall.corpus.windows import open_windows, shuffled
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
