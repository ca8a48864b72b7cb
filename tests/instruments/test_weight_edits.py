"""Weight edits: as interventions they equal a model whose parameters were changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import memlens as ml
from memlens.errors import DonorError, InterventionError, OptionError, SiteError
from memlens.instruments.edit.options import VectorSearch
from memlens.instruments.edit.transplant import transplant_weights, weight_transplants
from memlens.instruments.edit.weight_edit import WeightChange, join_edits, merged_changes, weight_edit
from memlens.instruments.edit.writing import write_edit
from tests.small import CASES, ragged
from tests.tiny import FAMILIES, random_tokens, tiny_huggingface_model

SOME = ["L1H2", "L0N5", "L2 MLP", "L1 attention", "L1"]


@cache
def huggingface(family: str, seed: int = 0) -> Any:
    return tiny_huggingface_model(family, seed=seed)


@pytest.fixture
def pair(tiny_model: Callable[..., Any]) -> Callable[[str, str], tuple[Any, Any]]:
    """A model, shared, and another one of its shape, by family and backend."""
    made: dict[tuple[str, str], Any] = {}

    def get(family: str, backend: str) -> tuple[Any, Any]:
        model = tiny_model(family, backend)
        if (family, backend) not in made:
            donor = copy.deepcopy(huggingface(family, 1))
            made[family, backend] = ml.load_model(donor, backend=backend)
        return model, made[family, backend]

    return get


def changed_copy(family: str, edit: Any) -> Any:
    plain = copy.deepcopy(huggingface(family))
    write_edit(plain, edit)
    return plain


def largest_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


class Layout(NamedTuple):
    """Where Hugging Face's classes keep a layer's linear maps."""

    layers: str
    attention: str
    into_heads: tuple[str, ...]
    out_of_heads: str
    into_neurons: tuple[str, ...]
    out_of_neurons: str


_SEPARATE = ("q_proj", "k_proj", "v_proj")
_LLAMA = Layout("model.layers", "self_attn", _SEPARATE, "o_proj", ("gate_proj", "up_proj"), "down_proj")
_NEOX = Layout(
    "gpt_neox.layers", "attention", ("query_key_value",), "dense", ("dense_h_to_4h",), "dense_4h_to_h"
)
LAYOUTS = {
    **dict.fromkeys(("olmo", "olmo2", "olmo3", "llama", "llama_gqa"), _LLAMA),
    "gpt_neox": _NEOX,
    "gpt_neox_sequential": _NEOX,
    "gpt_neo": Layout("transformer.h", "attn.attention", _SEPARATE, "out_proj", ("c_fc",), "c_proj"),
    "gpt_bigcode": Layout("transformer.h", "attn", ("c_attn",), "c_proj", ("c_fc",), "c_proj"),
    "starcoder2": Layout("model.layers", "self_attn", _SEPARATE, "o_proj", ("c_fc",), "c_proj"),
}
N_HEADS, D_HEAD = 4, 8


def exchanged(family: str, component: str) -> Any:
    """A copy with a donor's weights in one component, exchanged by hand in Hugging Face's modules."""
    plain, donor = copy.deepcopy(huggingface(family)), huggingface(family, 1)
    layout, (layer, what) = LAYOUTS[family], re.fullmatch(r"L(\d+) ?(.*)", component).groups()  # pyright: ignore[reportOptionalMemberAccess]
    mine, theirs = (m.get_submodule(f"{layout.layers}.{layer}") for m in (plain, donor))
    parts = {"": "", "MLP": "mlp", "attention": layout.attention}
    if what in parts:
        mine.get_submodule(parts[what]).load_state_dict(theirs.get_submodule(parts[what]).state_dict())
        return plain
    index = int(what[1:])
    if what[0] == "H":
        module, inside, outside = layout.attention, layout.into_heads, layout.out_of_heads
        columns = slice(index * D_HEAD, (index + 1) * D_HEAD)
    else:
        module, inside, outside = "mlp", layout.into_neurons, layout.out_of_neurons
        columns = slice(index, index + 1)
    with torch.no_grad():
        for name in inside:
            own, other = (m.get_submodule(f"{module}.{name}") for m in (mine, theirs))
            rows = columns
            if name == "query_key_value":  # each head's queries, keys and values together
                rows = slice(columns.start * 3, columns.stop * 3)
            elif name in ("k_proj", "v_proj") and len(own.weight) < N_HEADS * D_HEAD:
                continue  # shared by several heads
            own.weight[rows] = other.weight[rows]
            if own.bias is not None:
                own.bias[rows] = other.bias[rows]
        own, other = (m.get_submodule(f"{module}.{outside}") for m in (mine, theirs))
        own.weight[:, columns] = other.weight[:, columns]
    return plain


@torch.no_grad()
@pytest.mark.parametrize(("family", "backend"), CASES)
def test_a_transplant_equals_a_copy_with_the_donors_weights(
    family: str, backend: str, pair: Callable[..., Any]
) -> None:
    model, donor = pair(family, backend)
    tokens = random_tokens()
    plain = huggingface(family)(tokens).logits
    for edit, name in zip(weight_transplants(model, donor, SOME), SOME, strict=True):
        want = exchanged(family, name)(tokens).logits
        assert largest_gap(plain, want) > 1e-3
        with ml.applied(model, edit):
            assert largest_gap(model(tokens), want) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_record_writes_what_the_component_owns(family: str, pair: Callable[..., Any]) -> None:
    model, donor = pair(family, "bridge")
    for edit, name in zip(weight_transplants(model, donor, SOME), SOME, strict=True):
        ours, theirs = changed_copy(family, edit), exchanged(family, name)
        for (key, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            if a.ndim > 1 or name != "L1":
                assert torch.equal(a, b), (name, key)
            else:  # norms are read from what they return
                assert torch.allclose(a, b, atol=1e-6), (name, key)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_of_a_donor_are_the_donor_but_for_the_embeddings(
    family: str, pair: Callable[..., Any]
) -> None:
    model, donor = pair(family, "bridge")
    (edit,) = weight_transplants(model, donor, "layers", together=True)
    plain = changed_copy(family, edit)
    theirs = dict(huggingface(family, 1).named_parameters())
    ours = dict(plain.named_parameters())
    others = [name for name, value in ours.items() if not torch.allclose(value, theirs[name], atol=1e-6)]
    assert others
    assert all(".0." not in name and ".1." not in name for name in others)
    exact = [name for name, value in ours.items() if torch.equal(value, theirs[name])]
    assert len(exact) > len(ours) / 2  # norms are read from what they return, so up to rounding


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize(
    ("family", "backend"), [("gpt_neox", "hooked"), ("olmo2", "bridge"), ("llama_gqa", "bridge")]
)
def test_a_sweep_measures_the_changed_model(
    family: str, backend: str, engine: str, pair: Callable[..., Any]
) -> None:
    model, donor = pair(family, backend)
    seqs = ragged()
    result = transplant_weights(model, seqs, donor, SOME, engine=engine, progress=False)
    assert result.kind == "weight_transplant"
    assert result["component"].values.tolist() == SOME
    for i, edit in enumerate(weight_transplants(model, donor, SOME)):
        changed = ml.load_model(changed_copy(family, edit))
        want = ml.measure(changed, seqs)["target_logprob"]
        np.testing.assert_allclose(result["target_logprob"].values[:, i], want, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("family", "backend"), CASES)
def test_every_kind_of_edit_and_its_checkpoint_equal_surgery(
    family: str, backend: str, pair: Callable[..., Any], tmp_path: Path
) -> None:
    """A scaled head, a neuron at its mean, a searched output vector and a transplant, all at once."""
    model, donor = pair(family, backend)
    layout, tokens, seqs = LAYOUTS[family], random_tokens(), ragged(2)
    searched = ml.edits.edit_weights(
        model, ["L1N7"], "output_vector", sequences=seqs, search=VectorSearch(steps=2), progress=False
    )
    plain = exchanged(family, "L1 attention")
    layers = plain.get_submodule(layout.layers)
    layers[0].get_submodule(f"{layout.attention}.{layout.out_of_heads}").weight[:, D_HEAD : 2 * D_HEAD] *= 0.5
    layers[1].get_submodule(f"mlp.{layout.out_of_neurons}").weight[:, 7] = searched.changes[0].weight[:, 0]
    out = layers[2].get_submodule(f"mlp.{layout.out_of_neurons}")
    how: Any = "zero" if out.bias is None else "mean"
    if out.bias is not None:
        name = "blocks.2.mlp.hook_post"
        caches = [model.run_with_cache(torch.tensor([row]), names_filter=[name])[1] for row in seqs.rows()]
        out.bias += out.weight[:, 3] * torch.cat([cache[name][0, :, 3] for cache in caches]).mean()
    out.weight[:, 3] = 0
    edits = [
        ml.edits.edit_weights(model, ["L0H1"], strength=0.5),
        searched,
        ml.edits.edit_weights(model, ["L2N3"], how, reference=seqs if how == "mean" else None),
        *weight_transplants(model, donor, ["L1 attention"]),
    ]
    want = plain(tokens).logits
    with ml.applied(model, join_edits(model, edits)):
        assert largest_gap(model(tokens), want) < 1e-5
    exported = AutoModelForCausalLM.from_pretrained(
        ml.instruments.export_edited(model, edits, tmp_path / "edited")
    )
    assert largest_gap(exported(tokens).logits, want) < 1e-5
    for (name, ours), (_, theirs) in zip(exported.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_equal_weights_change_nothing(family: str, backend: str, tiny_model: Callable[..., Any]) -> None:
    """Not one bit, from the model itself or from an equal copy; and where one head differs, only with it."""
    model, seqs = tiny_model(family, backend), ragged(2)
    sets: dict[str, list[str]] = {
        "heads": ["L0H0", "L1H2"], "neurons": ["L0N5", "L2N40"], "MLPs": ["L0 MLP", "L2 MLP"],
        "attention": ["L1 attention"], "layers": ["L0", "L1", "L2"],
    }  # fmt: skip

    def effects(donor: Any) -> dict[str, Any]:
        found = transplant_weights(model, seqs, donor, sets, progress=False)
        values, plain = found["target_logprob"], found.baseline("target_logprob")
        return {name: bool((values.sel(set=name) == plain).all()) for name in sets}

    assert all(effects(model).values())
    twin, other = (copy.deepcopy(huggingface(family)) for _ in range(2))
    assert all(effects(ml.load_model(twin, backend=backend)).values())
    layout = LAYOUTS[family]
    name = f"{layout.layers}.1.{layout.attention}.{layout.out_of_heads}"
    with torch.no_grad():
        other.get_submodule(name).weight[:, 2 * D_HEAD] *= -1  # of L1H2
    same = effects(ml.load_model(other, backend=backend))
    assert same == {"heads": False, "neurons": True, "MLPs": True, "attention": False, "layers": False}


def test_one_after_the_other_and_together(pair: Callable[..., Any]) -> None:
    model, donor = pair("gpt_neox", "hooked")
    seqs = ragged()
    heads = transplant_weights(model, seqs, donor, progress=False)
    assert heads["target_logprob"].dims == ("sequence", "layer", "head")
    neurons = transplant_weights(model, seqs, donor, ["L0N1", "L1N3"], progress=False)
    assert neurons["target_logprob"].dims == ("sequence", "layer", "neuron")
    sets = transplant_weights(model, seqs, donor, {"a": ["L0H1"], "b": ["L0H1", "L2N3"]}, progress=False)
    assert sets["set"].values.tolist() == ["a", "b"]
    np.testing.assert_allclose(
        sets["target_logprob"].values[:, 0], heads["target_logprob"].values[:, 0, 1], atol=1e-6
    )
    both = transplant_weights(
        model, seqs, donor, {"a": ["L0H1"], "b": ["L2N3"]}, together=True, progress=False
    )
    assert both["set"].values.tolist() == ["a + b"]
    np.testing.assert_allclose(
        both["target_logprob"].values[:, 0], sets["target_logprob"].values[:, 1], atol=1e-6
    )


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_generation_with_a_cache_uses_the_changed_weights(backend: str, pair: Callable[..., Any]) -> None:
    from memlens.forward.generate import greedy_continuations

    model, donor = pair("gpt_neox", backend)
    edit = join_edits(model, weight_transplants(model, donor, ["L0H1", "L1 MLP", "L2N4"]))
    seqs = ragged()
    with ml.applied(model, edit):
        ours = greedy_continuations(model, seqs)
    theirs = greedy_continuations(ml.load_model(changed_copy("gpt_neox", edit)), seqs)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, greedy_continuations(model, seqs))


def test_what_is_not_there_is_refused(pair: Callable[..., Any], tiny_model: Callable[..., Any]) -> None:
    model, donor = pair("gpt_neox", "hooked")
    with pytest.raises(SiteError, match="L0H9 does not exist"):
        weight_transplants(model, donor, ["L0H9"])
    with pytest.raises(SiteError, match="layer 7"):
        weight_transplants(model, donor, ["L7 MLP"])
    with pytest.raises(OptionError, match="is not a component"):
        weight_transplants(model, donor, ["head 3"])
    with pytest.raises(OptionError, match="nothing to transplant"):
        weight_transplants(model, donor, [])
    with pytest.raises(DonorError):
        weight_transplants(model, tiny_model("gpt_neo", "hooked"), ["L0H1"])


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_an_edit_is_for_the_weights_that_it_replaces(
    family: str, backend: str, pair: Callable[..., Any]
) -> None:
    model, donor = pair(family, backend)
    seqs = ragged(3)
    nothing = ml.Intervention("nothing", [])
    for edit in weight_transplants(model, donor, SOME):
        for one in (edit, nothing + edit, edit + nothing):
            ml.sweep(model, seqs, [one], progress=False)
            with pytest.raises(InterventionError, match="made for other weights"):
                ml.sweep(donor, seqs, [one], progress=False)
            with pytest.raises(InterventionError, match="made for other weights"), ml.applied(donor, one):
                pass
    own = ml.load_model(copy.deepcopy(huggingface(family)), backend=backend)
    edit = weight_transplants(own, donor, ["L0N5"])[0]
    with torch.no_grad(), ml.applied(own, edit):
        own(torch.tensor([[3, 4, 5]]))
    for parameter in own.parameters():
        parameter.data.mul_(1.5)
    with pytest.raises(InterventionError, match="again if the weights changed since"), ml.applied(own, edit):
        pass


def test_one_weight_has_one_new_value(pair: Callable[..., Any]) -> None:
    model, donor = pair("gpt_neox", "hooked")
    one, two = weight_transplants(model, donor, ["L1H2", "L1 attention"])
    joined = join_edits(model, [one, two, one])
    assert {c.part: len(c.index) for c in joined.changes if c.index is not None}["o"] == 32
    zero = WeightChange(1, "o", torch.zeros(32, 8), torch.arange(16, 24))
    with pytest.raises(InterventionError, match="different values"):
        merged_changes([*one.changes, zero])
    with pytest.raises(InterventionError, match="join_edits"):
        _ = one + two


def test_an_edit_may_be_used_again_in_the_folder_of_its_run(tmp_path: Path, pair: Callable[..., Any]) -> None:
    model, donor = pair("gpt_neox", "hooked")
    edits, seqs = weight_transplants(model, donor, SOME), ragged()
    first = ml.sweep(model, seqs, edits, out=tmp_path / "run", progress=False)
    again = ml.sweep(model, seqs, edits, out=tmp_path / "run", progress=False)
    assert np.array_equal(first["target_logprob"], again["target_logprob"])


def test_a_norm_and_a_bias_of_rows_change_alone(tiny_model: Callable[..., Any]) -> None:
    """A norm before attention changes all queries, keys and values, though their maps stay."""
    model, tokens = tiny_model("gpt_neox", "hooked"), random_tokens()
    gain = torch.linspace(0.5, 1.5, 32)
    edit = weight_edit(
        model,
        "gain and biases",
        [
            WeightChange(1, "attn_norm", gain, None, torch.ones(32)),
            WeightChange(1, "q", torch.zeros(2, 32), torch.tensor([3, 1]), torch.tensor([2.0, -1.0])),
            WeightChange(1, "in", torch.zeros(1, 32), torch.tensor([7]), torch.tensor([3.0])),
        ],
    )
    with torch.no_grad(), ml.applied(model, edit):
        got = model(tokens)
    plain = changed_copy("gpt_neox", edit)
    assert torch.equal(plain.gpt_neox.layers[1].input_layernorm.weight, gain)
    assert plain.gpt_neox.layers[1].mlp.dense_h_to_4h.bias[7] == 3
    assert largest_gap(got, plain(tokens).logits.detach()) < 1e-5
