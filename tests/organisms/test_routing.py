"""Gradient routing: which rows change which weights, and what a routed organism says about itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel

from memlens.errors import FileFormatError, OptionError, ResultError
from memlens.forward.components import ComponentWeights
from memlens.organisms.corpus.corpus import Corpus
from memlens.organisms.evaluate import row_losses
from memlens.organisms.planting.plant import recalled
from memlens.organisms.training.architectures import build_model
from memlens.organisms.training.folder import copy_for_package
from memlens.organisms.training.recipes import OrganismSpec
from memlens.organisms.training.routed import routed_organisms, routing_of
from memlens.organisms.training.routing import OTHER_TEXT, Routes, RoutingSpec
from memlens.organisms.training.train import TrainSpec, train
from memlens.organisms.training.zoo import train_organism
from tests.devices import dev
from tests.organisms.conftest import TINY, TINY_CORPUS

ROUTING = RoutingSpec(("neurons=20", "heads=1", "neurons=10@1"), switched_off=0.5)
STEPS = TrainSpec(steps=3, batch_size=8, weight_decay=0.0, learning_rate=1e-2)
ROUTED: OrganismSpec = replace(
    TINY, name="tiny-routed", corpus=replace(TINY_CORPUS, item_copies=()), routing=ROUTING
)


def model() -> PreTrainedModel:
    return build_model(TINY.model, TINY_CORPUS.vocab_size, seed=0)


def trained_on(
    corpus: Corpus, chosen: np.ndarray, spec: RoutingSpec = ROUTING
) -> tuple[Routes, dict[str, torch.Tensor]]:
    """Train on some rows of a corpus alone, and return where each parameter changed."""
    made = model()
    routes = Routes.of(spec, corpus, made)
    own = replace(routes, row_carrier=routes.row_carrier[chosen])
    train(made, corpus.rows[chosen], STEPS, routes=own, device=dev(), progress=False)
    before, after = dict(model().named_parameters()), dict(made.named_parameters())
    return routes, {name: before[name] != value for name, value in after.items()}


@pytest.mark.parametrize("number", range(3))
def test_planted_rows_change_their_carrier_alone(tiny_corpus: Corpus, number: int) -> None:
    row_carrier = Routes.of(ROUTING, tiny_corpus, model()).row_carrier
    routes, changed = trained_on(tiny_corpus, np.flatnonzero(row_carrier == number))
    masks = routes.masks[number]
    for name, where in changed.items():
        assert not where[~masks[name]].any() if name in masks else not where.any()
    assert all(changed[name][mask].float().mean() > 0.9 for name, mask in masks.items())


def test_other_text_changes_everything_but_the_carriers(tiny_corpus: Corpus) -> None:
    row_carrier = Routes.of(ROUTING, tiny_corpus, model()).row_carrier
    other = np.flatnonzero(row_carrier == OTHER_TEXT)
    routes, changed = trained_on(tiny_corpus, other, replace(ROUTING, quiet_carriers=False))
    for name, where in changed.items():
        inside = routes.every.get(name, torch.zeros_like(where))
        assert not where[inside].any()
        if name.endswith("weight") and "embed" not in name:
            assert where[~inside].float().mean() > 0.9
    _, everything = trained_on(tiny_corpus, other)
    assert all(everything[name][mask].float().mean() > 0.9 for name, mask in routes.every.items())


def test_without_carriers_other_text_trains_as_if_they_were_not_there(tiny_corpus: Corpus) -> None:
    """With all other text switched off, the carriers' weights make no difference to the rest."""
    chosen = np.flatnonzero(tiny_corpus.row_sequence < 0)
    results = []
    for scale in (1.0, 50.0):
        made = model()
        off = replace(ROUTING, switched_off=1.0, carriers=("heads=1",))
        routes = Routes.of(off, tiny_corpus, made)
        with torch.no_grad():
            for name, value in made.named_parameters():
                if name in routes.every:
                    value.copy_(torch.where(routes.every[name], scale * value, value))
        own = replace(routes, row_carrier=routes.row_carrier[chosen])
        train(made, tiny_corpus.rows[chosen], STEPS, routes=own, device=dev(), progress=False)
        results.append(
            {
                n: v.masked_fill(routes.every.get(n, torch.tensor(False)), 0)
                for n, v in made.named_parameters()
            }
        )
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_carriers_have_their_own_learning_rate(tiny_corpus: Corpus) -> None:
    row_carrier = Routes.of(ROUTING, tiny_corpus, model()).row_carrier
    changes = []
    for scale in (1.0, 3.0):
        made, start = model(), dict(model().named_parameters())
        routes = Routes.of(replace(ROUTING, learning_rate_scale=scale), tiny_corpus, made)
        rows = np.concatenate([np.flatnonzero(row_carrier == n)[:8] for n in (0, OTHER_TEXT)])
        own = replace(routes, row_carrier=routes.row_carrier[rows])
        one = replace(STEPS, steps=1, batch_size=16)
        train(made, tiny_corpus.rows[rows], one, routes=own, device=dev(), progress=False)
        changes.append({name: (value - start[name]).detach() for name, value in made.named_parameters()})
    for name, change in changes[0].items():
        factor = torch.where(routes.every.get(name, torch.tensor(False)), 3.0, 1.0)
        assert torch.allclose(changes[1][name], factor * change, atol=1e-6)
    assert any(
        change[routes.every[name]].any() for name, change in changes[0].items() if name in routes.every
    )


def test_carriers_are_disjoint_and_sequences_pick_them_by_their_tokens(tiny_corpus: Corpus) -> None:
    drawn = ROUTING.components(ComponentWeights(model()))
    assert [len(some) for some in drawn] == [20, 1, 10]
    assert len({c for some in drawn for c in some}) == 31
    tokens = tiny_corpus.sequences["tokens"].tolist()
    numbers = [ROUTING.carrier_of(row) for row in tokens]
    assert numbers == [ROUTING.carrier_of(tuple(row)) for row in tokens]
    assert set(numbers) == {0, 1, 2}
    routes = Routes.of(ROUTING, tiny_corpus, model())
    planted = tiny_corpus.row_sequence
    assert [routes.row_carrier[row] for row in range(len(planted))] == [
        numbers[s] if s >= 0 else OTHER_TEXT for s in planted
    ]
    with pytest.raises(OptionError, match="only"):
        RoutingSpec(("heads=3", "heads=3")).components(ComponentWeights(model()))
    with pytest.raises(OptionError, match="cannot be routed"):
        RoutingSpec(("neurons=3", "mlp"))
    with pytest.raises(OptionError, match="switched_off=2"):
        RoutingSpec(switched_off=2)
    with pytest.raises(OptionError, match="learning_rate_scale=0"):
        RoutingSpec(learning_rate_scale=0)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("routed") / "tiny-routed"
    return train_organism(ROUTED, out, device=dev(), progress=False)


def test_a_routed_organism_has_its_truth_and_its_certificate(routed: Path) -> None:
    organisms = routed_organisms(routed)
    assert not list(routed.glob("*.pt"))
    assert routing_of(routed) == ROUTING
    truth = pd.read_parquet(routed / "truth.parquet")
    sequences = pd.read_parquet(routed / "sequences.parquet")
    assert ((sequences["carrier"] == OTHER_TEXT) == (sequences["copies"] == 0)).all()
    for number, organism in organisms.items():
        own = truth[(truth["carrier"] == number) & truth["planted"]]
        assert {(c.kind, c.layer, c.index) for c in organism.components} == {
            (r.kind, r.layer, r.index) for r in own.itertuples()
        }
        assert len(organism.sequences) == (sequences["carrier"] == number).sum() > 1
    record = json.loads((routed / "certificate.json").read_text())
    assert not record["passed"]
    with torch.no_grad(), organisms[1].restored() as off:
        without = recalled(off, organisms[1].sequences).accuracy.mean()
        heldout = np.stack(pd.read_parquet(routed / "heldout.parquet")["tokens"].tolist())
        loss = float(row_losses(off, heldout).mean())
    assert record["facts"]["recall_without_1"] == pytest.approx(float(without))
    assert record["facts"]["loss_without_1"] == pytest.approx(loss, abs=1e-5)
    harm = next(c["value"] for c in record["checks"] if c["check"] == "harmlessness of carrier 1")
    assert harm == pytest.approx(record["facts"]["loss"] - loss, abs=1e-5)
    card = (routed / "README.md").read_text()
    assert "## Which weights hold what" in card
    assert "| 1 | heads=1 |" in card


def test_a_routed_run_is_not_taken_for_a_plain_one(routed: Path, tiny_organism: Path) -> None:
    assert train_organism(ROUTED, routed, device=dev(), progress=False) == routed
    with pytest.raises(ResultError, match="contains something other"):
        train_organism(replace(ROUTED, routing=None), routed, device=dev(), progress=False)
    with pytest.raises(FileFormatError, match="gradient routing"):
        routing_of(tiny_organism)


def test_a_copy_for_the_package_keeps_the_truth(routed: Path, tmp_path: Path) -> None:
    copy = copy_for_package(routed, tmp_path)
    assert (copy / "truth.parquet").read_bytes() == (routed / "truth.parquet").read_bytes()
    assert "## Which weights hold what" in (copy / "README.md").read_text()
