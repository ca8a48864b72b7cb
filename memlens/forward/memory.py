"""How much memory a forward pass takes and may take; every batch size follows from `fitting`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from memlens.errors import OptionError
from memlens.forward.trunk import Trunk
from memlens.sequences.set import SequenceSet

_CPU_BYTES = 2**30
_FREE_SHARE = 0.4

# From 1,024 to 4,096 positions are equally fast on a CPU (docs/benchmarks.md); more leave its caches.
_CPU_POSITIONS = 2048
_CPU_UNEMBEDDED = 256
_CPU_REDUCED, _CPU_REDUCED_LOGITS = 16, 2**17
"""Target positions whose logits are reduced at a time on a CPU, so that they stay in its caches: at least the
first number, and more where the vocabulary is so small that the second one holds them."""


def default_budget(device: torch.device) -> int:
    """Return the bytes that activations may take: 1 GiB, or 40 % of a GPU's free memory."""
    if device.type == "cuda":
        return budget_of_free(torch.cuda.mem_get_info(device)[0])
    return _CPU_BYTES


def budget_bytes(memory_budget: int | None, device: torch.device) -> int:
    """Return the bytes that activations may take: those that were given, or else `default_budget`.

    Raises:
        OptionError: Less than one byte was given.
    """
    if memory_budget is None:
        return default_budget(device)
    if memory_budget < 1:
        raise OptionError(f"memory_budget={memory_budget} bytes hold nothing: give more, or None")
    return memory_budget


def budget_of_free(free: float) -> int:
    """Return the bytes that activations may take of a GPU's free memory: 40 %, and at least one."""
    return max(1, int(free * _FREE_SHARE))


def fitting(cost: int, total: int, *, share: float = 0.25, most: int | None = None) -> int:
    """Return how many items of `cost` bytes fit into a share of a budget: at least 1, and at most `most`.

    >>> fitting(10, 1000), fitting(10, 1000, share=1, most=64), fitting(2000, 1000)
    (25, 64, 1)
    """
    found = max(1, int(total * share) // cost)
    return found if most is None else min(found, most)


def check_batch_size(batch_size: int | None) -> None:
    """Raise `OptionError` unless it is None (chosen by memory) or at least 1."""
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch_size={batch_size} holds no sequence: give 1 or more, or None")


def row_bytes(cfg: Any, length: int, itemsize: int = 4) -> int:
    """Return what one sequence of `length` tokens takes at the peak of a forward pass, without logits.

    A token costs about twelve residuals and three MLP activations in a layer, and four rows of the attention
    pattern per head.

    Args:
        cfg: A TransformerLens model's configuration.
        length: Number of tokens.
        itemsize: Bytes of a number.
    """
    d_mlp = getattr(cfg, "d_mlp", None) or 4 * cfg.d_model
    return itemsize * length * (12 * cfg.d_model + 3 * d_mlp + 4 * cfg.n_heads * length)


def position_bytes(trunk: Trunk, width: int) -> int:
    """Return what one position takes while a layer runs on it as a function."""
    d_mlp = getattr(trunk.model.cfg, "d_mlp", None) or 4 * trunk.d_model
    return trunk.dtype.itemsize * (6 * trunk.d_model + 2 * d_mlp + trunk.n_heads * width)


def backward_bytes(cfg: Any, length: int, n_targets: int, itemsize: int = 4, *, by_layer: bool) -> int:
    """Return what one sequence takes at the peak of a forward and backward pass to its activations.

    Args:
        cfg: A TransformerLens model's configuration, or a `Shape`.
        length: Number of tokens.
        n_targets: Number of targets, whose logits are kept.
        itemsize: Bytes of a number.
        by_layer: Whether only the input of each layer is kept, and one layer's activations at a time, instead
            of the activations of all layers.
    """
    layer, inputs = row_bytes(cfg, length, itemsize), itemsize * length * cfg.d_model * (cfg.n_layers + 1)
    kept = layer + inputs if by_layer else cfg.n_layers * layer
    return kept + n_targets * logits_bytes(cfg.d_vocab, itemsize)


def logits_bytes(d_vocab: int, itemsize: int = 4) -> int:
    """Return what reducing one position's logits takes: about six arrays of the vocabulary."""
    return 6 * max(itemsize, 4) * d_vocab


def rows_per_batch(cfg: Any, length: int, device: torch.device) -> int:
    """Return how many sequences of `length` tokens one forward pass may hold; only targets are unembedded."""
    most = max(1, _CPU_POSITIONS // length) if device.type == "cpu" else 256
    return fitting(row_bytes(cfg, length), default_budget(device), most=most)


def unembedding_rows(
    d_vocab: int, device: torch.device, itemsize: int = 4, total: int | None = None
) -> tuple[int, int]:
    """Return how many target positions may be unembedded at a time, and how many of them reduced.

    Args:
        d_vocab: The size of the vocabulary.
        device: The model's device.
        itemsize: Bytes of a logit.
        total: The memory budget in bytes; `default_budget` by default.
    """
    total = budget_bytes(total, device)
    reduced = fitting(logits_bytes(d_vocab, itemsize), total, share=0.15)
    if device.type != "cpu":
        return reduced, reduced
    reduced = min(reduced, _CPU_UNEMBEDDED, max(_CPU_REDUCED, _CPU_REDUCED_LOGITS // d_vocab))
    unembedded = fitting(max(itemsize, 4) * d_vocab, total, share=0.1, most=_CPU_UNEMBEDDED)
    return max(unembedded, reduced), reduced


@dataclass(frozen=True)
class Budget:
    """How much a sweep runs at a time.

    Attributes:
        bytes: What activations may take.
        batch_size: Sequences in a batch.
        stack_tokens: Positions (of all sequences and interventions) in one stacked forward.
        unembed_rows: Target positions unembedded at a time.
        reduced_rows: Target positions whose logits are reduced to metrics at a time.
    """

    bytes: int
    batch_size: int
    stack_tokens: int
    unembed_rows: int
    reduced_rows: int

    @staticmethod
    def of(trunk: Trunk, seqs: SequenceSet, memory_budget: int | None, batch_size: int | None) -> Budget:
        """Divide a memory budget (bytes); by default 1 GiB, or 40 % of a GPU's free memory."""
        check_batch_size(batch_size)
        total = budget_bytes(memory_budget, trunk.device)
        width, item = int(seqs.lengths.max()), trunk.dtype.itemsize
        positions = _CPU_POSITIONS if trunk.device.type == "cpu" else None
        tokens = fitting(position_bytes(trunk, width), total, share=0.6, most=positions)
        kept = item * width * trunk.d_model * 4 * trunk.n_layers
        size = batch_size or max(1, min(len(seqs), tokens // width, fitting(kept, total, most=64)))
        unembed = unembedding_rows(trunk.d_vocab, trunk.device, item, total)
        return Budget(total, size, max(tokens, size * width), *unembed)
