"""Norms, linear maps and MLPs, read from a model's own modules in either backend.

They hold views of the model's current weights, so they are read again for each use and never kept. A module
of unknown form is read from its outputs, so that no architecture needs a reader of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from memlens.errors import UnsupportedModelError
from memlens.forward.exclusive import known_of
from memlens.forward.hooks import hook_name, hook_points
from memlens.models.families import architecture_of, family_by_architecture


@dataclass(frozen=True)
class Norm:
    r"""A LayerNorm or RMSNorm, ``(x - mean) / scale * weight + bias``; RMSNorm does not subtract the mean.

    Attributes:
        weight: :math:`\gamma`, `[d]`; ones where the norm has none.
        bias: :math:`\beta`, `[d]`; zeros where the norm has none.
        eps: What is added to the variance (the mean square, of an RMSNorm).
        centered: Whether the mean over features is subtracted (LayerNorm).
    """

    weight: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    eps: float
    centered: bool

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return the norm of `x`, by the fused kernels."""
        if self.centered:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def linear(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return the part that is linear in `x`, before the division by the scale."""
        return (x - x.mean(-1, keepdim=True) if self.centered else x) * self.weight

    def inverse_scale(
        self, x: Float[Tensor, "*batch d"], out: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch 1"]:
        """Return 1 / scale of the norm that made `out` from `x`, by least squares over the features."""
        linear = self.linear(x)
        return ((out - self.bias) * linear).sum(-1, keepdim=True) / linear.square().sum(-1, keepdim=True)


@dataclass(frozen=True)
class Linear:
    """An affine map, ``x @ weight.T + bias``."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None

    def __call__(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the map of `x`."""
        return F.linear(x, self.weight, self.bias)

    def rows(self, part: slice) -> Linear:
        """Return the map to some of the outputs only."""
        return Linear(self.weight[part], None if self.bias is None else self.bias[part])


@torch.no_grad()
def read_norm(norm: Any, width: int, cfg: Any, like: Tensor) -> Norm:
    """Read a norm from what it returns for three known vectors.

    Args:
        norm: The module.
        width: Its width (even).
        cfg: The model's configuration, whose epsilon counts where the module has none.
        like: A tensor whose device and dtype are used, wherever the norm runs.
    """
    known = torch.zeros(1, 3, width, device=like.device, dtype=like.dtype)
    known[:, 1] = 1e3
    known[:, 1, 1::2] = -1e3  # mean 0 and root mean square 1e3, so that the norm's epsilon does not count
    known[:, 2] = 1
    bias, signs, ones = norm(known)[0]
    weight = (signs - bias) * known[0, 1].sign().to(bias.device)
    centered = bool((ones - bias).abs().max() < 1e-2 * weight.abs().max())
    inner = getattr(norm, "original_component", norm)
    eps = next((getattr(inner, n) for n in ("eps", "variance_epsilon") if hasattr(inner, n)), cfg.eps)
    return Norm(weight.to(like.device), bias.to(like.device), float(eps), centered)


@torch.no_grad()
def read_linear(component: Any, n_in: int | None = None) -> Linear | None:
    """Read the affine map that a bridge's component wraps, or None if there is none.

    Args:
        component: The component, or None.
        n_in: The width of its input. With it, modules other than a plain `nn.Linear` are read as well, from
            their output for the identity matrix.
    """
    module = getattr(component, "original_component", None)
    if type(module) is nn.Linear:
        return Linear(module.weight.detach(), None if module.bias is None else module.bias.detach())
    if type(module) is Conv1D:  # GPT-2's: weights laid out input by output
        return Linear(module.weight.detach().T, module.bias.detach())
    if module is None or n_in is None:
        return None
    like = next(module.parameters())
    eye = torch.eye(n_in, device=like.device, dtype=like.dtype)
    bias = module(torch.zeros_like(eye[:1]))[0]
    return Linear((module(eye) - bias).T, bias)


def _mlp_linear(model: Any, layer: int, part: str, n_in: int | None = None) -> Linear | None:
    """Return one affine map of a layer's MLP, or None if there is none; `n_in` as for `read_linear`."""
    mlp = model.blocks[layer].mlp
    if hasattr(model, "original_model"):
        return read_linear(getattr(mlp, part, None), n_in)
    weight, bias = getattr(mlp, f"W_{part}", None), getattr(mlp, f"b_{part}", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    return Linear(weight.detach().T, None if bias is None else bias.detach())


@torch.no_grad()
def output_projection(
    model: Any, layer: int
) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, " d_model"]]:
    """Return a layer's attention output projection: `W_O` by head, and `b_O` (zeros where there is none).

    They are on the embedding's device, as are captured activations.
    """
    attn, cfg = model.blocks[layer].attn, model.cfg
    if not hasattr(model, "original_model"):
        return attn.W_O.detach(), attn.b_O.detach()
    found = read_linear(attn.o, cfg.n_heads * cfg.d_head)
    assert found is not None
    bias = torch.zeros_like(found.weight[:, 0]) if found.bias is None else found.bias
    place = next(model.parameters()).device
    return found.weight.T.reshape(cfg.n_heads, cfg.d_head, cfg.d_model).to(place), bias.to(place)


def attention_post_norm(model: Any, layer: int) -> Any:
    """Return the norm between a block's attention and the residual (OLMo 2 and 3), or None."""
    block = model.blocks[layer]
    if hasattr(model, "original_model"):
        part = hook_points(model)[hook_name("attn_out", layer)].name.split(".")[2]
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
    b_u, here = model.unembed(zero.to(w_u))[0, 0], ids.to(w_u.device)
    columns, bias = w_u[:, here].movedim(0, -1), b_u[here]
    if centered:
        columns, bias = columns - w_u.mean(1), bias - b_u.mean()
    return columns.to(ids.device), bias.to(ids.device)


@torch.no_grad()
def value_vectors(model: Any, layer: int) -> Float[Tensor, "neuron d_model"]:
    """Return a layer's value vectors: what each hidden unit of the MLP writes, by unit of its activation.

    They are the rows of the MLP's output matrix, before any norm between the MLP and the residual.

    Raises:
        UnsupportedModelError: The MLP has no single output matrix (a mixture of experts).
    """
    found = _mlp_linear(model, layer, "out", model.cfg.d_mlp)
    if found is None:
        kind = type(model.blocks[layer].mlp).__name__
        raise UnsupportedModelError(
            f"the MLP of layer {layer} is a {kind} without a single output matrix: its neurons "
            "have no value vectors, so ablate the whole MLP instead (ablate_mlps)."
        )
    return found.weight.T.to(next(model.parameters()).device)


_AGREES = 1e-4


@dataclass(frozen=True)
class Activation:
    """An activation function.

    Attributes:
        fn: The function.
        slope: An upper bound of the absolute value of its derivative.
        dip: An upper bound of its absolute value where it is not monotone.
    """

    fn: Callable[[Tensor], Tensor]
    slope: float
    dip: float


_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "gelu": Activation(F.gelu, 1.129, 0.17),
        "gelu_new": Activation(_gelu_tanh, 1.1291, 0.1701),
        "gelu_fast": Activation(_gelu_tanh, 1.1291, 0.1701),
        "gelu_pytorch_tanh": Activation(_gelu_tanh, 1.1291, 0.1701),
        "silu": Activation(F.silu, 1.0999, 0.2785),
        "swish": Activation(F.silu, 1.0999, 0.2785),
        "relu": Activation(F.relu, 1.0, 0.0),
    }
)
"""The known activations, by the names of transformers and TransformerLens."""


@dataclass(frozen=True)
class MlpWeights:
    """``out(act(into(x)))``, or with a gate ``out(act(gate(x)) * into(x))``.

    Attributes:
        into: From the input to the hidden units.
        gate: From the input to the gate; None without one.
        out: From the hidden units to the output.
        act: The activation.
    """

    into: Linear
    gate: Linear | None
    out: Linear
    act: Activation

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return the MLP's output."""
        if self.gate is None:
            return self.out(self.act.fn(self.into(x)))
        return self.out(self.act.fn(self.gate(x)) * self.into(x))


@torch.no_grad()
def read_mlp(model: Any, layer: int) -> MlpWeights:
    """Read a layer's MLP, and compare once what was read with what it computes.

    Raises:
        UnsupportedModelError: It is not an MLP of two or three matrices with a known activation.
    """
    mlp, name = model.blocks[layer].mlp, str(model.cfg.act_fn)
    where = f"the MLP of layer {layer} ({type(mlp).__name__}, activation {name!r})"
    into, gate, out = (_mlp_linear(model, layer, part) for part in ("in", "gate", "out"))
    if into is None or out is None or name not in ACTIVATIONS:
        raise UnsupportedModelError(f"{where} has a form whose bounds memlens does not know.")
    found = MlpWeights(into, gate, out, ACTIVATIONS[name])
    read: dict[int, bool] = known_of(model).setdefault(
        f"whether MLPs are what their matrices say in {into.weight.dtype}", {}
    )
    if layer not in read:
        weight = into.weight
        probe = torch.linspace(-2, 2, 3 * weight.shape[1], dtype=weight.dtype, device=weight.device)
        probe = probe.reshape(1, 3, -1).sin()
        want = mlp(probe)
        read[layer] = float((found(probe).to(want.device) - want).abs().max()) <= _AGREES * float(
            want.abs().max()
        )
    if not read[layer]:
        raise UnsupportedModelError(f"{where} does not compute what its matrices say.")
    return found
