r"""Upper bounds on how much a norm or an MLP can stretch a difference of inputs.

All are ours. Each holds on the straight line between two known inputs: the difference of the outputs is the
integral of the Jacobian along the line, so the largest norm of the Jacobian on it bounds the stretch. Norms
of matrices are spectral.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.read_blocks import BlockWeights
from memlens.forward.read_weights import MlpWeights, Norm, read_mlp
from memlens.instruments.bypass.traces import BlockTrace


def spectral_norm(weight: Float[Tensor, "*batch a b"]) -> Float[Tensor, "*batch"]:
    """Return the largest singular value, from the smaller Gram matrix.

    >>> round(float(spectral_norm(torch.tensor([[3.0, 0.0], [0.0, -4.0], [0.0, 0.0]]))), 6)
    4.0
    """
    wide = weight.shape[-1] > weight.shape[-2]
    gram = weight @ weight.mT if wide else weight.mT @ weight
    return torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0).sqrt()


def product_norm(
    a: Float[Tensor, "*batch out inner"], b: Float[Tensor, "*batch inner in"]
) -> Float[Tensor, "*batch"]:
    """Return the spectral norm of `a @ b` without computing the product.

    >>> round(float(product_norm(torch.tensor([[3.0], [0.0]]), torch.tensor([[0.0, 2.0]]))), 6)
    6.0
    """
    left, right = torch.linalg.qr(a, mode="r").R, torch.linalg.qr(b.mT, mode="r").R
    return spectral_norm(left @ right.mT)


def norm_stretch(
    norm: Norm | None, x: Float[Tensor, "*batch d"], dx: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch"]:
    r"""Return how much a norm can stretch differences on the line from `x` to `x + dx`.

    :math:`\|\gamma\|_\infty / \sqrt{\min_{\tau \in [0, 1]} \mathrm{var}(x + \tau\,dx) + \epsilon}`. The
    variance (for an RMSNorm, the mean square) is a convex quadratic in :math:`\tau`, so its minimum is known.
    1 without a norm.
    """
    if norm is None:
        return torch.ones_like(x[..., 0])
    if norm.centered:
        x, dx = (t - t.mean(-1, keepdim=True) for t in (x, dx))
    v0, v1, c = x.square().mean(-1), dx.square().mean(-1), (x * dx).mean(-1)
    at = torch.where(v1 > 0, -c / v1, 0.0).clamp(0, 1)
    least = (x + at[..., None] * dx).square().mean(-1)
    # both expressions are equal up to rounding; the smaller one is safe
    least = torch.minimum(least, (v0 + 2 * at * c + at * at * v1).clamp_min(0))
    return norm.weight.abs().max() / (least + norm.eps).sqrt()


def mlp_stretch(
    mlp: MlpWeights,
    norms: tuple[Tensor, Tensor, Tensor],
    x0: Float[Tensor, "*batch d"],
    x1: Float[Tensor, "*batch d"],
) -> Float[Tensor, "*batch"]:
    r"""Return how much an MLP can stretch differences on the line from `x0` to `x1`.

    Without a gate, :math:`\|W_1\| \|W_2\| \sup|\phi'|`. With a gate, :math:`f = W_2(\phi(g) \odot p)`, it is
    :math:`\|W_2\| (\sup|\phi'| \max|p|\, \|W_g\| + \max|\phi(g)|\, \|W_1\|)`. As :math:`p` and :math:`g` move
    on straight lines, their largest values are at the ends; :math:`|\phi(g)|` is largest at an end or at the
    minimum of :math:`\phi`.
    """
    into, gate, out = norms
    if mlp.gate is None:
        return (into * out * mlp.act.slope).expand(x0.shape[:-1])
    p = _reach(mlp.into(x0), mlp.into(x1)).amax(-1)
    g = _reach(mlp.act.fn(mlp.gate(x0)), mlp.act.fn(mlp.gate(x1))).amax(-1).clamp_min(mlp.act.dip)
    return out * (mlp.act.slope * p * gate + g * into)


def _reach(a: Tensor, b: Tensor) -> Tensor:
    """The largest distance from 0 between `a` and `b`, elementwise."""
    return torch.maximum(a.abs(), b.abs())


def head_matrices(
    blocks: FunctionalBlocks, layer: int
) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, "head d_model d_head"]]:
    """Return the value matrices of a layer, one per query head, and its output matrices."""
    block, n_values = blocks.blocks[layer], blocks.n_kv * blocks.d_head
    w_v = block.qkv().weight[-n_values:].unflatten(0, (-1, blocks.d_head))
    w_o = block.o.weight.unflatten(1, (blocks.n_heads, blocks.d_head)).transpose(0, 1)
    return w_v.repeat_interleave(blocks.n_heads // blocks.n_kv, 0), w_o


@dataclass(frozen=True)
class BlockNorms:
    """A block's weights and their norms.

    Attributes:
        block: The weights of the block.
        mlp: The weights of its MLP.
        mlp_norms: Spectral norms of the MLP's `into`, `gate` and `out`.
        w_v: Value matrices, one per query head.
        w_o: Output matrices, one per head.
        gain: Largest factor by which a head can stretch its input: the norm of `w_o w_v`, or the product of
            both norms if values are clipped in between.
    """

    block: BlockWeights
    mlp: MlpWeights
    mlp_norms: tuple[Tensor, Tensor, Tensor]
    w_v: Float[Tensor, "head d_head d_model"]
    w_o: Float[Tensor, "head d_model d_head"]
    gain: Float[Tensor, " head"]

    @classmethod
    def of(cls, blocks: FunctionalBlocks, layer: int) -> BlockNorms:
        """Read a layer.

        Raises:
            UnsupportedModelError: memlens does not know the form of its MLP.
        """
        block, mlp = blocks.blocks[layer], read_mlp(blocks.trunk.model, layer)
        w_v, w_o = head_matrices(blocks, layer)
        clipped = block.clip is not None
        gate = torch.zeros(()) if mlp.gate is None else spectral_norm(mlp.gate.weight)
        return cls(
            block=block, mlp=mlp,
            mlp_norms=(spectral_norm(mlp.into.weight), gate, spectral_norm(mlp.out.weight)), w_v=w_v, w_o=w_o,
            gain=spectral_norm(w_v) * spectral_norm(w_o) if clipped else product_norm(w_o, w_v),
        )  # fmt: skip

    def mlp_path(self, a: BlockTrace, b: BlockTrace) -> Float[Tensor, "row pos"]:
        """Return how much norm, MLP and post-norm together can stretch the difference at a token."""
        before = norm_between(self.block.mlp_norm, a.mlp_from, b.mlp_from)
        after = norm_between(self.block.mlp_post_norm, a.mlp_raw, b.mlp_raw)
        return before * mlp_stretch(self.mlp, self.mlp_norms, a.mlp_in, b.mlp_in) * after


def norm_between(
    norm: object, a: Float[Tensor, "*batch d"], b: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch"]:
    """Return how much a norm, or None, can stretch differences between `a` and `b`."""
    return norm_stretch(norm if isinstance(norm, Norm) else None, a, b - a)
