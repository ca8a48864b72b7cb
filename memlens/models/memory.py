"""How much memory a forward pass takes, and how much it may: what every batch size is cut from."""

from __future__ import annotations

from typing import Any

import torch

from memlens.errors import OptionError

__all__ = ["check_batch_size", "default_budget", "logits_bytes", "row_bytes"]

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
