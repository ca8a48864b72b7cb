"""What happens inside: decoding probability over layers, recall under noise, and recovery from it.

The results have a coordinate `group` along `sequence`: of `MEMORIZED`, `CONTROL` and `UNTRAINED`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate, mean_estimate
from memlens.results.statistics.intervals import FEWEST, mean_interval, rows_by_group
from memlens.results.statistics.resampling import bootstrap_means
from memlens.studies.comparative.analyze.domains import resampled_rates, shares_of, structural_share
from memlens.studies.comparative.analyze.rates import drawn_estimate
from memlens.studies.comparative.options import CONTROL, DEFAULTS, MEMORIZED, ComparativeOptions

Values = Float[np.ndarray, "seq layer"]


def group_values(result: Result, metric: str) -> dict[str, Values]:
    """Return a metric of each group, one row per sequence, averaged over targets and draws of the noise."""
    data = result[metric]
    data = data.mean([dim for dim in ("target", "draw") if dim in data.dims], skipna=True)
    data = data.transpose("sequence", "layer").astype(float)
    return {group: data.values[rows] for group, rows in rows_by_group(data["group"]).items()}


def depth_curve(values: Values, options: ComparativeOptions = DEFAULTS) -> pd.DataFrame:
    """Return the mean after each layer: columns `layer`, `depth`, `mean`, `low`, `high` (bootstrap), `n`.

    The output of layer l of L is at relative depth (l + 1) / L, so the last layer's is at 1.
    """
    n, n_layers = values.shape
    low = high = np.full(n_layers, np.nan)
    if n >= FEWEST:
        drawn = bootstrap_means(values, options.n_resamples, options.seed)
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    layer = np.arange(n_layers)
    columns = {"layer": layer, "depth": (layer + 1) / n_layers, "mean": values.mean(0), "low": low}
    return pd.DataFrame({**columns, "high": high, "n": n})


def decoding_table(result: Result, options: ComparativeOptions = DEFAULTS) -> pd.DataFrame:
    """Return the decoding probability after each layer.

    Columns as `depth_curve`, with `group` and `token`: the "true" one, or the one "predicted" at the end.
    """
    metrics = {"true": "probability", "predicted": "predicted_probability"}
    values = {token: group_values(result, metric) for token, metric in metrics.items()}
    return pd.concat(
        [
            depth_curve(values[token][group], options).assign(group=group, token=token)
            for group in values["true"]
            for token in metrics
        ],
        ignore_index=True,
    )


def burst_table(result: Result, options: ComparativeOptions = DEFAULTS) -> pd.DataFrame:
    """Return where the decoding probability of the true token bursts, and where its mean passes 1/2.

    Returns:
        Columns `group`, `n`, `burst` with `low` and `high` (see `burst`), `crossing` with `crossing_low` and
        `crossing_high` (see `crossing`), `before_last` with `before_low` and `before_high` (mean probability
        after the next-to-last layer), `late_share` (of the whole rise, in the later half of the layers).
    """
    rows = []
    for group, values in group_values(result, "probability").items():
        curve = depth_curve(values, options)
        means, last = curve["mean"].to_numpy(), curve.iloc[max(len(curve) - 2, 0)]
        rise = means[-1] - means[0]
        rows.append(
            {
                "group": group,
                **burst(values, options).row("burst"),
                **crossing(values, options).row("crossing", prefix="crossing_", n=None),
                **Estimate.from_row(last, "mean").row("before_last", prefix="before_", n=None),
                "late_share": (means[-1] - means[(len(means) - 1) // 2]) / rise if rise > 0 else np.nan,
            }
        )
    return pd.DataFrame(rows)


def burst(values: Values, options: ComparativeOptions = DEFAULTS) -> Estimate:
    """Return the relative depth of the layer that raises the mean most.

    The rise from layer l to layer l + 1 is attributed to layer l + 1; the first layer's own rise, from what
    the embeddings give, is not known. Bootstrap over sequences.

    >>> burst(np.array([[0.0, 0.1, 0.9, 1.0], [0.0, 0.0, 0.7, 1.0]])).value
    0.75
    """

    def largest_rise(means: np.ndarray) -> np.ndarray:
        return (np.diff(means, axis=1).argmax(1) + 2) / means.shape[1]

    return _of_curve(values, largest_rise, options)


def crossing(values: Values, options: ComparativeOptions = DEFAULTS) -> Estimate:
    """Return the relative depth of the first layer after which the mean is above 1/2; NaN for none.

    Bootstrap over sequences, of the resamples that cross.

    >>> crossing(np.array([[0.1, 0.4, 0.6, 0.9], [0.1, 0.2, 0.6, 0.9]])).value
    0.75
    """

    def first(means: np.ndarray) -> np.ndarray:
        above = means > 0.5
        depth = (above.argmax(1) + 1) / means.shape[1]
        return np.where(above.any(1), depth, np.nan)

    return _of_curve(values, first, options)


def _of_curve(
    values: Values, statistic: Callable[[np.ndarray], np.ndarray], options: ComparativeOptions
) -> Estimate:
    n, n_layers = values.shape
    if n == 0 or n_layers < 2:
        return Estimate.unknown(n)
    value = float(statistic(values.mean(0, keepdims=True))[0])
    drawn = statistic(bootstrap_means(values, options.n_resamples, options.seed))
    return drawn_estimate(value, drawn, n)


# ---- noise -----------------------------------------------------------------------------------------------


def over_draws(array: xr.DataArray) -> xr.DataArray:
    """Return the mean over draws of the noise, where there are several."""
    return array.mean("draw") if "draw" in array.dims else array


def noise_table(result: Result, options: ComparativeOptions = DEFAULTS) -> pd.DataFrame:
    """Return rate, distribution of the score and structural share at each strength.

    Args:
        result: Kind "residual_perturbation" with `exact_match`, `matching_prefix` and `target_accuracy` of
            a sample of all sequences, and their coordinates `n_targets` and `domain`.
        options: `structural`, and `n_resamples` and `seed` of the bootstraps.

    Returns:
        Columns `alpha`, `n`, `rate`, `low`, `high` (mean over draws; bootstrap over sequences, Wilson's with
        one draw), `leading` (mean share of the continuation that is correct from its start, a lower bound of
        M), `accuracy` (teacher-forced share of correct tokens: mostly above M), `below_half`, `between` and
        `all_right` (shares of sequences by that share: under 1/2, from there to under 1, and 1),
        `structural`, `structural_low`, `structural_high` (see `structural_share`).
    """
    chances: dict[str, Any] = {"n_resamples": options.n_resamples, "seed": options.seed}
    rows = []
    for alpha in result["alpha"].values.tolist():
        part = result.data.sel(alpha=alpha)
        hits, right = over_draws(part["exact_match"]), part["target_accuracy"].values
        leading = over_draws(part["matching_prefix"]) / part["n_targets"]
        share = structural_share(hits.values, part["domain"].values, options)
        rows.append(
            {
                "alpha": alpha,
                **Estimate.of(mean_interval(hits, **chances)).row("rate"),
                "leading": float(leading.mean()),
                "accuracy": float(right.mean()),
                "below_half": float((right < 0.5).mean()),
                "between": float(((right >= 0.5) & (right < 1)).mean()),
                "all_right": float((right == 1).mean()),
                **share.row("structural", prefix="structural_", n=None),
            }
        )
    return pd.DataFrame(rows)


def structural_change(result: Result, options: ComparativeOptions = DEFAULTS) -> Estimate:
    """Return the structural share of what is memorized under the strongest noise minus that without noise.

    Bootstrap over the same sequences, within each domain; `n` counts those that are still memorized in some
    draw. NaN where nothing is left, or all domains are of one kind.
    """
    hits, labels = over_draws(result["exact_match"]), result["domain"].values
    clean, noisy = (hits.sel(alpha=alpha).values for alpha in (0.0, float(hits["alpha"].max())))
    before, structural = resampled_rates(clean, labels, options)
    if structural.all() or not structural.any():
        return Estimate.unknown()
    after, _ = resampled_rates(noisy, labels, options)
    change = shares_of(after, structural) - shares_of(before, structural)
    return drawn_estimate(change[0], change[1:], int((noisy > 0).sum()))


def similarity_table(result: Result, options: ComparativeOptions = DEFAULTS) -> pd.DataFrame:
    """Return the similarity to the clean residual after each layer, at the strongest noise.

    Columns as `depth_curve`, with `group`; the last layer is at relative depth 1.
    """
    strongest = Result(result.data.sel(alpha=max(options.alphas)))
    layers = result["similarity"]["layer"].values
    frames = [
        depth_curve(values, options).assign(group=group, layer=layers, depth=(layers + 1) / (layers[-1] + 1))
        for group, values in group_values(strongest, "similarity").items()
    ]
    return pd.concat(frames, ignore_index=True)


def recovery_table(result: Result, seed: int = 0) -> pd.DataFrame:
    """Return the similarity recovered, R = sim(last) - sim(at the noise), of each group at each strength.

    Returns:
        Columns `group`, `alpha`, `n`, `recovery`, `low`, `high` (bootstrap over sequences), `at_noise`,
        `at_last` (mean similarities).
    """
    rows = []
    recovery, at_noise = (over_draws(result[name]) for name in ("recovery", "similarity_at_noise"))
    for group, own in rows_by_group(result["group"]).items():
        for alpha in recovery["alpha"].values.tolist():
            here, start = (array.sel(alpha=alpha).isel(sequence=own) for array in (recovery, at_noise))
            found, first = mean_estimate(here, seed=seed), float(start.mean())
            ends = {"at_noise": first, "at_last": first + found.value}
            rows.append({"group": group, "alpha": alpha, **found.row("recovery"), **ends})
    return pd.DataFrame(rows)


def recovery_gaps(result: Result, matched: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Return how much more similarity memorized sequences recover than their matched controls.

    Args:
        result: Kind "residual_perturbation".
        matched: For each control the id of the memorized sequence that it is matched to.
        seed: Of the bootstrap over pairs.

    Returns:
        Columns `alpha`, `pairs`, `gap` (mean difference within pairs), `low`, `high` (bootstrap); empty with
        fewer than two pairs.
    """
    values, groups = over_draws(result["recovery"]), rows_by_group(result["group"])
    if len(matched) < 2:
        return pd.DataFrame()
    ours, theirs = (values.isel(sequence=groups[name]) for name in (MEMORIZED, CONTROL))
    gaps = ours.sel(sequence=matched.astype(str)).drop_vars("sequence") - theirs.drop_vars("sequence")
    return pd.DataFrame(
        [
            {"alpha": alpha, **mean_estimate(gaps.sel(alpha=alpha), seed=seed).row("gap", n="pairs")}
            for alpha in gaps["alpha"].values.tolist()
        ]
    )
