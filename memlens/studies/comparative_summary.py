"""The summary of the report: the row of each model, and the paper's findings judged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from memlens.studies.comparative_claims import RULE
from memlens.studies.comparative_inner_sections import InnerSections
from memlens.studies.comparative_judging import as_finding, claim_table, judge_all, signature_table
from memlens.studies.comparative_measure import MEMORIZED

__all__ = ["Report"]


class Report(InnerSections):
    """All parts of the report, and what sums them up."""

    def summary(self) -> None:
        """Part 9: the row of each model; then the paper's findings, judged."""
        table = self.tables["rates"].drop(columns=["depth_low", "depth_high"])
        facts = pd.DataFrame(
            [
                {
                    "model": m.label,
                    "corpus": m.facts["corpus"],
                    "layers": m.facts["n_layers"],
                    "heads": m.facts["n_layers"] * m.facts["n_heads"],
                }
                for m in self.models
            ]
        )
        table = table.merge(facts, on="model")
        for frame in self._columns():
            table = table.merge(frame, on="model", how="left")
        self.keep("models", table, "Every model", "models")
        if "families" in self.tests:
            self.keep(
                "signature_notes",
                signature_table(table.loc[~table["control"]], self.tables.get("profile_similarity")),
                "What is noted of single families, beside the order here",
                "signatures",
                "Noted by a reader of the full text; most and least are our reading. No test: where a trait "
                "comes from a family's data, models of one toy corpus cannot show it.",
            )

    def other_options(self) -> None:
        """Say which saved measures were made with other options than this run's."""
        rows = []
        for model in self.models:
            for part, made in model.parts.items():
                for name, value in made.get("options", {}).items():
                    now = json.loads(json.dumps(getattr(self.options, name, value)))
                    if value != now:
                        rows.append((model.label, part, name, str(value), str(now)))
        columns = ["model", "measure", "option", "measured_with", "this_run"]
        self.keep(
            "other_options",
            pd.DataFrame(rows, columns=columns),
            "Measures that were saved with other options",
            "models",
            "Models with other options than the rest are not to be compared with them in these measures.",
        )

    def _columns(self) -> list[pd.DataFrame]:
        """One column or more of each part, a row a model."""
        tables: Mapping[str, Any] = self.tables
        found: list[pd.DataFrame] = []
        for name, column, new in (
            ("scores", "at_ends", "m_at_ends"),
            ("compression", "ratio", "compression_ratio"),
            ("structural", "structural_share", "structural_share"),
        ):
            if len(tables.get(name, ())):
                found.append(pd.DataFrame({"model": tables[name]["model"], new: tables[name][column]}))
        areas = tables.get("thresholds", pd.DataFrame())
        if len(areas):
            rows = areas.loc[areas["comparison"] == "all"]
            found.append(pd.DataFrame({"model": rows["model"], "frequency_area": rows["area"]}))
        noise = tables.get("noise", pd.DataFrame())
        if len(noise):
            rates = noise.pivot(index="model", columns="alpha", values="rate")
            left = rates[rates.columns.max()] / rates[0.0].where(rates[0.0] > 0)
            found.append(pd.DataFrame({"model": left.index, "noise_left": left.to_numpy()}))
        gaps = tables.get("recovery_gaps", pd.DataFrame())
        if len(gaps):
            rows = gaps.loc[gaps["alpha"] == gaps["alpha"].max()]
            found.append(pd.DataFrame({"model": rows["model"], "recovery_gap": rows["gap"]}))
        bursts = tables.get("bursts", pd.DataFrame())
        if len(bursts):
            found.append(
                bursts.loc[bursts["group"] == MEMORIZED, ["model", "burst", "crossing", "before_last"]]
            )
        return found + self._head_columns()

    def _head_columns(self) -> list[pd.DataFrame]:
        overlap: Any = self.tables.get("head_overlap", pd.DataFrame())
        found: list[pd.DataFrame] = []
        if len(overlap):
            wide = overlap[overlap["null"] == "heads anywhere"].pivot(
                index="model", columns="statistic", values="value"
            )
            names = {
                "across domains": "head_overlap",
                "inside a domain": "head_overlap_inside",
                "universal": "universal_heads",
            }
            found.append(wide[list(names)].rename(columns=names).reset_index())
        similar = self.tables.get("profile_similarity", pd.DataFrame())
        if len(similar):
            labels = similar["model"].tolist()
            families = {model.label: model.family for model in self.models}
            values = similar[labels].to_numpy()
            rows = []
            for i, label in enumerate(labels):
                own = [j for j, other in enumerate(labels) if j != i and families[other] == families[label]]
                rows.append((label, values[i, own].mean() if own else np.nan))
            found.append(pd.DataFrame(rows, columns=["model", "family_similarity"]))
        return found

    def claims(self) -> None:
        """The paper's directional findings, judged by the tables."""
        judged = judge_all(self.without_controls(), self.tests, self.signature)
        self.keep(
            "claims", claim_table(judged), "The paper's findings, and what was found here", "claims", RULE
        )
        for item in judged:
            self.folder.find(as_finding(item))
