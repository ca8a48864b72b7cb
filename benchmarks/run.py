"""Run the benchmark table: `python -m benchmarks.run --model pythia-160m --repeats 3 --out DIR`."""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import memlens as ml
from benchmarks.memory import line as memory_line
from benchmarks.models import build
from benchmarks.rows import ROWS, Row
from benchmarks.timing import Clock, interleaved, matrix_rate
from memlens.forward.trunk import Trunk

COLUMNS = (
    "model", "backend", "work", "against", "ratio", "seconds", "peer_seconds", "difference", "share_of_floor",
    "share_of_forward",
)  # fmt: skip


@torch.no_grad()
def measured(model: Any, row: Row, repeats: int, clock: Clock) -> dict[str, Any]:
    """Time one row and compare both sides' results."""
    timed = interleaved(row.ours, row.peer, repeats, clock, lambda: bounds(model, row, clock))
    floor, forward = np.array(timed.beside).T
    return {
        "work": row.name,
        "against": row.peer_name,
        "ratio": timed.ratio / row.share,
        "seconds": float(np.median(timed.ours)),
        "peer_seconds": float(np.median(timed.peer)) / row.share,
        "peer_share_measured": row.share,
        "difference": row.difference(timed.our_result, timed.peer_result),
        "share_of_floor": float(np.median(floor / np.array(timed.ours))),
        "share_of_forward": float(np.median(forward / np.array(timed.ours))),
    }


def bounds(model: Any, row: Row, clock: Clock) -> tuple[float, float]:
    """Return the time of the necessary operations at two measured rates.

    Returns:
        At the rate of bare matrix products; and, in the blocks, at the rate at which the model's own forward
        does the same operations on 32 sequences of 64 tokens, attention, norms and activations included.
    """
    cost = ml.plan(model, row.sequences, row.interventions(), calibrate=False)
    width, hidden = model.cfg.d_model, 4 * model.cfg.d_model
    shapes = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
    dtype = next(model.parameters()).dtype
    rate = matrix_rate(shapes, 2048, dtype, str(model.cfg.device), clock)
    final = matrix_rate([(width, model.cfg.d_vocab)], 512, dtype, str(model.cfg.device), clock)
    unembedding = cost.unembed_flops / final
    trunk = Trunk(model)
    seqs = ml.SequenceSet.from_tokens(torch.arange(32 * 64).reshape(32, 64) % model.cfg.d_vocab, 32)
    resid = trunk.embed(seqs.tokens.to(trunk.device))
    trunk.run(resid, 0, trunk.n_layers)
    timed = [clock(lambda: trunk.run(resid, 0, trunk.n_layers))[0] for _ in range(5)]
    own_rate = ml.plan(model, seqs, [], calibrate=False).block_flops / float(np.median(timed))
    return cost.block_flops / rate + unembedding, cost.block_flops / own_rate + unembedding


def main() -> None:
    """Parse the command line, run, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=["pythia-160m"], help="shapes, or zoo/pythia-s")
    parser.add_argument("--backend", nargs="+", default=["hooked", "bridge"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: for one thread on a busy machine"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--memory", action="store_true", help="also measure peak memory, each side in its own process"
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    for name in args.model:
        for backend in args.backend:
            model = build(name, backend, dtype=args.dtype, device=args.device)
            for key in args.rows:
                row = measured(model, ROWS[key](model), args.repeats, Clock(args.clock))
                found.append({"model": name, "backend": backend, "row": key, **row})
                print(line(found[-1]), flush=True)
    memory = []
    if args.memory:
        memory = [memory_line(name, backend) for name in args.model for backend in args.backend]
        print("\n".join(memory))
    write(args.out, found, memory, vars(args))


def line(row: dict[str, Any]) -> str:
    """Return a row of the Markdown table."""
    return "| " + " | ".join(cell(row[c]) for c in COLUMNS) + " |"


def cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(out: Path, rows: list[dict[str, Any]], memory: list[str], settings: dict[str, Any]) -> None:
    """Write the table as Markdown and as JSON."""
    out.mkdir(parents=True, exist_ok=True)
    machine = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "settings": {k: str(v) for k, v in settings.items()},
    }
    (out / "table.json").write_text(
        json.dumps({"machine": machine, "rows": rows, "memory": memory}, indent=1)
    )
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    (out / "table.md").write_text("\n".join([*head, *map(line, rows), "", *memory]) + "\n")


if __name__ == "__main__":
    main()
