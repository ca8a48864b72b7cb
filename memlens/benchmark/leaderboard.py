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

    def _planted(self, component: str) -> pd.DataFrame:
        """Return the rows of a kind of component, of carriers that hold some."""
        rows: Any = self.rows
        own = rows[(rows["component"] == component) & ~rows["carrier_kind"].isin(["none", "spread"])]
        if own.empty:
            raise ResultError(f"the run measured nothing for {component}: add a carrier that holds some.")
        return own

    def best(self, component: str, *, measure: str = "average_precision") -> dict[str, Any]:
        """Return the row of the best localizer for a kind of component, over all carriers that hold any.

        Controls and variants that use the twin are left out.

        Raises:
            ResultError: Nothing was measured for this kind of component.
        """
        rows = self._cell(self._planted(component), measure, 0).to_dict("records")
        return next(dict(r) for r in rows if not r["control"] and r["variant"] != "less twin")

    def recommendations(self) -> dict[str, dict[str, Any]]:
        """Return the best localizer for each kind of component, as plain values.

        `memlens.benchmark.recommended` reads them from `recommended.yaml`.
        """
        found = {}
        for component in dict.fromkeys(self.rows["component"]):
            own: Any = self._planted(component)
            best = self.best(component)
            chosen = own[(own["localizer"] == best["localizer"]) & (own["variant"] == best["variant"])]
            entry: dict[str, Any] = {"localizer": best["localizer"], "variant": best["variant"]}
            for measure in ("average_precision", "recall_at_k"):
                row = self._cell(chosen, measure, 0).iloc[0]
                for key, end in ((measure, ""), ("low", "_low"), ("high", "_high")):
                    entry[measure + end] = round(float(row[key]), 3)
            entry |= {"chance": round(float(best["chance"]), 3), "n": int(best["n"])}
            found[component] = entry | {
                "models": sorted(set(own["model"])), "carriers": sorted(set(own["carrier"]))
            }  # fmt: skip
        return found


def _behind(best: pd.Series, other: pd.Series) -> float:
    both = pd.concat([best, other], axis=1, join="inner").to_numpy(float)
    difference = both[:, 0] - both[:, 1]
    if len(difference) < 5 or not difference.any():
        return 1.0
    found: Any = stats.wilcoxon(difference, alternative="greater")
    return float(found.pvalue)
