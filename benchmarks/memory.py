"""Peak memory of the head sweep, beside the weights: `python -m benchmarks.memory --model pythia-160m`.

A process of its own for each side, so that nothing that one left behind counts for the other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import memlens as ml
from benchmarks.models import build, recalled


def resident(field: str) -> int:
    """Bytes that Linux says this process holds now (`VmRSS`) or held at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in lines if row.startswith(field))


@torch.no_grad()
def one_side(side: str, name: str, backend: str) -> dict[str, int]:
    """Peak bytes of a "sweep", or of an unfiltered "cache" of the same sequences, above those before."""
    torch.set_num_threads(1)
    model = build(name, backend)
    seqs = recalled(model, 8, 32, 32)
    edits = ml.edits.head_ablations(
        model, seqs, mode="zero", heads=range(0, model.cfg.n_heads, 3)
    )  # as high, sooner
    ml.sweep(
        model, seqs[:1], edits[:: len(edits) // model.cfg.n_layers], progress=False
    )  # asked once a model
    planned = ml.plan(model, seqs, edits, calibrate=False).bytes
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    kept: Any = (
        model.run_with_cache(seqs.tokens) if side == "cache" else ml.sweep(model, seqs, edits, progress=False)
    )
    peak = resident("VmHWM") - before
    del kept
    return {"peak": peak, "planned": planned}


def main() -> None:
    """Run both sides and print one JSON line a backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pythia-160m")
    parser.add_argument("--backend", nargs="+", default=["hooked", "bridge"])
    parser.add_argument("--side", choices=["sweep", "cache"])
    args = parser.parse_args()
    if args.side:
        print(json.dumps(one_side(args.side, args.model, args.backend[0])))
        return
    for backend in args.backend:
        print(line(args.model, backend), flush=True)


def line(model: str, backend: str) -> str:
    """Both sides of one backend, each in its own process, as one line."""
    sweep, cache = (measured(side, model, backend) for side in ("sweep", "cache"))
    return (
        f"{model} {backend}: head sweep of 8 x (32 + 32) tokens {sweep['peak'] / 2**20:.0f} MiB beside the "
        f"weights (planned {sweep['planned'] / 2**20:.0f}), unfiltered run_with_cache "
        f"{cache['peak'] / 2**20:.0f} MiB"
    )


def measured(side: str, model: str, backend: str) -> dict[str, int]:
    """One side in its own process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory",
        "--side",
        side,
        "--model",
        model,
        "--backend",
        backend,
    ]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


if __name__ == "__main__":
    main()
