"""Costs, deletion and uniqueness of localizers on an organism, against plain computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from memlens.benchmark import measure_organism, score_ranking
from memlens.benchmark.cost import operations
from memlens.benchmark.deletion import deletions, top_k
from memlens.benchmark.measure import AVERAGED, Costs
from memlens.benchmark.running import pretended_truth
from memlens.benchmark.scores import chance_level
from memlens.forward.baseline import teacher_forced_stats
from memlens.models.load import load_model
from memlens.sequences.set import SequenceSet
from tests.devices import dev
from tests.tiny import tiny_huggingface_model

METHODS = [*AVERAGED, "resample ablation", "gate gradient", "weight norm", "random"]


def some(n: int, seed: int) -> SequenceSet:
    generator = torch.Generator().manual_seed(seed)
    return SequenceSet.from_tokens(torch.randint(4, 90, (n, 12), generator=generator), 6)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(tiny_huggingface_model("gpt_neox"), device=dev(), check_weights=False)


def truth_of(model: Any, kind: str, planted: int) -> pd.DataFrame:
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    cells = [(layer, head) for layer in range(layers) for head in range(heads)]
    rows = [
        {"kind": kind, "layer": a, "index": b, "planted": i < planted, "graded": float(i < planted)}
        for i, (a, b) in enumerate(cells)
    ]
    return pd.DataFrame(rows)


def logprob(model: Any, seqs: SequenceSet) -> np.ndarray:
    return teacher_forced_stats(model, seqs, progress=False).logprob.mean(1).numpy()


def test_deletion_is_the_loss_with_the_weights_set_to_zero(model: Any) -> None:
    seqs, others = some(2, 0), some(3, 1)
    heads, d = model.cfg.n_heads, model.cfg.d_head
    sets = [[(0, heads + 1), (1, 2)], [(0, heads + 1)]]  # one set per sequence; one set for both
    found = deletions(model, seqs, others, "head", sets)
    hf = tiny_huggingface_model("gpt_neox")
    with torch.no_grad():
        for flat in sets[1][0]:
            layer, head = divmod(flat, heads)
            out: Any = hf.get_submodule(f"gpt_neox.layers.{layer}.attention.dense").weight
            out[:, head * d : (head + 1) * d] = 0
    cut = load_model(hf, device=dev(), check_weights=False)
    lost, lost_others = (logprob(model, s) - logprob(cut, s) for s in (seqs, others))
    assert found[1]["deletion"] == pytest.approx(lost.mean(), abs=1e-5)
    assert found[1]["deletion_others"] == pytest.approx(lost_others.mean(), abs=1e-5)
    assert found[1]["deletion_specific"] == pytest.approx(lost.mean() - lost_others.mean(), abs=1e-5)
    assert found[0]["deletion"] != pytest.approx(found[1]["deletion"], abs=1e-6)
    assert found[0]["deletion_random"] == found[1]["deletion_random"]


@pytest.mark.parametrize("component", ["neuron", "layer_mlp", "layer_attention"])
def test_everything_of_a_kind_can_be_deleted(component: Any, model: Any) -> None:
    size = {"neuron": model.cfg.n_layers * model.cfg.d_mlp}.get(component, model.cfg.n_layers)
    everything = tuple(range(size))
    found = deletions(model, some(2, 0), some(2, 1), component, [[everything]])[0]
    assert found["deletion_random"] == pytest.approx(found["deletion_specific"], abs=1e-5)


def test_the_rows_of_an_organism(model: Any) -> None:
    costs: Costs = {}
    seqs, others, truth = some(1, 0), some(6, 1), truth_of(model, "head", 2)
    found = measure_organism(model, seqs, others, truth, localizers=METHODS, costs=costs, twin=model)
    by: Any = found.set_index(["localizer", "variant"])
    assert by.loc[("gate gradient", ""), "forwards"] > 1
    assert by.loc[("zero ablation", ""), "forwards"] > by.loc[("gate gradient", ""), "forwards"]
    assert by.loc[("zero ablation", ""), "forwards_others"] == pytest.approx(
        len(others) * by.loc[("zero ablation", ""), "forwards"], rel=0.2
    )
    assert by.loc[("weight norm", ""), "forwards"] == 0
    assert by.loc[("averaged ranks", "z-scored"), "forwards"] == sum(
        by.loc[(name, ""), "forwards"] for name in AVERAGED
    )
    assert (by["cpu_seconds"] >= 0).all()
    varying = {name for (_, name), cost in costs.items() if cost.varies}
    assert varying == {"resample ablation", "random"}
    assert by.loc[("zero ablation", ""), "uniqueness"] == 1 > by.loc[("random", ""), "uniqueness"]
    assert by.loc[("averaged ranks", "z-scored"), "uniqueness"] <= 1
    assert np.isnan(by.loc[("zero ablation", "less twin"), "uniqueness"])
    lost = found[["deletion", "deletion_others", "deletion_specific", "deletion_random"]]
    assert np.isfinite(lost.to_numpy(float)).all()
    ranks = by.loc[("zero ablation", ""), "planted_ranks"]
    assert by.loc[("zero ablation", ""), "recall_at_k"] == np.mean(np.array(ranks) <= 2)
    z = by.loc[("zero ablation", "z-scored")]
    assert sum(z["z_counts"]) == len(truth)
    assert sum(z["z_planted"]) == 2

    again = measure_organism(model, seqs, others, truth, localizers=METHODS, costs=costs, twin=model)
    unlike = ["seconds", "cpu_seconds"]
    pd.testing.assert_frame_equal(again.drop(columns=unlike), found.drop(columns=unlike))


def test_where_nothing_is_planted_every_method_is_at_chance(model: Any) -> None:
    truth: Any = pretended_truth(tiny_huggingface_model("gpt_neox"), 5, draws=60)
    truth = truth[truth["kind"].isin(["head", "neuron"])]
    found = measure_organism(model, some(1, 2), some(4, 3), truth, localizers=METHODS)
    assert set(found["component"]) == {"head", "neuron"}
    for component, own in found.groupby("component"):
        truths: Any = truth[truth["kind"] == component].groupby("draw")
        planted = np.stack([each["planted"].to_numpy(bool) for _, each in truths])
        order = np.random.default_rng(0).random(planted.shape[1])[None]
        alike = [score_ranking(order, each[None])["average_precision"] for each in planted]
        error = 4 * np.std(alike) / np.sqrt(len(alike))
        chance = chance_level("average_precision", planted[0].mean(), planted[0].sum())
        assert own["average_precision"].to_numpy() == pytest.approx(chance, abs=error)
        assert "deletion" not in own


def test_operations_count_both_directions() -> None:
    weight = torch.ones(3, 4, requires_grad=True)
    forward = operations(lambda: torch.ones(2, 3) @ weight)[1]
    both = operations(lambda: (torch.ones(2, 3) @ weight).sum().backward())[1]
    assert (forward, both) == (48, 96)


def test_the_first_of_equal_scores_are_taken() -> None:
    assert top_k(np.array([[1.0, 1.0], [1.0, 2.0]]), 2) == (0, 3)
