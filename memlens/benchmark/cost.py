"""What a localizer costs: forward passes, processor time, memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from memlens.sequences.set import SequenceSet

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What one localizer costs, for one kind of component; a run counts it on its first organism.

    Attributes:
        forwards: Floating-point operations of its matrix products, forward and backward, over those of one
            plain forward pass of the planted sequences.
        forwards_others: The same for its scores on the other sequences, which "less others" and "z-scored"
            need once per model; 0 for a method that is never run on them.
        varies: Whether its scores differ under another seed and half of the other sequences.
    """

    forwards: float
    forwards_others: float
    varies: bool


class Timer:
    """Wall and processor time since it was made.

    Attributes:
        seconds: Wall time of `stop`.
        cpu_seconds: Processor time of this process, all threads, at `stop`; other work on the machine does
            not add to it.
    """

    seconds: float
    cpu_seconds: float

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self.seconds = self.cpu_seconds = 0.0

    def stop(self) -> Timer:
        """Read both clocks."""
        self.seconds, self.cpu_seconds = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return self

    def columns(self) -> dict[str, float]:
        """Return both times as columns of a table."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


def operations(work: Callable[[], T]) -> tuple[T, int]:
    """Return what a function returns, and the floating-point operations of its matrix products.

    Forward and backward passes are counted alike, whichever way a method takes through the model.

    >>> operations(lambda: torch.ones(2, 3) @ torch.ones(3, 4))[1]
    48
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        found = work()
    return found, counter.get_total_flops()


@torch.no_grad()
def forward_operations(model: Any, sequences: SequenceSet) -> int:
    """Return the floating-point operations of one plain forward pass of all sequences."""
    device = next(model.parameters()).device
    return operations(lambda: model(sequences.tokens.to(device)))[1]


def peak_memory() -> float:
    """Return the most memory that this process has held, in MiB; NaN where the system does not say."""
    import sys

    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
