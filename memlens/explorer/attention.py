"""Attention maps of one sequence, with one byte per weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from memlens.forward.exclusive import computes
from memlens.forward.hooks import attached, check_head, check_layer, hook_name
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.heads import Head


def quantized(weights: Float[Tensor, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Return weights from 0 to 1 as integers from 0 to 255 (with an error of at most 1/510).

    >>> quantized(torch.tensor([0.0, 0.5, 1.0])).tolist()
    [0, 128, 255]
    """
    return (weights.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


@computes
@torch.no_grad()
def attention_maps(
    model: Any, tokens: Int[Tensor, "pos"], heads: Iterable[Head]
) -> dict[Head, UInt8[np.ndarray, "query key"]]:
    """Return the attention of some heads on one sequence, from one forward pass.

    A map's value divided by 255 is the attention weight of a query token on a key token (see `quantized`).
    Only the given heads are kept, and no layer after the last of them runs.

    Args:
        model: A TransformerLens model; its hooks act.
        tokens: The sequence, without padding.
        heads: Pairs of layer and (query) head.

    Raises:
        SiteError: The model does not have one of the heads.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> maps = attention_maps(model, torch.tensor([5, 6, 7]), [(2, 1)])
        >>> maps[2, 1].shape, int(maps[2, 1][0, 0])
        ((3, 3), 255)
    """
    trunk, by_layer = Trunk(model), defaultdict[int, list[int]](list)
    for layer, head in sorted(set(heads)):
        check_layer(layer, trunk.n_layers)
        check_head(head, trunk.n_heads)
        by_layer[layer].append(head)
    found: dict[Head, np.ndarray] = {}

    def keep(layer: int) -> Callable[..., None]:
        def look(pattern: Tensor, hook: Any) -> None:
            for head in by_layer[layer]:
                found[layer, head] = quantized(pattern[0, head])

        return look

    if by_layer:
        with attached(model, [(hook_name("pattern", layer), keep(layer)) for layer in by_layer]):
            trunk.run(trunk.embed(tokens[None]), 0, max(by_layer) + 1)
    return found


def pack_causal(weights: UInt8[np.ndarray, "pos pos"]) -> bytes:
    """Return a causal map as bytes: its lower triangle, row by row, with runs of zeros compressed.

    A byte above 0 is a weight; a byte 0 is followed by the length of the run of zeros, 1 to 255. Weights
    above the diagonal are 0 in every causal model and are not stored.

    >>> pack_causal(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 9]], dtype=np.uint8)).hex(" ")
    'ff 00 01 ff 00 02 09'
    """
    flat = weights[np.tril_indices(len(weights))]
    starts = np.flatnonzero(np.diff(flat == 0, prepend=flat[0] != 0) if len(flat) else [])
    out = bytearray()
    for run in np.split(flat, starts):
        if not len(run) or run[0]:
            out += run.tobytes()
            continue
        full, rest = divmod(len(run), 255)
        out += b"\x00\xff" * full + (bytes([0, rest]) if rest else b"")
    return bytes(out)


def unpack_causal(packed: bytes, n: int) -> UInt8[np.ndarray, "pos pos"]:
    """Return the map of `n` positions that `pack_causal` packed.

    >>> unpack_causal(pack_causal(np.eye(2, dtype=np.uint8)), 2).tolist()
    [[1, 0], [0, 1]]
    """
    flat, place, at = np.zeros(n * (n + 1) // 2, np.uint8), 0, 0
    while at < len(packed):
        if packed[at]:
            flat[place] = packed[at]
            place, at = place + 1, at + 1
        else:
            place, at = place + packed[at + 1], at + 2
    out = np.zeros((n, n), np.uint8)
    out[np.tril_indices(n)] = flat
    return out
