"""An estimate of how much the blocks after a bypass can stretch a small difference where it happens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memlens.models.functional import FunctionalBlocks

__all__ = ["local_norm"]

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
