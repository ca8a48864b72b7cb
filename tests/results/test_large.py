"""Results larger than memory, read from their file some sequences at a time: the numbers of small ones."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import memlens as ml
from memlens.errors import OptionError, WriteError
from memlens.results import storage
from memlens.results.result import Result
from memlens.results.statistics import comparison, intervals, resampling
from memlens.results.statistics.comparison import compare_groups
from memlens.results.statistics.resampling import EXACT_ROWS, SideBySide, bootstrap_means, sums_and_counts
from memlens.results.storage import load_result

N = 60


@pytest.fixture
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat 60 sequences as if they were many."""
    for module in (resampling, comparison):
        monkeypatch.setattr(module, "EXACT_ROWS", 20)
    monkeypatch.setattr(resampling, "_ROWS", 7)
    monkeypatch.setattr(storage, "_READ", 200)
    monkeypatch.setattr(storage, "_CHUNK", 100)
    monkeypatch.setattr(storage, "_IN_MEMORY", 1000)
    monkeypatch.setattr(storage, "_ROW_GROUP", 50)


def _result(n: int = N, seed: int = 0) -> Result:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, 2, 3)).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = np.nan
    ids = [f"s{i}" for i in range(n)]
    coords = {"sequence": ids, "domain": ("sequence", np.where(rng.random(n) < 0.5, "code", "text"))}
    data = {
        "target_logprob": (("sequence", "layer", "head"), values),
        "target_logprob_baseline": ("sequence", rng.normal(size=n).astype(np.float32)),
        "exact_match": (("sequence", "layer"), (rng.random((n, 2)) < 0.4).astype(np.int8)),
        "note": ("sequence", np.array([None] * (n - 3) + ["a", "b", "c"], dtype=object)),
    }
    return Result.create(xr.Dataset(data, coords), kind="head_ablation", settings={"engine": "fast"})


@pytest.fixture
def both(small_portions: None, tmp_path: Path) -> tuple[Result, Result]:
    whole = _result()
    return whole, load_result(whole.save(tmp_path / "result.nc"), lazy=True)


def test_values_stay_in_the_file_and_come_back_equal(both: tuple[Result, Result]) -> None:
    whole, lazy = both
    assert len(lazy["target_logprob"].chunks[0]) > 5
    assert lazy["exact_match"].chunks is None  # small ones are read
    xr.testing.assert_identical(lazy.data.compute(), whole.data)
    assert {n: v.dtype for n, v in lazy.data.variables.items()} == {
        n: v.dtype for n, v in whole.data.variables.items()
    }
    assert lazy.settings == whole.settings


@pytest.mark.parametrize("of", ["value", "effect"])
@pytest.mark.parametrize("group", [None, "domain"])
@pytest.mark.parametrize("method", ["auto", "t"])
def test_means_and_intervals_are_those_of_the_whole(
    of: str, group: str | None, method: str, both: tuple[Result, Result]
) -> None:
    whole, lazy = both
    options = {"of": of, "group": group, "method": method, "n_resamples": 50}
    xr.testing.assert_allclose(lazy.mean_ci(**options), whole.mean_ci(**options), rtol=1e-12)
    inner = whole.mean_ci(("sequence", "head"), of=of, n_resamples=50)
    xr.testing.assert_allclose(lazy.mean_ci(("sequence", "head"), of=of, n_resamples=50), inner, rtol=1e-6)


def test_comparisons_and_figures_are_those_of_the_whole(both: tuple[Result, Result]) -> None:
    whole, lazy = both
    options = {"n_resamples": 40, "n_permutations": 40}
    found = [r.compare_groups("target_logprob", "domain", of="effect", **options) for r in (whole, lazy)]
    xr.testing.assert_allclose(*found, rtol=1e-12)
    controls = _result(seed=1).data.assign_coords(match=("sequence", [f"s{i // 2}" for i in range(N)]))
    found = [compare_groups(r, Result(controls), "target_logprob", **options) for r in (whole, lazy)]
    xr.testing.assert_allclose(*found, rtol=1e-12)
    assert found[0].attrs["paired"]
    assert lazy.plot("target_logprob", n_resamples=20) == whole.plot("target_logprob", n_resamples=20)


def test_a_restored_share_is_that_of_the_whole(small_portions: None, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "m": (("sequence", "layer"), rng.random((N, 40))),
        "m_clean": ("sequence", 1 + rng.random(N)),
        "m_corrupt": ("sequence", -rng.random(N)),
    }
    whole = Result.create(xr.Dataset(arrays), kind="activation_patching")
    lazy = load_result(whole.save(tmp_path / "patched.nc"), lazy=True)
    assert lazy["m"].chunks is not None
    ours, theirs = (ml.stats.restored_share(r, n_resamples=40) for r in (lazy, whole))
    xr.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_a_table_is_written_in_row_groups(both: tuple[Result, Result], tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    whole, lazy = both
    path = lazy.to_parquet(tmp_path / "table.parquet")
    assert pq.ParquetFile(path).num_row_groups > 3
    table = pd.read_parquet(path)
    pd.testing.assert_frame_equal(table, whole.to_frame("all"), check_dtype=False)
    assert table["note"].isna().sum() == 6 * (N - 3)  # the first groups hold nothing else
    assert table.attrs["kind"] == "head_ablation"


def test_a_file_that_the_disk_has_no_space_for_is_refused(
    both: tuple[Result, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WriteError, match="are needed"):
        both[1].save(tmp_path / "copy.nc")
    assert not (tmp_path / "copy.nc").exists()


def test_without_dask_only_the_explicit_wish_is_refused(
    both: tuple[Result, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_HAS_DASK", False)
    monkeypatch.setattr(storage, "_LAZY", 10)
    assert load_result(tmp_path / "result.nc")["target_logprob"].chunks is None
    with pytest.raises(OptionError, match=r"memlens\[dask\]"):
        load_result(tmp_path / "result.nc", lazy=True)
    monkeypatch.setattr(storage, "_HAS_DASK", True)
    assert load_result(tmp_path / "result.nc")["target_logprob"].chunks is not None


def test_damage_in_values_that_stay_in_the_file_is_found_when_they_are_read(
    both: tuple[Result, Result], tmp_path: Path
) -> None:
    path = tmp_path / "result.nc"
    content = bytearray(path.read_bytes())
    stored = both[0]["target_logprob"].values
    import h5py

    with h5py.File(path) as file:
        chunk = file["target_logprob"].id.get_chunk_info(0)
    assert stored.nbytes > chunk.size
    content[chunk.byte_offset + chunk.size // 2] ^= 0xFF
    path.write_bytes(content)
    lazy = load_result(path, lazy=True)
    with pytest.raises(OSError, match=r"[Cc]hecksum|[Cc]an't.* read|filter"):
        lazy.mean_ci()


def test_sums_of_many_rows_skip_what_is_missing_and_each_row_is_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(EXACT_ROWS + 5000, 3)).astype(np.float32)
    table[rng.random(table.shape) < 0.2] = np.nan
    read: list[tuple[int, int]] = []

    class OnDisk:
        shape = table.shape

        def __len__(self) -> int:
            return len(table)

        def __getitem__(self, rows: slice) -> np.ndarray:
            read.append((rows.start, rows.stop))
            return table[rows]

    sums, counts = sums_and_counts(OnDisk())
    np.testing.assert_allclose(sums, np.nansum(table, 0, dtype=float))
    assert counts.tolist() == np.isfinite(table).sum(0).tolist()
    read.clear()
    found = bootstrap_means(SideBySide([OnDisk(), OnDisk()]), 600, 0)
    assert len(read) == 2 * len(set(read))
    np.testing.assert_array_equal(found[:, :3], found[:, 3:])
    np.testing.assert_allclose(found[:, :3], bootstrap_means(table, 600, 0), rtol=1e-12)
    np.testing.assert_allclose(found.std(0)[:3], np.nanstd(table, 0) / np.sqrt(counts), rtol=0.12)


def test_permutations_of_many_sequences_agree_with_those_of_few_and_take_little_memory() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(0.05, 1, (6000, 2)), rng.normal(0, 1, (5000, 2))
    y[:700, 1] = np.nan
    tracemalloc.start()
    many = comparison._unpaired_p(x, y, 400, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20  # all labels at once: 35 MB as truth values, 280 MB as numbers
    gap = np.nanmean(x, 0) - np.nanmean(y, 0)
    error = np.sqrt(np.nanvar(x, 0) / len(x) + np.nanvar(y, 0) / np.isfinite(y).sum(0))
    from scipy import stats

    np.testing.assert_allclose(many, 2 * stats.norm.sf(abs(gap / error)), atol=0.05)
    difference = rng.normal(0.012, 1, (EXACT_ROWS + 3000, 1))
    p = comparison._paired_p(difference, 400, 0)
    expected = 2 * stats.norm.sf(abs(difference.mean() / difference.std() * np.sqrt(len(difference))))
    assert p[0] == pytest.approx(expected, abs=0.06)


def test_the_mean_of_several_controls_skips_what_is_missing() -> None:
    values = np.array([[1.0, np.nan], [3.0, np.nan], [5.0, 7.0], [np.nan, 2.0]])
    array = xr.DataArray(values, dims=("sequence", "layer"), coords={"sequence": list("abcd")})
    found = comparison._averaged(array, np.array(["x", "x", "y", "x"]), ["y", "x"])
    np.testing.assert_array_equal(found.values, [[5.0, 7.0], [2.0, 2.0]])


def test_is_binary_looks_at_every_portion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "EXACT_ROWS", 4)
    monkeypatch.setattr(resampling, "_ROWS", 2)
    assert intervals.is_binary(np.array([np.nan] * 8 + [1.0]))
    assert not intervals.is_binary(np.array([0.0] * 8 + [0.5]))
    assert not intervals.is_binary(np.array([np.nan] * 9))
