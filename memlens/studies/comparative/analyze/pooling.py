"""One number of many models: how a table's column becomes the number that a claim is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from memlens.results.statistics.estimates import Estimate
from memlens.studies.comparative.report.claims import Judged, judge, over_models

Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Column:
    """A column with its interval.

    Attributes:
        value: Of the number.
        low: Of the lower end.
        high: Of the upper end.
        n: Of what is counted, where there is such a column.
    """

    value: str
    low: str = "low"
    high: str = "high"
    n: str = "n"


def estimates(table: pd.DataFrame, column: Column) -> list[Estimate]:
    """Return one estimate a row; rows without a number are left out."""
    if not len(table):
        return []
    numbers = table[[column.value, column.low, column.high]].to_numpy(float)
    counts = table[column.n].to_numpy(int) if column.n in table else np.zeros(len(table), dtype=int)
    found = [
        Estimate(value, low, high, n)
        for (value, low, high), n in zip(numbers.tolist(), counts.tolist(), strict=True)
    ]
    return [estimate for estimate in found if np.isfinite(estimate.value)]


def pooled(
    claim: str,
    table: pd.DataFrame,
    column: Column,
    sign: int,
    what: str,
    unit: str,
    *,
    against: float = 0.0,
    control: str = "",
) -> Judged | None:
    """Judge the mean over models of a column.

    Args:
        claim: Key of the claim.
        table: One row a model.
        column: Which column.
        sign: Side of `against` on which the paper has it.
        what: Begins the sentence that says what was found.
        unit: Of the number.
        against: What it is compared with.
        control: What stands beside it.

    Returns:
        None where no model has the number.
    """
    own = estimates(table, column)
    if not own:
        return None
    mean, verdicts = over_models(own), [judge(estimate, sign, against) for estimate in own]
    over = "one model"
    if len(own) > 1:
        over = (
            f"mean over {len(own)} models; by a model's own interval it holds in {verdicts.count('holds')} "
            f"and does not in {verdicts.count('does not hold')}"
        )
    return Judged(claim, f"{what} is {mean} ({over}).", mean, unit, control, judge(mean, sign, against))


def fitted(claim: str, fits: pd.DataFrame, sign: int, what: str, unit: str) -> Judged | None:
    """Judge the slope on size that all families share, or the one family's; None where nothing was fitted."""
    if not len(fits):
        return None
    joint = fits[fits["family"] == "all families"]
    row: Any = (joint if len(joint) else fits).iloc[0]
    low, high = (row["low"], row["high"]) if np.isfinite(row["low"]) else (row["boot_low"], row["boot_high"])
    slope = Estimate(float(row["slope"]), float(low), float(high), int(row["sizes"]))
    others = fits.drop(index=row.name)
    beside = "; ".join(
        f"{family}, {reading}: {value:.3g} [{start:.3g}, {end:.3g}], R² {r2:.2g}"
        for family, reading, value, start, end, r2 in others[
            ["family", "reading", "slope", "low", "high", "r2"]
        ].itertuples(index=False)
    )
    found = (
        f"{what} changes by {slope} with every factor 10 in parameters ({row['family']}, {slope.n} sizes, "
        f"R² {row['r2']:.2g})."
    )
    return Judged(claim, found, slope, unit, beside, judge(slope, sign))
