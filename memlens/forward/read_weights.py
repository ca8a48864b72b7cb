"""Weights read from a model's own modules by what they do, so that no architecture needs its own reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memlens.errors import UnsupportedModelError
from memlens.forward.hooks import hook_name
from memlens.models.families import architecture_of, family_by_architecture


@dataclass(frozen=True)
class NormAffine:
    r"""A LayerNorm or RMSNorm as ``(x - mean) / scale * weight + bias``; RMSNorm takes no mean away.

    Attributes:
        weight: :math:`\gamma`, `[d_model]`; ones where the norm has none.
        bias: :math:`\beta`, `[d_model]`; zeros where the norm has none.
        centered: Whether the mean over features is taken away (LayerNorm).
    """

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centered: bool

    def linear(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return the part that is linear in `x`, before the division by the scale."""
        return (x - x.mean(-1, keepdim=True) if self.centered else x) * self.weight

    def inverse_scale(
        self, x: Float[Tensor, "*batch d_model"], out: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch 1"]:
        """Return 1 / scale of the norm that made `out` of `x`, by least squares over the features."""
        linear = self.linear(x)
        return ((out - self.bias) * linear).sum(-1, keepdim=True) / linear.square().sum(-1, keepdim=True)


@torch.no_grad()
def read_norm(norm: Callable[[Tensor], Tensor], d_model: int, like: Tensor) -> NormAffine:
    """Read a norm's affine form from what it gives on three known vectors.

    Args:
        norm: The module.
        d_model: Its width (even).
        like: A tensor whose device and dtype to use.
    """
    zero = torch.zeros(1, 1, d_model, device=like.device, dtype=like.dtype)
    ones = torch.ones_like(zero)
    signs = 1e3 * ones
    signs[..., 1::2] = -1e3  # mean 0 and root mean square 1e3, so that the norm's epsilon does not count
    bias = norm(zero)[0, 0]
    weight = (norm(signs)[0, 0] - bias) * signs[0, 0].sign()
    centered = bool((norm(ones)[0, 0] - bias).abs().max() < 1e-2 * weight.abs().max())
    return NormAffine(weight, bias, centered)


@torch.no_grad()
def output_projection(
    model: Any, layer: int
) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, " d_model"]]:
    """Return a layer's attention output projection: `W_O` by head, and `b_O` (zeros where there is none)."""
    attn, cfg = model.blocks[layer].attn, model.cfg
    weight = next(attn.parameters())
    if hasattr(model, "original_model"):
        project = attn.o.original_component
        zero = torch.zeros(1, cfg.n_heads * cfg.d_head, device=weight.device, dtype=weight.dtype)
        b_o = project(zero)[0]
        eye = torch.eye(cfg.n_heads * cfg.d_head, device=weight.device, dtype=weight.dtype)
        w_o = project(eye) - b_o
        return w_o.reshape(cfg.n_heads, cfg.d_head, cfg.d_model), b_o
    return attn.W_O.detach(), attn.b_O.detach()


def attention_post_norm(model: Any, layer: int) -> Any:
    """Return the norm between a block's attention and the residual (OLMo 2 and 3), or None."""
    block = model.blocks[layer]
    if hasattr(model, "original_model"):
        part = model.hook_dict[hook_name("attn_out", layer)].name.split(".")[2]
        return None if part.startswith("attn") else getattr(block, part)
    family = family_by_architecture(architecture_of(model))
    if family is not None and family.post_norm:
        return block.ln1
    return getattr(block, "ln1_post", None)


@torch.no_grad()
def target_directions(
    model: Any, ids: Tensor, *, centered: bool
) -> tuple[Float[Tensor, "*batch d_model"], Float[Tensor, "*batch"]]:
    """Return the unembedding's column and bias of each token, minus the vocabulary's mean if `centered`."""
    w_u, zero = model.W_U, torch.zeros(1, 1, model.cfg.d_model)
    b_u = model.unembed(zero.to(w_u))[0, 0]
    columns, bias = w_u[:, ids].movedim(0, -1), b_u[ids]
    if centered:
        return columns - w_u.mean(1), bias - b_u.mean()
    return columns, bias


@torch.no_grad()
def value_vectors(model: Any, layer: int) -> Float[Tensor, "neuron d_model"]:
    """Return a layer's value vectors: what each hidden unit of the MLP writes, by unit of its activation.

    They are the rows of the MLP's output matrix, before any norm between the MLP and the residual.

    Raises:
        UnsupportedModelError: The MLP has no single output matrix, as a mixture of experts has none.
    """
    mlp = model.blocks[layer].mlp
    if hasattr(model, "original_model"):
        project = getattr(getattr(mlp, "out", None), "original_component", None)
        if isinstance(project, nn.Linear):
            return project.weight.detach().T
        if project is not None:
            weight = next(project.parameters())
            eye = torch.eye(model.cfg.d_mlp, device=weight.device, dtype=weight.dtype)
            return project(eye) - project(torch.zeros_like(eye[:1]))
    elif isinstance(getattr(mlp, "W_out", None), Tensor) and mlp.W_out.ndim == 2:
        return mlp.W_out.detach()
    raise UnsupportedModelError(
        f"the MLP of layer {layer} is a {type(mlp).__name__} without one output matrix: its neurons have no "
        "value vectors, so ablate the whole MLP instead (ablate_mlps)."
    )
