"""Tables over all models of what goes on inside them: noise and middle layers.

As in `comparative_tables`, from saved results only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from memlens.studies.comparative_layers import burst, crossing, depth_curve, group_values
from memlens.studies.comparative_measure import CONTROL, MEMORIZED
from memlens.studies.comparative_noise import (
    noise_table,
    over_draws,
    recovery_gap,
    recovery_table,
    structural_change,
)
from memlens.studies.comparative_options import ComparativeOptions
from memlens.studies.comparative_store import SavedModel
from memlens.studies.comparative_tables import each

__all__ = [
    "bursts",
    "decodings",
    "gaps",
    "noises",
    "recoveries",
    "similarities",
    "structural_changes",
]


def noises(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return rate, spread and structural share at each strength of the noise (see `noise_table`)."""

    def table(model: SavedModel) -> pd.DataFrame:
        return noise_table(
            model.result("noise"), options.structural, n_resamples=options.n_resamples, seed=options.seed
        )

    return each(models, "noise", table)


def structural_changes(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return how the structural share changes under the strongest noise (see `structural_change`)."""

    def row(model: SavedModel) -> pd.DataFrame:
        found = structural_change(
            model.result("noise"), options.structural, n_resamples=options.n_resamples, seed=options.seed
        )
        return pd.DataFrame([{"change": found.value, "low": found.low, "high": found.high, "n": found.n}])

    return each(models, "noise", row)


def recoveries(models: Sequence[SavedModel], seed: int = 0) -> pd.DataFrame:
    """Return the similarity regained by each group at each strength (see `recovery_table`)."""
    return each(models, "recovery", lambda model: recovery_table(model.result("recovery"), seed=seed))


def gaps(models: Sequence[SavedModel], seed: int = 0) -> pd.DataFrame:
    """Return how much more similarity memorized sequences regain than their matched controls.

    Columns `alpha`, `pairs`, `gap`, `low`, `high` (bootstrap over pairs); below 0 memorized regain less.
    """

    def table(model: SavedModel) -> pd.DataFrame:
        result, groups = model.result("recovery"), model.groups
        matched = groups.loc[groups["group"] == CONTROL, "matched_to"].to_numpy()
        rows = []
        for alpha in result["alpha"].values.tolist():
            if len(matched) > 1:
                found = recovery_gap(result, alpha, MEMORIZED, CONTROL, matched, seed=seed)
                rows.append((alpha, found.n, found.value, found.low, found.high))
        return pd.DataFrame(rows, columns=["alpha", "pairs", "gap", "low", "high"])

    return each(models, "recovery", table)


def similarities(models: Sequence[SavedModel], alpha: float, options: ComparativeOptions) -> pd.DataFrame:
    """Return the similarity to the clean residual after each block, at one strength.

    Columns `group`, `layer`, `depth` (relative), `mean`, `low`, `high`, `n`.
    """

    def table(model: SavedModel) -> pd.DataFrame:
        result = model.result("recovery")
        data = over_draws(result["similarity"]).sel(alpha=alpha).transpose("sequence", "layer")
        labels, total = result["group"].values.astype(str), int(model.facts["n_layers"])
        frames = []
        for group in dict.fromkeys(labels.tolist()):
            values = data.values[labels == group]
            curve = depth_curve(values, n_resamples=options.n_resamples, seed=options.seed)
            layers = data["layer"].values
            frames.append(curve.assign(group=group, layer=layers, depth=(layers + 1) / total))
        return pd.concat(frames, ignore_index=True)

    return each(models, "recovery", table)


def decodings(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return the decoding probability after each block.

    Columns `group`, `token` ("true": the continuation's own; "predicted": what the model ends with), `layer`,
    `depth`, `mean`, `low`, `high`, `n`.
    """

    def table(model: SavedModel) -> pd.DataFrame:
        result, frames = model.result("decoding"), []
        for group in dict.fromkeys(result["group"].values.astype(str).tolist()):
            for token, metric in (("true", "probability"), ("predicted", "predicted_probability")):
                values = group_values(result, metric, group)
                curve = depth_curve(values, n_resamples=options.n_resamples, seed=options.seed)
                frames.append(curve.assign(group=group, token=token))
        return pd.concat(frames, ignore_index=True)

    return each(models, "decoding", table)


def bursts(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return where the decoding probability of the true token bursts, and where its mean passes 1/2.

    Columns `group`, `n`, `burst`, `low`, `high` (relative depth of the block with the largest rise),
    `crossing`, `crossing_low`, `crossing_high` (relative depth after which the mean is above 1/2),
    `before_last`, `before_low`, `before_high` (mean probability after the last block but one), `late_share`
    (share of the whole rise that comes in the later half of the blocks).
    """

    def table(model: SavedModel) -> pd.DataFrame:
        result, rows = model.result("decoding"), []
        for group in dict.fromkeys(result["group"].values.astype(str).tolist()):
            values = group_values(result, "probability", group)
            where, over = (
                measure(values, n_resamples=options.n_resamples, seed=options.seed)
                for measure in (burst, crossing)
            )
            curve = depth_curve(values, n_resamples=options.n_resamples, seed=options.seed)
            means, last = curve["mean"].to_numpy(), curve.iloc[max(len(curve) - 2, 0)]
            rise = means[-1] - means[0]
            late = (means[-1] - means[(len(means) - 1) // 2]) / rise if rise > 0 else np.nan
            rows.append(
                (
                    group, len(values), where.value, where.low, where.high, over.value, over.low, over.high,
                    last["mean"], last["low"], last["high"], late,
                )
            )  # fmt: skip
        columns = [
            "group", "n", "burst", "low", "high", "crossing", "crossing_low", "crossing_high", "before_last",
            "before_low", "before_high", "late_share",
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    return each(models, "decoding", table)
