"""How much memory a forward pass takes, and how much it may: what every batch size is cut from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from memlens.errors import OptionError
from memlens.forward.trunk import Trunk
from memlens.sequences.set import SequenceSet

_CPU_BYTES = 2**30
_FREE_SHARE = 0.4


def default_budget(device: torch.device) -> int:
    """Return the bytes that activations may take: 1 GiB, or 40 % of a GPU's free memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _FREE_SHARE)
    return _CPU_BYTES


def row_bytes(cfg: Any, length: int, itemsize: int = 4) -> int:
    """Return what one sequence of `length` tokens takes at the height of a forward pass, logits aside.

    A token costs about twelve residuals and three MLP activations in a block, and four rows of the attention
    pattern a head.

    Args:
        cfg: A TransformerLens model's configuration.
        length: Tokens.
        itemsize: Bytes of a number.
    """
    d_mlp = getattr(cfg, "d_mlp", None) or 4 * cfg.d_model
    return itemsize * length * (12 * cfg.d_model + 3 * d_mlp + 4 * cfg.n_heads * length)


def logits_bytes(d_vocab: int, itemsize: int = 4) -> int:
    """Return what reducing one position's logits takes: about six arrays of the vocabulary."""
    return 6 * max(itemsize, 4) * d_vocab


def check_batch_size(batch_size: int | None) -> None:
    """Raise `OptionError` unless it is None (chosen by memory) or at least 1."""
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch_size={batch_size} holds no sequence: give 1 or more, or None")


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


_REDUCED = 16
"""Target positions reduced at a time on a processor: what is made of their logits stays in its caches."""


_WELL_FILLED = 2048
"""On a processor a larger stack is no faster and takes more memory."""
_WELL_UNEMBEDDED = 256
"""The same of target positions."""


@dataclass(frozen=True)
class Budget:
    """How much is run at a time.

    Attributes:
        bytes: What activations may take.
        batch_size: Sequences in a batch.
        stack_tokens: Positions (of all sequences and interventions) in one stacked forward.
        chunk_tokens: Positions that run through a block at a time.
        unembed_rows: Target positions unembedded at a time.
        reduced_rows: Target positions whose logits are made into metrics at a time.
    """

    bytes: int
    batch_size: int
    stack_tokens: int
    chunk_tokens: int
    unembed_rows: int
    reduced_rows: int

    @staticmethod
    def of(trunk: Trunk, seqs: SequenceSet, memory_budget: int | None, batch_size: int | None) -> Budget:
        """Cut a memory budget (bytes) into sizes; by default 1 GiB, or 40 % of a GPU's free memory."""
        check_batch_size(batch_size)
        total = memory_budget or default_budget(trunk.device)
        width = int(seqs.lengths.max())
        item = trunk.dtype.itemsize
        kept = item * width * trunk.d_model * 4 * trunk.n_layers
        logits = logits_bytes(trunk.d_vocab, item)
        on_cpu = trunk.device.type == "cpu"
        tokens = max(1, int(total * 0.6) // position_bytes(trunk, width))
        unembed = max(1, int(total * 0.15) // logits)
        if on_cpu:
            tokens, unembed = min(tokens, _WELL_FILLED), min(unembed, _WELL_UNEMBEDDED)
        size = batch_size or max(1, min(len(seqs), 64, tokens // width, int(total * 0.25) // kept))
        reduced = min(unembed, _REDUCED) if on_cpu else unembed
        return Budget(total, size, max(tokens, size * width), tokens, unembed, reduced)


def position_bytes(trunk: Trunk, width: int) -> int:
    """What one position of a stack takes while a block runs on it."""
    d_mlp = getattr(trunk.model.cfg, "d_mlp", None) or 4 * trunk.d_model
    return trunk.dtype.itemsize * (6 * trunk.d_model + 2 * d_mlp + trunk.n_heads * width)
