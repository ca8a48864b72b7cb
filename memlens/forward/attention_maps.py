"""The maps to queries, keys and values of a block, and the rotation of queries and keys by position."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlens.errors import UnsupportedModelError
from memlens.forward.read_blocks import BlockWeights
from memlens.forward.read_weights import Linear, Norm


@dataclass(frozen=True)
class Turn:
    """Rotation of pairs of features by their position.

    Attributes:
        by: The rotations as complex numbers of absolute value 1, or what a model takes for them.
        d_head: Features of a head.
    """

    by: Tensor
    d_head: int

    @staticmethod
    def of(rotary: tuple[Tensor, Tensor] | None, d_head: int) -> Turn | None:
        """Return the rotation with cosines and sines `[pos, rotary]`; None without any.

        Raises:
            UnsupportedModelError: The two features of a pair have different angles.
        """
        if rotary is None:
            return None
        cos, sin = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in rotary)
        half = cos.shape[-1] // 2
        if any(not torch.equal(t[:, :half], t[:, half:]) for t in (cos, sin)):
            raise UnsupportedModelError("rotary embeddings with two angles for one pair of features.")
        return Turn(torch.complex(cos[:, :half].contiguous(), sin[:, :half].contiguous()), d_head)

    def paired(self, x: Float[Tensor, "features ..."]) -> Float[Tensor, "features ..."]:
        """Put the features that rotate together, half a width apart in the model, side by side, in place."""
        half = self.by.shape[-1]
        turned = x.unflatten(0, (-1, self.d_head))[:, : 2 * half]
        turned.copy_(turned.unflatten(1, (2, half)).transpose(1, 2).flatten(1, 2))
        return x

    def __call__(
        self, x: Float[Tensor, "row pos head d_head"], places: slice | Int[Tensor, "row pos"]
    ) -> Float[Tensor, "row pos head d_head"]:
        """Rotate queries or keys, in place where nothing else needs them, at the given positions."""
        by = self.by[places][..., None, :]
        wide = x.to(self.by.real.dtype)  # a model may rotate in a wider dtype than its weights have
        wide = wide.clone() if x.requires_grad and wide is x else wide  # autograd allows no change of a view
        torch.view_as_complex(wide[..., : 2 * by.shape[-1]].unflatten(-1, (-1, 2))).mul_(by)
        return wide.to(x.dtype)


@dataclass(frozen=True)
class AttentionMaps:
    """What queries, keys and values are made with; pairs of features that rotate together are side by side.

    Attributes:
        qkv: The map to queries, keys and values.
        q_norm: The norm of the queries.
        k_norm: The norm of the keys.
        turn: The rotation.
    """

    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    turn: Turn | None

    @staticmethod
    def of(block: BlockWeights, turn: Turn | None, n_heads: int, n_kv: int) -> AttentionMaps:
        """Copy a block's, in this order of features."""
        qkv, q_norm, k_norm = block.qkv(), block.q_norm, block.k_norm
        if turn is None:
            return AttentionMaps(qkv, q_norm, k_norm, None)

        def ordered(norm: Norm | None) -> Norm | None:
            if norm is None:
                return None
            return replace(norm, weight=turn.paired(norm.weight.clone()), bias=turn.paired(norm.bias.clone()))

        turn.paired(qkv.weight[: (n_heads + n_kv) * turn.d_head])
        if qkv.bias is not None:
            turn.paired(qkv.bias[: (n_heads + n_kv) * turn.d_head])
        return AttentionMaps(qkv, ordered(q_norm), ordered(k_norm), turn)
