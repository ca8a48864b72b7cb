"""A screen in bfloat16: how fast it is, and how well it agrees: `python -m benchmarks.screen_precision`.

Speed: heads ablated in some layers, by turns in float32 and in bfloat16 (weights converted within the time),
least processor seconds of each. Agreement: every head of a zoo model, screened in bfloat16 and run again in
float32.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

import memlens as ml
from benchmarks.models import build, recalled
from benchmarks.timing import Clock, interleaved
from memlens.instruments.screen.screening import bfloat16_time
from memlens.sweeps.contexts import in_dtype


def swept(model: Any, seqs: ml.SequenceSet, layers: list[int]) -> None:
    """Ablate every head of some layers."""
    ml.ablate_heads(model, seqs, mode="zero", layers=layers, check_dtype=False, progress=False)


def swept_in_bfloat16(model: Any, seqs: ml.SequenceSet, layers: list[int]) -> None:
    """The same with rounded weights."""
    with in_dtype(model, torch.bfloat16, narrow=True):
        swept(model, seqs, layers)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="pythia-160m")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 6, 11])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--agreement", default="zoo/pythia-s")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model: Any = build(options.model, "hooked", device="cpu")
    seqs = recalled(model, 2, 48, 16)
    print(f"{options.model}: one product takes {bfloat16_time(model):.2f} times as long in bfloat16")
    ours, peer = (partial(run, model, seqs, options.layers) for run in (swept, swept_in_bfloat16))
    timed = interleaved(ours, peer, options.repeats, Clock("cpu"))
    wide, narrow = min(timed.ours), min(timed.peer)
    print(f"heads ablated: {wide:.2f} s in float32, {narrow:.2f} s in bfloat16, {wide / narrow:.2f} times")
    model = build(options.agreement, "hooked", device="cpu")
    scores = ml.score_recall(
        model, ml.load_sequences("zoo", model), generate=False, metrics=(), progress=False
    )
    found = ml.screen_then_verify(
        model, scores.memorized()[: options.sequences], instrument="head_ablation", precision="bfloat16",
        verify="all", top_k=options.top_k, progress=False,
    )  # fmt: skip
    rough, exact = (r.effect("target_logprob") for r in (found.estimate, found.exact))
    print(f"{options.agreement}: {len(found.table)} heads, {len(rough)} sequences")
    print(found.agreement.to_string())
    print(f"largest difference of an effect {float(abs(rough - exact).max()):.3g} nats per token")


if __name__ == "__main__":
    main()
