"""What a search among sets of blocks found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from memlens.results import Result
from memlens.results.tradeoff import Tradeoff, on_frontier

__all__ = ["LayerSetSearch", "Layers"]

Layers = tuple[int, ...]
"""A set of blocks, in order."""


@dataclass(frozen=True, eq=False)
class LayerSetSearch:
    """What bypassing sets of blocks did: chosen on one half of the data, scored on the other.

    Attributes:
        recall: Kind "bypass_sets": exact match, target accuracy and target log-probability
            `(sequence, layers)` of all sequences, both halves.
        accuracy: Kind "task_accuracy" `(sequence, layers)`: the questions of all tasks.
        sets: Layers by their label, in the order of the results.
        table: One row for each set: `layers` (its label), `size`, `kinds` (how it came to be tried),
            `selectivity_chosen` (on the choosing half), and on the scoring half the columns of
            `Tradeoff.table`.
        best: The label that each kind of search chose ("single block", "suffix", "quartile", "greedy",
            "exact", "any").
        choosing: The trade-off on the choosing half.
        scoring: The trade-off on the scoring half.
        settings: Every parameter.
    """

    recall: Result
    accuracy: Result
    sets: Mapping[str, Layers]
    table: pd.DataFrame
    best: Mapping[str, str]
    choosing: Tradeoff
    scoring: Tradeoff
    settings: Mapping[str, Any]

    def best_table(self) -> pd.DataFrame:
        """Return what each kind of search chose, with its score on the half that it did not see.

        Beside it `random_mean` and `random_share`: the mean selectivity, on the scoring half, of the other
        sets of the same size that were not chosen by any search, and the share of them that do as well or
        better (NaN where there is none).
        """
        rows = self.table.set_index("layers")
        found = []
        for kind, label in self.best.items():
            row = rows.loc[label]
            others = self._random_of(int(row["size"]), label)
            found.append(
                {
                    "search": kind,
                    "layers": label,
                    **row.drop("kinds").to_dict(),
                    "random_sets": len(others),
                    "random_mean": float(np.mean(others)) if len(others) else np.nan,
                    "random_share": float(np.mean(others >= row["selectivity"])) if len(others) else np.nan,
                }
            )
        return pd.DataFrame(found)

    def _random_of(self, size: int, label: str) -> np.ndarray:
        table = self.table
        kinds = table["kinds"].str.split(", ")
        unbiased = kinds.map(lambda names: bool({"random", "every set", "single block"} & set(names)))
        same = (table["size"] == size) & unbiased & (table["layers"] != label)
        return table.loc[same, "selectivity"].to_numpy(float)

    def areas(self, *, level: float = 0.95) -> pd.DataFrame:
        """Return the area under the frontier of some families of sets, on the scoring half.

        Of each family only the sets count that are on its frontier on the choosing half, so that no set is
        favored for the noise that it is scored with.

        Returns:
            Columns `family`, `sets` (tried), `on_frontier`, `area`, `low`, `high`; see `frontier_area`.
        """
        kinds = self.table["kinds"].str.split(", ")
        families = {
            name: kinds.map(lambda names, name=name: name in names).to_numpy(bool)
            for name in ("single block", "suffix", "prefix", "random")
        }
        families["any set"] = np.ones(len(kinds), dtype=bool)
        rows = []
        for name, member in families.items():
            if not member.any():
                continue
            places = np.flatnonzero(member)
            kept = places[on_frontier(self.choosing.take(places))]
            area = self.scoring.take(kept).area(level=level)
            rows.append((name, int(member.sum()), len(kept), *area))
        return pd.DataFrame(rows, columns=["family", "sets", "on_frontier", "area", "low", "high"])
