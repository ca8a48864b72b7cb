"""The leaderboard: localizers by how well they find what was planted, with intervals over organisms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd

from memlens.benchmark.over_organisms import (
    FEWEST_PAIRS,
    agreement,
    better_p_value,
    mean_over_organisms,
    resampled_over,
    share_over_organisms,
)
from memlens.benchmark.scores import MEASURES, Z_EDGES, chance_level
from memlens.errors import ResultError, check_option
from memlens.results.statistics.comparison import corrected

_CELL = ["component", "localizer", "variant"]
_ORGANISM = ["model", "carrier", "seed"]
_WITHOUT_TRUTH = ("none", "spread")
"""Kinds of carrier in which no component is the right answer."""
OTHER_MEASURES: Mapping[str, str] = {
    "uniqueness": "overlap of the first k under other seeds and other reference sequences",
    "deletion": "log-probability lost with the first k set to zero, nats per token",
    "deletion_others": "the same on sequences that were not planted",
    "deletion_specific": "what deletion takes more from the planted sequence than from others, nats",
}
"""What is measured of a ranking without the truth, with words for each."""


@dataclass(frozen=True, eq=False)
class Leaderboard:
    """What a run of the benchmark found.

    Attributes:
        organisms: One row per organism: `model`, `carrier`, `seed`, whether its certificate `passed`, which
            checks were `failures`, what else the certificate reports, and what the organism took: `seconds`,
            `cpu_seconds` and `peak_mib` (the process's largest memory up to its end).
        rows: One row per organism that passed, kind of component, localizer and variant, as
            `measure_organism` gives them.
    """

    organisms: pd.DataFrame
    rows: pd.DataFrame

    def table(
        self, measure: str = "average_precision", *, by: tuple[str, ...] = ("carrier_kind",), seed: int = 0
    ) -> pd.DataFrame:
        """Return the mean of a measure over organisms with its interval, the best localizer first.

        Args:
            measure: One of `memlens.benchmark.scores.MEASURES`, or of `OTHER_MEASURES`, which need no truth.
            by: What organisms are grouped by: "carrier_kind", "carrier", "model", or nothing.
            seed: Of the bootstrap over organisms.

        Returns:
            Columns of `by`, then `component`, `localizer`, `variant`, `control`, `twin` (whether it needs the
            model without the memory), `n` (organisms), the measure, `low` and `high` (95 %), `interval`
            (whether it is over "models" or "organisms"; see `mean_over_organisms`), `chance` (what a random
            ranking gets; of deletion, what equally large random sets lose), `seconds`, `cpu_seconds` and
            `forwards` (medians), and `behind_best`: the corrected p-value of Wilcoxon's signed-rank test,
            over organisms, against the first localizer that is not a control and needs no twin; NaN for that
            one itself, and with fewer than 5 organisms, which `note` says.
        """
        check_option("measure", measure, [*MEASURES, *OTHER_MEASURES])
        if self.rows.empty:
            raise ResultError("no organism passed its certificate, so that there is nothing to compare.")
        if measure not in self.rows:
            raise ResultError(f"this run did not measure {measure}: an earlier version made it.")
        found = []
        for facts, group in self._groups([*by, "component"]):
            found.append(_cell(group, measure, seed).assign(**facts))
        columns = [
            *by, *_CELL, "control", "twin", "n", measure, "low", "high", "interval", "chance", "seconds",
            "cpu_seconds", "forwards", "behind_best", "note",
        ]  # fmt: skip
        return pd.concat(found, ignore_index=True).reindex(columns=columns)

    def _groups(
        self, by: list[str], rows: pd.DataFrame | None = None
    ) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
        groups: Any = (self.rows if rows is None else rows).groupby(by, sort=False)
        for key, group in groups:
            yield dict(zip(by, key, strict=True)), group

    @property
    def planted(self) -> pd.DataFrame:
        """The rows of carriers that hold some of their kind of component."""
        rows: Any = self.rows
        return rows[~rows["carrier_kind"].isin(_WITHOUT_TRUTH)]

    def _planted(self, component: str) -> pd.DataFrame:
        """Return the rows of a kind of component, of carriers that hold some."""
        rows: Any = self.planted
        own = rows[rows["component"] == component]
        if own.empty:
            raise ResultError(f"the run measured nothing for {component}: add a carrier that holds some.")
        return own

    def best(self, component: str, *, measure: str = "average_precision") -> dict[str, Any]:
        """Return the row of the best localizer for a kind of component, over all carriers that hold any.

        Controls and variants that use the twin are left out.

        Raises:
            ResultError: Nothing was measured for this kind of component.
        """
        rows = _cell(self._planted(component), measure, 0).to_dict("records")
        return next(dict(r) for r in rows if not r["control"] and not r["twin"])

    def recommendations(self) -> dict[str, dict[str, Any]]:
        """Return the best localizer for each kind of component, as plain values.

        `memlens.benchmark.recommended` reads them from `recommended.yaml`.
        """
        found = {}
        for component in dict.fromkeys(self.planted["component"]):
            own: Any = self._planted(component)
            best = self.best(component)
            chosen = own[(own["localizer"] == best["localizer"]) & (own["variant"] == best["variant"])]
            entry: dict[str, Any] = {"localizer": best["localizer"], "variant": best["variant"]}
            for measure in ("average_precision", "recall_at_k"):
                row = _cell(chosen, measure, 0).iloc[0]
                for key, end in ((measure, ""), ("low", "_low"), ("high", "_high")):
                    entry[measure + end] = round(float(row[key]), 3)
            entry |= {"chance": round(float(best["chance"]), 3), "n": int(best["n"])}
            found[component] = entry | {
                "models": sorted(set(own["model"])), "carriers": sorted(set(own["carrier"]))
            }  # fmt: skip
        return found

    def deletion_agreement(
        self, *, truth: str = "average_precision", deletion: str = "deletion_specific", seed: int = 0
    ) -> pd.DataFrame:
        """Return whether the order of methods by deletion is their order by the truth.

        Methods are often compared by deletion, because it needs no truth. Here both are known. Controls count
        as methods, so that orders differ enough to be compared; variants that use the twin do not.

        Args:
            truth: The measure against the truth.
            deletion: "deletion", or "deletion_specific".
            seed: Of the bootstrap over organisms.

        Returns:
            One row per kind of carrier and component: `n` (organisms), `methods`, `tau` (Kendall's tau-b over
            methods within each organism, mean over organisms) with `low`, `high` and `interval` as in
            `table`; `tau_of_means`, of the methods' means over organisms; `best_by_deletion` and
            `best_by_truth`, the first of each order that is not a control; and `precision_lost`: how much of
            `truth` one loses on average by taking, on each organism, the method that deletion puts first.

        Raises:
            ResultError: The run did not measure deletion.
        """
        check_option("deletion", deletion, ["deletion", "deletion_specific"])
        check_option("truth", truth, list(MEASURES))
        if deletion not in self.rows:
            raise ResultError("this run did not measure deletion: an earlier version made it.")
        rows: Any = self.planted
        rows = rows[~_twin(rows)].dropna(subset=[deletion, truth])
        found = []
        for facts, group in self._groups(["carrier_kind", "component"], rows):
            taus, models, lost = [], [], []
            for organism, own in self._groups(_ORGANISM, group):
                taus.append(agreement(own[deletion].to_numpy(float), own[truth].to_numpy(float)))
                models.append(organism["model"])
                fair: Any = own[~own["control"].astype(bool)]
                if len(fair):
                    lost.append(fair[truth].max() - fair[truth].loc[fair[deletion].idxmax()])
            methods: Any = group.groupby(["localizer", "variant"], sort=False)
            means = methods[[deletion, truth]].mean()
            fair = means[~methods["control"].first().astype(bool)]
            names = {c: " ".join(fair[c].idxmax()).strip() if len(fair) else "" for c in (deletion, truth)}
            found.append(
                {
                    **facts, **mean_over_organisms(np.array(taus), models, seed=seed).row("tau"),
                    "interval": resampled_over(models), "methods": len(means),
                    "tau_of_means": agreement(means[deletion].to_numpy(), means[truth].to_numpy()),
                    "best_by_deletion": names[deletion], "best_by_truth": names[truth],
                    "precision_lost": float(np.mean(lost)) if lost else np.nan,
                }
            )  # fmt: skip
        return pd.DataFrame(found)

    def calibration(self, by: Literal["rank", "z"] = "rank", *, seed: int = 0) -> pd.DataFrame:
        """Return how sure the top of a ranking is: the share of planted components by rank or by z.

        Args:
            by: "rank": ranks 1, 2, 3-4, 5-8, … up to twice the number planted. "z": bins of the z-scored
                variants' scores, whose edges are `memlens.benchmark.scores.Z_EDGES`.
            seed: Of the bootstrap over organisms.

        Returns:
            One row per kind of component, localizer, variant and bin: `bin`, its first and last value
            (`start`, `end`), `components` (how many were counted), `n` (organisms with any), `share`, `low`,
            `high`.

        Raises:
            ResultError: The run did not record it.
        """
        check_option("by", by, ["rank", "z"])
        column = "planted_ranks" if by == "rank" else "z_counts"
        if column not in self.rows:
            raise ResultError("this run did not record calibration: an earlier version made it.")
        rows: Any = self.planted
        rows = rows[rows[column].notna()]
        found = []
        for facts, group in self._groups(_CELL, rows):
            bins = _rank_bins(group) if by == "rank" else _z_bins(group)
            models = group["model"].tolist()
            for name, start, end, hits, of in bins:
                share = share_over_organisms(hits, of, models, seed=seed)
                cell = {"bin": name, "start": start, "end": end, "components": int(of.sum())}
                found.append({**facts, **cell, **share.row("share")})
        return pd.DataFrame(found)

    def without_truth(self, measure: str = "average_precision", *, seed: int = 0) -> pd.DataFrame:
        """Return whether methods are at chance where there is nothing to find: carriers "none" and "spread".

        On these organisms components are drawn at random as if they had been planted, so that no method can
        do better than chance. Controls and variants with the twin count too. The draws of a seed are the same
        in all models of one shape, and the interval does not hold their noise.

        Args:
            measure: One of `memlens.benchmark.scores.MEASURES`.
            seed: Of the bootstrap over organisms.

        Returns:
            One row per kind of carrier and component: `n` (organisms), `methods`, `above_chance` (mean over
            methods and organisms of the measure less its chance) with `low`, `high` and `interval` as in
            `table`, and `most_above`: the largest mean over organisms of a single method. No rows without
            such carriers.
        """
        check_option("measure", measure, list(MEASURES))
        rows: Any = self.rows[self.rows["carrier_kind"].isin(_WITHOUT_TRUTH)]
        found = []
        for facts, group in self._groups(["carrier_kind", "component"], rows):
            pairs = zip(group["chance"], group["k"], strict=True)
            chance = np.array([chance_level(measure, share, k) for share, k in pairs])
            group = group.assign(above=group[measure].to_numpy(float) - chance)
            each: Any = group.groupby(_ORGANISM, sort=False)["above"].mean()
            models = each.index.get_level_values("model").tolist()
            methods: Any = group.groupby(["localizer", "variant"], sort=False)["above"].mean()
            found.append(
                {
                    **facts, "methods": len(methods), "interval": resampled_over(models),
                    **mean_over_organisms(each.to_numpy(float), models, seed=seed).row("above_chance"),
                    "most_above": float(methods.max()),
                }
            )  # fmt: skip
        return pd.DataFrame(found)

    def effort(self) -> dict[str, float]:
        """Return what the run took: `organisms`, `seconds`, `cpu_seconds` (sums), `peak_mib` (the most)."""
        own: Any = self.organisms.reindex(columns=["seconds", "cpu_seconds", "peak_mib"]).astype(float)
        return {
            "organisms": float(len(own)), "seconds": float(own["seconds"].sum()),
            "cpu_seconds": float(own["cpu_seconds"].sum()), "peak_mib": float(own["peak_mib"].max()),
        }  # fmt: skip


def _cell(group: pd.DataFrame, measure: str, seed: int) -> pd.DataFrame:
    """Return one row per method of a group of rows, the best first."""
    rows, values = [], {}
    group = group.reindex(columns=list(dict.fromkeys([*group.columns, "cpu_seconds", "forwards"])))
    methods: Any = group.groupby(["localizer", "variant"], sort=False)
    for (name, variant), own in methods:
        measured = own.set_index(_ORGANISM)[measure].dropna()
        values[name, variant] = measured
        models = measured.index.get_level_values("model").tolist()
        estimate = mean_over_organisms(measured.to_numpy(float), models, seed=seed)
        rows.append(
            {
                "localizer": name, "variant": variant, "control": bool(own["control"].iloc[0]),
                "twin": bool(_twin(own).iloc[0]), **estimate.row(measure),
                "interval": resampled_over(models), "chance": _chance(own, measure),
                **own[["seconds", "cpu_seconds", "forwards"]].median().to_dict(),
            }
        )  # fmt: skip
    table = pd.DataFrame(rows).sort_values(measure, ascending=False, kind="stable")
    fair = table[~table["control"] & ~table["twin"] & table[measure].notna()]
    table["behind_best"], table["note"] = np.nan, ""
    if len(fair):
        best = values[fair.iloc[0]["localizer"], fair.iloc[0]["variant"]]
        others = [i for i in table.index if i != fair.index[0]]
        compared = [values[table.at[i, "localizer"], table.at[i, "variant"]] for i in others]
        table.loc[others, "behind_best"] = corrected(np.array([better_p_value(best, v) for v in compared]))
        few = table["behind_best"].isna() & (table.index != fair.index[0])
        table.loc[few, "note"] = f"no test: fewer than {FEWEST_PAIRS} organisms"
    return table


def _twin(rows: pd.DataFrame) -> pd.Series:
    """Return whether each row's method needs the model without the memory."""
    less: Any = rows["variant"] == "less twin"
    return less | rows["twin"].eq(True) if "twin" in rows else less


def _chance(own: pd.DataFrame, measure: str) -> float:
    if measure in MEASURES:
        kinds = own[["chance", "k"]].itertuples(index=False, name=None)
        return float(np.mean([chance_level(measure, share, k) for share, k in kinds]))
    if measure == "deletion_specific" and "deletion_random" in own:
        lost: Any = own["deletion_random"].mean()
        return float(lost)
    return float("nan")


Bin = tuple[str, float, float, np.ndarray, np.ndarray]
"""A bin's name, its first and last value, and for each organism its planted and all components in it."""


def _rank_bins(group: pd.DataFrame) -> Iterator[Bin]:
    last = 2 * group["k"].to_numpy(int)
    ranked = group["n_rankings"].to_numpy(int)
    ranks = [np.array(each, dtype=int) for each in group["planted_ranks"]]
    start = 1
    while start <= last.max():
        end = max(start, 2 * (start - 1))
        name = str(start) if start == end else f"{start}-{end}"
        of = np.clip(np.minimum(end, last) - start + 1, 0, None) * ranked
        hits = [((r >= start) & (r <= min(end, n))).sum() for r, n in zip(ranks, last, strict=True)]
        yield name, start, end, np.array(hits, float), of.astype(float)
        start = end + 1


def _z_bins(group: pd.DataFrame) -> Iterator[Bin]:
    counts, hits = (np.array(group[c].tolist(), dtype=float) for c in ("z_counts", "z_planted"))
    for i, (start, end) in enumerate(pairwise(Z_EDGES)):
        name = f"above {start:g}" if np.isinf(end) else f"{start:g} to {end:g}"
        name = f"below {end:g}" if np.isinf(start) else name
        yield name, start, end, hits[:, i], counts[:, i]
