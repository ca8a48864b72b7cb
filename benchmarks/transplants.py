"""Do weight transplants, patching from a twin and ablation find planted heads?

    python -m benchmarks.transplants --model zoo/pythia-s --organisms 6

Into each organism one sequence is planted by training four heads alone (`heads=4`); the twin is the model
before. Printed is each method's average precision over all heads, the mean over organisms with its 95 %
interval.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

import memlens as ml
from memlens.benchmark.suites import material, read_suite
from memlens.organisms.planting.plant import plant
from memlens.organisms.planting.substrate import as_asked, hooked
from memlens.results.statistics.estimates import mean_estimate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="zoo/pythia-s")
    parser.add_argument("--organisms", type=int, default=6)
    options = parser.parse_args()
    suite = read_suite("standard")
    texts = material(options.model, suite)
    found: dict[str, list[float]] = {}
    for i in range(options.organisms):
        planted = {"heldout": texts.training, "seed": 100 + i, "options": suite.planting}
        organism = plant(texts.base(), texts.planted[i : i + 1], "heads=4", **planted)
        model, seqs, twin = hooked(organism), as_asked(organism), texts.twin
        truth = np.zeros((model.cfg.n_layers, model.cfg.n_heads))
        for component in organism.components:
            truth[component.layer, component.index] = 1
        how: dict[str, Any] = {"metrics": ["target_logprob"], "progress": False}
        effects = {
            "weights of the twin": ml.instruments.transplant_weights(model, seqs, twin, "heads", **how),
            "activations of the twin": ml.ablate_heads(model, seqs, mode="donor", donor=twin, **how),
            "ablation to zero": ml.ablate_heads(model, seqs, mode="zero", **how),
            "ablation to other heads": ml.ablate_heads(model, seqs, mode="mean_of_other_heads", **how),
        }
        for name, result in effects.items():
            harm = -result.effect("target_logprob").mean("sequence").transpose("layer", "head").values
            found.setdefault(name, []).append(average_precision_score(truth.ravel(), harm.ravel()))
    print("| method | average precision |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {mean_estimate(np.array(values))} |")


if __name__ == "__main__":
    main()
