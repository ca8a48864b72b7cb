"""Separation: planted neurons are found, shuffled labels are not, and confounds take their share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

import memlens as ml
from memlens.errors import EmptySetError, OptionError, ResultError, SequenceError
from memlens.instruments.detect.groups import Groups, mean_over_targets, residuals_at_targets
from memlens.instruments.detect.probe import cross_validated_scores
from memlens.instruments.detect.separation import area_of, cohens_d, neuron_areas, shuffled_labels
from memlens.results.kinds import reading
from memlens.results.statistics.agreement import roc_area, roc_gain
from memlens.sequences.set import SequenceSet

FAST: dict[str, Any] = {"strengths": (0.03,), "folds": 3, "n_resamples": 100, "top": 2}
PROBE: dict[str, Any] = {"strengths": (0.01, 1.0), "folds": 5, "inner_folds": 3, "seed": 0}


def random_set(n: int, low: int, high: int, name: str, seed: int, **columns: Any) -> SequenceSet:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(low, high, (n, 12), generator=generator)
    table = pd.DataFrame({"id": [f"{name}{i}" for i in range(n)], **columns})
    return SequenceSet.from_tokens(rows, 6, table=table)


@pytest.fixture
def planted(tiny_model: Callable[..., Any]) -> Any:
    """A model whose neuron 7 of layer 1 is high wherever the token is below 50."""
    model = tiny_model("gpt_neox", "bridge")
    seen: list[torch.Tensor] = []

    def look(module: Any, given: tuple[Any, ...]) -> None:
        seen.append(given[0])

    def raise_neuron(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts = acts.clone()
        acts[..., 7] += 100.0 * (seen[-1] < 50)
        return acts

    handle = model.embed.register_forward_pre_hook(look)
    edit = ml.Intervention("planted", [("blocks.1.mlp.hook_post", raise_neuron)])
    try:
        with ml.applied(model, edit):
            yield model
    finally:
        handle.remove()


def test_a_planted_neuron_is_found_and_measured_on_other_sequences(planted: Any) -> None:
    recalled, matched = random_set(12, 0, 50, "a", 0), random_set(12, 50, 100, "b", 1)
    options = ml.detect.SeparationOptions(**FAST)
    found = ml.detect.separation(planted, recalled, matched, options=options, progress=False)
    best = ml.detect.separating_neurons(found).iloc[0]
    assert (best["layer"], best["neuron"], best["held_out_area"], best["area"]) == (1, 7, 1.0, 1.0)
    assert best["cohens_d"] > 10
    assert best["p"] < 0.05
    assert 0.4 < best["low"] < best["high"] == 1.0
    area = found["area"].sel(statistic="mean")
    assert float(area.sel(features="activations", layer=1)) == 1.0
    shuffled = found["area"].sel(features="shuffled labels", layer=2)
    assert float(shuffled.sel(statistic="low")) < 0.5 < float(shuffled.sel(statistic="high"))


def test_numbers_are_those_of_plain_loops(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "bridge")
    groups = Groups.of(random_set(5, 0, 90, "a", 0), random_set(4, 0, 90, "b", 1))
    acts = mean_over_targets(model, groups.sequences, "mlp_post", [0, 2], progress=False)
    tokens = residuals_at_targets(model, groups.sequences, [0, 2], 3, progress=False)
    for i, row in enumerate(groups.sequences.rows()):
        _, cache = model.run_with_cache(torch.tensor([row]))
        for j, layer in enumerate((0, 2)):
            wanted = cache[f"blocks.{layer}.mlp.hook_post"][0, 5:11].mean(0)
            np.testing.assert_allclose(acts[i, j], wanted.numpy(), atol=1e-5)
            resid = cache[f"blocks.{layer}.hook_resid_post"][0, [5, 7, 10]]
            np.testing.assert_allclose(tokens.acts[tokens.row == i][:, j], resid.numpy(), atol=1e-5)
    assert tokens.place[tokens.row == 0].tolist() == [0, 2, 5]
    area, p = neuron_areas(acts, groups.recalled)
    for layer, neuron in ((0, 0), (1, 5)):
        assert area[layer, neuron] == pytest.approx(
            roc_auc_score(groups.recalled, acts[:, layer, neuron]), abs=1e-9
        )
    assert ((p > 0) & (p <= 1)).all()
    ours, theirs = acts[:5, 0, 3].astype(float), acts[5:, 0, 3].astype(float)
    pooled = np.sqrt((4 * ours.var(ddof=1) + 3 * theirs.var(ddof=1)) / 7)
    assert cohens_d(acts[:5], acts[5:])[0, 3] == pytest.approx((ours.mean() - theirs.mean()) / pooled)


def test_a_neuron_without_spread_separates_nothing() -> None:
    acts = np.zeros((6, 1, 2))
    acts[:3, 0, 1] = 1.0
    area, p = neuron_areas(acts, np.arange(6) < 3)
    assert area.tolist() == [[0.5, 1.0]]
    assert p[0, 0] == 1.0 > p[0, 1]
    assert np.isnan(cohens_d(acts[:3], acts[3:])[0]).all()


def test_shuffled_labels_give_an_area_of_one_half() -> None:
    rng = np.random.default_rng(0)
    label, group = np.arange(200) % 2 == 0, np.repeat(np.arange(100), 2)
    features = rng.normal(size=(200, 10)) + label[:, None]
    true = area_of(cross_validated_scores(features, label, group, **PROBE), label)
    assert true[0] > 0.95
    shuffled = rng.permutation(label)
    value, low, high = area_of(cross_validated_scores(features, shuffled, group, **PROBE), shuffled)
    assert low < 0.5 < high
    assert abs(value - 0.5) < 0.15


def test_a_probe_learns_nothing_from_a_group_about_itself() -> None:
    """Each group has its own direction and a label; only a probe that saw the group could know it."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 5)
    label = (rng.permutation(40) < 20)[group]
    features = np.eye(40)[group] + 0.01 * rng.normal(size=(200, 40))
    leaking = cross_validated_scores(features, label, np.arange(200), **PROBE)
    grouped = cross_validated_scores(features, label, group, **PROBE)
    assert roc_auc_score(label, leaking) > 0.99
    assert roc_auc_score(label, grouped) < 0.7


def test_few_groups_are_divided_into_fewer_inner_folds() -> None:
    rng = np.random.default_rng(0)
    label = np.array([True, False] * 3)
    features = label[:, None] + rng.normal(scale=0.01, size=(6, 2))
    group = np.array([0, 0, 1, 1, 2, 2])
    options = {"strengths": (0.1, 1.0), "inner_folds": 3, "seed": 0}
    for folds, some in ((3, slice(None)), (2, slice(4))):  # with two groups one is left to fit to
        scores = cross_validated_scores(features[some], label[some], group[some], folds=folds, **options)
        assert roc_area(scores, label[some]).area == 1.0


def test_confounds_that_decide_leave_nothing_to_add(tiny_model: Callable[..., Any]) -> None:
    """Longer sequences of more copies: the baseline separates perfectly, and nothing is gained."""
    model = tiny_model("gpt_neox", "bridge")
    recalled = random_set(12, 0, 90, "a", 0, copies=range(100, 112))
    short = SequenceSet.from_tokens(
        [row[:9] for row in random_set(12, 0, 90, "b", 1).rows()], 6,
        table=pd.DataFrame({"id": [f"b{i}" for i in range(12)], "copies": range(12)}),
    )  # fmt: skip
    options = ml.detect.SeparationOptions(**FAST, layers=(0, 2))
    found = ml.detect.separation(model, recalled, short, options=options, progress=False)
    assert found["baseline"].values.tolist() == ["confounds", "confounds and copies"]
    assert float(found["area"].sel(features="confounds", statistic="mean").min()) == 1.0
    assert float(found["gain"].sel(statistic="high").max()) <= 0.0
    text = reading(found)
    assert "nothing is shown beyond them" in text
    assert "shuffled labels" in text
    assert found.plot().data
    without = ml.detect.SeparationOptions(**FAST, layers=(0,), confounds=("frequency",))
    other = ml.detect.separation(model, recalled, short, options=without, progress=False)
    assert float(other["area"].sel(features="confounds", statistic="mean").item()) < 1.0


def test_confounds_are_what_they_say(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "bridge")
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 9, 9]]
    seqs = SequenceSet.from_tokens(rows, [3, 1], table=pd.DataFrame({"copies": [0, 3]}))
    counts = np.arange(101)
    table = ml.detect.confounds(model, seqs, token_counts=counts, progress=False)
    assert table["length"].tolist() == [6, 5]
    assert table["copies"].tolist() == pytest.approx([0, np.log(4)])
    assert table["frequency"][0] == pytest.approx(np.log1p([1, 2, 3, 4, 5, 6]).mean())
    assert table["repeated_share"].tolist() == [0.0, 0.5]
    logprob = model(torch.tensor([rows[0]])).detach().log_softmax(-1)[0]
    assert table["prefix_perplexity"][0] == pytest.approx(-float(logprob[0, 2] + logprob[1, 3]) / 2, abs=1e-4)
    assert np.isnan(table["prefix_perplexity"][1])
    with pytest.raises(SequenceError, match="the token id 9"):
        ml.detect.confounds(model, seqs, token_counts=counts[:9])


def test_pairs_stay_together() -> None:
    recalled = random_set(6, 0, 90, "a", 0)
    matched = random_set(6, 0, 90, "b", 1, matched_to=[f"a{i}" for i in (5, 4, 3, 2, 1, 0)])
    groups = Groups.of(recalled, matched)
    assert groups.pair.tolist() == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    first, second = groups.halves(0)
    assert not set(groups.pair[first]) & set(groups.pair[second])
    assert sorted([*first, *second]) == list(range(12))
    labels = shuffled_labels(groups, 0)
    assert labels.sum() == 6
    assert (labels[:6] != labels[6:][::-1]).all()  # one of each pair


def test_one_or_two_sequences_give_no_interval() -> None:
    value, low, high = area_of(np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, True, False, False]))
    assert value == 1.0
    assert np.isnan([low, high]).all()
    value, low, high = roc_gain([1, 2, 0, 0, 1], [0, 0, 0, 0, 0], [True, True, False, False, False])
    assert value == pytest.approx(5.5 / 6 - 0.5)
    assert np.isnan([low, high]).all()


def test_a_gain_is_the_difference_of_areas() -> None:
    rng = np.random.default_rng(0)
    label = rng.random(80) < 0.5
    good, bad = rng.normal(size=80) + label, rng.normal(size=80)
    value, low, high = roc_gain(good, bad, label)
    assert value == pytest.approx(roc_area(good, label).area - roc_area(bad, label).area)
    assert low < value < high
    assert roc_gain(good, good, label) == (0.0, 0.0, 0.0)
    narrow = roc_gain(good, bad, label, level=0.5)
    assert narrow[2] - narrow[1] < high - low
    with pytest.raises(ResultError):
        roc_gain(good, bad[1:], label)


def test_what_cannot_be_separated_is_refused(tiny_model: Callable[..., Any]) -> None:
    model, few = tiny_model("gpt_neox", "bridge"), random_set(2, 0, 90, "a", 0)
    with pytest.raises(EmptySetError, match="no matched sequences"):
        ml.detect.separation(model, few, few[:0])
    with pytest.raises(ResultError, match="5 folds"):
        ml.detect.separation(model, few, random_set(2, 0, 90, "b", 0), progress=False)
    with pytest.raises(OptionError, match="folds"):
        ml.detect.SeparationOptions(folds=1)
