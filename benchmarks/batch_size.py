"""Speed of `score_recall` by batch size, and of the size it chooses: `python -m benchmarks.batch_size`.

All sizes take turns in one process, in another order in each repeat; of each the fastest repeat counts, by
processor time (which other work on the machine disturbs less) and by wall time. Sizes above the number of
sequences are left out.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import memlens as ml
from benchmarks.models import build
from benchmarks.timing import Clock
from memlens.forward.memory import rows_per_batch

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Row:
    """Random sequences to score.

    Attributes:
        model: A zoo model, or a shape of `benchmarks.models.SHAPES` with random weights.
        length: Tokens of a sequence.
        targets: How many of them are the continuation.
        sequences: How many sequences.
        generate: Whether sequences with an error are also decoded, which are all.
    """

    model: str
    length: int
    targets: int
    sequences: int
    generate: bool = False


ROWS = (
    Row("zoo/pythia-s", 32, 16, 512),
    Row("zoo/pythia-s", 64, 32, 512),
    Row("zoo/pythia-s", 64, 32, 256, generate=True),
    Row("pythia-70m", 64, 32, 128),
    Row("pythia-70m", 512, 32, 16),
)


def measured(
    row: Row, sizes: Sequence[int], repeats: int, backend: str
) -> dict[int | None, tuple[float, float]]:
    """Return for each batch size, and for None (automatic), processor and wall seconds of the best repeat."""
    model: Any = build(row.model, backend, device="cpu")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.cfg.d_vocab, (row.sequences, row.length), generator=generator)
    seqs = ml.SequenceSet.from_tokens(tokens, row.length - row.targets)
    chosen: list[int | None] = [None, *(size for size in sizes if size <= row.sequences)]
    found: dict[int | None, tuple[float, float]] = dict.fromkeys(chosen, (float("inf"), float("inf")))
    processor, wall = Clock("cpu"), Clock()
    print(f"{row}: automatic is {rows_per_batch(model.cfg, row.length, torch.device('cpu'))}", flush=True)
    for repeat in range(repeats):
        for size in random.Random(repeat).sample(chosen, len(chosen)):
            score = partial(
                ml.score_recall,
                model,
                seqs,
                batch_size=size,
                generate=row.generate,
                metrics=(),
                progress=False,
            )
            waited, (used, _) = wall(partial(processor, score))
            found[size] = min(found[size][0], used), min(found[size][1], waited)
    return found


def main() -> None:
    """Print one row of a table per case and batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=list(range(len(ROWS))), help="numbers of rows")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="hooked")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for row in (ROWS[number] for number in args.rows):
        found = measured(row, args.sizes, args.repeats, args.backend)
        least = [min(times) for times in zip(*found.values(), strict=True)]
        print("| batch size | sequences per processor second | of the best | wall |\n|---|---|---|---|")
        for size, (used, waited) in found.items():
            shares = f"{least[0] / used:.2f} | {least[1] / waited:.2f}"
            print(f"| {size or 'automatic'} | {row.sequences / used:.0f} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
