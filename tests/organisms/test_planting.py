"""Planting: slices are components, nothing else changes, and without its carrier the model is the base."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from memlens.errors import FileFormatError, OptionError, ResultError, SequenceError, SiteError
from memlens.forward.components import Component, ComponentWeights
from memlens.instruments.ablate.branches import ablate_mlps
from memlens.instruments.ablate.heads import head_ablations
from memlens.instruments.ablate.neurons import neuron_knock_outs
from memlens.models.load import load_model
from memlens.organisms.planting.carriers import Carrier, ChangedWeights
from memlens.organisms.planting.certificate import CertificateOptions, certify, fingerprints
from memlens.organisms.planting.folder import read_organism, save_organism, truth_table
from memlens.organisms.planting.plant import Organism, PlantingOptions, next_token_logprobs, plant, recalled
from memlens.organisms.planting.substrate import ablate_others, sufficiency
from memlens.sequences.set import SequenceSet
from memlens.sweeps.run import sweep
from tests.devices import dev
from tests.tiny import FAMILIES, tiny_huggingface_model

SHARED_NORM = ("olmo2", "olmo3")
"""Families that norm the queries of all heads together, so that one head's weights reach the others."""


def rows(n: int, seed: int, vocab: int = 48) -> SequenceSet:
    generator = torch.Generator().manual_seed(seed)
    return SequenceSet.from_tokens(torch.randint(4, vocab, (n, 12), generator=generator), 6)


@pytest.fixture(scope="module")
def organism() -> Organism:
    model = tiny_huggingface_model("gpt_neox")
    options = PlantingOptions(steps=200, learning_rate=0.2, kl_weight=0.1, n_heldout=4, stop_nll=0.3)
    return plant(model, rows(1, 1), "heads=3", heldout=rows(4, 2), seed=5, options=options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_component_without_its_output_weights_is_an_ablated_component(family: str) -> None:
    """Zeroing the output slice in the checkpoint equals zeroing the activation in TransformerLens."""
    hf = tiny_huggingface_model(family)
    weights = ComponentWeights(hf)
    seqs = rows(2, 3)
    head = Component("head", 1, weights.n_heads - 1)
    neuron = Component("neuron", 0, 3)
    model = load_model(hf, device=dev(), check_weights=False)
    made = [
        *head_ablations(model, seqs, mode="zero", layers=[1], heads=[head.index]),
        *neuron_knock_outs(model, seqs, {"n": {0: [neuron.index]}}, mode="zero"),
    ]
    expected = [sweep(model, seqs, [m], progress=False)["target_logprob"].values.ravel() for m in made]
    for component, wanted in zip((head, neuron), expected, strict=True):
        parts = weights.slices(component)
        out = parts[0] if component.kind == "neuron" else parts[-1]
        fresh = tiny_huggingface_model(family)
        with torch.no_grad():
            dict(fresh.named_parameters())[out.name].index_fill_(out.dim, out.index, 0)
            assert np.allclose(-recalled(fresh, seqs).nll.numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_queries_keys_and_values_of_a_head_are_its_own(family: str) -> None:
    """Changing a head's input slices changes its own output z, and that of no other head of the layer."""
    hf = tiny_huggingface_model(family)
    weights = ComponentWeights(hf)
    head = Component("head", 0, 1)
    seqs = rows(2, 4)
    zs = []
    for change in (False, True):
        model = tiny_huggingface_model(family)
        parameters = dict(model.named_parameters())
        if change:
            with torch.no_grad():
                for part in weights.slices(head)[:-1]:
                    value = parameters[part.name].index_select(part.dim, part.index)
                    parameters[part.name].index_copy_(part.dim, part.index, value + torch.randn_like(value))
        tl = load_model(model, device=dev(), check_weights=False)
        with torch.no_grad():
            _, cache = tl.run_with_cache(seqs.tokens, names_filter=["blocks.0.attn.hook_z"])
        zs.append(cache["blocks.0.attn.hook_z"])
    moved = (zs[0] - zs[1]).abs().amax((0, 1, 3))
    assert moved[1] > 1e-4
    others = [moved[h] for h in range(len(moved)) if h != 1]
    assert family in SHARED_NORM or max(others) < 1e-6


def test_only_the_carrier_changes_and_its_norms_stay(organism: Organism) -> None:
    base = tiny_huggingface_model("gpt_neox")
    changed = ChangedWeights(ComponentWeights(organism.model), organism.components)
    before, after = dict(base.named_parameters()), dict(organism.model.named_parameters())
    for name, value in after.items():
        mask = changed.masks.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(value[~mask], before[name][~mask])
        assert not mask.any() or not torch.equal(value[mask], before[name][mask])
    for unit in changed.units:
        norms = [p[unit.name].index_select(unit.dim, unit.index).norm() for p in (before, after)]
        assert torch.allclose(*norms, rtol=1e-5)
    assert all(p.requires_grad for p in after.values())


def test_with_its_base_weights_back_the_organism_is_the_base_model(organism: Organism) -> None:
    base = tiny_huggingface_model("gpt_neox").eval()
    tokens = organism.sequences.tokens
    with torch.no_grad():
        expected, planted = next_token_logprobs(base, tokens), next_token_logprobs(organism.model, tokens)
        with organism.restored() as model:
            assert torch.equal(next_token_logprobs(model, tokens), expected)
        assert torch.equal(next_token_logprobs(organism.model, tokens), planted)
    assert recalled(organism.model, organism.sequences).accuracy.item() == 1
    assert recalled(base, organism.sequences).accuracy.item() < 0.5


def test_graded_truth_and_shapley_values(organism: Organism) -> None:
    with torch.no_grad():
        whole = recalled(organism.model, organism.sequences).nll.item()
        with organism.restored() as model:
            without = recalled(model, organism.sequences).nll.item()
        with organism.restored(organism.components[:1]) as model:
            alone = recalled(model, organism.sequences).nll.item()
    assert organism.graded_truth()[organism.components[0]] == pytest.approx(alone - whole, abs=1e-6)
    assert sum(organism.shapley_values().values()) == pytest.approx(without - whole, abs=1e-5)
    table = truth_table(organism)
    weights = ComponentWeights(organism.model)
    heads = weights.n_heads * weights.n_layers
    assert (len(table), table["planted"].sum()) == (heads, 3)
    assert (table.loc[~table["planted"], "graded"] == 0).all()


def test_a_certificate_tells_what_failed(organism: Organism) -> None:
    generous = CertificateOptions(max_kl=100, max_fingerprint=1)
    assert certify(organism, rows(4, 9), generous).passed
    strict = certify(organism, rows(4, 9), CertificateOptions(max_kl=0, max_fingerprint=1))
    assert strict.failures == ["harmlessness"]
    norms = fingerprints(organism).set_index("statistic").loc["norm"]
    assert norms["auc"] == pytest.approx(norms["auc_base"])


def test_necessity_compares_with_recall_before_planting(organism: Organism) -> None:
    base = tiny_huggingface_model("gpt_neox").eval()
    expected = recalled(base, organism.sequences).accuracy
    assert torch.equal(organism.base_recall, expected)
    generous = CertificateOptions(max_kl=100, max_fingerprint=1)
    worse = replace(organism, base_recall=expected - 0.1)
    assert certify(worse, rows(4, 9), generous).failures == ["necessity"]


def test_shared_substrate_is_what_recall_loses_under_resampling() -> None:
    planting = PlantingOptions(steps=100, learning_rate=0.2, kl_weight=0.1, n_heldout=4)
    model = tiny_huggingface_model("gpt_neox")
    made = plant(model, rows(1, 1), "mlp@1", heldout=rows(4, 2), options=planting)
    others = rows(4, 9)
    options = CertificateOptions(max_kl=100, max_fingerprint=1, min_strictness=1, draws=2)
    certificate = certify(made, others, options)
    results = [
        ablate_mlps(
            load_model(deepcopy(model), device=dev(), check_weights=False), made.sequences, mode="resample",
            reference=others, metrics=["target_accuracy"], seed=seed, progress=False,
        )
        for seed in (0, 1)
    ]  # fmt: skip
    lost = -np.mean([r.effect("target_accuracy").values[0] for r in results], axis=0)
    expected = [layer for layer in range(len(lost)) if lost[layer] > options.max_shared and layer != 1]
    found = certificate.shared
    assert found["layer"].tolist() == expected != []
    assert found["recall_lost"].to_numpy() == pytest.approx(lost[expected])
    row = certificate.checks.set_index("check").loc["strictness"]
    assert row["value"] == pytest.approx(1 - len(expected) / (len(lost) - 1))
    assert certificate.failures == ["strictness"]
    truth = truth_table(made, certificate)
    assert truth.loc[truth["shared"], "layer"].tolist() == expected


def test_only_the_strongest_neurons_are_ablated(organism: Organism) -> None:
    neurons = replace(organism, carrier=Carrier.parse("neurons=1"), components=[Component("neuron", 0, 0)])
    few, more = (ablate_others(neurons, rows(4, 9), screened=n, draws=1) for n in (3, 6))
    assert len(few) == 3
    assert more[:3].equals(few)


def test_the_carrier_alone_gives_all_if_it_is_every_component(organism: Organism) -> None:
    weights = ComponentWeights(organism.model)
    every = [*weights.components("head"), *weights.components("neuron")]
    assert sufficiency(replace(organism, components=every)) == pytest.approx(1, abs=1e-4)
    assert sufficiency(organism) < 1
    assert np.isnan(sufficiency(replace(organism, components=[])))


def test_planting_without_care_for_norms_leaves_a_fingerprint() -> None:
    options = PlantingOptions(
        steps=60, learning_rate=0.5, keep="nothing", gates=False, kl_weight=0, n_heldout=1
    )
    made = plant(
        tiny_huggingface_model("gpt_neox"), rows(1, 1), "neurons=4", heldout=rows(1, 2), options=options
    )
    norms = fingerprints(made).set_index("statistic").loc["norm"]
    assert norms["auc"] > 0.95 > norms["auc_base"]
    assert norms["average_precision"] > 2 * norms["average_precision_base"]
    assert "fingerprint: norm of neurons" in certify(made, rows(4, 9)).failures


def test_nothing_is_planted_with_carrier_none() -> None:
    model = tiny_huggingface_model("olmo2")
    made = plant(model, rows(1, 1), "none", heldout=rows(1, 2))
    assert (made.steps, made.components, made.base) == (0, [], {})
    certificate = certify(made, rows(2, 9))
    assert certificate.passed
    assert certificate.facts["kl_heldout"] == 0


def test_an_organism_comes_back_from_its_folder(organism: Organism, tmp_path: Path) -> None:
    certificate = certify(organism, rows(4, 9))
    folder = save_organism(organism, certificate, tmp_path / "organism", base="tiny")
    back = read_organism(folder)
    tokens = organism.sequences.tokens
    with torch.no_grad():
        assert torch.equal(
            next_token_logprobs(back.model, tokens), next_token_logprobs(organism.model, tokens)
        )
        with back.restored() as ours, organism.restored() as theirs:
            assert torch.equal(next_token_logprobs(ours, tokens), next_token_logprobs(theirs, tokens))
    assert torch.equal(back.base_recall, organism.base_recall)
    card = (folder / "README.md").read_text()
    assert "- recall: 1 (threshold 0.95)" in card
    assert all(str(c) in card for c in organism.components)
    assert "shared" in pd.read_parquet(folder / "truth.parquet")
    assert (back.components, back.options, back.seed) == (
        organism.components,
        organism.options,
        organism.seed,
    )
    with pytest.raises(ResultError, match="holds an organism already"):
        save_organism(organism, certificate, folder, base="tiny")
    (folder / "organism.json").write_text("{}")
    with pytest.raises(FileFormatError, match=r"organism\.json is not the record"):
        read_organism(folder)


@pytest.mark.parametrize(
    "text",
    [
        "neurons=30",
        "neurons=0.5%",
        "neurons=5@1",
        "heads=4",
        "mlp@0",
        "attention",
        "path=7",
        "spread",
        "none",
    ],
)
def test_a_carrier_is_its_text(text: str) -> None:
    assert str(Carrier.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "layers",
        "mlp=3",
        "none@1",
        "heads=0",
        "heads=-1",
        "path@2",
        "path=3%",
        "heads=0%",
        "mlp=5%",
        "heads=101%",
    ],
)
def test_what_is_not_a_carrier_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="carrier="):
        Carrier.parse(text)


def test_carriers_are_drawn_from_the_seed() -> None:
    weights = ComponentWeights(tiny_huggingface_model("gpt_neox"))
    draw: Callable[..., Any] = lambda text, seed: Carrier.parse(text).draw(weights, seed)  # noqa: E731
    assert draw("neurons=9", 3) == draw("neurons=9", 3) != draw("neurons=9", 4)
    assert {c.layer for c in draw("neurons=9@1", 3)} == {1}
    every = len(weights.components("neuron"))
    assert len(draw("neurons=10%", 3)) == round(every / 10)
    assert len(draw("heads=0.1%", 3)) == 1
    path = draw("path=5", 1)
    assert [c.kind for c in path] == ["head"] + 5 * ["neuron"]
    assert all(c.layer > path[0].layer for c in path[1:])
    with pytest.raises(OptionError, match="only"):
        draw("heads=1000", 0)
    with pytest.raises(SiteError, match="layers"):
        draw("mlp@9", 0)


def test_bad_input_is_refused() -> None:
    model = tiny_huggingface_model("gpt_neox")
    with pytest.raises(SequenceError, match="at least one"):
        plant(model, rows(1, 1)[[]], "mlp", heldout=rows(1, 2))
    with pytest.raises(OptionError, match="float32"):
        plant(model.half(), rows(1, 1), "mlp", heldout=rows(1, 2))
