"""The check of a large model reads each weight once per model, and refuses what that of a small one does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import memlens.models.load as loading
from memlens.errors import ModelLoadError, NonFiniteError
from memlens.forward.check import reference
from memlens.forward.check.comparison import own_pass
from memlens.forward.check.kinds import first_of_each_kind
from memlens.forward.check.reference import record_reference
from memlens.forward.trunk import Trunk
from memlens.models.checks import check_finite_weights, noting_finite_products
from memlens.models.load import load_model
from memlens.models.names import has_hooked_transformer
from tests.devices import dev
from tests.tiny import FAMILIES, HOOKED_FAMILIES, tiny_huggingface_model

CASES = [(f, "bridge") for f in FAMILIES] + [(f, "hooked") for f in HOOKED_FAMILIES]


@pytest.fixture(autouse=True)
def every_model_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "FEW_FROM", 0)


@torch.no_grad()
def test_few_tokens_run_in_full_and_more_through_the_first_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    hf: Any = tiny_huggingface_model("gpt_neo")  # every other layer has a window
    found = record_reference(hf, "any")
    assert found.first is not None
    assert (found.tokens.shape, found.first.tokens.shape, len(found.first.resid)) == ((1, 3), (2, 12), 3)
    few, more = (hf(tokens, output_hidden_states=True) for tokens in (found.tokens, found.first.tokens))
    torch.testing.assert_close(found.logits, few.logits)
    torch.testing.assert_close(found.resid, [*few.hidden_states[:-1]])
    torch.testing.assert_close(found.first.resid, [*more.hidden_states[:3]])
    whole = record_reference(hf, "any", sparing=False)
    assert (whole.first, whole.tokens.shape) == (None, (2, 12))
    monkeypatch.setattr(reference, "FEW_FROM", hf.num_parameters() + 1)
    assert record_reference(hf, "any").first is None


def test_a_model_whose_kinds_of_layers_appear_late_runs_on_all_tokens() -> None:
    found = record_reference(tiny_huggingface_model("olmo3"), "any")  # one of four without a window, the last
    assert (found.first, found.tokens.shape) == (None, (2, 12))


def test_layers_may_be_told_apart_by_a_list_in_the_configuration() -> None:
    blocks = [nn.Linear(2, 2) for _ in range(4)]
    assert first_of_each_kind(blocks) == [0]
    assert first_of_each_kind(blocks, [["a", "a", "b", "a"], [1, 1, 1, 2]]) == [0, 2, 3]


@pytest.mark.parametrize(("family", "backend"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_models_pass(family: str, backend: str, dtype: str, tiny_folder: Callable[[str], Path]) -> None:
    if backend == "hooked" and not has_hooked_transformer():
        pytest.skip("this TransformerLens has no HookedTransformer")
    load_model(tiny_folder(family), backend=backend, dtype=dtype, device=dev())


@torch.no_grad()
@pytest.mark.parametrize("backend", ["bridge", "hooked"])
def test_one_pass_runs_each_layer_from_the_references_residual_too(
    backend: str, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("gpt_neox", backend)
    tokens = torch.arange(10, device=dev())[None]
    given = [torch.randn(1, 10, model.cfg.d_model, device=dev()) for _ in model.blocks]
    resid, logits, made = own_pass(model, tokens, given)
    torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-4)
    trunk = Trunk(model)
    torch.testing.assert_close(resid["blocks.2.hook_resid_pre"], trunk.run(trunk.embed(tokens), 0, 2))
    assert sorted(made) == [0, 1, 2]
    for layer, out in made.items():
        torch.testing.assert_close(out, trunk.run(given[layer], layer, layer + 1), rtol=1e-4, atol=1e-4)
    resid, _, made = own_pass(model, tokens, given[:2], stop=2)
    assert list(resid) == [*(f"blocks.{n}.hook_resid_pre" for n in (0, 1)), "blocks.1.hook_resid_post"]
    assert sorted(made) == [0, 1]
    assert own_pass(model, tokens, given[:1])[2] == {}  # of one layer only


def _edited(monkeypatch: pytest.MonkeyPatch, edit: Callable[[Any], object]) -> None:
    build = loading.build_bridge

    def changed(*args: Any, **kwargs: Any) -> Any:
        bridge = build(*args, **kwargs)
        edit(bridge)
        return bridge

    monkeypatch.setattr(loading, "build_bridge", changed)


def _later_positions(x: torch.Tensor, hook: Any) -> torch.Tensor:
    return torch.cat([x[:, :5], x[:, 5:] * 1.01], 1)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda m: m.blocks[2].attn.o.original_component.weight.data[:, :4].zero_(),
            "logits, first in layer 2",
        ),
        (lambda m: m.blocks[0].hook_out.add_hook(_later_positions), "logits, first in layer 0"),
        (lambda m: m.embed.hook_out.add_hook(_later_positions), "logits, .* in its embedding"),
        (
            lambda m: m.unembed.hook_out.add_hook(lambda x, hook: x * 1.01),
            "logits, first in layer 2: .* last",
        ),
    ],
    ids=["a layer's weights", "a layer at later positions", "the embedding there", "the logits"],
)
def test_a_changed_model_is_refused(
    edit: Callable[[Any], object],
    message: str,
    tiny_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _edited(monkeypatch, edit)
    with pytest.raises(ModelLoadError, match=message):
        load_model(tiny_folder("llama"), backend="bridge", device=dev())


def test_a_trunk_that_is_wrong_at_later_positions_is_refused(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trunk.run

    def without_a_mask(self: Any, resid: torch.Tensor, start: int = 0, stop: int | None = None) -> Any:
        return _later_positions(run(self, resid, start, stop), None)

    monkeypatch.setattr(Trunk, "run", without_a_mask)
    with pytest.raises(ModelLoadError, match=r"trunk, first in layer 0: .*first layers together"):
        load_model(tiny_folder("llama"), backend="bridge", device=dev())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "lm_head.weight",
    ],
)
def test_every_weight_that_is_not_finite_is_found(name: str, value: float) -> None:
    hf = tiny_huggingface_model("llama")
    hf.get_parameter(name).data.view(-1)[-1] = value
    with pytest.raises(NonFiniteError, match=rf"in '{name}' \(1 of"):
        load_model(hf, device=dev())


@torch.no_grad()
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 24])
def test_products_tell_which_weights_are_finite(rows: int, dtype: torch.dtype, value: float) -> None:
    """Also where the number is multiplied by zero."""
    layers = nn.ModuleList([nn.Linear(70, 40), Conv1D(40, 70), nn.Linear(70, 40), nn.Linear(70, 40)])
    layers = layers.to(dev(), dtype)
    good, column, bad, biased = layers
    bad.get_parameter("weight")[17, 33] = value
    biased.get_parameter("bias")[3] = value
    x = torch.randn(rows, 70, device=dev(), dtype=dtype)
    x[:, 33] = 0
    finite: set[int] = set()
    with noting_finite_products(layers, finite):
        for layer in layers:
            layer(x)
            layer(x[:0])
    assert finite == {id(p) for layer in (good, column) for p in layer.parameters()}
    assert not any(layer._forward_hooks for layer in layers)
    with pytest.raises(NonFiniteError, match=r"in '2\.weight'"):
        check_finite_weights(layers, "it", finite)
    finite.clear()
    with noting_finite_products(layers, finite):
        good(x[:0])
    assert finite == set()


def test_weights_are_searched_before_a_model_that_does_not_run_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hf: Any = tiny_huggingface_model("llama")
    monkeypatch.setattr(hf, "forward", lambda **kwargs: 1 / 0)
    with pytest.raises(ModelLoadError, match="does not run in transformers"):
        load_model(hf, device=dev())
    hf.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"outside the layers, in 'lm_head\.weight'"):
        load_model(hf, device=dev())
