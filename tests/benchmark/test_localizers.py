"""Every localizer gives numbers; those written here are checked against plain computations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from memlens.benchmark import LOCALIZERS, Localizer, localizer, score_ranking
from memlens.benchmark.localizer import component_shape
from memlens.benchmark.localizers.atp import NODES
from memlens.benchmark.localizers.gradients import SITES
from memlens.benchmark.localizers.masks import (
    HARD_CONCRETE,
    SLIMMING,
    MaskTraining,
    hard_concrete_gate,
    mask_hooks,
    probability_of_staying,
)
from memlens.benchmark.suites import Suite, material
from memlens.errors import OptionError, ResultError
from memlens.forward.components import COMPONENT_KINDS, ComponentKind, ComponentWeights
from memlens.forward.hooks import attached, hook_name
from memlens.forward.trunk import Trunk
from memlens.instruments.detect.curvature import high_curvature, kfac_factors
from memlens.models.load import load_model
from memlens.organisms.planting.plant import PlantingOptions, plant, recalled
from memlens.sequences.corrupt import corrupt
from memlens.sequences.set import SequenceSet
from tests.devices import dev
from tests.tiny import tiny_huggingface_model

FAMILIES = ("gpt_neox", "gpt_neo", "olmo2", "llama_gqa")


def rows(n: int, seed: int) -> SequenceSet:
    generator = torch.Generator().manual_seed(seed)
    return SequenceSet.from_tokens(torch.randint(4, 90, (n, 12), generator=generator), 6)


def load(hf: torch.nn.Module) -> Any:
    return load_model(hf, device=dev(), check_weights=False)


def run_with_hooks(model: Any, seqs: SequenceSet, hooks: list[tuple[str, Any]] | None = None) -> Tensor:
    """The mean target log-probability by TransformerLens alone; differentiable."""
    logits = model.run_with_hooks(seqs.tokens, fwd_hooks=hooks or [], return_type="logits")
    own = logits[:, 5:-1].log_softmax(-1).gather(-1, seqs.tokens[:, 6:, None])
    return own[..., 0].mean(-1)


def activations(model: Any, seqs: SequenceSet) -> Any:
    wanted = [hook_name(site, n) for site in ("z", "q", "k", "v", "mlp_post", "mlp_out", "attn_out")
              for n in range(model.cfg.n_layers)]  # fmt: skip
    with torch.no_grad():
        return model.run_with_cache(seqs.tokens, names_filter=wanted, return_type=None)[1]


def score(name: str, model: Any, seqs: SequenceSet, component: ComponentKind, **options: Any) -> np.ndarray:
    return LOCALIZERS[name](model, seqs, component=component, others=options.pop("others", seqs), **options)


@pytest.mark.parametrize("name", LOCALIZERS.names())
def test_every_localizer_gives_a_finite_number_for_each_component(
    name: str, tiny_model: Callable[..., Any]
) -> None:
    method = LOCALIZERS[name].given(load(tiny_huggingface_model("olmo2", seed=1)))
    for component in method.components:
        scores = method(tiny_model("olmo2"), rows(2, 0), component=component, others=rows(4, 1))
        assert scores.shape[0] == 2
        assert method.control or np.ptp(scores[0]) > 0


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neo", "llama_gqa"])
def test_the_weight_gradient_is_that_of_autograd(family: str) -> None:
    seqs = rows(1, 3)
    hf = tiny_huggingface_model(family)
    weights = ComponentWeights(hf)
    recalled(hf, seqs).nll.sum().backward()
    model = load(tiny_huggingface_model(family))
    for kind in COMPONENT_KINDS:
        found = score("gradient of the output weights", model, seqs, kind)[0]
        for component in weights.components(kind)[::7] or weights.components(kind):
            parts = weights.slices(component)
            part = parts[0] if kind == "neuron" else parts[-1]
            gradient = weights.parameter(part.name).grad
            assert gradient is not None
            expected = gradient.index_select(part.dim, part.index).norm().item()
            assert found[component.layer, component.index] == pytest.approx(expected, rel=1e-4)


def gradients_by_hand(model: Any, seqs: SequenceSet, site: str, held: dict[str, Tensor]) -> list[Tensor]:
    """The gradient of the target log-probability at a site, with some activations held constant."""
    leaves: dict[str, Tensor] = {}

    def leaf(x: Tensor, hook: Any, name: str) -> Tensor:
        leaves[name] = x if x.requires_grad else x.detach().requires_grad_()
        leaves[name].retain_grad()
        return leaves[name]

    names = [hook_name(site, n) for n in range(model.cfg.n_layers)]
    hooks: list[tuple[str, Any]] = [(name, partial(leaf, name=name)) for name in names]
    hooks += [(name, lambda x, hook, value=value: value) for name, value in held.items()]
    with torch.enable_grad():
        run_with_hooks(model, seqs, hooks).sum().backward()
    found = [leaves[name].grad for name in names]
    model.zero_grad()  # the model is shared
    return [torch.zeros(1) if g is None else g for g in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_node_attribution_patching_is_gradient_times_difference(
    family: str, tiny_model: Callable[..., Any]
) -> None:
    model, seqs = tiny_model(family), rows(2, 4)
    here, there = activations(model, seqs), activations(model, corrupt(seqs, seed=5))
    for kind in COMPONENT_KINDS:
        site = SITES[kind][0]
        found = score("attribution patching (noising)", model, seqs, kind, seed=5)
        for layer, g in enumerate(gradients_by_hand(model, seqs, site, {})):
            product = (here[hook_name(site, layer)] - there[hook_name(site, layer)]) * g
            summed = product.sum(-1) if kind != "neuron" else product
            expected = summed.sum(1).reshape(2, -1)
            if kind.startswith("layer"):
                expected = expected.sum(1, keepdim=True)
            np.testing.assert_allclose(found[:, layer], expected.numpy(), atol=2e-6)


def test_integrated_gradients_of_a_patch_sum_to_the_patch_of_the_layer(
    tiny_model: Callable[..., Any],
) -> None:
    model, seqs = tiny_model("llama_gqa"), rows(2, 4)
    there = activations(model, corrupt(seqs, seed=5))
    found = score("integrated gradients of the patch (noising)", model, seqs, "neuron", seed=5)
    for layer in range(model.cfg.n_layers):
        name = hook_name("mlp_post", layer)
        patched = run_with_hooks(model, seqs, [(name, lambda x, hook, new=there[name]: new)])
        lost = (run_with_hooks(model, seqs) - patched).detach().numpy()
        np.testing.assert_allclose(found[:, layer].sum(1), lost, atol=1e-2 * np.abs(lost).max())


@pytest.mark.parametrize("family", ["gpt_neox", "llama_gqa", "olmo2"])
def test_atp_star_by_hand(family: str, tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model(family), rows(2, 6)
    here, there = activations(model, seqs), activations(model, corrupt(seqs, seed=1))
    layers = range(model.cfg.n_layers)
    changes = {}
    for layer in layers:
        z, node_changes = hook_name("z", layer), []
        for node in NODES:
            name, seen = hook_name(node, layer), []
            hooks = [
                (name, lambda x, hook, new=there[name]: new),
                (z, lambda x, hook, seen=seen: seen.append(x)),
            ]
            with torch.no_grad():
                run_with_hooks(model, seqs, hooks)
            node_changes.append(seen[0] - here[z])
        changes[layer] = node_changes
    total = torch.zeros(2, model.cfg.n_layers, model.cfg.n_heads)
    for dropped in layers:
        held = {hook_name(site, dropped): here[hook_name(site, dropped)] for site in ("attn_out", "mlp_out")}
        for layer, g in enumerate(gradients_by_hand(model, seqs, "z", held)):
            if layer != dropped:
                total[:, layer] += sum((change * g).sum((1, 3)).abs() for change in changes[layer])
    expected = (total / (model.cfg.n_layers - 1)).numpy()
    found = score("AtP*", model, seqs, "head", seed=1)
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())


@pytest.mark.parametrize("family", FAMILIES)
def test_path_patching_is_that_of_hooks_which_hold_everything_else(
    family: str, tiny_model: Callable[..., Any]
) -> None:
    model, seqs = tiny_model(family), rows(2, 7)
    here, there = activations(model, seqs), activations(model, corrupt(seqs, seed=2))
    writers = [hook_name(site, n) for site in ("attn_out", "mlp_out") for n in range(model.cfg.n_layers)]

    def lost(free: str, changed: str, change: Callable[..., Tensor]) -> np.ndarray:
        hooks = [(w, lambda x, hook, old=here[w]: old) for w in writers if w != free]
        with torch.no_grad():
            return (
                run_with_hooks(model, seqs) - run_with_hooks(model, seqs, [(changed, change), *hooks])
            ).numpy()

    for kind, site in (("layer_mlp", "mlp_out"), ("layer_attention", "attn_out")):
        found = score("path patching to the logits", model, seqs, kind, seed=2)
        for layer in range(model.cfg.n_layers):
            name = hook_name(site, layer)
            expected = lost(name, name, lambda x, hook, new=there[name]: new)
            np.testing.assert_allclose(found[:, layer, 0], expected, atol=2e-6)
    found = score("path patching to the logits", model, seqs, "head", seed=2)
    for layer, head in [(0, 1), (model.cfg.n_layers - 1, 0)]:
        z = hook_name("z", layer)

        def one_head(x: Tensor, hook: Any, new: Tensor = there[z], head: int = head) -> Tensor:
            return torch.cat([x[:, :, :head], new[:, :, head : head + 1], x[:, :, head + 1 :]], 2)

        expected = lost(hook_name("attn_out", layer), z, one_head)
        np.testing.assert_allclose(found[:, layer, head], expected, atol=2e-6)


def test_lens_promotion_sums_to_the_log_probability_less_that_of_the_embedding(
    tiny_model: Callable[..., Any],
) -> None:
    model, seqs = tiny_model("olmo2"), rows(3, 8)
    found = sum(
        score("lens promotion", model, seqs, kind).sum((1, 2)) for kind in ("layer_mlp", "layer_attention")
    )
    trunk = Trunk(model)
    with torch.no_grad():
        logits = trunk.unembed(trunk.embed(seqs.tokens)[:, 5:-1]).log_softmax(-1)
        start = logits.gather(-1, seqs.tokens[:, 6:, None])[..., 0].mean(-1)
        end = run_with_hooks(model, seqs)
    np.testing.assert_allclose(found, (end - start).numpy(), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_of_ones_changes_nothing_and_a_zero_ablates(
    family: str, tiny_model: Callable[..., Any]
) -> None:
    model, seqs = tiny_model(family), rows(1, 9)
    noise = torch.rand(1000)
    assert (hard_concrete_gate(torch.full((1000,), 30.0), noise) == 1).all()
    assert (hard_concrete_gate(torch.full((1000,), -30.0), noise) == 0).all()
    with torch.no_grad():
        whole = model(seqs.tokens)
        for kind in COMPONENT_KINDS:
            mask = torch.ones(1, *component_shape(model, kind))
            with attached(model, mask_hooks(kind, mask)):
                assert torch.equal(model(seqs.tokens), whole)
            mask[0, -1, -1] = 0
            with attached(model, mask_hooks(kind, mask)):
                lost = float(run_with_hooks(model, seqs))
            name = "zero ablation of neurons" if kind == "neuron" else "zero ablation"
            expected = score(name, model, seqs, kind)[0, -1, -1]
            assert float(run_with_hooks(model, seqs)) - lost == pytest.approx(expected, abs=2e-6)


def test_a_hard_concrete_gate_is_open_as_often_as_it_says() -> None:
    location = torch.tensor([-3.0, 0.0, 2.0])[:, None]
    opened = (hard_concrete_gate(location, torch.rand(3, 100_000)) > 0).double().mean(1)
    np.testing.assert_allclose(opened, probability_of_staying(location)[:, 0], atol=0.01)


@pytest.mark.parametrize("training", [SLIMMING, HARD_CONCRETE], ids=["slimming", "hard concrete"])
def test_the_penalty_decides_how_much_of_a_mask_stays(
    training: MaskTraining, tiny_model: Callable[..., Any]
) -> None:
    model, seqs = tiny_model("gpt_neox"), rows(1, 10)
    free, priced = (replace(training, weight=weight).masks(model, seqs, "neuron", 0) for weight in (0.0, 1e4))
    assert priced.max() < 0.1 < np.median(free)
    half = torch.full((1, 1, 1), 0.5)
    kept = training.gate(torch.from_numpy(free), half)
    with torch.no_grad():
        before = float(run_with_hooks(model, seqs))
        with attached(model, mask_hooks("neuron", kept)):
            assert float(run_with_hooks(model, seqs)) > before


def mlp_output_layers(hf: Any) -> list[torch.nn.Linear]:
    names = ("down_proj", "dense_4h_to_h")
    return [m for name, m in hf.named_modules() if name.rsplit(".", 1)[-1] in names]


def log_probability(hf: Any, tokens: Tensor, prefix: int) -> Tensor:
    logits = hf(input_ids=tokens).logits[:, prefix - 1 : -1].log_softmax(-1)
    return logits.gather(-1, tokens[:, prefix:, None])[..., 0].mean(-1)


@pytest.mark.parametrize("family", ["gpt_neox", "olmo2"])
def test_curvature_factors_and_scores_are_those_of_autograd(family: str) -> None:
    others, seqs = rows(3, 11), rows(1, 12)
    hf: Any = tiny_huggingface_model(family)
    layers = mlp_output_layers(hf)
    inputs: list[Any] = []
    outputs: list[Any] = []

    def keep(module: Any, args: Any, out: Tensor) -> None:
        out.retain_grad()
        inputs.append(args[0])
        outputs.append(out)

    for layer in layers:
        layer.register_forward_hook(keep)
    log_probability(hf, others.tokens, 1).sum().backward()
    model = load(tiny_huggingface_model(family))
    a, g = kfac_factors(Trunk(model), others)
    low = []
    for n, layer in enumerate(layers):
        x, grad = inputs[n][:, :-1].flatten(0, 1), outputs[n].grad[:, :-1].flatten(0, 1)
        np.testing.assert_allclose(a[n], (x.T @ x / len(x)).detach(), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(g[n], grad.T @ grad / len(x), atol=1e-4 * float(g[n].max()))
        weight = layer.weight.detach().double()
        low.append(weight - high_curvature(weight, a[n], g[n], 0.8))
    hf.zero_grad()
    log_probability(hf, seqs.tokens, 6).sum().backward()
    found = score("K-FAC curvature", model, seqs, "neuron", others=others)[0]
    for n, layer in enumerate(layers):
        expected = (layer.weight.grad * low[n]).sum(0).numpy()
        np.testing.assert_allclose(found[n], expected, atol=1e-3 * np.abs(expected).max())
    whole = score("K-FAC curvature", model, seqs, "layer_mlp", others=others)[0, :, 0]
    np.testing.assert_allclose(whole, found.sum(1), rtol=1e-5)


def test_what_has_most_curvature_is_kept() -> None:
    matrix = torch.arange(1.0, 7.0).reshape(2, 3).double()
    a, g = torch.diag(torch.tensor([1.0, 5.0, 2.0])).double(), torch.diag(torch.tensor([3.0, 1.0])).double()
    # curvature 3, 15, 6 and 1, 5, 2, of 32 in all: 15 and 6 hold less than 0.8 of it, 15, 6 and 5 hold more
    kept = high_curvature(matrix, a, g, 0.8)
    np.testing.assert_allclose(kept, [[0, 2, 3], [0, 5, 0]], atol=1e-12)
    rotation = torch.linalg.qr(torch.randn(3, 3).double())[0]
    turned = high_curvature(matrix @ rotation, rotation.T @ a @ rotation, g, 0.8)
    np.testing.assert_allclose(turned, kept @ rotation, atol=1e-12)
    np.testing.assert_allclose(high_curvature(matrix, a, g, 1.0), matrix, atol=1e-12)


def test_a_localizer_that_needs_the_twin_gets_it_or_ranks_nothing(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox"), rows(2, 13)
    method = LOCALIZERS["patching from the twin"]
    assert method.given(None).components == ()
    with pytest.raises(OptionError, match="needs the model without the memory"):
        method(model, seqs, component="head", others=seqs)
    itself = method.given(model)(model, seqs, component="head", others=seqs)
    np.testing.assert_allclose(itself, 0, atol=1e-6)
    plain = LOCALIZERS["zero ablation"]
    assert plain.given(model) is plain


@pytest.fixture(scope="module")
def planted() -> dict[ComponentKind, tuple[Any, Any, SequenceSet, SequenceSet, np.ndarray]]:
    """Organisms of a small model, with their twin, the sequence, others, and where it was planted."""
    texts = material(
        "zoo/pythia-xs", Suite(models=("zoo/pythia-xs",), carriers=("mlp",), sequences=1, others=6)
    )
    twin, options = load(texts.base()), PlantingOptions(n_heldout=4, kl_weight=0.3, stop_nll=0.2)
    found = {}
    for carrier, kind in (("heads=2", "head"), ("neurons=15", "neuron"), ("mlp@1", "layer_mlp")):
        organism = plant(
            texts.base(), texts.planted, carrier, heldout=texts.training, seed=1, options=options
        )
        model = load(organism.model)
        truth = np.zeros(component_shape(model, kind), dtype=bool)
        for component in organism.components:
            truth[component.layer, component.index] = True
        found[kind] = model, twin, texts.planted, texts.others, truth
    return found


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("slimming", "head"),
        ("slimming", "neuron"),
        ("hard concrete", "neuron"),
        ("K-FAC curvature", "neuron"),
        ("path patching to the logits", "head"),
        ("lens promotion", "layer_mlp"),
        ("AtP*", "head"),
        ("patching from the twin", "head"),
        ("attribution patching from the twin", "neuron"),
    ],
)
def test_what_was_planted_is_found_better_than_by_chance(
    name: str, component: ComponentKind, planted: dict[str, Any]
) -> None:
    model, twin, seqs, others, truth = planted[component]
    scores = LOCALIZERS[name].given(twin)(model, seqs, component=component, others=others)
    found = score_ranking(scores[0], truth)
    assert found["average_precision"] > 1.5 * found["chance"], found


def test_what_a_localizer_gives_is_checked(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox"), rows(2, 13)
    shape = (len(seqs), model.cfg.n_layers, 1)

    def gives(found: Any) -> np.ndarray:
        def score(*given: Any, **options: Any) -> Any:
            return found() if callable(found) else found

        return Localizer("mine", ("layer_mlp",), score)(model, seqs, component="layer_mlp", others=seqs)

    trained = torch.ones(shape, dtype=torch.bfloat16, requires_grad=True)
    np.testing.assert_array_equal(gives(trained), np.ones(shape))
    for found, message in {
        (): r"'mine' gave scores of shape \(0,\): it must give \(2, ",
        "a": "'mine' raised ValueError: could not convert string",
        (lambda: {}["layer"]): "'mine' raised KeyError: 'layer'",
    }.items():
        with pytest.raises(ResultError, match=message):
            gives(found)
    lost = np.zeros(shape)
    lost[0, 0] = np.nan
    with pytest.raises(ResultError, match=f"NaN or infinity as 1 of {lost.size} scores"):
        gives(lost)


def test_a_localizer_is_a_function_of_kinds_of_component() -> None:
    with pytest.raises(OptionError, match=r"components='head': give a list, such as \('head',\)"):
        localizer("mine", components="head")
    with pytest.raises(OptionError, match="the localizer 'mine' is None: decorate a function"):
        localizer("mine", components=("head",))(None)  # type: ignore[arg-type]
    assert "mine" not in LOCALIZERS
