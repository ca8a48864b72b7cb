"""Peak memory of the head sweep, without the weights: `python -m benchmarks.memory --model pythia-160m`.

With `--gradients`, of gradients at all heads instead: with the activations of all layers, and layer by layer.
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
from memlens.forward.memory import backward_bytes


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


def gradients(side: str, name: str, backend: str) -> dict[str, int]:
    """Return the additional peak bytes of gradients, "whole" or "by layer", and what is planned."""
    torch.set_num_threads(1)
    model = build(name, backend)
    seqs = recalled(model, 8, 32, 32)
    other = ml.SequenceSet.from_tokens(
        torch.cat([seqs.tokens[:, :32].roll(1, 0), seqs.tokens[:, 32:]], 1), 32
    )
    options: dict[str, Any] = {"site": "z", "over": "head", "progress": False}
    ml.attribute_gradients(model, seqs[:1], other[:1], layers=[0], **options)
    row = backward_bytes(model.cfg, 64, 32, by_layer=side == "by layer")
    kept = (
        4 * 4 * 64 * model.cfg.d_model * model.cfg.n_layers
    )  # a, a', a' - a and the gradient of every layer
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    budget = 1 if side == "by layer" else 2**40
    found = ml.attribute_gradients(model, seqs, other, batch_size=8, memory_budget=budget, **options)
    assert found.settings["backward"] == side
    return {"peak": resident("VmHWM") - before, "planned": len(seqs) * (row + kept)}


def main() -> None:
    """Run both sides and print one line per backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pythia-160m")
    parser.add_argument("--backend", nargs="+", default=["hooked", "bridge"])
    parser.add_argument("--side", choices=["sweep", "cache", "whole", "by layer"])
    parser.add_argument("--gradients", action="store_true")
    args = parser.parse_args()
    if args.side:
        run = one_side if args.side in ("sweep", "cache") else gradients
        print(json.dumps(run(args.side, args.model, args.backend[0])))
        return
    for backend in args.backend:
        print((gradient_line if args.gradients else line)(args.model, backend), flush=True)


def gradient_line(model: str, backend: str) -> str:
    """Return a line with both ways of going back."""
    sides = {side: measured(side, model, backend) for side in ("whole", "by layer")}
    said = (
        f"{side} {found['peak'] / 2**20:.0f} MiB (planned {found['planned'] / 2**20:.0f})"
        for side, found in sides.items()
    )
    return f"{model} {backend}: gradients at all heads of 8 x (32 + 32) tokens, {', '.join(said)}"


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
