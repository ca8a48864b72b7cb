"""What compares a model with itself sees small differences too, not only broken models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import memlens as ml
from memlens.errors import UnsupportedModelError
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.check.model import check_model
from memlens.forward.check.reference import record_reference
from memlens.models.load import load_model
from tests.devices import dev
from tests.small import ragged
from tests.tiny import random_tokens

Folder = Callable[[str], Path]


def residuals(trunk: ml.Trunk, tokens: Tensor) -> dict[int, Tensor]:
    found = {0: trunk.embed(tokens)}
    for layer in range(trunk.n_layers):
        found[layer + 1] = trunk.run(found[layer], layer, layer + 1)
    return found


@torch.no_grad()
def test_blocks_that_are_off_by_a_ten_thousandth_are_not_used(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = ml.Trunk(load_model(tiny_folder("llama_gqa"), backend="bridge", device=dev()))
    right = residuals(trunk, random_tokens())
    for layer in range(1, trunk.n_layers + 1):
        wrong = {number: resid.clone() for number, resid in right.items()}
        wrong[layer][1, 3, 5] += 1e-4 * wrong[layer].abs().max()
        assert FunctionalBlocks.of(trunk, wrong) is None
    plain = FunctionalBlocks.unembed
    monkeypatch.setattr(FunctionalBlocks, "unembed", lambda self, resid: plain(self, resid) * (1 + 1e-4))
    assert FunctionalBlocks.of(trunk, right) is None
    monkeypatch.undo()
    assert FunctionalBlocks.of(trunk, right) is not None
    longer = residuals(trunk, random_tokens(length=30))
    longer[2][0, 25, 0] += 1e-4 * longer[2].abs().max()
    assert FunctionalBlocks.of(trunk, longer) is None  # positions that were not compared yet


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_are_refused_for_blocks_that_are_off_by_a_hundredth(
    dtype: str, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FunctionalBlocks.run
    model = tiny_model("gpt_neox", "bridge")

    def run(self: Any, layer: int, *args: Any, **options: Any) -> Tensor:
        return plain(self, layer, *args, **options) * (1.01 if layer == 1 else 1)

    monkeypatch.setattr(FunctionalBlocks, "run", run)
    with pytest.raises(
        UnsupportedModelError, match=r"block 1 does not compute what its weights say \(off by 0.01"
    ):
        ml.bypass.bounds(model, ragged(), dtype=dtype, progress=False)


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float64, 1e-5), (torch.float32, 1e-3), (torch.bfloat16, 0.06), (torch.float16, 0.03)],
)
def test_a_trunk_that_is_off_by_more_than_rounding_is_found(
    dtype: torch.dtype, factor: float, tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_folder("gpt_neox"), backend="bridge", dtype=dtype, device=dev())
    assert [check.status for check in check_model(model, layers=[0]).checks][:2] == ["ok", "ok"]
    plain = ml.Trunk.unembed
    monkeypatch.setattr(ml.Trunk, "unembed", lambda self, resid: plain(self, resid) * (1 + factor))
    found = check_model(model, layers=[0])
    assert [check.name for check in found.failures] == ["trunk"]
    assert 0.5 * factor < found.failures[0].difference < 2 * factor
    assert found.failures[0].layer is None
    assert "what follows the last layer" in found.failures[0].note
    monkeypatch.undo()
    run = ml.Trunk.run

    def off_in_layer_1(self: ml.Trunk, resid: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        out = run(self, resid, start, stop)
        return out + 2 * factor * out.flip(-1) if start <= 1 < (stop or 3) else out

    monkeypatch.setattr(ml.Trunk, "run", off_in_layer_1)
    found = check_model(model, layers=[1])
    assert [(check.name, check.layer) for check in found.failures] == [("trunk", 1)]
    assert found.failures[0].note.endswith("are not the model's own forward pass")


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1.05), (torch.float16, 1.015)])
def test_in_16_bits_a_layer_s_own_part_is_compared(
    dtype: torch.dtype, factor: float, tiny_folder: Folder
) -> None:
    """The logits are within their tolerance, which has to allow for rounding in all layers."""
    model = load_model(tiny_folder("gpt_neox"), backend="bridge", dtype=dtype, device=dev())
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder("gpt_neox"), dtype=dtype).eval()
    hf.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.data.mul_(factor)
    (found,) = check_model(model, reference=record_reference(hf, "gpt_neox"), layers=[0]).failures
    assert (found.name, found.layer) == ("logits", 1)
    assert found.note == "what the layer adds to the residual differs from Hugging Face's model"
    assert found.allowed < found.difference < factor - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_that_is_off_by_a_hundredth_is_found(dtype: torch.dtype, tiny_folder: Folder) -> None:
    model = load_model(tiny_folder("gpt_neox"), backend="bridge", dtype=dtype, device=dev())
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder("gpt_neox"), dtype=dtype).eval()
    assert check_model(model, reference=record_reference(hf, "gpt_neox"), layers=[0]).ok
    hf.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.data.mul_(1.01)
    found = check_model(model, reference=record_reference(hf, "gpt_neox"), layers=[0])
    assert [(check.name, check.layer) for check in found.failures] == [("logits", 1)]
