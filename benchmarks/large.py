"""Results and sources larger than memory: `python -m benchmarks.large make`, then `means`, and so on.

`make` writes a result of 300,000 sequences by 1,024 heads by 2 metrics; the next four read it. `sweep` makes
one of this size part by part, from random numbers in place of a model's; `gather` joins its parts again.
`score` scores 100,000 sequences of random tokens on `zoo/pythia-xs`. Each prints seconds and resident memory.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

import memlens as ml
from benchmarks.memory import resident
from memlens.sweeps import run

LAYERS = HEADS = 32
_ROWS = 8192
CASES = ("score", "make", "open", "means", "plot", "compare", "sweep", "gather")


def made(n: int) -> ml.Result:
    """Return a result whose values are drawn when they are needed."""
    import dask.array as da

    def drawn(seed: int, binary: bool) -> Any:
        def block(block_info: Any = None) -> np.ndarray:
            (start, stop), *_ = block_info[None]["array-location"]
            values = np.random.default_rng([seed, start]).normal(size=(stop - start, LAYERS, HEADS))
            return (values > 0 if binary else values).astype(np.float32)

        rows = tuple(min(_ROWS, n - start) for start in range(0, n, _ROWS))
        return da.map_blocks(block, chunks=(rows, (LAYERS,), (HEADS,)), dtype=np.float32)

    dims = ("sequence", "layer", "head")
    data = {
        "target_logprob": (dims, drawn(1, False)),
        "exact_match": (dims, drawn(2, True)),
        "target_logprob_baseline": ("sequence", np.random.default_rng(0).normal(size=n).astype(np.float32)),
        "exact_match_baseline": ("sequence", np.ones(n, np.float32)),
    }
    coords = {
        "sequence": [f"s{i}" for i in range(n)],
        "domain": ("sequence", np.where(np.arange(n) % 3 == 0, "code", "text")),
    }
    return ml.Result.create(xr.Dataset(data, coords), kind="head_ablation", model="random numbers")


def scored(n: int, folder: Path) -> list[tuple[float, int]]:
    """Score random tokens and return the resident bytes every five seconds."""
    model = ml.load_model("zoo/pythia-xs")
    rows = np.random.default_rng(0).integers(0, model.cfg.d_vocab - 1, (n, 24)).astype(np.uint16)
    np.save(folder / "rows.npy", rows)
    log: list[tuple[float, int]] = []
    ended = threading.Event()
    start = time.perf_counter()

    def watch() -> None:
        while not ended.wait(5):
            log.append((time.perf_counter() - start, resident("VmRSS")))

    watching = threading.Thread(target=watch)
    watching.start()
    reading = {"prefix_len": 12, "on_eos": "keep"}
    out = folder / "scores.parquet"
    ml.recall.score_to_file(model, folder / "rows.npy", out, size=2048, reading=reading, progress=False)
    ended.set()
    watching.join()
    return log


def swept(n: int, folder: Path) -> None:
    """Run a sweep whose parts are drawn, not computed, from its first part to its result in `folder`."""
    model = ml.load_model("zoo/pythia-xs")
    rows = np.random.default_rng(0).integers(0, model.cfg.d_vocab - 1, (n, 3))
    edits = [
        ml.Intervention(
            f"L{layer}H{head}", [("blocks.0.hook_attn_out", torch.zeros_like)], {"layer": layer, "head": head}
        )
        for layer in range(LAYERS)
        for head in range(HEADS)
    ]

    def drawn(*given: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        items, rows = len(given[2]), given[-1]
        rng = np.random.default_rng(rows.start)
        base = rng.normal(size=len(rows)).astype(np.float32)
        values = rng.normal(size=(len(rows), items)).astype(np.float32)
        recalled = {"target_logprob": base, "exact_match": np.ones_like(base)}
        return recalled, {"target_logprob": values, "exact_match": (values > 0).astype(np.float32)}

    run.run_batches = drawn
    seqs = ml.SequenceSet.from_tokens(rows, 2)
    ml.sweep(model, seqs, edits, batch_size=512, out=folder, part=(0, 1), progress=False)


def main() -> None:
    """Do one thing and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=CASES)
    parser.add_argument("--n", type=int, help="sequences; by default 100,000 for score, else 300,000")
    parser.add_argument("--out", type=Path, default=Path("large"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path, start = given.out / "result.nc", time.perf_counter()
    if given.what == "score":
        log = scored(given.n or 100_000, given.out)
        for seconds, size in log[:: max(1, len(log) // 20)]:
            print(f"{seconds:6.0f} s {size / 2**20:6.0f} MiB")
    elif given.what == "make":
        made(given.n or 300_000).save(path)
    elif given.what == "sweep":
        swept(given.n or 300_000, given.out / "swept")
    elif given.what == "gather":
        (given.out / "swept" / "result.nc").unlink(missing_ok=True)
        ml.gather(given.out / "swept").save(given.out / "gathered.nc")
    else:
        result = ml.load_result(path)
        if given.what == "means":
            print(result.mean_ci(of="effect"))
        elif given.what == "plot":
            result.plot("target_logprob").write_html(given.out / "figure.html")
        elif given.what == "compare":
            print(result.compare_groups("target_logprob", "domain", of="effect"))
    seconds, peak = time.perf_counter() - start, resident("VmHWM") / 2**30
    print(f"{given.what}: {seconds:.1f} s, at most {peak:.2f} GiB resident")


if __name__ == "__main__":
    main()
