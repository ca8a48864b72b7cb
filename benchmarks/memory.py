"""Peak memory of the head sweep, without the weights: `python -m benchmarks.memory --model pythia-160m`.

Each side runs in its own process, so that neither affects the other.
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
    """Return the resident bytes of this process, now (`VmRSS`) or at the peak (`VmHWM`), from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in lines if row.startswith(field))


@torch.no_grad()
def one_side(side: str, name: str, backend: str) -> dict[str, int]:
    """Return the additional peak bytes of a "sweep", or of an unfiltered "cache" of the same sequences."""
    torch.set_num_threads(1)
    model = build(name, backend)
    seqs = recalled(model, 8, 32, 32)
    # A third of the heads has the same peak in less time. The first sweep does what is done once per model.
    edits = ml.edits.head_ablations(model, seqs, mode="zero", heads=range(0, model.cfg.n_heads, 3))
    ml.sweep(model, seqs[:1], edits[:: len(edits) // model.cfg.n_layers], progress=False)
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
    """Run both sides and print one line per backend."""
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
    """Return a line with both sides of one backend, each measured in its own process."""
    sweep, cache = (measured(side, model, backend) for side in ("sweep", "cache"))
    return (
        f"{model} {backend}: head sweep of 8 x (32 + 32) tokens {sweep['peak'] / 2**20:.0f} MiB above the "
        f"weights (planned {sweep['planned'] / 2**20:.0f}), unfiltered run_with_cache "
        f"{cache['peak'] / 2**20:.0f} MiB"
    )


def measured(side: str, model: str, backend: str) -> dict[str, int]:
    """Measure one side in its own process."""
    options = ["--side", side, "--model", model, "--backend", backend]
    command = [sys.executable, "-m", "benchmarks.memory", *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
