"""Stretches against exact Jacobians: at no point of the line is one larger than its bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jacrev

from memlens.forward.read_weights import ACTIVATIONS, Linear, MlpWeights, Norm
from memlens.instruments.bypass.lipschitz import mlp_stretch, norm_stretch, product_norm, spectral_norm

SEEDS = st.integers(0, 2**31 - 1)
LINE = torch.linspace(0, 1, 9, dtype=torch.float64)


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def largest(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.flatten(matrix.ndim // 2).flatten(0, -2), ord=2))


@given(seed=SEEDS, shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)))
def test_norms_of_matrices(seed: int, shape: tuple[int, int, int]) -> None:
    a, b = drawn(seed, (3, shape[0], shape[2]), (3, shape[2], shape[1]))
    want = torch.linalg.matrix_norm(a @ b, ord=2)
    assert torch.allclose(product_norm(a, b), want, rtol=1e-9, atol=1e-12)
    assert torch.allclose(spectral_norm(a @ b), want, rtol=1e-9, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, centered=st.booleans(), back=st.floats(-3, 3))
def test_a_norm_stretches_no_more_than_its_bound(seed: int, centered: bool, back: float) -> None:
    """Also on a line that passes near 0, where a norm stretches most."""
    x, dx, weight, bias = drawn(seed, (6,), (6,), (6,), (6,))
    dx = back * x + 0.1 * dx
    norm = Norm(weight, bias, 1e-5, centered)
    bound = float(norm_stretch(norm, x, dx))
    steepest = max(largest(jacrev(norm)(x + t * dx)[:, None].squeeze(1)) for t in LINE)
    assert steepest <= bound * (1 + 1e-9)
    assert float((norm(x + dx) - norm(x)).norm()) <= bound * float(dx.norm()) * (1 + 1e-9)


def test_a_norm_s_bound_is_reached() -> None:
    """Across features of equal weight that do not change the length."""
    x, dx = torch.eye(6, dtype=torch.float64)[:2] * 3
    one = Norm(torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64), 1e-5, False)
    bound = float(norm_stretch(one, x, 1e-6 * dx))
    assert largest(jacrev(one)(x)) == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
@settings(deadline=None, max_examples=15)
@given(seed=SEEDS)
def test_an_mlp_stretches_no_more_than_its_bound(name: str, gated: bool, seed: int) -> None:
    x0, x1, into, gate, out, b1, b2 = drawn(seed, (5,), (5,), (8, 5), (8, 5), (5, 8), (8,), (8,))
    mlp = MlpWeights(
        Linear(into, b1), Linear(gate, b2) if gated else None, Linear(out, None), ACTIVATIONS[name]
    )
    norms = (spectral_norm(into), spectral_norm(gate), spectral_norm(out))
    bound = float(mlp_stretch(mlp, norms, x0, 3 * x1))
    steepest = max(largest(jacrev(mlp)(x0 + t * (3 * x1 - x0))) for t in LINE)
    assert steepest <= bound * (1 + 1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_no_steeper_and_dip_no_deeper(name: str) -> None:
    act = ACTIVATIONS[name]
    x = torch.linspace(-12, 12, 48001, dtype=torch.float64).requires_grad_()
    y = act.fn(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert act.slope - 0.001 < float(slope.abs().max()) <= act.slope
    assert act.dip - 0.001 < float(y[x < 0].abs().max()) <= act.dip
