"""Figures of the report, drawn from its tables: one declarative list, `FIGURES`.

Titles, readings and sections are in `texts.yaml`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from memlens.figures.models import curves_by_family, model_dots, shares_by_model, similarity_map, sizes
from memlens.studies.comparative.analyze.profiles import cluster
from memlens.studies.comparative.options import CONTROL, MEMORIZED
from memlens.studies.comparative.tables import Made


@dataclass(frozen=True)
class Figure:
    """One figure of the report.

    Attributes:
        table: The table that it shows.
        draw: Draws rows of the table, given the figure's titles.
        mean: The column that is drawn as `mean`.
        rows: Chooses the rows.
        largest: Whether only each family's largest model is shown.
    """

    table: str
    draw: Callable[..., go.Figure]
    mean: str = "mean"
    rows: Callable[[Any], Any] = lambda frame: frame
    largest: bool = False

    def of(self, made: Made, **words: str) -> go.Figure | None:
        """Draw the figure; None where there is nothing to show."""
        frame: Any = made.table(self.table)
        frame = self.rows(frame) if len(frame) else frame
        if not len(frame):
            return None
        if self.largest:
            frame = largest_of_families(frame, made.table("rates"))
        return self.draw(frame.rename(columns={self.mean: "mean"}), **words)


def largest_of_families(frame: Any, rates: Any) -> pd.DataFrame:
    """Return the rows of each family's largest model; controls only where a family has nothing else."""
    rates = rates[rates["model"].isin(frame["model"])]
    size = rates["n_params"] * ~rates["control"]
    largest = rates["model"][size == size.groupby(rates["family"]).transform("max")]
    return frame[frame["model"].isin(largest)]


def _scores(frame: Any, **words: str) -> go.Figure:
    whole = frame.groupby(["model", "part"], sort=False, as_index=False).agg({"share": "sum"})
    parts = "M " + whole["part"].replace({"0": "= 0", "1": "= 1"})
    return shares_by_model(whole.assign(part=parts), "part", **words)


def _domain_shares(frame: pd.DataFrame, **words: str) -> go.Figure:
    return shares_by_model(frame, "domain", "equal_share", **words)


def _head_overlap(frame: pd.DataFrame, **words: str) -> go.Figure:
    return model_dots(frame.assign(kind=frame["statistic"]), reference="exact", **words)


def _profile_similarity(frame: pd.DataFrame, linkage: str, **words: str) -> go.Figure:
    labels = frame["model"].tolist()
    similarity = frame[labels].to_numpy()
    return similarity_map(similarity, labels, *cluster(similarity, linkage), **words)


def _examined(frame: Any) -> Any:
    return frame[frame["group"].isin([MEMORIZED, CONTROL])]


def _compared(frame: Any) -> Any:
    statistics = frame["statistic"].isin(["across domains", "inside a domain"])
    return frame[statistics & (frame["null"] == "heads anywhere")]


def _curves(x: str, **options: Any) -> Callable[..., go.Figure]:
    return partial(curves_by_family, x=x, **options)


FIGURES: dict[str, Figure] = {
    "rate_and_size": Figure("rates", sizes, rows=lambda frame: frame[~frame["control"]]),
    "scores": Figure("score_spread", _scores),
    "depth": Figure("depth", _curves("k"), "rate"),
    "compression": Figure("compression", model_dots, "ratio"),
    "domain_shares": Figure("domains", _domain_shares, rows=lambda frame: frame.dropna(subset="equal_share")),
    "frequency": Figure("frequency", _curves("offset", dash="bucket"), largest=True),
    "copies": Figure(
        "copies", _curves("copies", log_x=True), "rate", rows=lambda frame: frame[frame["copies"] > 0]
    ),
    "training": Figure("training", _curves("step"), "rate"),
    "noise": Figure("noise", _curves("alpha"), "rate"),
    "similarity": Figure("similarity", _curves("depth", dash="group"), rows=_examined, largest=True),
    "decoding": Figure(
        "decoding", _curves("depth", dash="group"), rows=lambda f: _examined(f[f["token"] == "true"])
    ),
    "head_overlap": Figure("head_overlap", _head_overlap, "value", rows=_compared),
    "profiles": Figure("profiles", _curves("depth")),
    "profile_similarity": Figure("profile_similarity", _profile_similarity),
}
"""By name, in the order of the report."""
