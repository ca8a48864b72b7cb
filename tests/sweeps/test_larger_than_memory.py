"""Sweeps whose values are left in their parts: the numbers, to the bit, of those that are held in memory."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import memlens as ml
from memlens.errors import ResultError, WriteError
from memlens.results import storage
from memlens.sweeps import run as sweeping
from tests.small import corrupted, ragged

HALF = ml.Intervention("half", [("blocks.1.hook_mlp_out", lambda x, hook: x / 2)])
NAN = ml.Intervention("nan", [("blocks.0.hook_attn_out", lambda x, hook: x * torch.nan)])
HEADS = [(0, 1), (1, 0), (1, 1)]
Work = Callable[..., ml.Result]


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part holds one batch and the fewest interventions."""
    monkeypatch.setattr("memlens.sweeps.shards._SHARD_FLOPS", {"cpu": 0.0, "cuda": 0.0})


def leave_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every result as a large one, of which a few cells are read at once."""
    monkeypatch.setattr(storage, "_LAZY", 0)
    monkeypatch.setattr("memlens.sweeps.shards._LARGEST_BLOCK", 1)
    for name in ("_READ", "_CHUNK", "_IN_MEMORY"):
        monkeypatch.setattr(storage, name, 100)


def pairs(model: Any, **options: Any) -> ml.Result:
    return ml.instruments.ablate_head_pairs(model, ragged(), HEADS, mode="zero", **options)


def cumulative(model: Any, **options: Any) -> ml.Result:
    return ml.instruments.ablate_heads_cumulatively(model, ragged(), HEADS, mode="zero", **options)


def neurons(model: Any, **options: Any) -> ml.Result:
    """Controls are drawn twice and the dominant ones once, so that some cells are empty."""
    choice: dict[str, Any] = {"selection": ["dominant", "random"], "n_draws": 2}
    return ml.knock_out_neurons(model, ragged(), top_k=[1, 4], windows=1, **choice, **options)


WORKS: dict[str, Work] = {
    "sweep": lambda model, **o: ml.sweep(model, ragged(), [HALF, NAN], **o),
    "patching": lambda model, **o: ml.patch_activations(model, ragged(), corrupted(ragged()), **o),
    "patching a run": lambda model, **o: ml.patch_activations(model, ragged(), HALF, per_token=True, **o),
    "pairs": lambda model, **o: pairs(model, per_token=True, **o),
    "cumulative": cumulative,
    "neurons": neurons,
    "noise": lambda model, **o: ml.perturb_residual(model, ragged(), alphas=[0.0, 0.5], n_draws=2, **o),
    "depth": lambda model, **o: ml.instruments.unlearning_depth(
        model, ragged(), retain=model, edited=HALF, **o
    ),
}


@pytest.mark.parametrize("name", WORKS)
def test_values_are_those_of_a_result_in_memory(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    options: dict[str, Any] = {"batch_size": 2, "progress": False}
    whole = WORKS[name](model, out=tmp_path / "a", **options)
    leave_in_files(monkeypatch)
    lazy = WORKS[name](model, out=tmp_path / "b", **options)
    kept = ml.load_result(tmp_path / "b" / "result.nc", lazy=False)
    assert kept.settings == whole.settings
    for found in (lazy.data.compute(), kept.data):
        assert found.drop_attrs(deep=False).identical(whole.data.drop_attrs(deep=False))
        for variable, array in whole.data.data_vars.items():
            assert found[variable].dtype == array.dtype
            assert found[variable].values.tobytes() == array.values.tobytes()
    numbers = [array for array in lazy.data.data_vars.values() if array.dtype.kind == "f"]
    assert all(array.chunks is not None or array.nbytes <= 100 for array in numbers)


def test_accuracies_of_tasks_are_those_of_a_result_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ml.load_model("zoo/pythia-xs")
    tasks = ml.tasks.local_tasks("zoo", model, n=5)[:2]
    edits = ml.edits.attention_bypasses(model)
    options: dict[str, Any] = {"batch_size": 4, "progress": False}
    whole = ml.evaluate_tasks(model, tasks, edits, out=tmp_path / "a", **options)
    leave_in_files(monkeypatch)
    lazy = ml.evaluate_tasks(model, tasks, edits, out=tmp_path / "b", **options)
    assert len(lazy["accuracy"].chunksizes["sequence"]) > 2
    assert lazy.data.drop_attrs(deep=False).identical(whole.data.drop_attrs(deep=False))


def drawn_sweep(
    monkeypatch: pytest.MonkeyPatch, model: Any, out: Path, n: int = 40, sites: int = 64
) -> ml.Result:
    """A sweep of n sequences in 20 batches, with random numbers in place of the model's."""

    def drawn(*given: Any) -> Any:
        items, rows = len(given[2]), given[-1]
        rng = np.random.default_rng([rows.start, items])
        return {"m": rng.random(len(rows))}, {"m": rng.random((len(rows), items))}

    monkeypatch.setattr(sweeping, "run_batches", drawn)
    edits = [ml.Intervention(f"{i}", HALF.hooks, {"layer": i // 8, "head": i % 8}) for i in range(sites)]
    rows = np.random.default_rng(0).integers(0, 90, (n, 3))
    seqs = ml.SequenceSet.from_tokens(rows, 2)
    return ml.sweep(
        model, seqs, edits, ("exact_match",), batch_size=n // 20, out=out, part="0/1", progress=False
    )


@pytest.fixture
def drawn(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ml.Result:
    """The result of `drawn_sweep` in memory, whose parts are in `tmp_path`."""
    found = drawn_sweep(monkeypatch, tiny_model("gpt_neox", "bridge"), tmp_path)
    (tmp_path / "result.nc").unlink()
    return found


def test_parts_are_gathered_and_written_in_little_memory(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memlens.sweeps.shards._SHARD_FLOPS", {"cpu": 1e12, "cuda": 1e12})
    whole = drawn_sweep(monkeypatch, tiny_model("gpt_neox", "bridge"), tmp_path, 2000, 512)
    (tmp_path / "result.nc").unlink()
    for name in ("_LAZY", "_READ", "_CHUNK", "_IN_MEMORY"):
        monkeypatch.setattr(storage, name, 2**17)
    ml.gather(tmp_path).save(tmp_path / "first.nc")  # imports what is needed
    tracemalloc.start()
    gathered = ml.gather(tmp_path)
    gathered.save(tmp_path / "gathered.nc")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert whole["m"].nbytes == 8_192_000
    assert peak < 5_000_000, peak
    assert len(gathered["m"].chunksizes["sequence"]) == 20
    monkeypatch.undo()
    again = ml.load_result(tmp_path / "gathered.nc")
    assert again.data.drop_attrs().identical(whole.data.drop_attrs())


def test_a_part_that_is_lost_or_damaged_when_it_is_read_is_named(
    drawn: ml.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_in_files(monkeypatch)
    gathered = ml.gather(tmp_path)
    first, second, *_ = sorted(tmp_path.glob("*.npz"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ResultError, match=rf"{second.name} does not belong to"):
        gathered.save(tmp_path / "gathered.nc")
    second.unlink()
    with pytest.raises(ResultError, match=rf"{second.name} is gone: run the sweep again"):
        gathered["m"].sum().compute()
    assert not list(tmp_path.glob("*gathered*"))


def test_a_full_disk_loses_no_part(
    drawn: ml.Result, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_in_files(monkeypatch)
    parts = {path: path.read_bytes() for path in tmp_path.glob("*.npz")}
    model = tiny_model("gpt_neox", "bridge")
    with monkeypatch.context() as full:
        full.setattr(storage.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
        with pytest.raises(WriteError, match=r"result\.nc cannot be written .* are needed"):
            drawn_sweep(monkeypatch, model, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.npz")} == parts
    assert not list(tmp_path.glob("*result.nc*"))
    again = drawn_sweep(monkeypatch, model, tmp_path)
    assert again["m"].chunks is not None
    assert again.data.drop_attrs().identical(drawn.data.drop_attrs())


def test_a_save_that_fails_waits_for_what_still_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A portion that is written after another one has failed must not make the removed file anew."""
    array = pytest.importorskip("dask.array")
    monkeypatch.setattr(storage, "_IN_MEMORY", 0)
    monkeypatch.setattr(storage, "_READ", 1)

    def portion(block_id: tuple[int, ...]) -> np.ndarray:
        time.sleep(0.3 * block_id[0])
        if block_id == (0,):
            raise ResultError("the first part is gone")
        return np.ones(1)

    values = array.map_blocks(portion, chunks=((1,) * 4,), dtype=float)
    with pytest.raises(ResultError, match="the first part is gone"):
        storage.save_dataset(xr.Dataset({"m": ("sequence", values)}), tmp_path / "a.nc")
    time.sleep(1.5)
    assert not list(tmp_path.iterdir())
