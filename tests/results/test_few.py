"""One or two units (sequences, models, organisms, questions) give no interval, and the text says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from memlens.benchmark.over_organisms import mean_over_organisms, share_over_organisms
from memlens.instruments.decode.promotion import promotion_summary
from memlens.report.model import Finding
from memlens.results.result import Result
from memlens.results.statistics.agreement import agreement, roc_area, roc_gain, standard_interval
from memlens.results.statistics.comparison import compare_groups
from memlens.results.statistics.estimates import (
    Estimate,
    mean_estimate,
    median_estimate,
    ratio_estimate,
    share_estimate,
)
from memlens.results.statistics.intervals import mean_interval, quantile_interval, wilson_interval
from memlens.results.statistics.tasks import task_summary
from memlens.results.statistics.tradeoff import edit_tradeoff, join_frontier
from memlens.studies.comparative.analyze.domains import structural_gap, structural_share
from memlens.studies.comparative.analyze.heads import HeadEffects, head_overlap
from memlens.studies.comparative.analyze.layers import burst, crossing, depth_curve
from memlens.studies.comparative.analyze.profiles import Profiles
from memlens.studies.comparative.analyze.rates import drawn_estimate, size_fits
from memlens.studies.comparative.findings import over_models
from memlens.studies.comparative.options import ComparativeOptions
from tests.results.test_tradeoff import recall_result, task_result

_FEW = ComparativeOptions(n_permutations=19, n_resamples=50, n_splits=5, min_per_domain=2)
Ends = Any


def values(n: int) -> np.ndarray:
    return np.linspace(0.1, 0.9, n) ** 2


def array(n: int) -> xr.DataArray:
    return xr.DataArray(values(n), dims="sequence")


def hits(n: int) -> np.ndarray:
    return (np.arange(n) % 2).astype(float)


def result(n: int, kind: str = "recall") -> Result:
    return Result.create(xr.Dataset({"m": ("sequence", values(n))}), kind=kind)


def of(found: Estimate) -> Ends:
    return found.low, found.high


def columns(table: pd.DataFrame, *names: str) -> Ends:
    return [table[name].to_numpy(float) for name in names]


def curves(n: int) -> np.ndarray:
    return np.add.outer(0.01 * np.arange(n), np.array([0.1, 0.4, 0.6, 0.9]))


def heads(n: int) -> xr.DataArray:
    table = np.random.default_rng(0).normal(size=(2 * n, 3, 4))
    return xr.DataArray(table, dims=("sequence", "layer", "head"))


def decoded(n: int) -> Result:
    rank = np.tile(np.array([5.0, 0.0, 0.0]), (n, 1))[:, :, None]
    dims = ("sequence", "layer", "target")
    data = {name: (dims, x) for name, x in (("rank", rank), ("probability", 1 / (1 + rank)))}
    coords = {"layer": range(3), "sequence": [str(i) for i in range(n)]}
    return Result.create(xr.Dataset(data, coords), kind="residual_decoding")


def tasks_of(n: int) -> Result:
    return task_result({"a": ("language", 0.0, [[1.0, 0.0, 1.0]] * n, [1.0] * n)})


def tradeoff(n: int) -> Ends:
    found = edit_tradeoff(recall_result([[1.0, 0.0, 0.0]] * n, [1.0] * n), tasks_of(40), n_resamples=50)
    table = found.table()
    return [
        *columns(table, "removed_low", "removed_high", "selectivity_low", "selectivity_high"),
        found.area()[1:],
    ]


def questions(n: int) -> Ends:
    found = tasks_of(n)
    pair = recall_result([[1.0, 0.0, 0.0]] * 5, [1.0] * 5), found
    joined = join_frontier({"model": pair}, n_resamples=50)
    ends = [joined[name].values for name in ("accuracy_low", "accuracy_high")]
    return [*columns(task_summary(found, n_resamples=50), "low", "high"), *ends]


def overlap(n: int) -> Ends:
    effects = HeadEffects(heads(n), np.repeat(["a", "b"], n), _FEW)
    return columns(head_overlap(effects, _FEW), "low", "high")


def profiles(n: int) -> Ends:
    importances = {name: heads(n).isel(sequence=slice(n)) for name in ("a", "b", "c")}
    found = Profiles.of(importances, {"a": "x", "b": "x", "c": "y"}, _FEW)
    gap = found.within_minus_across()
    assert gap is not None
    return [*columns(found.by_layer, "low", "high"), *of(gap)]


def sizes(n: int) -> Ends:
    models = pd.DataFrame(
        {"family": "x", "n_params": [1e6, 1e7, 1e8], "n": n, "memorized": [0, 1, n]},
    )
    return columns(size_fits(models, options=_FEW).head(1), "boot_low", "boot_high")


INTERVALS: dict[str, Callable[[int], Ends]] = {
    "mean": lambda n: mean_interval(array(n)).values[1:],
    "mean, t": lambda n: mean_interval(array(n), method="t").values[1:],
    "mean of hits": lambda n: mean_interval(xr.DataArray(hits(n), dims="sequence")).values[1:],
    "mean estimate": lambda n: of(mean_estimate(array(n))),
    "share": lambda n: of(share_estimate(hits(n))),
    "ratio": lambda n: of(ratio_estimate(array(n), 2 * array(n))),
    "median": lambda n: of(median_estimate(values(n))),
    "quantiles": lambda n: quantile_interval(np.random.default_rng(0).normal(size=(50, 2)), 0.95, n),
    "wilson": lambda n: wilson_interval(1, n),
    "standard": lambda n: standard_interval(0.5, np.array([0.4, 0.5, 0.6]), 0.95, 0.0, n),
    "roc": lambda n: (lambda a: (a.low, a.high))(
        roc_area([*values(n), 0.2, 0.3, 0.4], [True] * n + [False] * 3)
    ),
    "roc, bootstrap": lambda n: (lambda a: (a.low, a.high))(
        roc_area([*values(n), 0.2, 0.3, 0.4], [False] * n + [True] * 3, method="bootstrap", n_resamples=50)
    ),
    "gain": lambda n: roc_gain(
        [*values(n), 0.2, 0.3, 0.4], [*-values(n), 0.2, 0.3, 0.4], [True] * n + [False] * 3, n_resamples=50
    )[1:],
    "agreement": lambda n: [v for k, v in agreement(hits(n), hits(n)).items() if k[-4:] in ("_low", "high")][
        :4
    ],
    "organisms": lambda n: of(mean_over_organisms(values(n), ["a"] * n)),
    "share of organisms": lambda n: of(share_over_organisms(hits(n), np.ones(n), ["a"] * n)),
    "curve": lambda n: columns(depth_curve(curves(n), _FEW), "low", "high"),
    "burst": lambda n: of(burst(curves(n), _FEW)),
    "crossing": lambda n: of(crossing(curves(n), _FEW)),
    "drawn": lambda n: of(drawn_estimate(0.5, np.array([0.4, 0.6]), n)),
    "structural share": lambda n: of(structural_share(np.ones(2 * n), np.repeat(["code", "web"], n), _FEW)),
    "structural gap": lambda n: of(structural_gap(np.ones(2 * n), np.repeat(["code", "web"], n), _FEW)),
    "models": lambda n: of(over_models([Estimate(v, v - 1, v + 1, 9) for v in values(n)])),
    "promotion": lambda n: columns(
        promotion_summary(decoded(n), token="target", n_resamples=50), "low", "high"
    ),
    "questions": questions,
    "tradeoff": tradeoff,
    "overlap": overlap,
    "profiles": profiles,
    "slope": sizes,
}


@pytest.mark.parametrize("what", INTERVALS)
def test_one_or_two_units_give_no_interval(what: str) -> None:
    few = (
        (2,) if what in {"models", "overlap"} else (1, 2)
    )  # one model keeps its own; a domain has two or more
    for n in few:
        ends = np.concatenate([np.ravel(part) for part in INTERVALS[what](n)])
        assert np.isnan(ends).all(), (what, n, ends)
    ends = np.concatenate([np.ravel(part) for part in INTERVALS[what](5)])
    assert np.isfinite(ends).any(), (what, ends)


def test_two_sequences_or_pairs_are_compared_without_an_interval() -> None:
    for n, known in ((2, False), (3, True)):
        found = compare_groups(result(n), result(5), "m", n_resamples=50, n_permutations=19)
        assert np.isfinite([float(found["low"]), float(found["high"])]).all() == known
        assert np.isfinite(float(found["difference"]))


def test_texts_say_why_there_is_no_interval() -> None:
    assert str(Estimate(0.5, n=2)) == "0.5 (no interval: n = 2)"
    assert str(Estimate(0.5, 0.25, 0.75, n=3)) == "0.5 [0.25, 0.75]"
    assert Finding.of("a", "b", Estimate(0.5, n=1)).number == "0.5, n = 1 (too few sequences for an interval)"
    of_models = Finding.of("a", "b", Estimate(0.5, n=2), over="models")
    assert of_models.number == "0.5, n = 2 (too few models for an interval)"
    few, enough = (_subtitle(n) for n in (2, 3))
    assert "over 2 sequences, too few for an interval" in few
    assert "over 3 sequences, 95 % interval" in enough


def _subtitle(n: int) -> str:
    data = xr.Dataset({"m": (("sequence", "layer"), np.random.default_rng(0).normal(size=(n, 3)))})
    figure: Any = Result.create(data, kind="mlp_ablation").plot()
    return str(figure.layout.title.subtitle.text)
