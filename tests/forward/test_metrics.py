"""Metrics: one definition each, and results that say what they measure."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import memlens as ml
from memlens.errors import OptionError
from memlens.figures import labels
from memlens.figures.labels import metric_text
from memlens.forward.metrics import (
    BUILT_IN,
    METRICS,
    LazyTargetStats,
    Metric,
    as_metric,
    as_metrics,
    make_reduce,
    metric_names,
    register_metric,
)
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


# Unit, better, proportion, differentiable, label, words of the meaning, and what it is cited for.
DESCRIBED: dict[str, tuple[str, str, bool, bool, str, str, tuple[tuple[str, str], ...]]] = {
    "target_logprob": (
        "nats", "higher", False, True, "target log-prob",
        "mean log-probability of the continuation's tokens", (),
    ),
    "exact_match": (
        "0 or 1", "higher", True, False, "exact match", "1 where the arg-max is the target at every position",
        (("carlini2023", "exact match of the continuation"),),
    ),
    "matching_prefix": (
        "tokens", "higher", False, False, "matching prefix", "right before the first error", ()
    ),
    "target_accuracy": (
        "share of tokens", "higher", False, False, "target accuracy", "share .* are the arg-max", ()
    ),
    "target_rank": ("0 = top", "lower", False, False, "target rank", "mean zero-based rank", ()),
    "completion_entropy": (
        "nats", "lower", False, True, "completion entropy", "sum of the next-token entropies",
        (("menta2025", "completion entropy"),),
    ),
    "margin": (
        "logits", "higher", False, True, "margin over the best other token",
        "smallest difference between a target's logit and the best other", (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_is_said_of_each_built_in_metric(name: str) -> None:
    unit, better, proportion, differentiable, label, words, cites = DESCRIBED[name]
    metric = METRICS[name]
    assert (metric.unit, metric.better, metric.proportion) == (unit, better, proportion)
    assert (metric.differentiable, metric.label, metric.cites) == (differentiable, label, cites)
    assert re.search(words, metric.meaning)
    assert re.fullmatch(r"[a-z1].*[a-z]", metric.meaning)  # goes on after the name, without a full stop
    attrs = {"label": label, "units": unit, "long_name": metric.meaning, "better": better}
    assert metric.attrs == (attrs | {"proportion": True} if proportion else attrs)
    assert tuple(DESCRIBED) == BUILT_IN


@pytest.mark.parametrize("name", DESCRIBED)
def test_values_per_sequence_and_per_target_by_plain_loops(name: str) -> None:
    torch.manual_seed(3)
    logits = (3 * torch.randn(40, 4, 5)).round()  # with ties
    ids, mask = torch.randint(5, (40, 4)), torch.arange(4) < torch.randint(1, 5, (40, 1))
    found = METRICS[name](logits, ids, mask)
    per_token = make_reduce([name], per_token=True)(logits, ids, mask)[name]
    together = {
        "target_logprob": lambda values: sum(values) / len(values),
        "exact_match": lambda values: float(all(values)),
        "matching_prefix": lambda values: float([*values, 0.0].index(0.0)),
        "target_accuracy": lambda values: sum(values) / len(values),
        "target_rank": lambda values: sum(values) / len(values),
        "completion_entropy": sum,
        "margin": min,
    }
    for i in range(40):
        values = [plain_value(name, logits[i, j].double(), int(ids[i, j])) for j in range(4) if mask[i, j]]
        assert float(found[i]) == pytest.approx(together[name](values), rel=1e-6, abs=1e-6)
        assert per_token[i][mask[i]].tolist() == pytest.approx(values, rel=1e-6, abs=1e-6)
        assert per_token[i][~mask[i]].isnan().all()
    assert make_reduce([name], per_token=False)(logits, ids, mask)[name].tolist() == found.tolist()


def plain_value(name: str, row: torch.Tensor, target: int) -> float:
    """One target's value from one row of logits."""
    others = [float(x) for v, x in enumerate(row) if v != target]
    logp = row.log_softmax(-1)
    return {
        "target_logprob": float(logp[target]),
        "target_rank": float(sum(x > row[target] for x in others)),
        "completion_entropy": float(-(logp.exp() * logp).sum()),
        "margin": float(row[target]) - max(others),
    }.get(name, float(int(row.argmax()) == target))


def test_metrics_are_given_by_name_object_or_function() -> None:
    mine = Metric(surprise)
    assert (mine.name, mine.label, mine.unit, mine.meaning, mine.better) == (
        "surprise",
        "surprise",
        "",
        "",
        None,
    )
    assert (mine.proportion, mine.differentiable, mine.cites) == (False, True, ())
    assert Metric(surprise, name="a_b").label == "a b"
    assert as_metric(mine) is mine
    assert as_metric("margin") is METRICS["margin"]
    assert as_metric(surprise).fn is surprise
    assert metric_names(["margin", mine, lambda logits, ids, mask: logits]) == [
        "margin",
        "surprise",
        "<lambda>",
    ]
    for bad, such in (([], "exact_match"), ((), "exact_match"), ("margin", "margin")):
        with pytest.raises(
            OptionError, match=rf"give a sequence with at least one metric, such as \('{such}'"
        ):
            as_metrics(bad)
    with pytest.raises(OptionError, match=r"marginal.*Did you mean 'margin'"):
        as_metrics("marginal")
    with pytest.raises(OptionError, match="two metrics have the same name"):
        as_metrics(["margin", surprise, mine])
    for form in (
        {"fn": surprise, "per_target": lambda s: s, "reduce": lambda v, m: v}, {"per_target": lambda s: s},
        {"fn": surprise, "reduce": lambda v, m: v}, {},
    ):  # fmt: skip
        with pytest.raises(OptionError, match="metric 'any': give a function, or per_target= together"):
            Metric(name="any", **form)


def test_several_metrics_come_from_one_pass_over_the_logits_as_plain_numbers() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    ids, mask = torch.randint(5, (2, 3)), torch.ones(2, 3, dtype=torch.bool)
    found = make_reduce(["margin", surprise, "exact_match"], per_token=False)(logits, ids, mask)
    assert list(found) == ["margin", "surprise", "exact_match"]
    assert not found["surprise"].requires_grad
    assert found["surprise"].dtype == torch.float32
    stats = LazyTargetStats(logits, ids, mask)
    assert METRICS["margin"].of(stats).tolist() == found["margin"].tolist()
    with pytest.raises(OptionError, match="metric 'surprise' is a function of logits"):
        Metric(surprise).of(stats, per_token=True)
    scalar = Metric(lambda logits, ids, mask: 3.0, name="scalar")  # type: ignore[arg-type, return-value]
    with pytest.raises(OptionError, match=r"metric 'scalar' returned float: it must .* shape \(2,\)"):
        scalar(logits, ids, mask)


def in_place(what: str) -> Any:
    def metric(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        {"logits": logits, "ids": ids, "mask": mask}[what].zero_()
        return torch.ones(len(logits))

    return metric


@pytest.mark.parametrize("what", ["logits", "ids", "mask"])
def test_a_metric_that_changes_what_others_read_is_refused(what: str) -> None:
    """Else the metrics after it are those of other logits, without a word."""
    given = torch.randn(2, 1, 3), torch.ones(2, 1, dtype=torch.long), torch.ones(2, 1).bool()
    reduce = make_reduce([in_place(what), "target_logprob"], per_token=False)
    with pytest.raises(OptionError, match=rf"changes its {what} in place.*{what}\.clone\(\)"):
        reduce(*given)
    with torch.inference_mode():  # tensors of which no change is counted
        kept = [tensor.clone() for tensor in given]
        assert Metric(surprise)(*kept).shape == (2,)


def test_a_metric_that_raises_is_named() -> None:
    def broken(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        raise KeyError("layer")

    given = torch.randn(2, 1, 3), torch.ones(2, 1, dtype=torch.long), torch.ones(2, 1).bool()
    with pytest.raises(OptionError, match="metric 'broken' raised KeyError: 'layer'"):
        Metric(broken)(*given)


def test_a_full_device_is_left_to_who_can_take_smaller_portions() -> None:
    def hungry(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    given = torch.randn(2, 1, 3), torch.ones(2, 1, dtype=torch.long), torch.ones(2, 1).bool()
    with pytest.raises(torch.OutOfMemoryError):
        Metric(hungry)(*given)


@pytest.mark.parametrize("cites", [("carlini2023", "what for"), "carlini2023", (("carlini2023",),)])
def test_what_is_cited_is_named_in_pairs(cites: Any) -> None:
    with pytest.raises(OptionError, match=r"metric 'surprise' cites .*give pairs"):
        Metric(surprise, cites=cites)


@pytest.mark.parametrize("name", ["margin_baseline", "margin_corrupt", "margin_clean"])
def test_a_metric_is_not_called_like_the_baseline_of_another(name: str) -> None:
    with pytest.raises(OptionError, match="two metrics have the same name in a result"):
        as_metrics(["margin", Metric(surprise, name=name)])
    assert as_metrics(["exact_match", Metric(surprise, name=name)])[1].name == name


def test_only_a_function_is_a_metric_and_only_a_metric_is_registered() -> None:
    with pytest.raises(OptionError, match="metric 'int' holds 3, which is not a function"):
        Metric(3)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"is not a Metric: register Metric\(fn"):
        register_metric(surprise)  # type: ignore[arg-type]
