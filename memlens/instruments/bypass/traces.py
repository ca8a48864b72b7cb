"""The intermediate results of one block, as the bounds on its error need them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memlens.forward.blocks import FunctionalBlocks, Trace


@dataclass(frozen=True)
class BlockTrace:
    """The intermediate results of a block.

    Attributes:
        resid: Its input.
        attn_in: What attention reads.
        q: Queries as used; the features of a head may be in another order than the model's.
        k: Keys as used, in the same order.
        v: Values as used.
        projected: Attention's projected output.
        added: What attention adds to the residual: `projected`, after a post-norm where there is one.
        mlp_from: What the norm before the MLP reads: the residual after attention, or in a parallel block the
            block's input.
        mlp_in: What the MLP reads.
        mlp_raw: The MLP's output before a post-norm.
        out: The block's output.
    """

    resid: Float[Tensor, "row pos d_model"]
    attn_in: Float[Tensor, "row pos d_model"]
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

    def to(self, device: torch.device) -> BlockTrace:
        """Return the same on a device."""
        return BlockTrace(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def where(self, chosen: Bool[Tensor, " row"], other: BlockTrace) -> BlockTrace:
        """Return these rows where `chosen`, else the other's."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return BlockTrace(*(torch.where(chosen.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))


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
        bypass: Attention mixes nothing: each position keeps its own values.
    """
    trace = Trace(f.name for f in fields(BlockTrace))
    out = blocks.run(layer, resid, trace=trace, bypass=bypass)
    return BlockTrace(resid=resid, out=out, **trace)
