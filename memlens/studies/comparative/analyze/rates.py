"""How much a model recalls: rate, spread of the memorization score, depth, and how the rate goes with size.

Everything here works on saved recall tables; nothing runs a model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from memlens.errors import ColumnError
from memlens.studies.idioms.findings import share_of

READINGS = ("rate", "log10 rate")
"""What is fitted on log10 of the parameters: "log-linear" may mean either."""


def rate_row(table: pd.DataFrame) -> dict[str, float]:
    """Return the share of sequences with M = 1 (`rate`, Wilson's `low`, `high`) with `n` and `memorized`.

    >>> rate_row(pd.DataFrame({"exact_match": [1, 0, 0, 0]}))["rate"]
    0.25
    """
    hits = table["exact_match"].to_numpy(float)
    share = share_of(hits)
    counts = {"n": len(hits), "memorized": int(hits.sum())}
    return {**counts, "rate": share.value, "low": share.low, "high": share.high}


def score_spread(table: pd.DataFrame, *, bins: int = 10) -> pd.DataFrame:
    """Return how the memorization score M spreads: at 0, at 1, and between.

    Args:
        table: Recall table with `memorization_score` (or, without generation, `target_accuracy`).
        bins: Equal bins of the open interval (0, 1).

    Returns:
        Columns `part` ("0", "between", "1"), `from`, `to`, `n`, `share`: one row for M = 0, one a bin
        between, one for M = 1; every sequence is in exactly one.

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
    """Return M of each sequence; without generation the teacher-forced share of right tokens.

    Raises:
        ColumnError: The table has neither.
    """
    name = next((n for n in ("memorization_score", "target_accuracy") if n in table), None)
    if name is None:
        raise ColumnError("the recall table has neither M nor target_accuracy: score again.")
    return table[name].to_numpy(float)


def depth_of(table: pd.DataFrame) -> Int[np.ndarray, " seq"]:
    """Return how many tokens of each continuation are right from its start.

    A greedy continuation is right up to its first error exactly as teacher forcing is, so no further pass is
    needed.
    """
    return table["matching_prefix"].to_numpy(int)


def depth_table(table: pd.DataFrame, n_targets: Int[np.ndarray, " seq"]) -> pd.DataFrame:
    """Return the exact-match rate of the first k tokens of the continuation, for every k.

    Only sequences with at least k targets count at k. "Depth" is our reading: what arXiv 2603.21658 calls
    memorization depth is not known here.

    Args:
        table: Recall table with `matching_prefix`.
        n_targets: Tokens of each continuation.

    Returns:
        Columns `k`, `n`, `rate`, `low`, `high` (Wilson, 95 %).

    >>> found = depth_table(pd.DataFrame({"matching_prefix": [2, 0]}), np.array([2, 2]))
    >>> found["rate"].tolist()
    [0.5, 0.5]
    """
    depth, rows = depth_of(table), []
    for k in range(1, int(np.max(n_targets, initial=0)) + 1):
        long = n_targets >= k
        share = share_of(depth[long] >= k)
        rows.append((k, share.n, share.value, share.low, share.high))
    return pd.DataFrame(rows, columns=["k", "n", "rate", "low", "high"])


def size_fits(
    models: pd.DataFrame, *, column: str = "", least: int = 3, n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    r"""Fit the rate on the logarithm of size, in each family and in all families with one common slope.

    Both readings of "log-linear": :math:`r = a + b \log_{10} P` and
    :math:`\log_{10} r = a + b \log_{10} P`. In the second a model of rate 0 has no place and is left out
    (`left_out` counts them): the fit then speaks
    of the others only.

    Args:
        models: One row a model: `family`, `n_params`, and `n` with `memorized` (counts), or another `column`
            (a number, such as a mean) to fit instead of the rate; then there is the first reading only.
        column: See above.
        least: Fewest sizes of a family.
        n_resamples: Of the bootstrap over sequences: each model's count is redrawn from its binomial.
        seed: Of the bootstrap.

    Returns:
        Columns `family` ("all families" has one slope and an intercept a family), `reading`, `sizes`,
        `left_out`, `slope` (per factor 10 in parameters), `low`, `high` (least squares, Student's 95 %),
        `boot_low`, `boot_high` (bootstrap, 95 %), `intercept`, `r2` (for all families: of what is left after
        the intercepts). Where as many numbers are fitted as there are sizes, low and high are NaN.
    """
    rng = np.random.default_rng(seed)
    rows = []
    parts: dict[str, Any] = {
        str(name): part for name, part in models.groupby("family") if len(set(part["n_params"])) >= least
    }
    joined: Any = models.groupby("family").filter(lambda part: len(set(part["n_params"])) >= 2)
    if joined["family"].nunique() > 1:
        parts["all families"] = joined
    for name, part in parts.items():
        for reading in READINGS if not column else (column,):
            rows.append(_fit(name, part, reading, column, n_resamples, rng))
    columns = [
        "family", "reading", "sizes", "left_out", "slope", "low", "high", "boot_low", "boot_high",
        "intercept", "r2",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _fit(
    name: str, part: pd.DataFrame, reading: str, column: str, n_resamples: int, rng: np.random.Generator
) -> tuple[Any, ...]:
    x, groups = np.log10(part["n_params"].to_numpy(float)), part["family"].to_numpy()
    log = reading == "log10 rate"
    if column:
        y, draws = part[column].to_numpy(float), np.empty((0, len(part)))
    else:
        n, hits = (part[key].to_numpy(int) for key in ("n", "memorized"))
        y, draws = hits / n, rng.binomial(n, hits / n, size=(n_resamples, len(part))) / n
    if log:
        with np.errstate(divide="ignore"):
            y, draws = np.log10(y), np.log10(draws)
    kept = np.isfinite(y)
    sizes, left_out = len(set(x[kept])), int((~kept).sum())
    slopes = slope_of(x, draws, groups)
    slopes = slopes[np.isfinite(slopes)]
    ends = np.percentile(slopes, [2.5, 97.5]).tolist() if len(slopes) else [np.nan, np.nan]
    if sizes < 2:
        return name, reading, sizes, left_out, *[np.nan] * 7
    return name, reading, sizes, left_out, *_least_squares(x[kept], y[kept], groups[kept], ends)


def _least_squares(x: np.ndarray, y: np.ndarray, groups: np.ndarray, ends: list[float]) -> tuple[float, ...]:
    import statsmodels.api as sm  # takes a second to import

    dummies = pd.get_dummies(pd.Series(groups), dtype=float).to_numpy()
    model: Any = sm.OLS(y, np.column_stack([x, dummies])).fit()
    slope, intercept = float(model.params[0]), float(np.mean(model.params[1:]))
    low, high = model.conf_int()[0] if model.df_resid > 0 else (np.nan, np.nan)
    centered = y - np.array([y[groups == group].mean() for group in groups])
    total = float((centered**2).sum())
    r2 = 1 - float((model.resid**2).sum()) / total if total > 0 else np.nan
    return slope, float(low), float(high), *ends, intercept, r2


def slope_of(
    x: Float[np.ndarray, " model"], y: Float[np.ndarray, "draw model"], groups: np.ndarray
) -> Float[np.ndarray, " draw"]:
    """Return the least-squares slope of each draw, with an intercept a group; what is not finite is left out.

    >>> slope_of(np.array([0.0, 1.0, 2.0]), np.array([[1.0, 3.0, 5.0]]), np.array(["a"] * 3)).tolist()
    [2.0]
    """
    known = np.isfinite(y)
    filled = np.where(known, y, 0)
    above, below = np.zeros(len(y)), np.zeros(len(y))
    for group in pd.unique(groups):
        some = groups == group
        weight, values, places = known[:, some].astype(float), filled[:, some], x[some]
        count = np.maximum(weight.sum(1, keepdims=True), 1)
        dx = (places - (weight * places).sum(1, keepdims=True) / count) * weight
        dy = (values - values.sum(1, keepdims=True) / count) * weight
        above, below = above + (dx * dy).sum(1), below + (dx * dx).sum(1)
    return np.where(below > 1e-12, above / np.where(below > 1e-12, below, 1), np.nan)
