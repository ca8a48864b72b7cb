"""Where components are in a checkpoint: each part against the model's own activations and maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import memlens as ml
from memlens.errors import OptionError, SiteError, UnsupportedModelError
from memlens.forward.components import (
    COMPONENT_KINDS,
    NORM_PARTS,
    PARTS,
    Component,
    ComponentWeights,
    WeightSlice,
)
from memlens.forward.hooks import hook_name
from memlens.forward.read_blocks import read_parts
from tests.devices import dev
from tests.tiny import D_VOCAB, FAMILIES, N_CTX, random_tokens, tiny_huggingface_model

# layers, heads, heads of keys and values, neurons, and whether the MLP has a gate
SHAPES = {
    "gpt_neox": (3, 4, 4, 64, False),
    "gpt_neox_sequential": (3, 4, 4, 64, False),
    "gpt_neo": (4, 4, 4, 96, False),
    "olmo": (3, 4, 4, 64, True),
    "olmo2": (3, 4, 2, 64, True),
    "olmo3": (4, 4, 2, 64, True),
    "llama": (3, 4, 4, 64, True),
    "llama_gqa": (3, 4, 2, 64, True),
    "gpt_bigcode": (3, 4, 1, 64, False),
    "starcoder2": (3, 4, 2, 64, False),
    "gpt2": (2, 4, 4, 48, False),
}


def huggingface(family: str) -> Any:
    if family != "gpt2":
        return tiny_huggingface_model(family)
    torch.manual_seed(0)
    shape = {
        "vocab_size": D_VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 48,
        "n_positions": N_CTX,
    }
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=100, eos_token_id=100))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module", params=[*FAMILIES, "gpt2"])
def case(request: pytest.FixtureRequest) -> tuple[str, Any, Any, ComponentWeights]:
    """A family, its Hugging Face model, a bridge of the same weights, and where its components are."""
    hf = huggingface(request.param)
    return request.param, hf, ml.load_model(huggingface(request.param), device=dev()), ComponentWeights(hf)


def test_counts_are_those_of_the_shape(case: Any) -> None:
    family, _, _, weights = case
    layers, heads, kv_heads, neurons, _ = SHAPES[family]
    assert (weights.n_layers, weights.n_heads, weights.n_kv_heads) == (layers, heads, kv_heads)
    assert (weights.n_neurons, weights.d_head) == (neurons, 8)
    numbers = {"head": heads, "neuron": neurons, "layer_mlp": 1, "layer_attention": 1}
    assert tuple(numbers) == COMPONENT_KINDS
    for kind in COMPONENT_KINDS:
        expected = [Component(kind, layer, i) for layer in range(layers) for i in range(numbers[kind])]
        assert weights.components(kind) == expected


def taken(weights: ComponentWeights, found: WeightSlice, family: str) -> torch.Tensor:
    """The weights of a slice, outputs first; GPT-2 keeps its matrices the other way round."""
    part = weights.parameter(found.name).index_select(found.dim, found.index)
    return part.T if family == "gpt2" else part


@torch.no_grad()
def test_every_map_and_bias_is_where_it_is_said_to_be(case: Any) -> None:
    family, _, model, weights = case
    gated = SHAPES[family][4]
    for layer in (0, weights.n_layers - 1):
        parts = read_parts(model, layer, parallel="blocks.0.hook_resid_mid" not in model.hook_dict)
        for part in PARTS:
            found = weights.matrix(layer, part)
            if part == "gate" and not gated:
                assert found is None
                assert weights.bias(layer, part) is None
                continue
            assert found is not None
            # columns of what gathers heads or neurons, rows of what feeds them
            assert found.dim == (part in ("o", "out")) ^ (family == "gpt2"), part
            torch.testing.assert_close(taken(weights, found, family), parts.maps[part].weight)
            bias, own = weights.bias(layer, part), parts.maps[part].bias
            if bias is None:
                assert own is None or not own.any(), part
            else:
                assert bias.dim == 0
                torch.testing.assert_close(weights.parameter(bias.name)[bias.index], own)


@torch.no_grad()
def test_every_norm_is_where_it_is_said_to_be(case: Any) -> None:
    family, _, model, weights = case
    for layer in (0, weights.n_layers - 1):
        norms = read_parts(model, layer, parallel="blocks.0.hook_resid_mid" not in model.hook_dict).norms
        for part in NORM_PARTS:
            names, own = weights.norm(layer, part), norms.get(part)
            if names is None:
                assert own is None or family == "olmo", part  # OLMo 1's norms have no weights
                continue
            assert own is not None, part
            torch.testing.assert_close(weights.parameter(names[0]), own.weight, rtol=1e-3, atol=1e-4)
            bias = torch.zeros_like(own.weight) if names[1] is None else weights.parameter(names[1])
            torch.testing.assert_close(bias, own.bias, rtol=1e-3, atol=1e-4)
    before = {"olmo": set(), "olmo2": {"attn_post_norm", "mlp_post_norm", "q_norm", "k_norm"}}
    before["olmo3"] = before["olmo2"]
    named = {part for part in NORM_PARTS if weights.norm(0, part)}
    assert named == before.get(family, {"attn_norm", "mlp_norm"})


@torch.no_grad()
def test_a_head_s_or_neuron_s_own_weights_are_what_it_writes_with(case: Any) -> None:
    """Zeroed columns of the output map do what a zero at the head's or neuron's activation does."""
    family, hf, model, weights = case
    tokens = random_tokens(2, 9)
    plain = hf(tokens).logits
    for component, site in ((Component("head", 1, 2), "z"), (Component("neuron", 1, 5), "mlp_post")):
        *_, last = slices = weights.slices(component)
        if component.kind == "neuron":
            last, *rest = slices
            assert [len(part.index) for part in slices] == [1] * (2 + SHAPES[family][4])
            assert {part.dim for part in rest} == {1 - last.dim}
        weight = weights.parameter(last.name)
        before = weight.detach().clone()
        weight.index_fill_(last.dim, last.index, 0.0)
        edited = hf(tokens).logits
        weight.copy_(before)

        def zero(x: torch.Tensor, hook: Any, component: Component = component) -> torch.Tensor:
            x[:, :, component.index] = 0
            return x

        with model.hooks(fwd_hooks=[(hook_name(site, 1), zero)]):
            expected = model(tokens)
        torch.testing.assert_close(edited, expected, rtol=1e-3, atol=1e-3)
        assert (edited - plain).abs().max() > 1e-2


def test_what_a_component_owns(case: Any) -> None:
    family, hf, _, weights = case
    d, shared = weights.d_head, weights.n_kv_heads != weights.n_heads
    for index in range(weights.n_heads):
        own = torch.arange(index * d, (index + 1) * d)
        slices = weights.slices(Component("head", 1, index))
        assert len(slices) == (2 if shared else 4)
        for part, found in zip(("q",) if shared else "qkv", slices[:-1], strict=True):
            whole = weights.matrix(1, part)
            assert whole is not None
            assert (found.name, found.dim) == (whole.name, whole.dim)
            assert found.index.tolist() == whole.index[own].tolist()
        out = weights.matrix(1, "o")
        assert (slices[-1].name, slices[-1].dim) == (out.name, out.dim)
        assert slices[-1].index.tolist() == own.tolist()
    matrices = {name for name, value in hf.named_parameters() if value.ndim == 2}
    found = {
        kind: {part.name for part in weights.slices(Component(kind, 1))}
        for kind in ("layer_attention", "layer_mlp", "layer")
    }
    assert found["layer"] == found["layer_attention"] | found["layer_mlp"]
    assert found["layer"] == {name for name in matrices if ".1." in name}
    assert not found["layer_attention"] & found["layer_mlp"]
    assert {"mlp" in name for name in found["layer_mlp"]} == {True}
    for kind in found:
        for part in weights.slices(Component(kind, 1)):
            assert part.dim == (family == "gpt2")
            assert part.index.tolist() == list(range(weights.parameter(part.name).shape[part.dim]))
    *rest, last = weights.slices(Component("layer_attention", 1))
    assert last.name == weights.matrix(1, "o").name
    assert all(part.name != last.name for part in rest)
    *rest, last = weights.slices(Component("layer_mlp", 1))
    assert last.name == weights.matrix(1, "out").name
    bare = ComponentWeights(hf, gates=False).slices(Component("neuron", 1, 5))
    assert [(part.name, part.dim, part.index.tolist()) for part in bare] == [
        (part.name, part.dim, part.index.tolist()) for part in weights.slices(Component("neuron", 1, 5))[:1]
    ]


def test_components_that_are_not_there_are_refused(case: Any) -> None:
    *_, weights = case
    n, heads, neurons = weights.n_layers, weights.n_heads, weights.n_neurons
    for component in (
        Component("head", n, 0), Component("head", -1, 0), Component("head", 0, heads),
        Component("head", 0, -1), Component("neuron", 0, neurons), Component("layer_mlp", 0, 1),
        Component("layer", n), Component("layer", 0, 1),
    ):  # fmt: skip
        words = f"{n} layers with {heads} heads and {neurons} neurons"
        with pytest.raises(SiteError, match=f"^{component} does not exist: the model has {words}"):
            weights.slices(component)
    assert weights.slices(Component("head", n - 1, heads - 1))
    assert weights.slices(Component("neuron", n - 1, neurons - 1))


def test_other_forms_of_models_are_refused() -> None:
    hf = tiny_huggingface_model("llama")
    hf.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModelError, match="there is no list of 5 layers in a LlamaForCausalLM"):
        ComponentWeights(hf)  # type: ignore[arg-type]
    hf = tiny_huggingface_model("llama")
    mlp = hf.model.layers[1].mlp
    mlp.other, mlp.down_proj = mlp.down_proj, torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"weights of model.layers.1 in a Llama.*mlp.other"):
        ComponentWeights(hf)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "component"),
    [
        ("L3H1", Component("head", 3, 1)), ("L12N20", Component("neuron", 12, 20)),
        ("L0", Component("layer", 0)),
        ("L3 MLP", Component("layer_mlp", 3)), ("L3 attention", Component("layer_attention", 3)),
    ],
)  # fmt: skip
def test_components_are_written_and_read_alike(text: str, component: Component) -> None:
    assert str(component) == text
    for spaced in (text, f"  {text} ", text.replace("L", "L", 1)):
        assert Component.parse(spaced) == component
    assert component.index == (0 if " " in text or text == "L0" else component.index)


@pytest.mark.parametrize(
    "text", ["", "H1", "L", "LH1", "L3H", "L3X1", "L3 mlp", "L3H1 x", "l3h1", "L-1", "L3 head"]
)
def test_other_texts_name_no_component(text: str) -> None:
    with pytest.raises(OptionError, match=r"is not a component: write L3H1 \(a head\), L3N20 \(a neuron\)"):
        Component.parse(text)


def test_components_are_in_the_order_of_kind_layer_and_index() -> None:
    every = [
        Component("neuron", 0, 1),
        Component("head", 1, 0),
        Component("head", 0, 3),
        Component("head", 0, 2),
    ]
    assert [str(one) for one in sorted(every)] == ["L0H2", "L0H3", "L1H0", "L0N1"]
