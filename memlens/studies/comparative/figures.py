"""Figures of the report, drawn from its tables: one declarative list, `FIGURES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from memlens.figures.models import curves_by_family, model_dots, shares_by_model, similarity_map, sizes
from memlens.studies.comparative.analyze.profiles import cluster
from memlens.studies.comparative.measure import CONTROL, MEMORIZED
from memlens.studies.comparative.store import SavedModel
from memlens.studies.comparative.tables import Made

Draw = Callable[..., go.Figure | None]
"""Draws a figure, given `Made` and its titles; None where there is nothing to show."""


def largest_of_families(table: pd.DataFrame, models: Sequence[SavedModel]) -> pd.DataFrame:
    """Return the rows of each family's largest model."""
    size = {model.label: float(model.facts["n_params"]) * (not model.control) for model in models}
    sizes_of: Any = pd.Series([size[str(name)] for name in table["model"]], index=table.index)
    return table.loc[np.asarray(sizes_of == sizes_of.groupby(table["family"]).transform("max"))]


def _curves(
    table: str,
    x: str,
    *,
    mean: str = "mean",
    largest: bool = False,
    rows: Callable[[Any], Any] = lambda frame: frame,
    **options: Any,
) -> Draw:
    """Return what draws one line per model from a table.

    Args:
        table: Its name.
        x: The column to the right.
        mean: The column that is drawn.
        largest: Only each family's largest model.
        rows: Chooses rows.
        **options: Of `curves_by_family`.
    """

    def draw(made: Made, **words: Any) -> go.Figure | None:
        frame = made.table(table)
        frame = rows(frame) if len(frame) else frame
        if not len(frame):
            return None
        if largest:
            frame = largest_of_families(frame, made.models)
        return curves_by_family(frame.rename(columns={mean: "mean"}), x, **options, **words)

    return draw


def _rate_and_size(made: Made, **words: str) -> go.Figure | None:
    series = made.series("rates")
    return sizes(series, **words) if len(series) else None


def _scores(made: Made, **words: str) -> go.Figure | None:
    spread: Any = made.table("score_spread")
    whole = spread.groupby(["model", "part"], sort=False, as_index=False).agg({"share": "sum"})
    parts = "M " + whole["part"].replace({"0": "= 0", "1": "= 1"})
    return shares_by_model(whole.assign(part=parts), "part", **words)


def _compression(made: Made, **words: str) -> go.Figure | None:
    table = made.table("compression")
    return model_dots(table.rename(columns={"ratio": "mean"}), **words) if len(table) else None


def _domain_shares(made: Made, **words: str) -> go.Figure | None:
    table = made.table("domains")
    known = table.loc[table["equal_share"].notna()]
    return shares_by_model(known, "domain", "equal_share", **words) if len(known) else None


def _head_overlap(made: Made, **words: str) -> go.Figure | None:
    table = made.table("head_overlap")
    if not len(table):
        return None
    shown = table["statistic"].isin(["across domains", "inside a domain"])
    rows = table.loc[shown & (table["null"] == "heads anywhere")]
    dots = rows.assign(mean=rows["value"], kind=rows["statistic"])
    return model_dots(dots, reference="exact", **words)


def _profile_similarity(made: Made, **words: str) -> go.Figure | None:
    found = made.profiles
    if len(found.models) < 2:
        return None
    merges, order = cluster(found.similarity, made.options.linkage)
    return similarity_map(found.similarity, found.labels, merges, order, **words)


def _examined(frame: Any) -> Any:
    return frame[frame["group"].isin([MEMORIZED, CONTROL])]


FIGURES: dict[str, tuple[str, Draw]] = {
    "rate_and_size": ("rates", _rate_and_size),
    "scores": ("rates", _scores),
    "depth": ("rates", _curves("depth", "k", mean="rate")),
    "compression": ("compression", _compression),
    "domain_shares": ("domains", _domain_shares),
    "frequency": ("frequency", _curves("frequency", "offset", dash="bucket", largest=True)),
    "copies": (
        "training",
        _curves("copies", "copies", mean="rate", rows=lambda frame: frame[frame["copies"] > 0], log_x=True),
    ),
    "training": ("training", _curves("training", "step", mean="rate")),
    "noise": ("noise", _curves("noise", "alpha", mean="rate")),
    "similarity": ("noise", _curves("similarity", "depth", rows=_examined, largest=True, dash="group")),
    "decoding": (
        "layers",
        _curves("decoding", "depth", rows=lambda f: _examined(f[f["token"] == "true"]), dash="group"),
    ),
    "head_overlap": ("heads", _head_overlap),
    "profiles": ("signatures", _curves("profiles", "depth")),
    "profile_similarity": ("signatures", _profile_similarity),
}
"""By name: the section and what draws it."""
