r"""How much a norm or an MLP can stretch a difference: upper bounds, not estimates.

All are ours. Each holds along the straight line between two inputs that are both known: a difference of
outputs is the integral of the Jacobian along it, so the Jacobian's largest norm on the line bounds the
stretch. Norms of matrices are spectral.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from memlens.forward.blocks import BlockTrace, FunctionalBlocks
from memlens.forward.read_blocks import BlockWeights
from memlens.forward.read_weights import MlpWeights, Norm, read_mlp


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
    """Return the spectral norm of `a @ b` without making the product.

    >>> round(float(product_norm(torch.tensor([[3.0], [0.0]]), torch.tensor([[0.0, 2.0]]))), 6)
    6.0
    """
    left, right = torch.linalg.qr(a, mode="r").R, torch.linalg.qr(b.mT, mode="r").R
    return spectral_norm(left @ right.mT)


def norm_stretch(
    norm: Norm | None, x: Float[Tensor, "*batch d"], dx: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch"]:
    r"""Return how much a norm can stretch differences on the line from `x` to `x + dx`.

    :math:`\|\gamma\|_\infty / \sqrt{\min_{\tau \in [0, 1]} \mathrm{var}(x + \tau\,dx) + \epsilon}`; the
    variance (the mean square, of an RMSNorm) is a convex quadratic of :math:`\tau`, so its least value is
    known. Without a norm it is 1.
    """
    if norm is None:
        return torch.ones_like(x[..., 0])
    if norm.centered:
        x, dx = (t - t.mean(-1, keepdim=True) for t in (x, dx))
    v0, v1, c = x.square().mean(-1), dx.square().mean(-1), (x * dx).mean(-1)
    at = torch.where(v1 > 0, -c / v1, 0.0).clamp(0, 1)
    least = (x + at[..., None] * dx).square().mean(-1)
    # all three are the same number but for rounding; the least of them is taken to be safe
    least = torch.minimum(least, (v0 + 2 * at * c + at * at * v1).clamp_min(0))
    return norm.weight.abs().max() / (least + norm.eps).sqrt()


def mlp_stretch(
    mlp: MlpWeights,
    norms: tuple[Tensor, Tensor, Tensor],
    x0: Float[Tensor, "*batch d"],
    x1: Float[Tensor, "*batch d"],
) -> Float[Tensor, "*batch"]:
    r"""Return how much an MLP can stretch differences on the line from `x0` to `x1`.

    Without a gate :math:`\|W_1\| \|W_2\| \sup|\phi'|`. With one, where
    :math:`f = W_2(\phi(g) \odot p)`, it is
    :math:`\|W_2\| (\sup|\phi'| \max|p|\, \|W_g\| + \max|\phi(g)|\, \|W_1\|)`: :math:`p` and :math:`g` move on
    straight lines, so their greatest values stand at the ends, and :math:`|\phi(g)|` is greatest at an end or
    at its dip.
    """
    into, gate, out = norms
    if mlp.gate is None:
        return (into * out * mlp.act.slope).expand(x0.shape[:-1])
    p = _reach(mlp.into(x0), mlp.into(x1)).amax(-1)
    g = _reach(mlp.act.fn(mlp.gate(x0)), mlp.act.fn(mlp.gate(x1))).amax(-1).clamp_min(mlp.act.dip)
    return out * (mlp.act.slope * p * gate + g * into)


def _reach(a: Tensor, b: Tensor) -> Tensor:
    """How far from 0 anything between `a` and `b` can be, number by number."""
    return torch.maximum(a.abs(), b.abs())


@dataclass(frozen=True)
class BlockNorms:
    """A block's weights and their norms.

    Attributes:
        block: The weights.
        mlp: The MLP's.
        mlp_norms: Of its `into`, `gate` and `out`.
        w_v: Value matrices by query head.
        w_o: Output matrices by head.
        gain: The largest a head can make a token of its values: the norm of `w_o w_v`, or where values are
            clipped between them the product of both norms.
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
            UnsupportedModelError: Its MLP has a form that is not known.
        """
        block, groups = blocks.blocks[layer], blocks.n_heads // blocks.n_kv
        mlp = read_mlp(blocks.trunk.model, layer)
        w_v = block.qkv().weight[-blocks.n_kv * blocks.d_head :].unflatten(0, (-1, blocks.d_head))
        w_v = w_v.repeat_interleave(groups, 0)
        w_o = block.o.weight.unflatten(1, (blocks.n_heads, blocks.d_head)).transpose(0, 1)
        clipped = block.clip is not None
        gate = torch.zeros(()) if mlp.gate is None else spectral_norm(mlp.gate.weight)
        return cls(
            block=block, mlp=mlp,
            mlp_norms=(spectral_norm(mlp.into.weight), gate, spectral_norm(mlp.out.weight)), w_v=w_v, w_o=w_o,
            gain=spectral_norm(w_v) * spectral_norm(w_o) if clipped else product_norm(w_o, w_v),
        )  # fmt: skip

    def mlp_path(self, a: BlockTrace, b: BlockTrace) -> Float[Tensor, "row pos"]:
        """Return how much norm, MLP and post-norm together can stretch a token's difference."""
        before = norm_between(self.block.mlp_norm, a.mlp_from, b.mlp_from)
        after = norm_between(self.block.mlp_post_norm, a.mlp_raw, b.mlp_raw)
        return before * mlp_stretch(self.mlp, self.mlp_norms, a.mlp_in, b.mlp_in) * after


def norm_between(
    norm: object, a: Float[Tensor, "*batch d"], b: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch"]:
    """Return how much a norm (or its absence, None) can stretch differences between `a` and `b`."""
    return norm_stretch(norm if isinstance(norm, Norm) else None, a, b - a)
