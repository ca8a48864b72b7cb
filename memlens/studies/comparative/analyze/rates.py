"""How much a model recalls: rate, distribution of M, depth, size, copies and training time.

Everything here works on saved recall tables; nothing runs a model. How a value stands against its bootstrap
draws or a null is here too, for all of `analyze`.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int
from scipy import stats

from memlens.errors import ColumnError, ResultError
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_strengths
from memlens.results.readings import read_strengths
from memlens.results.result import Result
from memlens.results.statistics.comparison import corrected
from memlens.results.statistics.estimates import Estimate, mean_estimate, share_estimate
from memlens.results.statistics.intervals import FEWEST
from memlens.studies.comparative.options import DEFAULTS, ComparativeOptions

READINGS = ("rate", "log10 rate")
"""What is fitted on log10 of the number of parameters: "log-linear" may mean either."""


def central(samples: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    """Return the ends of the central 95 % of the samples."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def drawn_estimate(value: float, drawn: Float[np.ndarray, " draw"], n: int) -> Estimate:
    """Return a value with the central 95 % of its bootstrap draws, of those that are finite.

    With fewer than `FEWEST` sequences, or no finite draw, there is no interval.
    """
    if not np.isfinite(value):
        return Estimate.unknown(n)
    drawn = drawn[np.isfinite(drawn)]
    return Estimate(float(value), *(central(drawn) if n >= FEWEST and len(drawn) else ()), n=n)


def against_null(value: float, null: Float[np.ndarray, " draw"]) -> dict[str, float]:
    """Return how a value compares with the draws of a null.

    Returns:
        `null_mean`, `null_low`, `null_high` (central 95 %), `p_above` and `p_below`: the share of the null at
        least as large, and at least as small, counting the value itself as one draw.
    """
    low, high = central(null)
    above, below = (
        (1 + found.sum()) / (1 + len(null)) for found in (null >= value - 1e-12, null <= value + 1e-12)
    )
    ends = {"null_mean": float(null.mean()), "null_low": low, "null_high": high}
    return {**ends, "p_above": float(above), "p_below": float(below)}


def rate_row(table: pd.DataFrame) -> dict[str, float]:
    """Return a model's rate, its mean M, and the mean length of the correct leading run.

    Args:
        table: Recall table with `exact_match`, `matching_prefix` and M (see `score_of`).

    Returns:
        `n`, `memorized`, `rate` (share of sequences with M = 1) with Wilson's `low` and `high`, `mean_m`,
        `depth` (tokens) with `depth_low` and `depth_high` (bootstrap over sequences).

    >>> frame = {"exact_match": [1, 0, 0, 0], "matching_prefix": [8, 2, 0, 0], "target_accuracy": 0.5}
    >>> found = rate_row(pd.DataFrame(frame))
    >>> found["rate"], found["depth"]
    (0.25, 2.5)
    """
    hits = table["exact_match"].to_numpy(float)
    rate, depth = share_estimate(hits), mean_estimate(table["matching_prefix"].to_xarray())
    return {
        "n": len(hits),
        "memorized": int(hits.sum()),
        **rate.row("rate", n=None),
        "mean_m": score_of(table).mean(),
        **depth.row("depth", prefix="depth_", n=None),
    }


def score_spread(table: pd.DataFrame, *, bins: int = 10) -> pd.DataFrame:
    """Return the distribution of the memorization score M: at 0, at 1, and between.

    Args:
        table: Recall table with `memorization_score` (or, without generation, `target_accuracy`).
        bins: Equal bins of the open interval (0, 1).

    Returns:
        Columns `part` ("0", "between", "1"), `from`, `to`, `n`, `share`: one row for M = 0, one per bin, one
        for M = 1; every sequence is in exactly one.

    >>> spread = score_spread(pd.DataFrame({"memorization_score": [0.0, 0.5, 1.0, 1.0]}), bins=2)
    >>> spread[["part", "n"]].to_numpy().tolist()
    [['0', 1], ['between', 0], ['between', 1], ['1', 2]]
    """
    scores = score_of(table)
    inside = scores[(scores > 0) & (scores < 1)]
    edges = np.linspace(0, 1, bins + 1)
    counts = np.bincount(np.minimum((inside * bins).astype(int), bins - 1), minlength=bins)
    rows = [("0", 0.0, 0.0, int((scores == 0).sum()))]
    rows += [("between", edges[i], edges[i + 1], int(counts[i])) for i in range(bins)]
    rows.append(("1", 1.0, 1.0, int((scores == 1).sum())))
    frame = pd.DataFrame(rows, columns=["part", "from", "to", "n"])
    return frame.assign(share=frame["n"] / max(len(scores), 1))


def score_of(table: pd.DataFrame) -> Float[np.ndarray, " seq"]:
    """Return M of each sequence; without generation, the teacher-forced share of correct tokens.

    Raises:
        ColumnError: The table has neither.
    """
    name = next((n for n in ("memorization_score", "target_accuracy") if n in table), None)
    if name is None:
        raise ColumnError("the recall table has neither M nor target_accuracy: score again.")
    return table[name].to_numpy(float)


def depth_table(table: pd.DataFrame, n_targets: Int[np.ndarray, " seq"]) -> pd.DataFrame:
    """Return the exact-match rate of the first k tokens of the continuation, for every k.

    Only sequences with at least k targets count at k. A greedy continuation is correct up to its first error
    exactly as teacher forcing is, so no further pass is needed. "Depth" is our reading: how arXiv 2603.21658
    defines memorization depth is not known here.

    Args:
        table: Recall table with `matching_prefix`.
        n_targets: Tokens of each continuation.

    Returns:
        Columns `k`, `n`, `rate`, `low`, `high` (Wilson, 95 %).

    >>> depth_table(pd.DataFrame({"matching_prefix": [2, 0]}), np.array([2, 2]))["rate"].tolist()
    [0.5, 0.5]
    """
    depth, lengths = table["matching_prefix"].to_numpy(int), range(1, int(np.max(n_targets, initial=0)) + 1)
    return pd.DataFrame([{"k": k, **share_estimate(depth[n_targets >= k] >= k).row("rate")} for k in lengths])


# ---- size ------------------------------------------------------------------------------------------------


def size_fits(models: pd.DataFrame, column: str = "", options: ComparativeOptions = DEFAULTS) -> pd.DataFrame:
    r"""Fit the rate on the logarithm of size, in each family and in all families with one common slope.

    Both readings of "log-linear": :math:`r = a + b \log_{10} P` and
    :math:`\log_{10} r = a + b \log_{10} P`. The second leaves out models with rate 0 (`left_out` counts
    them), so that it describes only the others. A family needs three sizes for a fit of its own.

    Args:
        models: One row per model: `family`, `n_params`, and `n` with `memorized` (counts), or `column`.
        column: A number, such as a mean, that is fitted instead of the rate; only with the first reading.
        options: `n_resamples` and `seed` of the bootstrap over sequences, which redraws each model's count
            from its binomial.

    Returns:
        Columns `family` ("all families" has one slope and an intercept per family), `reading`, `sizes`,
        `left_out`, `slope` (per factor 10 in parameters), `low`, `high` (least squares, Student's 95 %),
        `boot_low`, `boot_high` (bootstrap, 95 %), `intercept`, `r2` (for all families: of the variance left
        after the intercepts). With as many fitted numbers as sizes, low and high are NaN.
    """
    rng = np.random.default_rng(options.seed)
    sizes: Any = models.groupby("family")["n_params"].transform("nunique")
    parts: dict[str, Any] = {str(name): part for name, part in models[sizes >= 3].groupby("family")}
    joined: Any = models[sizes >= 2]
    if joined["family"].nunique() > 1:
        parts["all families"] = joined
    return pd.DataFrame(
        [
            {"family": name, "reading": reading, **_fit(part, reading, column, options.n_resamples, rng)}
            for name, part in parts.items()
            for reading in ([column] if column else READINGS)
        ]
    )


def _fit(
    part: pd.DataFrame, reading: str, column: str, n_resamples: int, rng: np.random.Generator
) -> dict[str, float]:
    x, groups = np.log10(part["n_params"].to_numpy(float)), part["family"].to_numpy()
    if column:
        y, draws = part[column].to_numpy(float), np.empty((0, len(part)))
    else:
        n, hits = (part[key].to_numpy(int) for key in ("n", "memorized"))
        y, draws = hits / n, rng.binomial(n, hits / n, size=(n_resamples, len(part))) / n
    if reading == "log10 rate":
        with np.errstate(divide="ignore"):
            y, draws = np.log10(y), np.log10(draws)
    kept = np.isfinite(y)
    sizes = len(set(x[kept]))
    names = ("slope", "low", "high", "boot_low", "boot_high", "intercept", "r2")
    row: dict[str, float] = {"sizes": sizes, "left_out": int((~kept).sum()), **dict.fromkeys(names, np.nan)}
    if sizes < 2:
        return row
    slopes = slope_of(x, draws, groups)
    slopes = slopes[np.isfinite(slopes)]
    if len(slopes) and part["n"].to_numpy(int).min() >= FEWEST:
        row["boot_low"], row["boot_high"] = central(slopes)
    return {**row, **_least_squares(x[kept], y[kept], groups[kept])}


def _least_squares(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    import statsmodels.api as sm  # takes a second to import

    dummies = pd.get_dummies(pd.Series(groups), dtype=float).to_numpy()
    model: Any = sm.OLS(y, np.column_stack([x, dummies])).fit()
    low, high = model.conf_int()[0] if model.df_resid > 0 else (np.nan, np.nan)
    centered = y - np.array([y[groups == group].mean() for group in groups])
    total = float((centered**2).sum())
    r2 = 1 - float((model.resid**2).sum()) / total if total > 0 else np.nan
    slope, intercept = float(model.params[0]), float(np.mean(model.params[1:]))
    return {"slope": slope, "low": float(low), "high": float(high), "intercept": intercept, "r2": r2}


def slope_of(
    x: Float[np.ndarray, " model"], y: Float[np.ndarray, "draw model"], groups: np.ndarray
) -> Float[np.ndarray, " draw"]:
    """Return the least-squares slope of each draw with an intercept per group; NaN and infinity are left out.

    >>> slope_of(np.array([0.0, 1.0, 2.0]), np.array([[1.0, 3.0, 5.0]]), np.array(["a"] * 3)).tolist()
    [2.0]
    """
    values = pd.DataFrame(np.where(np.isfinite(y), y, np.nan).T)
    places = values.notna().mul(x, axis=0).where(values.notna())
    dx, dy = (part - part.groupby(groups).transform("mean") for part in (places, values))
    above, below = (dx * dy).sum().to_numpy(), (dx * dx).sum().to_numpy()
    return np.where(below > 1e-12, above / np.where(below > 1e-12, below, 1), np.nan)


def smaller_beats_larger(rates: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs of models of two families, with both rates and a test that the smaller recalls more.

    Returns:
        Columns `smaller`, `larger`, `smaller_rate`, `larger_rate`, `p` (one-sided two-proportion test),
        `p_corrected` (Benjamini and Hochberg over all pairs).
    """
    rows = []
    for a, b in combinations(rates.sort_values("n_params").to_dict("records"), 2):
        if a["family"] == b["family"] or a["n_params"] == b["n_params"]:
            continue
        joint = (a["memorized"] + b["memorized"]) / (a["n"] + b["n"])
        error = np.sqrt(joint * (1 - joint) * (1 / a["n"] + 1 / b["n"]))
        p = float(stats.norm.sf((a["rate"] - b["rate"]) / error)) if error > 0 else 1.0
        rows.append((a["model"], b["model"], a["rate"], b["rate"], p))
    frame = pd.DataFrame(rows, columns=["smaller", "larger", "smaller_rate", "larger_rate", "p"])
    return frame.assign(p_corrected=corrected(frame["p"].to_numpy(float)))


# ---- copies and training time ----------------------------------------------------------------------------


def copies_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rate at each number of copies; empty where the table has no such column.

    Returns:
        Columns `copies`, `n`, `rate`, `low`, `high` (Wilson, 95 %).

    >>> copies_table(pd.DataFrame({"copies": [1, 1, 8], "exact_match": [0, 1, 1]}))["rate"].tolist()
    [0.5, 1.0]
    """
    parts = table.groupby("copies")["exact_match"] if "copies" in table else ()
    return pd.DataFrame([{"copies": copies, **share_estimate(hits).row("rate")} for copies, hits in parts])


def join_steps(tables: dict[int, pd.DataFrame]) -> Result:
    """Join the recall tables of one model's checkpoints.

    Args:
        tables: Training step to recall table, all of the same sequences.

    Returns:
        Kind "recall_over_training": `exact_match`, `matching_prefix`, `target_accuracy` `(sequence, step)`.

    Raises:
        ResultError: No checkpoints, or tables of different sequences.
    """
    if not tables:
        raise ResultError("there are no checkpoints to join: give at least one step.")
    steps = sorted(tables)
    first = tables[steps[0]]
    ids = first["id"].tolist()
    if any(tables[step]["id"].tolist() != ids for step in steps):
        raise ResultError("the checkpoints were scored on different sequences: score all on one set.")
    arrays = {
        name: (("sequence", "step"), np.stack([tables[step][name].to_numpy(float) for step in steps], 1))
        for name in ("exact_match", "matching_prefix", "target_accuracy")
    }
    coords: dict[str, object] = {"sequence": np.array(ids, dtype=object), "step": steps}
    for name in ("domain", "copies"):
        if name in first:
            values = first[name].to_numpy()
            coords[name] = ("sequence", values if values.dtype.kind in "iuf" else values.astype(str))
    return Result.create(xr.Dataset(arrays, coords), kind="recall_over_training", settings={"steps": steps})


register_kind("recall_over_training", plot=plot_strengths, reading=read_strengths)
