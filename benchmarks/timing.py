"""Interleaved timing, and the machine's matrix multiplication rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Timed:
    """Seconds of both sides in each repeat, their last results, and what was measured beside them."""

    ours: list[float]
    peer: list[float]
    our_result: Any
    peer_result: Any
    beside: list[Any]

    @property
    def ratio(self) -> float:
        """Median of peer / ours over the repeats."""
        return float(np.median(np.array(self.peer) / np.array(self.ours)))


class Clock:
    """Wall time, or this process' processor time ("cpu", for one thread on a busy machine), in seconds."""

    def __init__(self, kind: str = "wall") -> None:
        self.now = time.perf_counter if kind == "wall" else time.process_time

    def __call__(self, work: Callable[[], Any]) -> tuple[float, Any]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = self.now()
        result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.now() - start, result


def interleaved(
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    repeats: int,
    clock: Clock,
    beside: Callable[[], Any] = lambda: None,
) -> Timed:
    """Run A B A B …; the median over several repeats excludes warm-up in the first.

    Args:
        ours: One side.
        peer: The other one.
        repeats: How often each runs.
        clock: Times them.
        beside: Called before each A, such as to measure the machine, whose speed drifts.
    """
    a, b, x, y, others = [], [], None, None, []
    for _ in range(repeats):
        others.append(beside())
        seconds, x = clock(ours)
        a.append(seconds)
        seconds, y = clock(peer)
        b.append(seconds)
    return Timed(a, b, x, y, others)


def matrix_rate(
    shapes: Sequence[tuple[int, int]], rows: int, dtype: torch.dtype, device: str, clock: Clock
) -> float:
    """Return the machine's FLOP/s on products `[rows, in] x [in, out]`, weighted by operations."""
    flops, seconds = 0.0, 0.0
    for inside, outside in shapes:
        x = torch.randn(rows, inside, dtype=dtype, device=device)
        w = torch.randn(outside, inside, dtype=dtype, device=device)
        F.linear(x, w)
        seconds += float(np.median([clock(lambda x=x, w=w: F.linear(x, w))[0] for _ in range(5)]))
        flops += 2.0 * rows * inside * outside
    return flops / seconds
