"""Weight edits: as interventions they equal a model whose parameters were changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import DonorError, InterventionError, OptionError, SiteError
from memlens.forward.components import Component, ComponentWeights
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


def donors_slices(family: str, components: Sequence[str]) -> Any:
    """A copy with a donor's weights, written without memlens' record: matrices, biases and norms by name."""
    plain, donor = copy.deepcopy(huggingface(family)), huggingface(family, 1)
    weights, theirs = ComponentWeights(plain), dict(donor.named_parameters())
    with torch.no_grad():
        for text in components:
            component = Component.parse(text)
            for part in weights.slices(component):
                own = weights.parameter(part.name)
                own.index_copy_(part.dim, part.index, theirs[part.name].index_select(part.dim, part.index))
                bias = part.name.removesuffix(".weight") + ".bias"
                rows = part.dim == (1 if weights._blocks[component.layer].transposed else 0)
                if bias in theirs and (rows or component.kind.startswith("layer")):
                    index = part.index if rows else torch.arange(len(theirs[bias]))
                    weights.parameter(bias).index_copy_(0, index, theirs[bias][index])
    return plain


@torch.no_grad()
@pytest.mark.parametrize(("family", "backend"), CASES)
def test_a_transplant_equals_a_copy_with_the_donors_weights(
    family: str, backend: str, pair: Callable[..., Any]
) -> None:
    model, donor = pair(family, backend)
    tokens = random_tokens()
    plain = huggingface(family)(tokens).logits
    for edit in weight_transplants(model, donor, SOME):
        want = changed_copy(family, edit)(tokens).logits
        assert largest_gap(plain, want) > 1e-3
        with ml.applied(model, edit):
            assert largest_gap(model(tokens), want) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neo", "llama_gqa", "gpt_bigcode", "starcoder2"])
def test_the_record_writes_what_the_component_owns(family: str, pair: Callable[..., Any]) -> None:
    model, donor = pair(family, "bridge")
    chosen = ["L1H2", "L0N5", "L2 MLP"]
    for edit, name in zip(weight_transplants(model, donor, chosen), chosen, strict=True):
        ours, theirs = changed_copy(family, edit), donors_slices(family, [name])
        for (key, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert torch.equal(a, b), (name, key)


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


@pytest.mark.parametrize("kind", ["heads", "mlps", "attention", "layers"])
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_a_model_as_its_own_donor_changes_nothing(
    backend: str, kind: Any, tiny_model: Callable[..., Any]
) -> None:
    model, seqs = tiny_model("gpt_neox", backend), ragged()
    result = transplant_weights(model, seqs, model, kind, progress=False)
    values = result["target_logprob"].values.reshape(len(seqs), -1)
    assert (values == result.baseline("target_logprob").values[:, None]).all()


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
