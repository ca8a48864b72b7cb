"""A sweep's least time by the roofline of this processor, and what it takes.

    python -m benchmarks.roofline --models zoo/pythia-s pythia-70m

One thread; both rates and the sweeps are measured in processor seconds, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import memlens as ml
from benchmarks.models import build, recalled
from memlens.sweeps.roofline import Device, measured_device


def works(model: Any, few: int) -> dict[str, tuple[ml.SequenceSet, list[ml.Intervention]]]:
    """Return the main analyses: heads ablated, layers bypassed, residual patched."""
    eight, one = recalled(model, 8, 32, 32), recalled(model, 1, 24, 8, seed=1)
    other = ml.SequenceSet.from_tokens(one.tokens.roll(1, 1), 24)
    return {
        "heads ablated, 8 x (32 + 32) tokens": (
            eight, ml.edits.head_ablations(model, eight, mode="zero")[::few],
        ),
        "layers bypassed, 8 x (32 + 32) tokens": (eight, ml.edits.attention_bypasses(model)),
        "residual patched, 1 x (24 + 8) tokens": (
            one, ml.edits.activation_patches(model, other, positions=range(0, 31))[::few],
        ),
    }  # fmt: skip


def measured(model: Any, seqs: ml.SequenceSet, edits: list[ml.Intervention]) -> float:
    """Return the processor seconds of a sweep."""
    start = time.process_time()
    ml.sweep(model, seqs, edits, metrics=["target_logprob"], progress=False)
    return time.process_time() - start


def main() -> None:
    """Print one row per model and analysis."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["zoo/pythia-s", "pythia-70m"])
    parser.add_argument("--backend", default="bridge")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--few", type=int, default=1, help="every so manieth intervention")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rates: list[Device] = []
    print("| model | work | roofline, s | measured, CPU s | roofline / measured | bound |")
    print("|---|---|---|---|---|---|")
    for name in given.models:
        model = build(name, given.backend)
        for work, (seqs, edits) in works(model, given.few).items():
            measured(model, seqs, edits)  # what is done once per model
            pairs = [(rate(), measured(model, seqs, edits)) for _ in range(given.repeats)]
            rates += [device for device, _ in pairs]
            shares = []
            for device, took in pairs:
                line = ml.plan(model, seqs, edits, on=device).roofline
                assert line is not None
                shares.append((line.seconds / took, line.seconds, took, line.bound))
            share, planned, took, bound = statistics.median_low(shares)
            print(f"| {name} | {work} | {planned:.2f} | {took:.2f} | {share:.2f} | {bound} |", flush=True)
    for name, unit in (("peak", "GFLOP/s"), ("bandwidth", "GB/s")):
        values = [getattr(device, name) / 1e9 for device in rates]
        print(f"{name}: {min(values):.1f} to {max(values):.1f} {unit}")


def rate() -> Device:
    """Measure this processor, in seconds of processor time."""
    return measured_device(repeats=3, clock=time.process_time)


if __name__ == "__main__":
    main()
