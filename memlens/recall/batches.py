"""How many sequences fit a forward pass, and in which order they go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from memlens.errors import OptionError

__all__ = ["check_batch_size", "memory_budget", "rows_per_batch", "targets_per_chunk", "tidy_batches"]

_MAX_ROWS = 256


def memory_budget(device: torch.device) -> int:
    """Return the bytes one batch may take beside the weights: 256 MiB on a CPU, 2 GiB on an accelerator."""
    return 256 * 2**20 if device.type == "cpu" else 2 * 2**30


def rows_per_batch(cfg: Any, length: int, device: torch.device) -> int:
    """Return how many sequences of `length` tokens one forward pass may hold.

    A token costs about twelve residuals and two MLP activations in a block, and a row of the attention
    pattern a head; logits are not in it, since only target positions are unembedded.
    """
    d_mlp = getattr(cfg, "d_mlp", None) or 4 * cfg.d_model
    floats = length * (12 * cfg.d_model + 2 * d_mlp + 3 * cfg.n_heads * length)
    return int(min(_MAX_ROWS, max(1, memory_budget(device) // (4 * floats))))


def targets_per_chunk(d_vocab: int, device: torch.device) -> int:
    """Return how many target positions are unembedded at a time (about six arrays of logits live at once)."""
    return max(1, memory_budget(device) // (4 * 6 * d_vocab))


def tidy_batches(order: Int[Tensor, "row"], batch_size: int) -> Iterator[Int[Tensor, "row"]]:
    """Yield `order` in pieces of at most `batch_size` rows."""
    yield from torch.split(order, batch_size)


def check_batch_size(batch_size: int | None) -> None:
    """Raise `OptionError` unless it is None (chosen by memory) or at least 1."""
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch_size={batch_size} holds no sequence: give 1 or more, or None")
