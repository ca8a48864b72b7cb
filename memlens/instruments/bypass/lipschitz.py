r"""How much a norm, an MLP, attention or a block can stretch a difference: upper bounds, no estimates.

All are ours. Each holds along the straight line between two inputs that are both known: a difference of
outputs is the integral of the Jacobian along it, so the Jacobian's largest norm on the line bounds the
stretch. Norms of matrices are spectral.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memlens.forward.blocks import BlockTrace, FunctionalBlocks
from memlens.forward.read_blocks import BlockWeights, Norm
from memlens.forward.read_mlps import MlpWeights, read_mlp


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

    Args:
        mlp: The MLP.
        norms: Spectral norms of its `into`, `gate` and `out`.
        x0: One end.
        x1: The other.
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
        norm_q: Norm of each head's query matrix, of all heads together where queries have a norm.
        norm_k: Of its key matrix likewise.
        norm_v: Of its value matrix.
        norm_o: Of its output matrix.
        turn: The largest that a rotation makes a query or key longer (1, but for YaRN).
    """

    block: BlockWeights
    mlp: MlpWeights
    mlp_norms: tuple[Tensor, Tensor, Tensor]
    w_v: Float[Tensor, "head d_head d_model"]
    w_o: Float[Tensor, "head d_model d_head"]
    gain: Float[Tensor, " head"]
    norm_q: Float[Tensor, " head"]
    norm_k: Float[Tensor, " head"]
    norm_v: Float[Tensor, " head"]
    norm_o: Float[Tensor, " head"]
    turn: float

    @classmethod
    def of(cls, blocks: FunctionalBlocks, layer: int) -> BlockNorms:
        """Read a layer.

        Raises:
            UnsupportedModelError: Its MLP has a form that is not known.
        """
        block, groups = blocks.blocks[layer], blocks.n_heads // blocks.n_kv
        mlp = read_mlp(blocks.trunk.model, layer)
        sizes = [blocks.n_heads * blocks.d_head] + 2 * [blocks.n_kv * blocks.d_head]
        q, k, v = block.qkv().weight.split(sizes)
        w_q, w_k, w_v = (w.unflatten(0, (-1, blocks.d_head)) for w in (q, k, v))
        w_v = w_v.repeat_interleave(groups, 0)
        w_o = block.o.weight.unflatten(1, (blocks.n_heads, blocks.d_head)).transpose(0, 1)
        norm_v, norm_o = spectral_norm(w_v), spectral_norm(w_o)
        norm_q = spectral_norm(w_q if block.q_norm is None else q[None]).expand(blocks.n_heads)
        norm_k = spectral_norm(w_k) if block.k_norm is None else spectral_norm(k[None]).expand(blocks.n_kv)
        return cls(
            block=block,
            mlp=mlp,
            mlp_norms=(
                spectral_norm(mlp.into.weight),
                torch.zeros(()) if mlp.gate is None else spectral_norm(mlp.gate.weight),
                spectral_norm(mlp.out.weight),
            ),
            w_v=w_v,
            w_o=w_o,
            gain=product_norm(w_o, w_v) if block.clip is None else norm_v * norm_o,
            norm_q=norm_q,
            norm_k=norm_k.repeat_interleave(groups, 0),
            norm_v=norm_v,
            norm_o=norm_o,
            turn=_turn(block),
        )  # fmt: skip

    def attention(self, a: BlockTrace, b: BlockTrace, real: Tensor) -> Float[Tensor, " row"]:
        r"""Return how much attention can stretch a difference of what it reads, over all tokens together.

        .. math:: \sum_h \|W_O^h\| \Big[\sqrt{T}\,\|W_V^h\|
            + \rho_v c\,(\rho_k \lambda_q + \sqrt{T}\, \rho_q \lambda_k)\Big]

        with :math:`c` the factor of the scores, :math:`\rho` the largest query, key and (centered) value on
        the line between both inputs, and :math:`\lambda` the stretch of queries and keys. The first term
        moves values under fixed weights (:math:`\|A\| \le \sqrt T`), the second moves the weights: the
        change of a softmax average is a covariance of scores and values.

        Args:
            a: The block on one input.
            b: On the other.
            real: True where a token stands, `[row, pos]`.
        """
        n = real.sum(-1).double().to(a.v.dtype)[:, None]
        groups = len(self.gain) // a.v.shape[1]
        center = _masked(a.v, real).sum(2, keepdim=True) / n[..., None, None]
        values = _masked(_reach(a.v - center, b.v - center), real).norm(dim=-1).amax(-1)
        values = values.repeat_interleave(groups, 1)
        q, stretch_q = self._scored(self.block.q_norm, a.raw_q, b.raw_q, len(self.gain), real)
        k, stretch_k = self._scored(self.block.k_norm, a.raw_k, b.raw_k, a.k.shape[1], real)
        k = k.repeat_interleave(groups, 1)
        scores = abs(self.block.scale) * self.turn**2
        moved = k * stretch_q * self.norm_q + n.sqrt() * q * stretch_k * self.norm_k
        return (self.norm_o * (n.sqrt() * self.norm_v + values * scores * moved)).sum(-1)

    def _scored(
        self, norm: object, a: Tensor, b: Tensor, heads: int, real: Tensor
    ) -> tuple[Float[Tensor, "row head"], Float[Tensor, "row 1"]]:
        """The longest query (or key) of each head on the line, and how much its norm can stretch."""
        if isinstance(norm, Norm):
            longest = norm.weight.abs().max() * a.shape[-1] ** 0.5 + norm.bias.norm()
            stretch = norm_stretch(norm, a, b - a).masked_fill(~real, 0).amax(-1, keepdim=True)
            return longest.expand(len(a), heads), stretch
        clip = self.block.clip
        a, b = (x if clip is None else x.clamp(-clip, clip) for x in (a, b))
        reach = _reach(a, b).unflatten(-1, (heads, -1)).norm(dim=-1)
        return reach.masked_fill(~real[..., None], 0).amax(1), torch.ones_like(a[:, 0, :1])

    def block_stretch(self, a: BlockTrace, b: BlockTrace, real: Tensor) -> Float[Tensor, " row"]:
        r"""Return how much the block can stretch a difference of its input, over all tokens together.

        Parallel: :math:`1 + L_{attn} L_{ln1} + L_{mlp} L_{ln2}`; sequential:
        :math:`(1 + L_{attn} L_{ln1})(1 + L_{mlp} L_{ln2})`; with the stretch of post-norms in each term.
        """

        def worst(stretch: Tensor) -> Tensor:
            return stretch.masked_fill(~real, 0).amax(-1)

        block = self.block
        attn = self.attention(a, b, real)
        attn = attn * worst(norm_between(block.attn_norm, a.resid, b.resid))
        attn = attn * worst(norm_between(block.attn_post_norm, a.projected, b.projected))
        mlp = worst(self.mlp_path(a, b))
        return 1 + attn + mlp if block.parallel else (1 + attn) * (1 + mlp)

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


def _masked(x: Tensor, real: Tensor) -> Tensor:
    """Zero where no token stands: `x` is `[row, head, pos, …]`."""
    return x.masked_fill(~real[:, None, :, None], 0)


def _turn(block: BlockWeights) -> float:
    if block.around.rotary is None:
        return 1.0
    cos, sin = block.around.rotary
    return max(1.0, float((cos.square() + sin.square()).max().sqrt()))


_STEP = 1e-5


def local_norm(
    blocks: FunctionalBlocks,
    layer: int,
    base: Float[Tensor, "row pos d_model"],
    edited: Float[Tensor, "row pos d_model"],
    real: Bool[Tensor, "row pos"],
    iterations: int,
) -> Float[Tensor, " row"]:
    r"""Estimate the spectral norm of :math:`\partial x_L / \partial x_{l+1}` half way between two residuals.

    Power iteration on :math:`J^\top J` from the difference itself: :math:`Jv` by a central difference of the
    blocks, :math:`J^\top u` by one backward pass. Each iterate is the length of some :math:`Jv` with
    :math:`\|v\| = 1` and so, but for the difference's error, no more than the norm: an estimate from below,
    and of one point of the line, so no bound of what happens between both residuals.

    Args:
        blocks: The blocks.
        layer: The block that the residuals are outputs of.
        base: One residual.
        edited: The other.
        real: True where a token stands.
        iterations: Iterations, 1 or more.

    Returns:
        Residual per residual, no unit.
    """
    middle = (base + edited) / 2
    v = (edited - base).masked_fill(~real[..., None], 0)
    found = torch.zeros_like(v[:, 0, 0])
    for _ in range(iterations):
        length = _length(v)
        v = v / torch.where(length > 0, length, 1)[:, None, None]
        step = _STEP * _length(middle.masked_fill(~real[..., None], 0))[:, None, None]
        ahead, behind = (_rest(blocks, layer, middle + s * step * v) for s in (1, -1))
        u = ((ahead - behind) / (2 * step)).masked_fill(~real[..., None], 0)
        found = torch.maximum(found, _length(u))
        v = _transposed(blocks, layer, middle, u).masked_fill(~real[..., None], 0)
    return found


def _rest(blocks: FunctionalBlocks, layer: int, resid: Tensor) -> Tensor:
    for later in range(layer + 1, blocks.trunk.n_layers):
        resid = blocks.run(later, resid)
    return resid


def _transposed(blocks: FunctionalBlocks, layer: int, at: Tensor, u: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = at.detach().clone().requires_grad_()
        out = _rest(blocks, layer, leaf * 1)
        (found,) = torch.autograd.grad(out, leaf, u)
    return found


def _length(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=-1)
