"""Metrics: one definition each, and results that say what they measure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memlens as ml
from memlens.errors import OptionError
from memlens.figures import labels
from memlens.figures.labels import metric_text
from memlens.forward.metrics import BUILT_IN, METRICS, LazyTargetStats, Metric, make_reduce, register_metric
from memlens.results.kinds import reading
from tests.small import ragged


def surprise(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return -METRICS["target_logprob"](logits, ids, mask)


NO_ATTENTION = [
    ml.Intervention(
        f"off {layer}", [(f"blocks.{layer}.hook_attn_out", lambda x, hook: 0 * x)], {"layer": layer}
    )
    for layer in range(2)
]


def test_every_built_in_metric_has_a_direction_a_unit_and_a_meaning() -> None:
    assert set(BUILT_IN) <= set(METRICS)
    for name in BUILT_IN:
        assert METRICS[name].name == name
        assert {"label", "units", "long_name", "better"} <= set(METRICS[name].attrs)


def test_a_metric_says_whether_it_has_a_gradient() -> None:
    logits = torch.randn(3, 4, 7, requires_grad=True)
    ids, mask = torch.randint(7, (3, 4)), torch.ones(3, 4, dtype=torch.bool)
    for name in BUILT_IN:
        assert METRICS[name](logits, ids, mask).requires_grad == METRICS[name].differentiable, name


def test_a_proportion_is_0_or_1() -> None:
    logits, ids = torch.randn(50, 2, 3), torch.randint(3, (50, 2))
    mask = torch.ones(50, 2, dtype=torch.bool)
    binary = {n for n in BUILT_IN if set(METRICS[n](logits, ids, mask).tolist()) <= {0.0, 1.0}}
    assert binary == {n for n in BUILT_IN if METRICS[n].proportion}


def test_a_user_s_metric_is_described_by_the_result_and_its_direction_is_kept(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    mine = Metric(surprise, name="mine", unit="nats", better="lower", label="my surprise")
    result = ml.sweep(model, seqs, NO_ATTENTION, ["target_logprob", mine], progress=False)
    assert result["mine"].attrs == {"label": "my surprise", "units": "nats", "better": "lower"}
    assert result["mine_baseline"].attrs == result["mine"].attrs
    assert result["target_logprob"].attrs["better"] == "higher"
    assert abs(result["mine"] + result["target_logprob"]).max() < 1e-5
    effect = result.mean_ci(metric="mine", of="effect")["mine"]
    assert metric_text("mine", effect).axis == "change in my surprise (nats)"
    assert metric_text("mine", effect).better == -1
    harmed = [reading(result, name).split(":")[0] for name in ("mine", "target_logprob")]
    assert harmed[0] == harmed[1]
    assert harmed[0].startswith("Recall is harmed most at layer")


def test_without_a_direction_nothing_is_said_of_harm(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    result = ml.sweep(model, seqs, NO_ATTENTION, [surprise], progress=False)
    assert result["surprise"].attrs == {"label": "surprise"}
    said = reading(result)
    assert said.startswith("The change is largest at layer")
    assert "harm" not in said


def test_a_metric_of_statistics_keeps_the_target_dimension(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    worst = Metric(
        name="worst_rank", per_target=lambda s: s.rank.double(), reduce=lambda values, mask: values.amax(-1)
    )
    ours = ml.sweep(model, seqs, NO_ATTENTION, ["target_rank", worst], per_token=True, progress=False)
    assert ours["worst_rank"].equals(ours["target_rank"].rename("worst_rank"))


def test_a_registered_metric_goes_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (METRICS, labels._KNOWN):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
    metric = register_metric(Metric(surprise, name="test_surprise", unit="nats", better="lower"))
    assert METRICS["test_surprise"] is metric
    assert metric_text("test_surprise").better == -1
    with pytest.raises(OptionError, match="'test_surprise' is registered already"):
        register_metric(Metric(surprise, name="test_surprise"))


def test_what_is_no_metric_is_an_error() -> None:
    with pytest.raises(OptionError, match="give a function, or per_target= together with reduce="):
        Metric(name="empty")
    with pytest.raises(OptionError, match="'down'"):
        Metric(surprise, better="down")  # type: ignore[arg-type]
    logits, ids, mask = torch.zeros(2, 1, 3), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1).bool()
    reduce = make_reduce([lambda logits, ids, mask: logits], per_token=False)
    with pytest.raises(OptionError, match=r"returned \(2, 1, 3\): it must return a tensor of shape \(2,\)"):
        reduce(logits, ids, mask)
    with pytest.raises(OptionError, match="has no values per target"):
        Metric(surprise).of(LazyTargetStats(logits, ids, mask))
