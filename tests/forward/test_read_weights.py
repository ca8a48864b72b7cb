"""Norms, maps and projections as read from a model: they compute what the modules compute."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from memlens.errors import UnsupportedModelError
from memlens.forward.read_weights import (
    ACTIVATIONS,
    attention_post_norm,
    output_projection,
    read_linear,
    read_mlp,
    read_norm,
    target_directions,
    value_vectors,
)
from tests.small import CASES
from tests.tiny import random_tokens

WIDTH = 8


def norm_of(kind: type[nn.Module], **options: Any) -> nn.Module:
    module = kind(WIDTH, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize(
    ("module", "centered"),
    [
        (norm_of(nn.LayerNorm, eps=1e-5), True),
        (norm_of(nn.LayerNorm, eps=0.3), True),
        (norm_of(nn.LayerNorm, elementwise_affine=False), True),
        (norm_of(nn.RMSNorm, eps=0.3), False),
        (norm_of(nn.RMSNorm, eps=1e-6, elementwise_affine=False), False),
    ],
)
@torch.no_grad()
def test_a_norm_is_read_from_what_it_returns(module: Any, centered: bool) -> None:
    found = read_norm(module, WIDTH, SimpleNamespace(eps=7.0), torch.ones(1))
    assert (found.centered, found.eps) == (centered, module.eps)
    x = torch.randn(3, 5, WIDTH) + 1
    torch.testing.assert_close(found(x), module(x), rtol=1e-4, atol=1e-5)
    # the linear part over the scale, plus the bias
    scale = (
        (x - x.mean(-1, keepdim=True) if centered else x).square().mean(-1, keepdim=True) + found.eps
    ).sqrt()
    torch.testing.assert_close(found.linear(x) / scale + found.bias, module(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.inverse_scale(x, module(x)), 1 / scale, rtol=1e-4, atol=1e-5)


def test_a_norm_without_an_epsilon_of_its_own_has_that_of_the_model() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.original_component = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.original_component(x)

    plain = norm_of(nn.LayerNorm, eps=0.3)
    assert read_norm(Wrapped(plain), WIDTH, SimpleNamespace(eps=7.0), torch.ones(1)).eps == 0.3
    plain.variance_epsilon = plain.eps
    del plain.eps
    assert read_norm(SimpleNamespaceNorm(0.5), WIDTH, SimpleNamespace(eps=7.0), torch.ones(1)).eps == 0.5
    assert read_norm(SimpleNamespaceNorm(), WIDTH, SimpleNamespace(eps=7.0), torch.ones(1)).eps == 7.0


class SimpleNamespaceNorm:
    """A norm of a library that names its epsilon as Llama's does, or not at all."""

    def __init__(self, eps: float | None = None) -> None:
        if eps is not None:
            self.variance_epsilon = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.square().mean(-1, keepdim=True).add(0.5).sqrt()


class Other(nn.Linear):
    """A linear map that is not a plain `nn.Linear`: it is read from its outputs."""


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_an_affine_map_is_read_in_every_form(bias: bool) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    plain, other, conv = nn.Linear(6, 3, bias), Other(6, 3, bias), Conv1D(3, 6)
    nn.init.normal_(conv.bias)
    for module in (plain, other, conv):
        module.double()
        found = read_linear(SimpleNamespace(original_component=module), 6)
        assert found is not None
        assert found.weight.shape == (3, 6)
        assert found.weight.dtype == torch.float64
        torch.testing.assert_close(found(x), module(x))
        torch.testing.assert_close(found.rows(slice(1, 3))(x), module(x)[:, 1:])
    assert (read_linear(SimpleNamespace(original_component=plain)).bias is None) != bias  # type: ignore
    assert read_linear(SimpleNamespace(original_component=other)) is None
    assert read_linear(SimpleNamespace(), 6) is None
    assert read_linear(None, 6) is None


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bounds_of_activations_hold_and_are_tight(name: str) -> None:
    act = ACTIVATIONS[name]
    x = torch.linspace(-12, 12, 480_001, dtype=torch.float64, requires_grad=True)
    y = act.fn(x)
    torch.testing.assert_close(y, ACT2FN[name](x), rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.abs().max() <= act.slope <= 1.001 * slope.abs().max()
    where = slope < 0  # where it falls
    dip = y[where].abs().max() if where.any() else torch.zeros(())
    assert dip <= act.dip <= 1.001 * dip


@pytest.mark.parametrize(("family", "backend"), CASES)
@torch.no_grad()
def test_projections_and_directions_compute_the_model_s_own(
    tiny_model: Any, family: str, backend: str
) -> None:
    model, tokens = tiny_model(family, backend), random_tokens()
    logits, cache = model.run_with_cache(tokens)
    w_o, b_o = output_projection(model, 1)
    added = torch.einsum("bphd,hdm->bpm", cache["blocks.1.attn.hook_z"], w_o) + b_o
    post = attention_post_norm(model, 1)
    assert (post is not None) == family.startswith(("olmo2", "olmo3"))
    added = added if post is None else post(added)
    torch.testing.assert_close(added, cache["blocks.1.hook_attn_out"], rtol=1e-3, atol=1e-4)
    final = model.ln_final(cache[f"blocks.{len(model.blocks) - 1}.hook_resid_post"])
    ids = torch.tensor([[3, 50, 7], [1, 1, 99]])
    for centered in (False, True):
        directions, bias = target_directions(model, ids, centered=centered)
        for i in range(2):
            for k in range(3):
                wanted = logits[i, 4, ids[i, k]] - (logits[i, 4].mean() if centered else 0)
                found = final[i, 4] @ directions[i, k] + bias[i, k]
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(value_vectors(model, 1), read_mlp(model, 1).out.weight.T)


def test_an_mlp_without_one_output_matrix_has_no_value_vectors() -> None:
    model = SimpleNamespace(
        cfg=SimpleNamespace(d_mlp=8), blocks=[SimpleNamespace(mlp=nn.Identity())], original_model=None
    )
    with pytest.raises(UnsupportedModelError, match="the MLP of layer 0 is a Identity without a single"):
        value_vectors(model, 0)
