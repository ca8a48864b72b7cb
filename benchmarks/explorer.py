"""Time until the explorer shows something, and everything: `python -m benchmarks.explorer MODEL`.

As in a notebook, an event loop runs: the first draw (text and lens) comes first, and the effects of heads,
MLPs and bypasses in portions after it. The sequences are random tokens, of which nothing is recalled, so that
all of the generated text has to be decoded. On a busy machine the processor seconds are the ones to read; on
a free one with n threads, waiting takes little more than an n-th of them.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long the `with` statement takes, in seconds of the processor and of the clock."""
    processor, clock = time.process_time(), time.perf_counter()
    yield
    used, waited = time.process_time() - processor, time.perf_counter() - clock
    print(f"| {what} | {used:.1f} | {waited:.1f} |", flush=True)


async def measure(name: str, tokens: int, seed: int) -> None:
    """Load a model, open two random sequences in the explorer, and print a table of times."""
    print("| | processor seconds | seconds |\n|---|---|---|")
    with timed("import"):
        import memlens as ml
        from memlens.explorer.widget import ExplorerWidget
    with timed("load"):
        model = ml.load_model(name)
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, model.cfg.d_vocab, (2, tokens)).tolist()
    sequences = ml.SequenceSet.from_tokens(rows, tokens // 2)
    with timed("open: first draw"):
        explorer = ml.explore(model, sequences)
        widget: ExplorerWidget = explorer.widget
    with timed("open: the rest"):
        while not explorer.complete:
            await asyncio.sleep(0.01)
    with timed("another sequence: first draw"):
        widget.sequence.value = sequences.ids[1]
    with timed("another sequence: the rest"):
        while not explorer.complete:
            await asyncio.sleep(0.01)
    with timed("attention of another head"):
        explorer.select_head(0, 1)
    with timed("a layer bypassed"):
        explorer.toggle(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a name, folder or file, as for load_model")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a sequence, half of them prefix")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    asyncio.run(measure(args.model, args.tokens, args.seed))


if __name__ == "__main__":
    main()
