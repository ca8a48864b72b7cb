"""Sweeps on workers equal those of one process to the last bit, whatever happens to a worker."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import memlens as ml
from memlens.errors import InterventionError, OptionError, UnfinishedError, WorkerError
from memlens.store.carrying import packed, unpacked
from memlens.store.executors import work_on
from tests.devices import dev
from tests.small import corrupted, ragged
from tests.tiny import write_tiny


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part holds one sequence and the fewest interventions; and nothing waits for long."""
    monkeypatch.setattr("memlens.sweeps.shards._SHARD_FLOPS", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr("memlens.store.executors._POLL", 0.05)
    monkeypatch.setattr("memlens.store.sharing._LOOK", 0.05)


def edits(model: Any, pause: float = 0.0) -> list[ml.Intervention]:
    """Patches, ablations with references, and a hook of one's own that closes over a number."""

    def slow(x: torch.Tensor, hook: Any) -> torch.Tensor:
        time.sleep(pause)
        return x * 0.5

    own = ml.Intervention("own", [("blocks.1.hook_mlp_out", slow)])
    patched = ml.edits.activation_patches(model, corrupted(ragged()))
    ablated = ml.edits.head_ablations(model, ragged(), mode="resample")
    found = [*patched, *ablated, *[own] * 20]
    return [ml.Intervention(f"{i} {e.name}", e.hooks) for i, e in enumerate(found)]


def swept(model: Any, out: Path | None, items: Any = None, **options: Any) -> ml.Result:
    options = {"batch_size": 1, "progress": False, **options}
    return ml.sweep(model, ragged(), items or edits(model), out=out, **options)


def same(a: ml.Result, b: ml.Result) -> bool:
    return a.data.drop_attrs().identical(b.data.drop_attrs())


class Unreliable:
    """An executor in this process that loses parts: `lose[n]` times the n-th."""

    def __init__(self, lose: dict[int, int]) -> None:
        self.lose, self.numbers, self.tries = lose, {}, Counter()

    def submit(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        name = args[2]
        number = self.numbers.setdefault(name, len(self.numbers))
        self.tries[number] += 1
        if self.tries[number] <= self.lose.get(number, 0):
            future.set_exception(RuntimeError("its process was killed"))
        else:
            future.set_result(fn(*args))
        return future


def test_workers_give_what_one_process_gives(tiny_folder: Any, tmp_path: Path) -> None:
    model = ml.load_model(tiny_folder("gpt_neox"), device=dev())
    whole = swept(model, tmp_path / "one")
    with ThreadPoolExecutor(2) as executor:
        found = swept(model, tmp_path / "many", executor=executor)
    assert same(found, whole)
    assert len(list((tmp_path / "many").glob("*.npz"))) > 8
    assert not list((tmp_path / "many").glob(".*"))
    next(iter((tmp_path / "many").glob("*.npz"))).unlink()
    (tmp_path / "many" / "result.nc").unlink()
    left = tmp_path / "many" / ".claims" / f"{next(iter((tmp_path / 'many').glob('*.npz'))).name}.0"
    left.parent.mkdir()
    left.touch()  # its owner was killed after the part and before it could remove the claim
    with ThreadPoolExecutor(2) as executor:
        found = swept(model, tmp_path / "many", executor=executor)
    assert same(found, whole)
    assert not list((tmp_path / "many").glob(".*"))
    for part in (tmp_path / "one").glob("*.npz"):
        assert part.read_bytes() == (tmp_path / "many" / part.name).read_bytes()
    assert ml.gather(tmp_path / "many").data.identical(found.data)
    (tmp_path / "many" / "result.nc").unlink()
    gathered = ml.gather(tmp_path / "many")
    assert same(gathered, found)
    assert gathered.settings == found.settings
    assert gathered["exact_match"].attrs == found["exact_match"].attrs


def test_shares_of_a_sweep_are_gathered(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", "bridge")
    ablate = {"batch_size": 1, "progress": False, "mode": "zero"}
    whole = ml.ablate_heads(model, ragged(), **ablate)
    with pytest.raises(UnfinishedError, match=r"2 of 4 parts"):
        ml.ablate_heads(model, ragged(), out=tmp_path, part=(0, 2), **ablate)
    with pytest.raises(UnfinishedError, match=r"missing: sequences-000001-.*, sequences-000003-"):
        ml.gather(tmp_path)
    last = ml.ablate_heads(model, ragged(), out=tmp_path, part="1/2", **ablate)
    assert same(last, whole)
    (tmp_path / "result.nc").unlink()
    assert same(ml.gather(tmp_path), whole)
    next(iter(tmp_path.glob("*.npz"))).unlink()
    assert same(ml.ablate_heads(model, ragged(), out=tmp_path, part="auto", **ablate), whole)


def test_lost_parts_are_submitted_again_a_few_times(
    tiny_folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ml.load_model(tiny_folder("gpt_neox"), device=dev())
    items = edits(model)[:40]
    whole = swept(model, tmp_path / "one", items)
    with caplog.at_level(logging.WARNING, logger="memlens"):
        found = swept(model, tmp_path / "a", items, executor=Unreliable({1: 2, 3: 1}))
    assert same(found, whole)
    assert caplog.text.count("was lost with its worker (RuntimeError: its process was killed)") == 3
    unreliable = Unreliable({1: 9})
    with pytest.raises(WorkerError, match=r"1 parts were lost 3 times .* such as sequences-000000-.*killed"):
        swept(model, tmp_path / "b", items, executor=unreliable)
    assert unreliable.tries[1] == 3
    assert len(list((tmp_path / "b").glob("*.npz"))) == len(list((tmp_path / "a").glob("*.npz"))) - 1
    assert same(swept(model, tmp_path / "b", items), whole)


def test_an_error_of_a_hook_is_the_error_of_the_call(tiny_folder: Any, tmp_path: Path) -> None:
    model = ml.load_model(tiny_folder("gpt_neox"), device=dev())

    def fails(x: torch.Tensor, hook: Any) -> torch.Tensor:
        raise OSError("no such file")

    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(InterventionError, match=r"intervention 'fails' raised OSError: no such file"),
    ):
        swept(
            model, tmp_path, [ml.Intervention("fails", [("blocks.1.hook_mlp_out", fails)])], executor=executor
        )
    assert not list(tmp_path.glob("*.npz"))


def test_what_workers_cannot_have_is_refused_before_anything_starts(tiny_folder: Any, tmp_path: Path) -> None:
    model = ml.load_model(tiny_folder("gpt_neox"), device=dev())

    class Never:
        def submit(self, *_: Any) -> Any:
            raise AssertionError

    class Holds:
        def __reduce__(self) -> Any:
            raise TypeError("it holds an open connection")

        def __getstate__(self) -> None:
            return None  # so that it has a fingerprint

        def __call__(self, x: torch.Tensor, hook: Any) -> torch.Tensor:
            return x * 2

    item = ml.Intervention("holds", [("blocks.1.hook_mlp_out", Holds())])
    with pytest.raises(WorkerError, match=r"cannot be sent to other processes \(TypeError: it holds an open"):
        swept(model, tmp_path / "a", [item], executor=Never())
    own = [ml.Intervention("half", [("blocks.1.hook_mlp_out", lambda x, hook: x / 2)])]
    with pytest.raises(OptionError, match="need a folder that all workers share: give out="):
        swept(model, None, own, executor=Never())
    with pytest.raises(OptionError, match="contradict"):
        swept(model, tmp_path / "b", own, executor=Never(), part="auto")
    with pytest.raises(WorkerError, match=r"has no submit\(\)"):
        swept(model, tmp_path / "b", own, executor=4)
    model.hook_dict["blocks.0.hook_mlp_out"].add_hook(lambda x, hook: x * 2)
    with pytest.raises(WorkerError, match=r"has a hook on 'blocks\.0\."):
        swept(model, tmp_path / "c", own, executor=Never())
    model.reset_hooks()
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(WorkerError, match="was edited after it was loaded"):
        swept(model, tmp_path / "d", own, executor=Never())
    bridge = ml.load_model(getattr(ml.load_model(tiny_folder("llama"), backend="bridge"), "original_model"))  # noqa: B009
    with pytest.raises(WorkerError, match="was not loaded by a name or a path"):
        swept(bridge, tmp_path / "e", own, executor=Never())
    assert not list(tmp_path.rglob("*.npz"))


def test_a_worker_that_loads_another_model_refuses(tmp_path: Path) -> None:
    folder, other = (write_tiny("llama", tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    model = ml.load_model(folder, device=dev())
    content = packed([model, ml.Trunk(model), model.blocks[0]])
    found, trunk, block = unpacked(content)
    assert trunk.model is found
    assert found.blocks[0] is block
    assert found is not model
    model = ml.load_model(other, device=dev())
    content = packed(model)
    (other / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(WorkerError, match=r"loaded by a worker, is not the model of this run"):
        unpacked(content)


def test_a_job_that_was_tampered_with_is_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "job").write_bytes(packed("anything"))
    found = work_on(str(tmp_path / "job"), "0" * 32, "part", None)
    assert isinstance(found.error, WorkerError)
    assert "is not what the driver wrote" in str(found.error)


def kill_one(folder: Path, after: int) -> None:
    """Kill the process that works on a part, once some parts are done."""
    while True:
        for claim in (folder / ".claims").glob("*") if len(list(folder.glob("*.npz"))) >= after else ():
            try:
                process = json.loads(claim.read_text())["process"]
            except (OSError, ValueError):
                continue
            os.kill(process, signal.SIGKILL)
            (folder.parent / "killed").write_text(str(process))
            return
        time.sleep(0.01)


def check_with_a_kill(executor: Any, folder: Path, tmp_path: Path) -> None:
    """A sweep whose worker is killed in the middle equals that of one process, bit for bit, part by part."""
    model = ml.load_model(folder, device=dev())
    items = edits(model, pause=0.02)
    thread = threading.Thread(target=kill_one, args=(tmp_path / "many", 4), daemon=True)
    thread.start()
    found = swept(model, tmp_path / "many", items, executor=executor)
    thread.join(5)
    assert (tmp_path / "killed").exists()
    assert same(found, swept(model, tmp_path / "one", items))
    for part in (tmp_path / "one").glob("*.npz"):
        assert part.read_bytes() == (tmp_path / "many" / part.name).read_bytes()
    assert {f.name for f in (tmp_path / "many").iterdir()} - {
        f.name for f in (tmp_path / "one").iterdir()
    } == {"frame.nc"}


@pytest.mark.slow
def test_a_dask_cluster_whose_worker_is_killed(
    tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes have to start and to import everything, which takes some twenty seconds."""
    distributed = pytest.importorskip("dask.distributed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
    )
    with cluster, distributed.Client(cluster) as client:
        check_with_a_kill(client.get_executor(), tiny_folder("gpt_neox"), tmp_path)


@pytest.mark.slow
def test_a_pool_of_processes_whose_worker_is_killed(
    tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with (
        caplog.at_level(logging.WARNING, logger="memlens"),
        ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor,
    ):
        check_with_a_kill(executor, tiny_folder("gpt_neox"), tmp_path)
    assert "the executor is broken" in caplog.text
