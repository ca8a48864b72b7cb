"""Output-vector edits against zeroing the same neurons, idiom by idiom.

    python -m benchmarks.output_vectors --model SmolLM2-135M-Instruct.Q4_1.gguf --idioms idiomem.jsonl

For each of some recalled idioms, the neurons of highest gate gradient are zeroed, edited in their output
vectors, and left alone while as many random neurons of the same layers are edited with the same budgets.
Printed are means over idioms with 95 % intervals.
"""

from __future__ import annotations

import argparse

import numpy as np

import memlens as ml
from memlens.benchmark import rank
from memlens.instruments.edit.options import VectorSearch
from memlens.results.statistics.estimates import mean_estimate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--idioms", required=True)
    parser.add_argument("--items", type=int, default=12)
    parser.add_argument("--keep", type=int, default=8)
    parser.add_argument("--neurons", type=int, nargs="+", default=[20])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = ml.load_model(options.model, device="cpu")
    scores = ml.score_recall(model, ml.load_sequences(options.idioms, model), generate=False, metrics=())
    recalled = scores.memorized()
    print(f"{len(recalled)} of {len(scores.table)} idioms are recalled")
    search = VectorSearch(steps=options.steps)
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(len(recalled))
    chosen, keep, others = (
        recalled[np.sort(part)] for part in np.split(order, [options.items, options.items + options.keep])
    )
    edits: dict[tuple[str, int], list[ml.Intervention]] = {}
    for i in range(len(chosen)):
        one = chosen[i : i + 1]
        table = rank(model, one, "neuron", localizer="gate gradient").top(max(options.neurons))
        for n in options.neurons:
            located = [str(component) for component in table[:n]]
            random = []
            for component in table[:n]:
                taken = {*located, *random}
                free = [j for j in range(model.cfg.d_mlp) if f"L{component.layer}N{j}" not in taken]
                random.append(f"L{component.layer}N{rng.choice(free)}")
            for how, name, neurons in (
                ("zero", "zero", located),
                ("output_vector", "output vectors", located),
                ("output_vector", "output vectors of random neurons", random),
            ):
                made = ml.edits.edit_weights(
                    model, neurons, how, sequences=one, keep=keep, search=search, progress=False
                )
                edits.setdefault((name, n), []).append(made)
        print(f"edits for {i + 1} of {len(chosen)} idioms", flush=True)
    print("| neurons | edit | target, nats | others, nats | target still recalled | others still recalled |")
    print("|---:|---|---:|---:|---:|---:|")
    for (name, n), made in edits.items():
        own = ml.sweep(model, chosen, made, kind="edits", progress=False)
        far = ml.sweep(model, others, made, kind="edits", progress=False)
        told = []
        for metric in ("target_logprob", "exact_match"):
            for result, here in ((own, True), (far, False)):
                values = result.effect(metric) if metric == "target_logprob" else result[metric]
                array = values.transpose("sequence", "intervention").values.astype(float)
                # An edit is for one idiom: its own value there, and its mean over idioms that it is not for.
                told.append(str(mean_estimate(np.diag(array) if here else array.mean(0))))
        print(f"| {n} | {name} | " + " | ".join(told) + " |", flush=True)


if __name__ == "__main__":
    main()
