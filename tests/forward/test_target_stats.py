"""Statistics of targets and metrics, against loops in float64 over logits with many ties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from memlens.errors import OptionError
from memlens.figures.labels import metric_text
from memlens.forward.metrics import (
    BUILT_IN,
    METRICS,
    LazyTargetStats,
    Metric,
    TargetStats,
    as_metrics,
    make_reduce,
    metric_names,
    target_stats,
)

FEW_VALUES = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0, 1.0, 3.0]), min_size=7, max_size=7)


def by_hand(logits: np.ndarray, target: int) -> dict[str, float]:
    """What `TargetStats` says of one position, with ties as the module's docstring has them."""
    logp = log_softmax(logits.astype(np.float64))
    p = np.exp(logp)
    others = np.delete(logits, target)
    entropy = -(p[p > 0] * logp[p > 0]).sum()
    return {
        "logprob": logp[target],
        "rank": sum(float(other) > float(logits[target]) for other in logits),
        "argmax": logits.tolist().index(max(logits.tolist())),
        "entropy": entropy,
        "spread": math.sqrt((p[p > 0] * (logp[p > 0] + entropy) ** 2).sum()),
        "margin": logits[target] - others.max(),
        "correct": logits.tolist().index(max(logits.tolist())) == target,
    }


@settings(max_examples=40, deadline=None)
@given(st.lists(FEW_VALUES, min_size=1, max_size=4), st.integers(0, 6))
def test_statistics_are_those_by_hand_where_logits_tie(rows: list[list[float]], target: int) -> None:
    logits = torch.tensor(rows)[None]
    ids, mask = torch.full((1, len(rows)), target), torch.ones(1, len(rows), dtype=torch.bool)
    found = target_stats(logits, ids, mask)
    for place, row in enumerate(rows):
        for name, value in by_hand(np.array(row), target).items():
            assert float(getattr(found, name)[0, place]) == pytest.approx(float(value), abs=1e-6), name


def test_a_tie_for_the_first_place_has_rank_0_margin_0_and_goes_to_the_first_token() -> None:
    logits = torch.tensor([[[1.0, 5.0, 5.0, 2.0]] * 4])
    found = target_stats(logits, torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4, dtype=torch.bool))
    assert found.rank.tolist() == [[3, 0, 0, 2]]
    assert found.margin.tolist() == [[-4, 0, 0, -3]]
    assert found.argmax.tolist() == [[1, 1, 1, 1]]
    assert found.correct.tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_as_exact_as_the_logits(dtype: torch.dtype) -> None:
    logits = (8 * torch.randn(3, 5, 200)).to(dtype)
    ids, mask = torch.randint(200, (3, 5)), torch.ones(3, 5, dtype=torch.bool)
    found = target_stats(logits, ids, mask)
    near = 1e-12 if dtype == torch.float64 else 2e-6
    for i, k in np.ndindex(3, 5):
        for name, value in by_hand(logits[i, k].double().numpy(), int(ids[i, k])).items():
            assert float(getattr(found, name)[i, k]) == pytest.approx(float(value), rel=near, abs=near), name
    assert {found.logprob.dtype, found.entropy.dtype, found.spread.dtype, found.margin.dtype} == {
        torch.float64
    }


def test_banned_tokens_have_no_part_in_the_distribution() -> None:
    logits = torch.tensor([[[2.0, 1.0, -math.inf, 0.0]]])
    found = target_stats(logits, torch.tensor([[1]]), torch.tensor([[True]]))
    rest = by_hand(np.array([2.0, 1.0, 0.0]), 1)
    for name in ("logprob", "rank", "entropy", "spread", "margin"):
        assert float(getattr(found, name)[0, 0]) == pytest.approx(rest[name], rel=1e-6)


@pytest.fixture
def padded() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Targets of several lengths, often right; entries outside the mask are negative ids and huge logits."""
    logits = torch.randint(0, 4, (30, 6, 3)).float()
    mask = torch.arange(6) < torch.arange(30)[:, None] % 6 + 1
    ids = torch.where(torch.rand(30, 6) < 0.8, logits.argmax(-1), torch.randint(3, (30, 6)))
    return logits.masked_fill(~mask[..., None], 1e4), ids.masked_fill(~mask, -1), mask


def test_metrics_are_their_definitions_over_the_targets(padded: Any) -> None:
    logits, ids, mask = padded
    found = make_reduce(list(BUILT_IN), per_token=False)(logits, ids, mask)
    per_token = make_reduce(list(BUILT_IN), per_token=True)(logits, ids, mask)
    for i in range(30):
        n = int(mask[i].sum())
        rows = [by_hand(logits[i, k].numpy(), int(ids[i, k])) for k in range(n)]
        right = [bool(row["correct"]) for row in rows]
        expected = {
            "target_logprob": np.mean([row["logprob"] for row in rows]),
            "exact_match": float(all(right)),
            "matching_prefix": right.index(False) if False in right else n,
            "target_accuracy": np.mean(right),
            "target_rank": np.mean([row["rank"] for row in rows]),
            "completion_entropy": sum(row["entropy"] for row in rows),
            "margin": min(row["margin"] for row in rows),
        }
        assert set(expected) == set(BUILT_IN)
        for name, value in expected.items():
            assert float(found[name][i]) == pytest.approx(value, abs=1e-6), name
            assert METRICS[name](logits[i : i + 1], ids[i : i + 1], mask[i : i + 1]).item() == found[name][i]
        single = {"target_logprob": "logprob", "target_rank": "rank", "completion_entropy": "entropy"}
        single |= dict.fromkeys(("exact_match", "matching_prefix", "target_accuracy"), "correct")
        for name, field in (single | {"margin": "margin"}).items():
            assert per_token[name][i, :n].tolist() == pytest.approx(
                [float(row[field]) for row in rows], abs=1e-6
            )
            assert per_token[name][i, n:].isnan().all()


def test_parts_are_joined_along_sequences(padded: Any) -> None:
    logits, ids, mask = padded
    whole = target_stats(logits, ids, mask)
    joined = TargetStats.cat([target_stats(logits[a:b], ids[a:b], mask[a:b]) for a, b in ((0, 7), (7, 30))])
    for name in ("logprob", "rank", "argmax", "entropy", "spread", "margin", "correct", "mask"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))


UNITS = {
    "target_logprob": ("nats", "higher", True, False, "target log-prob"),
    "exact_match": ("0 or 1", "higher", False, True, "exact match"),
    "matching_prefix": ("tokens", "higher", False, False, "matching prefix"),
    "target_accuracy": ("share of tokens", "higher", False, False, "target accuracy"),
    "target_rank": ("0 = top", "lower", False, False, "target rank"),
    "completion_entropy": ("nats", "lower", True, False, "completion entropy"),
    "margin": ("logits", "higher", True, False, "margin over the best other token"),
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_units_and_directions(name: str) -> None:
    metric = METRICS[name]
    said = (metric.unit, metric.better, metric.differentiable, metric.proportion, metric.label)
    assert said == UNITS[name]
    assert metric.attrs.get("proportion", False) == metric.proportion
    assert metric.attrs["units"] == metric.unit
    assert metric_text(name).better == (1 if metric.better == "higher" else -1)


def test_names_of_metrics() -> None:
    def twice(logits: Any, ids: Any, mask: Any) -> torch.Tensor:
        return 2 * METRICS["margin"](logits, ids, mask)

    class Callable:
        def __call__(self, logits: Any, ids: Any, mask: Any) -> torch.Tensor:
            return logits.sum((-1, -2))

    mine = Metric(twice, name="other_name", label="another")
    assert metric_names([twice, "margin", mine, Callable()]) == ["twice", "margin", "other_name", "Callable"]
    assert (Metric(twice).label, mine.label) == ("twice", "another")
    assert Metric(twice, name="two_of_a_kind").label == "two of a kind"
    assert [m.name for m in as_metrics(("margin", "exact_match"))] == ["margin", "exact_match"]
    logits, ids, mask = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3).bool()
    found = make_reduce([twice, "margin"], per_token=False)(logits.double(), ids, mask)
    np.testing.assert_allclose(found["twice"], 2 * found["margin"], rtol=1e-6)
    assert found["twice"].dtype == torch.float32
    for wrong, words in (([twice, "margin", twice], "two metrics have the same name"), ([], "at least one")):
        with pytest.raises(OptionError, match=words):
            as_metrics(wrong)
    with pytest.raises(OptionError, match="give a sequence"):
        as_metrics("margin")


def test_a_direction_is_higher_or_lower() -> None:
    for better in ("higher", "lower", None):
        metric = Metric(lambda logits, ids, mask: logits, name="any", better=better)
        assert metric.attrs.get("better") == better
    with pytest.raises(OptionError, match=r"better='up'.*higher.*lower"):
        Metric(lambda logits, ids, mask: logits, name="any", better="up")  # type: ignore[arg-type]


def test_a_metric_is_given_one_way() -> None:
    def fn(logits: Any, ids: Any, mask: Any) -> torch.Tensor:
        return logits.sum((-1, -2))

    forms = {"per_target": lambda stats: stats.margin, "reduce": lambda values, mask: values.sum(-1)}
    assert Metric(name="both", **forms).name == "both"
    for given_ in (
        {"fn": fn, **forms},
        {"fn": fn, "reduce": forms["reduce"]},
        {"fn": fn, "per_target": forms["per_target"]},
        {"reduce": forms["reduce"]},
        {"per_target": forms["per_target"]},
    ):
        with pytest.raises(OptionError, match="give a function, or per_target= together with reduce="):
            Metric(name="wrong", **given_)  # type: ignore[arg-type]
    wrong = Metric(lambda logits, ids, mask: 1.0, name="number")  # type: ignore[arg-type,return-value]
    with pytest.raises(OptionError, match="returned float"):
        wrong(torch.zeros(2, 1, 3), torch.zeros(2, 1).long(), torch.ones(2, 1).bool())
    stats = LazyTargetStats(torch.zeros(1, 1, 3), torch.zeros(1, 1).long(), torch.ones(1, 1).bool())
    assert Metric(name="both", **forms).of(stats).tolist() == [0.0]


@pytest.mark.parametrize("vocab", [8192, 8200])
def test_the_arg_max_of_a_large_vocabulary_is_the_first_of_the_largest(vocab: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (2, 4, vocab), generator=generator).float()
    logits[0, 0, [77, 8100]] = 5.0
    logits[0, 1, [8191, vocab - 1]] = 5.0
    logits[1, 2] = 1.0
    logits[1, 3, 300] = math.nan
    stats = target_stats(logits, torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool))
    wanted = [[_first(row) for row in rows] for rows in logits.tolist()]
    assert stats.argmax[0].tolist() == wanted[0]
    assert stats.argmax[0, :2].tolist() == [77, 8191]
    assert stats.argmax[1].tolist() == [*wanted[1][:2], 0, 300]  # NaN counts as the largest


def _first(row: list[float]) -> int:
    return row.index(max(row))
