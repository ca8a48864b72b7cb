"""An MLP's matrices and activation, read from either backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from memlens.errors import UnsupportedModelError
from memlens.forward.read_blocks import Linear

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


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


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
"""The activations that are known, by transformers' and TransformerLens' names."""


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
    """Read a block's MLP, and compare what was read with what it computes.

    Raises:
        UnsupportedModelError: It is no MLP of two or three matrices with a known activation.
    """
    mlp, name = model.blocks[layer].mlp, str(model.cfg.act_fn)
    where = f"the MLP of layer {layer} ({type(mlp).__name__}, activation {name!r})"
    read = _bridge_matrix if hasattr(model, "original_model") else _hooked_matrix
    into, gate, out = (read(mlp, part) for part in ("in", "gate", "out"))
    if into is None or out is None or name not in ACTIVATIONS:
        raise UnsupportedModelError(f"{where} has a form whose bounds memlens does not know.")
    found = MlpWeights(into, gate, out, ACTIVATIONS[name])
    weight = into.weight
    probe = torch.linspace(-2, 2, 3 * weight.shape[1], dtype=weight.dtype, device=weight.device)
    probe = probe.reshape(1, 3, -1).sin()
    want = mlp(probe)
    if float((found(probe) - want).abs().max()) > _AGREES * float(want.abs().max()):
        raise UnsupportedModelError(f"{where} does not compute what its matrices say.")
    return found


def _bridge_matrix(mlp: Any, part: str) -> Linear | None:
    module = getattr(getattr(mlp, part, None), "original_component", None)
    if not isinstance(module, nn.Linear):
        return None
    return Linear(module.weight.detach(), None if module.bias is None else module.bias.detach())


def _hooked_matrix(mlp: Any, part: str) -> Linear | None:
    weight, bias = getattr(mlp, f"W_{part}", None), getattr(mlp, f"b_{part}", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    return Linear(weight.detach().T, None if bias is None else bias.detach())
