"""A block run with everything on its way kept, on plain functions of the residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memlens.models.functional import FunctionalBlocks

__all__ = ["BlockTrace", "trace_block"]


@dataclass(frozen=True)
class BlockTrace:
    """What a block computes, row by row.

    Attributes:
        resid: Its input.
        attn_in: What attention reads.
        raw_q: Queries as projected, all heads side by side: before norm, clipping and rotation.
        raw_k: Keys likewise.
        q: Queries as used.
        k: Keys as used.
        v: Values as used.
        projected: Attention's projected output.
        added: What attention adds to the residual: `projected` after a post-norm, where there is one.
        mlp_from: What the norm before the MLP reads: the residual after attention, or in a parallel block the
            block's input.
        mlp_in: What the MLP reads.
        mlp_raw: The MLP's output before a post-norm.
        out: The block's output.
    """

    resid: Float[Tensor, "row pos d_model"]
    attn_in: Float[Tensor, "row pos d_model"]
    raw_q: Float[Tensor, "row pos q_width"]
    raw_k: Float[Tensor, "row pos kv_width"]
    q: Float[Tensor, "row head pos d_head"]
    k: Float[Tensor, "row kv_head pos d_head"]
    v: Float[Tensor, "row kv_head pos d_head"]
    projected: Float[Tensor, "row pos d_model"]
    added: Float[Tensor, "row pos d_model"]
    mlp_from: Float[Tensor, "row pos d_model"]
    mlp_in: Float[Tensor, "row pos d_model"]
    mlp_raw: Float[Tensor, "row pos d_model"]
    out: Float[Tensor, "row pos d_model"]

    def __getitem__(self, rows: slice) -> BlockTrace:
        return BlockTrace(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def where(self, chosen: Bool[Tensor, " row"], other: BlockTrace) -> BlockTrace:
        """Return these rows where `chosen`, else the other's."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return BlockTrace(*(torch.where(chosen.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))

    def repeated(self, times: int) -> BlockTrace:
        """Return all rows `times` times, one copy of all after the other."""
        parts = (getattr(self, name) for name in self.__dataclass_fields__)
        return BlockTrace(*(p.repeat(times, *[1] * (p.ndim - 1)) for p in parts))


def trace_block(
    blocks: FunctionalBlocks,
    layer: int,
    resid: Float[Tensor, "row pos d_model"],
    *,
    bypass: bool = False,
) -> BlockTrace:
    """Run a block on residuals that begin at position 0.

    Args:
        blocks: The blocks.
        layer: Which.
        resid: Its input.
        bypass: Mix nothing: every token's own values stand where the mixed ones would.
    """
    block = blocks.blocks[layer]
    x = resid if block.attn_norm is None else block.attn_norm(resid)
    raw_q, raw_k, q, (k, v) = blocks.attention_parts(layer, x)
    if bypass:
        z = v.repeat_interleave(blocks.n_heads // blocks.n_kv, 1).transpose(1, 2).flatten(-2)
    else:
        z = blocks.mix(layer, q, (k, v))
    projected = block.o(z)
    added = projected if block.attn_post_norm is None else block.attn_post_norm(projected)
    mlp_from = resid if block.parallel else resid + added
    mlp_in = mlp_from if block.mlp_norm is None else block.mlp_norm(mlp_from)
    mlp_raw = block.mlp(mlp_in)
    mlp_added = mlp_raw if block.mlp_post_norm is None else block.mlp_post_norm(mlp_raw)
    out = resid + added + mlp_added
    return BlockTrace(
        resid, x, raw_q, raw_k, q, k, v, projected, added, mlp_from, mlp_in, mlp_raw, out
    )  # fmt: skip
