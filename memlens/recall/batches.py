"""How many sequences fit a forward pass of recall.

A quarter of what a sweep may take: a single pass gains nothing from more.
"""

from __future__ import annotations

from typing import Any

import torch

from memlens.models.memory import default_budget, logits_bytes, row_bytes

__all__ = ["memory_budget", "rows_per_batch", "targets_per_chunk"]

_MAX_ROWS = 256


def memory_budget(device: torch.device) -> int:
    """Return the bytes one batch may take beside the weights."""
    return default_budget(device) // 4


def rows_per_batch(cfg: Any, length: int, device: torch.device) -> int:
    """Return how many sequences of `length` tokens one forward pass may hold; only targets are unembedded."""
    return min(_MAX_ROWS, max(1, memory_budget(device) // row_bytes(cfg, length)))


def targets_per_chunk(d_vocab: int, device: torch.device) -> int:
    """Return how many target positions are unembedded at a time."""
    return max(1, memory_budget(device) // logits_bytes(d_vocab))
