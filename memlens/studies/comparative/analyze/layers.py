"""What happens inside: decoding probability over layers, recall under noise, and recovery from it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate, mean_estimate
from memlens.results.statistics.intervals import bootstrap_means, mean_interval
from memlens.studies.comparative.analyze.domains import structural_draws, structural_share
from memlens.studies.comparative.analyze.rates import difference, drawn_estimate
from memlens.studies.comparative.options import STRUCTURAL


def group_values(result: Result, metric: str, group: str) -> Float[np.ndarray, "seq layer"]:
    """Return one group's values, one row per sequence and one column per layer, averaged over targets.

    Args:
        result: A result with a coordinate `group` along `sequence`.
        metric: Which metric.
        group: Which group; without such a group there are no rows.
    """
    data = result[metric].isel(sequence=result["group"].values.astype(str) == group)
    if "target" in data.dims:
        data = data.mean("target", skipna=True)
    return data.transpose("sequence", "layer").values.astype(float)


def depth_curve(
    values: Float[np.ndarray, "seq layer"], *, n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return the mean after each layer: columns `layer`, `depth`, `mean`, `low`, `high` (bootstrap), `n`.

    The output of layer l of L is at relative depth (l + 1) / L, so the last layer's is at 1.
    """
    n, n_layers = values.shape
    low = high = np.full(n_layers, np.nan)
    if n > 1:
        low, high = np.percentile(bootstrap_means(values, n_resamples, seed), [2.5, 97.5], axis=0)
    layer = np.arange(n_layers)
    columns = {"layer": layer, "depth": (layer + 1) / n_layers, "mean": values.mean(0), "low": low}
    return pd.DataFrame({**columns, "high": high, "n": n})


def burst(values: Float[np.ndarray, "seq layer"], *, n_resamples: int = 1000, seed: int = 0) -> Estimate:
    """Return the relative depth of the layer that raises the mean most.

    The rise from layer l to layer l + 1 is attributed to layer l + 1; the first layer's own rise, from what
    the embeddings give, is not known. Bootstrap over sequences.

    >>> burst(np.array([[0.0, 0.1, 0.9, 1.0], [0.0, 0.0, 0.7, 1.0]])).value
    0.75
    """

    def largest_rise(means: np.ndarray) -> np.ndarray:
        return (np.diff(means, axis=1).argmax(1) + 2) / means.shape[1]

    return _of_curve(values, largest_rise, n_resamples, seed)


def crossing(
    values: Float[np.ndarray, "seq layer"], level: float = 0.5, *, n_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Return the relative depth of the first layer after which the mean is above `level`; NaN for none.

    Bootstrap over sequences, of the resamples that cross.

    >>> crossing(np.array([[0.1, 0.4, 0.6, 0.9], [0.1, 0.2, 0.6, 0.9]])).value
    0.75
    """

    def first(means: np.ndarray) -> np.ndarray:
        above = means > level
        depth = (above.argmax(1) + 1) / means.shape[1]
        return np.where(above.any(1), depth, np.nan)

    return _of_curve(values, first, n_resamples, seed)


def _of_curve(
    values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n_resamples: int, seed: int
) -> Estimate:
    n, n_layers = values.shape
    if n == 0 or n_layers < 2:
        return Estimate.unknown(n)
    value = float(statistic(values.mean(0, keepdims=True))[0])
    if n < 2:
        return Estimate(value, n=n)
    found = drawn_estimate(value, statistic(bootstrap_means(values, n_resamples, seed)), n)
    return found if found.known else Estimate(value, n=n)


# ---- noise -----------------------------------------------------------------------------------------------


def over_draws(array: xr.DataArray) -> xr.DataArray:
    """Return the mean over draws of the noise, where there are several."""
    return array.mean("draw") if "draw" in array.dims else array


def noise_table(
    result: Result, structural: Collection[str] = STRUCTURAL, *, n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Return rate, distribution of the score and structural share at each strength.

    Args:
        result: Kind "residual_perturbation" with `exact_match`, `matching_prefix` and `target_accuracy` of
            a sample of all sequences, and their coordinates `n_targets` and `domain`.
        structural: Domains that count as structural text.
        n_resamples: Of the bootstraps.
        seed: Of the bootstraps.

    Returns:
        Columns `alpha`, `n`, `rate`, `low`, `high` (mean over draws; bootstrap over sequences, Wilson's with
        one draw), `leading` (mean share of the continuation that is correct from its start, a lower bound of
        M), `accuracy` (teacher-forced share of correct tokens: mostly above M), `below_half`, `between` and
        `all_right` (shares of sequences by that share: under 1/2, from there to under 1, and 1),
        `structural`, `structural_low`, `structural_high` (see `structural_share`).
    """
    hits, accuracy = over_draws(result["exact_match"]), result["target_accuracy"]
    leading = over_draws(result["matching_prefix"]) / result["n_targets"]
    chances: dict[str, Any] = {"n_resamples": n_resamples, "seed": seed}
    rows = []
    for alpha in hits["alpha"].values.tolist():
        here, right = hits.sel(alpha=alpha), accuracy.sel(alpha=alpha).values
        share = Estimate.unknown()
        if "domain" in result.data.coords:
            share = structural_share(here.values, result["domain"].values, structural, **chances)
        rows.append(
            {
                "alpha": alpha,
                **Estimate.of(mean_interval(here, **chances)).row("rate"),
                "leading": float(leading.sel(alpha=alpha).mean()),
                "accuracy": float(right.mean()),
                "below_half": float((right < 0.5).mean()),
                "between": float(((right >= 0.5) & (right < 1)).mean()),
                "all_right": float((right == 1).mean()),
                **share.row("structural", prefix="structural_", n=None),
            }
        )
    return pd.DataFrame(rows)


def structural_change(
    result: Result, structural: Collection[str] = STRUCTURAL, *, n_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Return the structural share of what is memorized under the strongest noise minus that without noise.

    Bootstrap over the same sequences, within each domain; `n` counts those that are still memorized in some
    draw. NaN where nothing is left, or all domains are of one kind.
    """
    hits = over_draws(result["exact_match"])
    labels = result["domain"].values.astype(str)
    kinds = np.isin(np.unique(labels), list(structural))
    if kinds.all() or not kinds.any():
        return Estimate.unknown()
    clean, noisy = (hits.sel(alpha=alpha).values for alpha in (0.0, float(hits["alpha"].max())))
    before, after = (structural_draws(h, labels, structural, n_resamples, seed) for h in (clean, noisy))
    return drawn_estimate(after[0] - before[0], after[1] - before[1], int((noisy > 0).sum()))


def recovery_table(result: Result, *, seed: int = 0) -> pd.DataFrame:
    """Return the similarity recovered, R = sim(last) - sim(at the noise), of each group at each strength.

    Returns:
        Columns `group`, `alpha`, `n`, `recovery`, `low`, `high` (bootstrap over sequences), `at_noise`,
        `at_last` (mean similarities).
    """
    rows = []
    labels = result["group"].values.astype(str)
    recovery, at_noise = (over_draws(result[name]) for name in ("recovery", "similarity_at_noise"))
    for group in dict.fromkeys(labels.tolist()):
        for alpha in recovery["alpha"].values.tolist():
            here, start = (a.sel(alpha=alpha).isel(sequence=labels == group) for a in (recovery, at_noise))
            found, first = mean_estimate(here, seed=seed), float(start.mean())
            ends = {"at_noise": first, "at_last": first + found.value}
            rows.append({"group": group, "alpha": alpha, **found.row("recovery"), **ends})
    return pd.DataFrame(rows)


def recovery_gap(
    result: Result, alpha: float, ours: str, theirs: str, matched: np.ndarray | None = None, *, seed: int = 0
) -> Estimate:
    """Return how much more similarity one group recovers than another, at one strength.

    Args:
        result: With the coordinate `group`.
        alpha: The strength.
        ours: The one group.
        theirs: The other.
        matched: For each sequence of the other group the id of the one it is matched to: differences are then
            taken within pairs. Without it the groups are resampled independently.
        seed: Of the bootstrap over sequences (or pairs).
    """
    labels = result["group"].values.astype(str)
    values = over_draws(result["recovery"]).sel(alpha=alpha)
    a, b = (values.isel(sequence=labels == name) for name in (ours, theirs))
    if not a.sizes["sequence"] or not b.sizes["sequence"]:
        return Estimate.unknown()
    if matched is not None:
        rows = {str(name): i for i, name in enumerate(a["sequence"].values)}
        pairs = [(rows[str(name)], j) for j, name in enumerate(matched) if str(name) in rows]
        if pairs:
            i, j = np.array(pairs).T
            return mean_estimate(xr.DataArray(a.values[i] - b.values[j], dims="sequence"), seed=seed)
    return difference(a.values, b.values, seed)
