"""`Selection`: what part of a result a figure shows, and how; the options that all plot functions share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from memlens.errors import OptionError, SiteError, check_option
from memlens.figures.labels import metric_text
from memlens.results.result import Result
from memlens.results.statistics.intervals import FEWEST, METHODS, check_level

Of = Literal["value", "effect"]
ALWAYS = ("title", "level", "method", "n_resamples", "seed")
"""Options that every plot function takes."""


@dataclass(frozen=True)
class Selection:
    """What a figure shows.

    Attributes:
        metric: One metric; None for all, with a menu.
        of: "value", or "effect" for the difference to the baseline; None for effects where there are
            baselines.
        group: A coordinate along `sequence`, with one line or map per group.
        sequence: The id of the one sequence to show; None for the mean over all.
        title: Title of the figure; None for the default of the kind.
        level: Coverage of the intervals.
        method: Method of the intervals; see `mean_interval`.
        n_resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Raises:
        OptionError: An option has no such value.
    """

    metric: str | None = None
    of: Of | None = None
    group: str | None = None
    sequence: str | None = None
    title: str | None = None
    level: float = 0.95
    method: str = "auto"
    n_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.of is not None:
            check_option("of", self.of, get_args(Of))
        check_option("method", self.method, METHODS)
        check_level(self.level)
        if self.n_resamples < 1:
            raise OptionError(f"n_resamples={self.n_resamples}: use at least one resample.")

    @property
    def bootstrap(self) -> dict[str, Any]:
        """Options of a bootstrap: `level`, `n_resamples`, `seed`."""
        return {"level": self.level, "n_resamples": self.n_resamples, "seed": self.seed}

    @property
    def intervals(self) -> dict[str, Any]:
        """Options of an interval: those of `bootstrap`, and `method`."""
        return {**self.bootstrap, "method": self.method}

    def of_result(self, result: Result) -> Of:
        """Return what to show: as asked, else effects where some metric has a baseline."""
        has_effect = any(f"{n}{tail}" in result.data for n in result.metrics for tail in _TAILS)
        return self.of or ("effect" if has_effect else "value")

    def names(self, result: Result, *dims: str) -> list[str]:
        """Return the metric that was asked for, else every metric with all of `dims`."""
        return with_dims(result, *dims) if self.metric is None else [self.metric]

    def means(
        self, result: Result, names: list[str], shown: tuple[str, ...], *, of: Of = "value"
    ) -> xr.Dataset:
        """Return means over sequences on the dimensions shown; others are averaged within each sequence."""
        hidden = hidden_dims(result, names, shown)
        options = {"of": of, "group": self.group, **self.intervals}
        return result.mean_ci(("sequence", *hidden), metric=names, **options)

    def note(self, result: Result, names: list[str], of: Of) -> str:
        """Return what red and blue mean in a map of effects; the colors follow each metric's direction."""
        if of != "effect":
            return ""
        directed = [metric_text(name, result.data.get(name)).better != 0 for name in names]
        if all(directed):
            return "red = recall harmed"
        if not any(directed):
            return "red = lower, blue = higher"
        return "red = recall harmed, or lower where a metric has no direction"

    def subtitle(self, result: Result, *, of: Of = "value", note: str = "") -> str:
        """Return what the numbers are, over how many sequences, of which model.

        A sequence that is in several groups (a control among all that are not recalled, the same ones in a
        twin) counts once.
        """
        what = "mean change (with − without the intervention)" if of == "effect" else "mean"
        count = result.data.sizes["sequence"]
        if "original_id" in result.data.coords:
            count = len(np.unique(result.data["original_id"].values.astype(str)))
        over = f"{count} sequence{'' if count == 1 else 's'}"
        interval = f"{100 * self.level:g} % interval" if count >= FEWEST else "too few for an interval"
        numbers = f"{what} over {over}, {interval}"
        return " · ".join(filter(None, (numbers, note, str(result.data.attrs.get("model", "")))))

    def drawn(
        self,
        result: Result,
        shown: tuple[str, ...],
        title: str,
        *,
        of: Of | None = None,
        names: list[str] | None = None,
        note: str = "",
    ) -> tuple[xr.Dataset, dict[str, Any]]:
        """Return the means of `names` (by default of all with the dimensions shown), title and subtitle.

        Where neither `of` nor the selection says what to show, it is values.
        """
        of = of or self.of or "value"
        ci = self.means(result, self.names(result, *shown) if names is None else names, shown, of=of)
        return ci, {"title": self.title or title, "subtitle": self.subtitle(result, of=of, note=note)}


_TAILS = ("_baseline", "_corrupt")
Plot = Callable[..., go.Figure]
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def takes(**defaults: Any) -> Callable[[AnyFunction], AnyFunction]:
    """Declare which of `of`, `group` and `sequence` a plot function takes, with their defaults.

    A plot function is called as ``plot(result, selection, **own)``, where `own` are its keyword-only
    arguments. Any other option of `Result.plot` is refused.
    """

    def declared(function: AnyFunction) -> AnyFunction:
        function.takes = defaults  # type: ignore[attr-defined]
        return function

    return declared


def chooses(function: AnyFunction) -> AnyFunction:
    """Declare a function that returns the plot function for a result, by its dimensions."""
    function.chooses = True  # type: ignore[attr-defined]
    return function


def with_dims(result: Result, *dims: str) -> list[str]:
    """Return the metrics that have all of `dims`."""
    return [name for name in result.metrics if set(dims) <= set(result.data[name].dims)]


def hidden_dims(result: Result, names: list[str], shown: tuple[str, ...]) -> list[str]:
    """Return the dimensions of metrics that a figure does not show, other than `sequence`."""
    every = [str(dim) for name in names for dim in result[name].dims]
    return [dim for dim in dict.fromkeys(every) if dim not in ("sequence", *shown)]


def one(result: Result, sequence: str) -> xr.Dataset:
    """Return the values of one sequence, by its id."""
    ids = [str(value) for value in result["sequence"].values] if "sequence" in result.data.coords else []
    if str(sequence) not in ids:
        raise SiteError(f"sequence={sequence!r} is not in this result: use one of its {len(ids)} ids.")
    return result.data.isel(sequence=ids.index(str(sequence)))


def single(result: Result, names: list[str], shown: tuple[str, ...], of: str, sequence: str) -> xr.Dataset:
    """Return effects or values of one sequence, on the dimensions shown."""
    arrays = {name: result.effect(name) if of == "effect" else result[name] for name in names}
    row = one(Result(xr.Dataset(arrays, attrs=result.data.attrs)), sequence)
    return row.mean(hidden_dims(result, names, shown), keep_attrs=True)
