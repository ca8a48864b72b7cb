"""Long work is killed (SIGKILL) at random moments and run again until it is done; nothing may be lost.

    python -m tests.kill_loops --kills 100              # each job, until it was killed 100 times
    python -m tests.kill_loops --kills 20 --jobs sweep scan

Work runs in forks of this process, so that a kill costs no import. After each kill what the folder holds must
be valid; at the end it must equal, bit for bit, what an uninterrupted run leaves, with no other file in it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

import memlens as ml
import memlens.sweeps.run
from memlens.benchmark.running import run as run_benchmark
from memlens.benchmark.suites import Suite
from memlens.instruments.decode.lens import TunedLens
from memlens.models.load import load_model
from memlens.organisms.planting.plant import PlantingOptions
from memlens.organisms.training.train import TrainSpec, train
from memlens.recall.corpus.memorized_set import MemorizedSet
from memlens.results.storage import load_result
from memlens.sequences.set import SequenceSet
from tests.devices import dev
from tests.small import corrupted, ragged
from tests.tiny import tiny_huggingface_model, tiny_tokenizer

Holds = dict[str, Any]
"""What a folder holds, by file: contents that can be compared, without times of day."""


@dataclass(frozen=True)
class Job:
    """Long work on a folder.

    Attributes:
        name: Its name.
        work: Does it, or what is left of it.
        begin: Brings the folder into the state before it, such as an older result.
        check: After a kill: whether the folder is valid. Raises if not.
        slow: Whether it takes more than a few seconds.
    """

    name: str
    work: Callable[[Path], object]
    begin: Callable[[Path], object] = lambda folder: folder.mkdir()
    check: Callable[[Path], object] = lambda folder: None
    slow: bool = False


@dataclass(frozen=True)
class Outcome:
    """How often a job was killed, how often it reached its end, and how long it takes without a kill."""

    kills: int
    ends: int
    seconds: float


def kill_loop(job: Job, kills: int, place: Path, seed: int = 0) -> Outcome:
    """Kill a job until it was killed `kills` times and reached its end once more.

    Raises:
        AssertionError: A folder was not valid after a kill, differs at the end from that of an uninterrupted
            run, or has other files; or the work failed by itself.
    """
    whole, moments, killed, ends = place / "whole", random.Random(f"{job.name} {seed}"), 0, 0
    job.begin(whole)
    start = time.monotonic()
    assert _forked(job.work, whole, None), f"{job.name} failed without a kill"
    seconds = time.monotonic() - start
    wanted = holds(whole)
    while killed < kills or not ends:
        out = place / f"killed {ends}"
        job.begin(out)
        # in one attempt of two the kills come early, so that work is also cut off where it goes on
        while not _forked(job.work, out, moments.uniform(0, seconds * moments.choice((1.2, 0.4)))):
            killed += 1
            job.check(out)
            if killed >= kills:
                assert _forked(job.work, out, None), f"{job.name} failed after {killed} kills"
                break
        ends += 1
        found = holds(out)
        assert found.keys() == wanted.keys(), f"{job.name}: {sorted(found.keys() ^ wanted.keys())}"
        different = [name for name in wanted if not _equal(found[name], wanted[name])]
        assert not different, f"{job.name}: {different} differ after {killed} kills"
        shutil.rmtree(out)
    return Outcome(killed, ends, seconds)


def _forked(work: Callable[[Path], object], folder: Path, kill_after: float | None) -> bool:
    """Return whether the work reached its end in a fork, which is killed after some seconds."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            torch.set_num_threads(1)
            warnings.simplefilter("ignore")
            work(folder)
            status = 0
        finally:
            os._exit(status)  # without the parent's atexit
    try:
        deadline = time.monotonic() + (600 if kill_after is None else kill_after)
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                child = 0
                assert os.waitstatus_to_exitcode(status) == 0, "the work failed by itself"
                return True
            time.sleep(0.001)
        assert kill_after is not None, "the work does not end"
        return False
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


_TIMES = {
    "created",
    "seconds",
    "plant_seconds",
    "train_seconds",
    "memlens_attrs",
    "seal",
    "digest",
    "pandas",
    "cpu_seconds",
    "peak_mib",
}


def holds(folder: Path) -> Holds:
    """Return the contents of all files of a folder, hidden ones too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _content(path) for path in files}


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".nc":
        result = load_result(path)
        return result.data.drop_attrs(), result.settings
    if path.suffix == ".pt":
        return _timeless(torch.load(path, weights_only=True))
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pydict()
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(entry) for key, entry in value.items() if key not in _TIMES}
    if isinstance(value, list):
        return [_timeless(entry) for entry in value]
    return value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if hasattr(a, "identical"):
        return bool(a.identical(b))
    return bool(a == b) or (a != a and b != b)


@functools.cache
def _model() -> Any:
    return load_model(
        tiny_huggingface_model("gpt_neox"), tokenizer=tiny_tokenizer(), device=dev(), check_weights=False
    )


def _sweep(folder: Path) -> None:
    sys.modules["memlens.sweeps.shards"]._SHARD_FLOPS = {"cpu": 0.0, "cuda": 0.0}  # pyright: ignore[reportAttributeAccessIssue]
    edits = ml.edits.activation_patches(_model(), corrupted(ragged()), layers=[0, 1])
    ml.sweep(_model(), ragged(), edits, batch_size=2, out=folder, progress=False)


def _scan(folder: Path) -> None:
    corpus = np.random.default_rng(0).integers(0, 90, (300, 12))
    ml.recall.build_memorized_set(
        _model(), corpus, prefix_len=8, suffix_len=1, out=folder, block_size=40, batch_size=20, progress=False
    )


def _train(folder: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 90, (120, 16))
    model, spec = tiny_huggingface_model("gpt_neox"), TrainSpec(batch_size=2, steps=60)
    train(model, rows, spec, checkpoint=folder / "state.pt", checkpoint_every=5, progress=False)  # pyright: ignore[reportArgumentType]


_SUITE = Suite(
    models=("zoo/pythia-xs",), carriers=("mlp", "none"), sequences=2, others=3, localizers=("weight norm",),
    planting=PlantingOptions(n_heldout=2, steps=3, shapley=0), twin=False,
)  # fmt: skip


def _benchmark(folder: Path) -> None:
    run_benchmark(_SUITE, folder, progress=False)


def _organism(folder: Path) -> None:
    from memlens.organisms.training.zoo import train_organism
    from tests.organisms.conftest import TINY

    train_organism(TINY, folder / "tiny", device=dev(), progress=False)


def _study(name: str, *options: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        from memlens.cli.app import app

        app(["run", name, *options, "--out", str(folder / "run"), "--quiet"], result_action="return_value")

    return work


def _set(base: int) -> MemorizedSet:
    parts = [SequenceSet.from_tokens(np.full((400, 8), base + part), 4) for part in range(3)]
    return MemorizedSet(*parts, counts={"windows": base}, settings={"base": base})


def _check_set(folder: Path) -> None:
    found = MemorizedSet.load(folder)
    base = found.settings["base"]
    parts = (found.memorized, found.unmemorized, found.predictable)
    assert base in (1, 50)
    assert [int(part.tokens[0, 0]) for part in parts] == [base, base + 1, base + 2], "a mixture of two sets"


def _lens(base: int) -> TunedLens:
    return TunedLens(torch.full((4, 64, 64), float(base)), torch.full((4, 64), float(base)), {"base": base})


def _check_lens(folder: Path) -> None:
    found = TunedLens.load(folder)
    assert found.weight[0, 0, 0] == found.bias[0, 0] == found.facts["base"], "a mixture of two lenses"


@functools.cache
def _result(base: int) -> ml.Result:
    result = ml.score_recall(_model(), ragged(), progress=False).to_result()
    data = result.data.assign(more=("value", np.random.default_rng(base).normal(size=20_000)))
    return ml.Result.create(data, kind="recall", settings={"base": base})


def _check_result(folder: Path) -> None:
    found = load_result(folder / "x.nc")
    assert found["more"].equals(_result(found.settings["base"])["more"])


JOBS = [
    Job("sweep", _sweep),
    Job("scan", _scan),
    Job("training", _train),
    Job("saving a set over an old one", lambda f: _set(50).save(f), lambda f: _set(1).save(f), _check_set),
    Job("saving a lens over an old one", lambda f: _lens(5).save(f), lambda f: _lens(1).save(f), _check_lens),
    Job(
        "saving a result over an old one",
        lambda f: _result(5).save(f / "x.nc"),
        lambda f: _result(1).save(f / "x.nc"),
        _check_result,
    ),
    Job("benchmark", _benchmark, slow=True),
    Job("zoo training", _organism, slow=True),
    Job("run bypass", _study("bypass", "--model", "zoo/pythia-xs", "--max-sequences", "4"), slow=True),
    Job("run idioms", _study("idioms", "--model", "zoo/pythia-xs"), slow=True),
    Job(
        "run localize",
        _study("localize", "--model", "zoo/pythia-xs", "--sequences", "zoo", "--max-sequences", "3"),
        slow=True,
    ),
]


def main(args: Sequence[str] | None = None) -> None:
    """Run the jobs and print a line for each."""
    parser = argparse.ArgumentParser(description="Kill long work at random moments and run it again.")
    parser.add_argument("--kills", type=int, default=20, help="of each job")
    parser.add_argument("--jobs", nargs="*", default=[job.name for job in JOBS])
    parser.add_argument("--seed", type=int, default=0)
    given: Any = parser.parse_args(args)
    for job in (job for job in JOBS if job.name in given.jobs):
        with tempfile.TemporaryDirectory() as place:
            try:
                found = kill_loop(job, given.kills, Path(place), given.seed)
                said = f"{found.kills} kills, {found.ends} ends, {found.seconds:.2f} s each"
            except AssertionError as error:
                said = f"FAILED: {error}"
        sys.stdout.write(f"{job.name}: {said}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
