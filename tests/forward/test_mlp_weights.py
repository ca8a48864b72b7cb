"""An MLP as matrices: what is read computes what the model's own MLP does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memlens as ml
from memlens.errors import UnsupportedModelError
from memlens.forward.read_weights import read_mlp
from tests.devices import dev
from tests.small import CASES
from tests.tiny import write_tiny


@pytest.mark.parametrize(("family", "backend"), CASES)
@torch.no_grad()
def test_what_is_read_computes_what_the_mlp_does(tiny_model: Any, family: str, backend: str) -> None:
    model = tiny_model(family, backend)
    found = read_mlp(model, 1)
    assert (found.gate is not None) == family.startswith(("olmo", "llama"))
    x = torch.randn(2, 5, 32)
    assert torch.allclose(found(x), model.blocks[1].mlp(x), atol=1e-4)
    assert not torch.allclose(found(x), model.blocks[0].mlp(x), atol=1e-2)


def test_an_mlp_that_is_something_else_is_an_error(tmp_path: Any) -> None:
    model = ml.load_model(write_tiny("gpt_neox", tmp_path), backend="bridge", device=dev())
    double = ml.Intervention("double", [("blocks.1.mlp.hook_out", lambda x, hook: 2 * x)])
    with ml.applied(model, double), pytest.raises(UnsupportedModelError, match="does not compute what"):
        read_mlp(model, 1)
    read_mlp(model, 1)
    model.cfg.act_fn = "mish"
    with pytest.raises(UnsupportedModelError, match=r"activation 'mish'.*does not know"):
        read_mlp(model, 1)
