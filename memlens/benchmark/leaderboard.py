"""The leaderboard: localizers by how well they find what was planted, with intervals over organisms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from memlens.benchmark.scores import MEASURES
from memlens.errors import ResultError, check_option
from memlens.results.statistics.comparison import corrected
from memlens.results.statistics.estimates import mean_estimate

_CELL = ["component", "localizer", "variant"]


@dataclass(frozen=True, eq=False)
class Leaderboard:
    """What a run of the benchmark found.

    Attributes:
        organisms: One row per organism: `model`, `carrier`, `seed`, whether its certificate `passed`, which
            checks were `failures`, and what else the certificate reports.
        rows: One row per organism that passed, kind of component, localizer and variant, with the measures of
            `score_ranking`.
    """

    organisms: pd.DataFrame
    rows: pd.DataFrame

    def table(
        self, measure: str = "average_precision", *, by: tuple[str, ...] = ("carrier_kind",), seed: int = 0
    ) -> pd.DataFrame:
        """Return the mean of a measure over organisms with its interval, the best localizer first.

        Args:
            measure: One of `memlens.benchmark.scores.MEASURES`.
            by: What organisms are grouped by: "carrier_kind", "carrier", "model", or nothing.
            seed: Of the bootstrap over organisms.

        Returns:
            Columns of `by`, then `component`, `localizer`, `variant`, `control`, `n` (organisms), the
            measure, `low` and `high` (95 %), `chance`, `seconds` (median), and `behind_best`: the corrected
            p-value of Wilcoxon's signed-rank test, over organisms, against the first localizer that is not a
            control and does not use the twin; NaN for that one itself.
        """
        check_option("measure", measure, list(MEASURES))
        if self.rows.empty:
            raise ResultError("no organism passed its certificate, so that there is nothing to compare.")
        found = []
        groups: Any = self.rows.groupby([*by, "component"], sort=False)
        for key, group in groups:
            cell = self._cell(group, measure, seed)
            for name, value in zip([*by, "component"], key, strict=True):
                cell[name] = value
            found.append(cell)
        columns = [*by, *_CELL, "control", "n", measure, "low", "high", "chance", "seconds", "behind_best"]
        return pd.concat(found, ignore_index=True).reindex(columns=columns)

    def _cell(self, group: pd.DataFrame, measure: str, seed: int) -> pd.DataFrame:
        rows, values = [], {}
        methods: Any = group.groupby(["localizer", "variant"], sort=False)
        for (name, variant), own in methods:
            measured = own.set_index(["model", "carrier", "seed"])[measure].dropna()
            values[name, variant] = measured
            estimate = mean_estimate(xr.DataArray(measured.to_numpy(float), dims="sequence"), seed=seed)
            rows.append(
                {
                    "localizer": name, "variant": variant, "control": bool(own["control"].iloc[0]),
                    **estimate.row(measure), "chance": own["chance"].mean(),
                    "seconds": own["seconds"].median(),
                }
            )  # fmt: skip
        table = pd.DataFrame(rows).sort_values(measure, ascending=False, kind="stable")
        fair = table[~table["control"] & (table["variant"] != "less twin")]
        table["behind_best"] = np.nan
        if len(fair):
            best = values[fair.iloc[0]["localizer"], fair.iloc[0]["variant"]]
            others = [i for i in table.index if i != fair.index[0]]
            p = [_behind(best, values[table.at[i, "localizer"], table.at[i, "variant"]]) for i in others]
            table.loc[others, "behind_best"] = corrected(np.array(p)) if p else p
        return table

    def best(self, component: str, *, measure: str = "average_precision") -> pd.Series:
        """Return the row of the best localizer for a kind of component, over all carriers that hold any.

        Controls and variants that use the twin are left out.

        Raises:
            ResultError: Nothing was measured for this kind of component.
        """
        own: Any = self.rows[
            (self.rows["component"] == component) & ~self.rows["carrier_kind"].isin(["none", "spread"])
        ]
        if own.empty:
            raise ResultError(f"the run measured nothing for {component}: add a carrier that holds some.")
        table = self._cell(own, measure, 0)
        return table[~table["control"] & (table["variant"] != "less twin")].iloc[0]

    def recommendations(self) -> dict[str, dict[str, Any]]:
        """Return the best localizer for each kind of component, as plain values.

        `memlens.benchmark.recommended` reads them from `recommended.yaml`.
        """
        found = {}
        used = self.rows[~self.rows["carrier_kind"].isin(["none", "spread"])]
        for component in used["component"].unique().tolist():
            row, own = self.best(component), used[used["component"] == component]
            recall = self.best_row(component, row["localizer"], row["variant"], "recall_at_k")
            found[component] = {
                "localizer": str(row["localizer"]),
                "variant": str(row["variant"]),
                **{f"average_precision{end}": round(float(row[key]), 3)
                   for key, end in (("average_precision", ""), ("low", "_low"), ("high", "_high"))},
                **{f"recall_at_k{end}": round(float(recall[key]), 3)
                   for key, end in (("recall_at_k", ""), ("low", "_low"), ("high", "_high"))},
                "chance": round(float(row["chance"]), 3),
                "n": int(row["n"]),
                "models": sorted(own["model"].unique().tolist()),
                "carriers": sorted(own["carrier"].unique().tolist()),
            }  # fmt: skip
        return found

    def best_row(self, component: str, localizer: str, variant: str, measure: str) -> pd.Series:
        """Return the row of one localizer and variant, over all carriers with components of a kind."""
        own: Any = self.rows[
            (self.rows["component"] == component) & ~self.rows["carrier_kind"].isin(["none", "spread"])
        ]
        table = self._cell(own, measure, 0)
        return table[(table["localizer"] == localizer) & (table["variant"] == variant)].iloc[0]


def _behind(best: pd.Series, other: pd.Series) -> float:
    both = pd.concat([best, other], axis=1, join="inner").to_numpy(float)
    difference = both[:, 0] - both[:, 1]
    if len(difference) < 5 or not difference.any():
        return 1.0
    found: Any = stats.wilcoxon(difference, alternative="greater")
    return float(found.pvalue)
