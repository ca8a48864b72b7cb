"""Time and peak memory of what must not grow with the data: `python -m benchmarks.sizes`.

Each case runs in its own process: seconds of processor time of the work itself, and the peak resident memory
of the whole process (`ru_maxrss`, in MiB) with what it was before the work.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

import memlens as ml

Work = Callable[[], object]


def _scores(n: int) -> ml.RecallScores:
    """Return made-up scores of `n` sequences of 8 tokens, with copies and domains."""
    rng = np.random.default_rng(0)
    accuracy = rng.integers(0, 33, n) / 32
    table = pd.DataFrame({
        "id": np.arange(n).astype(str), "copies": 2 ** rng.integers(0, 8, n),
        "domain": rng.choice(["code", "prose", "web"], n), "exact_match": accuracy == 1,
        "target_accuracy": accuracy, "memorization_score": accuracy,
        "target_logprob": -rng.exponential(1, n), "target_rank": rng.exponential(9, n),
        "nll": rng.exponential(30, n), "perplexity": rng.exponential(2, n),
    })  # fmt: skip
    tokens = torch.from_numpy(rng.integers(0, 1000, (n, 8)))
    mask, prefix = torch.ones(n, 8, dtype=torch.bool), torch.full((n,), 4)
    return ml.RecallScores(table, ml.SequenceSet(tokens, mask, prefix, table[["id"]]))


def _summary(n: int) -> Work:
    scores = _scores(n)
    return scores.summary


def _result(work: str) -> Work:
    """Return the work on a result of 20,000 sequences, 48 layers and 5 metrics."""
    rng = np.random.default_rng(0)
    names = ("target_logprob", "target_rank", "completion_entropy", "target_accuracy", "logit_margin")
    arrays = {name: (("sequence", "layer"), rng.random((20_000, 48))) for name in names}
    coords = {
        "sequence": np.arange(20_000).astype(str),
        "domain": ("sequence", rng.choice([*"abcdefgh"], 20_000)),
    }
    result = ml.Result.create(xr.Dataset(arrays, {**coords, "layer": np.arange(48)}), kind="sweep")
    calls: dict[str, Work] = {
        "mean_ci": result.mean_ci,
        "by group": lambda: result.mean_ci(group="domain"),
        "plot": result.plot,
    }
    return calls[work]


def _npy(rows: int, limit: int | None, with_model: bool) -> Work:
    """Return the reading of a file of `rows` sequences of 64 tokens."""
    path = Path(tempfile.mkdtemp()) / "rows.npy"
    model = ml.load_model("zoo/pythia-s") if with_model else None
    most = model.cfg.d_vocab if model is not None else 50_000
    out = np.lib.format.open_memmap(path, "w+", np.uint16, (rows, 64))
    rng = np.random.default_rng(0)
    for start in range(0, rows, 10_000):
        out[start : start + 10_000] = rng.integers(1, most, out[start : start + 10_000].shape)
    del out
    return lambda: ml.load_sequences(path, model, limit=limit, on_eos="keep")


CASES: dict[str, Callable[[], Work]] = {
    "RecallScores.summary, 20,000 sequences": lambda: _summary(20_000),
    "RecallScores.summary, 200,000 sequences": lambda: _summary(200_000),
    "RecallScores.summary, 1,500,000 sequences": lambda: _summary(1_500_000),
    "Result.mean_ci, 20,000 sequences x 48 layers x 5 metrics": lambda: _result("mean_ci"),
    "Result.mean_ci by group, the same": lambda: _result("by group"),
    "Result.plot, the same": lambda: _result("plot"),
    "load_sequences of .npy, 1,000,000 x 64": lambda: _npy(1_000_000, None, False),
    "load_sequences of .npy, the same, checked for a model": lambda: _npy(1_000_000, None, True),
    "load_sequences of .npy, the same, limit=1000": lambda: _npy(1_000_000, 1000, False),
}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measured(name: str) -> dict[str, Any]:
    """Run one case in this process."""
    torch.set_num_threads(1)
    work = CASES[name]()
    before, start = _peak(), time.process_time()
    work()
    return {"seconds": time.process_time() - start, "peak_mib": _peak(), "before_mib": before}


def main() -> None:
    """Run the cases, each in its own process, and print one row of a table per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--case", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measured(args.case)))
        return
    print("| work | processor time, s | peak memory, MiB | before the work, MiB |\n|---|---|---|---|")
    for name in (name for name in CASES if args.only in name):
        command = [sys.executable, "-m", "benchmarks.sizes", "--case", name]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
        if done.returncode:
            print(f"| {name} | failed: {(done.stderr or 'killed').splitlines()[-1]} | | |", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | {row['seconds']:.1f} | {row['peak_mib']} | {row['before_mib']} |", flush=True)


if __name__ == "__main__":
    main()
