"""What the main analyses of models of billions of parameters need: `python -m benchmarks.large_models`.

Counted, not measured: the weights on the meta device and the activations by plans, in 16 bits, for a budget
of 1 GiB. Prints the tables of `docs/how-to/large.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

import memlens as ml
from memlens.forward.hooks import hook_name
from memlens.forward.memory import backward_bytes
from memlens.models.families import Shape, find_model
from memlens.studies.comparative.plan import counted_edit
from memlens.studies.plans import blank_sequences
from memlens.sweeps.interventions import Reads
from memlens.sweeps.plan import plan_shape

MODELS = ("pythia-1.4b", "pythia-6.9b", "pythia-12b")
SIZES = (1, 8)
TOKENS, PREFIX = 64, 32
BUDGET = 2**30
MEMORIES = (8, 16, 24, 40, 48, 80, 141)
"""Gigabytes (10^9 bytes) of common GPUs."""


def shape_of(name: str) -> Shape:
    """Return a model's shape from the table of families."""
    found = find_model(name)
    assert found is not None
    assert found[1].shape is not None
    return found[1].shape


def weights(shape: Shape) -> tuple[int, int]:
    """Return the bytes of the weights, and of a bridge's copies of the parts of fused projections."""
    config = GPTNeoXConfig(
        vocab_size=shape.d_vocab,
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        intermediate_size=shape.d_mlp,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    own = sum(p.numel() for p in model.parameters())
    copied = sum(p.numel() for name, p in model.named_parameters() if ".query_key_value." in name)
    return shape.itemsize * own, shape.itemsize * copied


def analyses(shape: Shape) -> dict[str, list[ml.Intervention]]:
    """Return the interventions of the main analyses, which are counted and never run."""
    layers = range(shape.n_layers)

    def nothing(x: Any, hook: Any) -> Any:
        return x

    def patch(layer: int, position: int) -> ml.Intervention:
        edit = [(hook_name("resid_pre", layer), nothing)]
        return ml.Intervention(f"L{layer} {position}", edit, first_position=position)

    return {
        "residual patched, every layer and position": [
            patch(n, p) for n in layers for p in range(TOKENS - 1)
        ],
        "every head ablated": [counted_edit("z", [n], head) for n in layers for head in range(shape.n_heads)],
        "every layer bypassed": [
            ml.Intervention(f"L{n}", [(hook_name("v", n), Reads(nothing)), (hook_name("z", n), nothing)])
            for n in layers
        ],
    }


def activations(shape: Shape, size: int) -> Iterator[tuple[str, int, float | None]]:
    """Yield each analysis, the peak bytes of its activations, and its least seconds on an H100 (SXM)."""
    seqs = blank_sequences(size, TOKENS, PREFIX)
    for work, edits in analyses(shape).items():
        found = plan_shape(shape, seqs, edits, memory_budget=BUDGET, batch_size=size, on="h100-sxm")
        assert found.roofline is not None
        yield work, found.roofline.activations, found.roofline.seconds
    kept = 4 * shape.itemsize * TOKENS * shape.d_model * shape.n_layers
    for by_layer in (False, True):
        row = backward_bytes(shape, TOKENS, TOKENS - PREFIX, shape.itemsize, by_layer=by_layer)
        way = "layer by layer" if by_layer else "activations of all layers"
        yield f"gradients at one site of every layer, {way}", size * (row + kept), None


def smallest(needed: float) -> str:
    """Return the smallest common memory that holds so many bytes."""
    return next((f"{size}" for size in MEMORIES if needed <= size * 1e9), "several")


def main() -> None:
    """Print both tables."""
    print("| model | weights, GB | copies of fused projections in a bridge, GB |\n|---|---:|---:|")
    for name in MODELS:
        own, copied = weights(shape_of(name))
        print(f"| {name} | {own / 1e9:.1f} | {copied / 1e9:.1f} |")
    print("\n| model | analysis | activations, GB, 1 and 8 sequences | smallest GPU, GB | H100, s |")
    print("|---|---|---:|---:|---:|")
    for name in MODELS:
        shape = shape_of(name)
        total = sum(weights(shape))
        rows = zip(*(activations(shape, size) for size in SIZES), strict=True)
        for (work, one, least), (_, eight, most) in rows:
            needed = " and ".join(dict.fromkeys(smallest(total + size) for size in (one, eight)))
            seconds = "" if least is None else f"{least:.2g} and {most:.2g}"
            print(f"| {name} | {work} | {one / 1e9:.2f} and {eight / 1e9:.2f} | {needed} | {seconds} |")


if __name__ == "__main__":
    main()
