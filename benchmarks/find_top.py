"""What `find_top` saves, and how often it is right.

    python -m benchmarks.find_top --model zoo/pythia-s --seeds 200 --keep cells.npz
    python -m benchmarks.find_top --what simulation --seeds 500

The full sweep of the recalled sequences and its estimates by gradients run once (`--keep` saves them); races
are then replayed on these tables in many random orders. The simulation races on made-up effects.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import memlens as ml
from memlens.results.statistics.racing import Race, RaceOptions, race

KS = (1, 3, 5, 10)
GRADIENTS = (("attribution_patching", 1), ("integrated_gradients", 1), ("integrated_gradients", 2),
             ("integrated_gradients", 8))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", default="heads", choices=["heads", "neurons", "simulation"])
    parser.add_argument("--model", default="zoo/pythia-s")
    parser.add_argument("--mode", default="zero")
    parser.add_argument("--layer", type=int, default=3, help="for neurons: those of one layer")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--level", type=float, default=0.95)
    parser.add_argument("--keep", type=Path, help="a file for the tables, which is read where it is there")
    options = parser.parse_args()
    if options.what == "simulation":
        simulated(options.seeds, options.level)
    else:
        tables = dict(np.load(options.keep)) if options.keep and options.keep.exists() else measured(options)
        if options.keep and not options.keep.exists():
            np.savez(options.keep, allow_pickle=False, **tables)
        replayed(tables, options.seeds, options.level)


def measured(options: Any) -> dict[str, np.ndarray]:
    """Run everything once: effects `exact`, estimates by method and steps, and processor seconds of each."""
    torch.set_num_threads(1)
    model = ml.load_model(options.model)
    scores = ml.score_recall(model, ml.load_sequences("zoo", model), generate=False, progress=False)
    seqs = scores.memorized()
    print(f"{len(seqs)} recalled sequences", flush=True)
    common: dict[str, Any] = {"mode": options.mode, "progress": False}
    heads = options.what == "heads"
    where: dict[str, Any] = {} if heads else {"site": "mlp_post", "layers": [options.layer]}
    tables = {}
    for method, steps in GRADIENTS:
        started = time.process_time()
        found = ml.instruments.attribute_ablation(model, seqs, method=method, steps=steps, **where, **common)
        tables[f"{method} {steps}"] = found.effect("target_logprob").values.reshape(len(seqs), -1)
        tables[f"seconds {method} {steps}"] = np.array(time.process_time() - started)
    started = time.process_time()
    if heads:
        result = ml.ablate_heads(model, seqs, metrics=("target_logprob",), **common)
    else:
        width = tables[f"{GRADIENTS[0][0]} 1"].shape[1]
        neurons = {f"{i}": {options.layer: [i]} for i in range(width)}
        edits = ml.edits.neuron_knock_outs(model, seqs, neurons, mode=options.mode)
        result = ml.sweep(model, seqs, edits, ("target_logprob",), progress=False)
    tables["exact"] = result.effect("target_logprob").values.reshape(len(seqs), -1)
    tables["seconds exact"] = np.array(time.process_time() - started)
    return tables


def raced(exact: np.ndarray, options: RaceOptions, seed: int, estimates: np.ndarray | None) -> Race:
    """Race on a table that is known."""
    n, m = exact.shape
    return race(lambda rows, parts: exact[np.ix_(rows, parts)], n, m, options, estimates=estimates, seed=seed)


def replayed(tables: dict[str, np.ndarray], seeds: int, level: float) -> None:
    """Print what races on measured tables cost, and how often they find the full sweep's top k."""
    exact = tables["exact"]
    names = [f"{method} {steps}" for method, steps in GRADIENTS]
    print(f"{exact.shape[0]} sequences, {exact.shape[1]} components; the top k by magnitude, level {level}")
    print("| gradients | variance falls by (median) | their processor time / full sweep's |\n|---|---:|---:|")
    for name in names:
        with np.errstate(invalid="ignore", divide="ignore"):
            r = [np.corrcoef(a, b)[0, 1] for a, b in zip(exact.T, tables[name].T, strict=True)]
        share = tables[f"seconds {name}"] / tables["seconds exact"]
        print(f"| {name} | {np.nanmedian(1 / (1 - np.square(r))):.2f} | {share:.2f} |")
    print("\n| k | gradients | equal widths | cells run | 1 / that | right |\n|---:|---|---|---:|---:|---:|")
    for k in KS:
        for name in (None, *names):
            for equal in (False, True) if name is None else (False,):
                known = None if name is None else tables[name]
                rules = RaceOptions(k, level=level, equal_width=equal)
                found = [raced(exact, rules, seed, known) for seed in range(seeds)]
                wanted = np.sort(np.argsort(-np.abs(exact.mean(0)), kind="stable")[:k])
                right = np.mean([np.array_equal(np.flatnonzero(f.status == "in"), wanted) for f in found])
                cells = np.mean([f.cells for f in found]) / exact.size
                print(
                    f"| {k} | {name or 'none'} | {'yes' if equal else 'no'} | {100 * cells:.0f} % | "
                    f"{1 / cells:.1f} | {100 * right:.1f} % |",
                    flush=True,
                )


MEANS = np.r_[np.linspace(1, 0.6, 5), np.linspace(0.5, 0, 15)]


def population(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Return made-up effects `[sequence, component]` of 20 components."""
    shape = (n, len(MEANS))
    hard = rng.gamma(1, 1, (n, 1))
    if kind == "normal":
        return MEANS + rng.normal(0, 1, shape)
    if kind == "shared difficulty":
        return MEANS * hard + rng.normal(0, 0.2, shape)
    if kind == "lognormal":
        return MEANS * rng.lognormal(0, 1.2, shape) + 0.2 * hard
    if kind == "rare sequences make the mean":
        return rng.normal(0, 0.1, shape) + (rng.random(shape) < 0.05) * MEANS / 0.05
    common = MEANS + 0.5 + rng.normal(0, 0.1, shape)  # "rare sequences reverse it"
    return common - 15 * (rng.random(shape) < 0.03) * rng.choice([0, 1], len(MEANS))


KINDS = (
    "normal",
    "shared difficulty",
    "lognormal",
    "rare sequences make the mean",
    "rare sequences reverse it",
)


def simulated(seeds: int, level: float) -> None:
    """Print how often races on made-up effects are wrong, and how often an interval misses its mean."""
    print(f"wrong answers, and races with an interval that misses its mean, at level {level}")
    print("| effects | sequences | k | gradients | wrong | an interval misses | cells |")
    print("|---|---:|---:|---|---:|---:|---:|")
    for kind in KINDS:
        for n in (40, 143, 1000):
            for k, correlated in ((1, False), (5, False), (5, True)):
                wrong = missed = 0
                cells = 0.0
                for seed in range(seeds):
                    rng = np.random.default_rng(seed)
                    exact = population(kind, n, rng)
                    noise = rng.normal(0, exact.std(0) / 2, exact.shape)
                    rules = RaceOptions(k, "increase", level=level)
                    found = raced(exact, rules, seed, exact + noise if correlated else None)
                    mean = exact.mean(0)
                    wanted = np.sort(np.argsort(-mean, kind="stable")[:k])
                    wrong += not np.array_equal(np.flatnonzero(found.status == "in"), wanted)
                    missed += bool(((mean < found.low - 1e-9) | (mean > found.high + 1e-9)).any())
                    cells += found.cells / exact.size
                print(
                    f"| {kind} | {n} | {k} | {'yes' if correlated else 'no'} | {100 * wrong / seeds:.1f} % | "
                    f"{100 * missed / seeds:.1f} % | {100 * cells / seeds:.0f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
