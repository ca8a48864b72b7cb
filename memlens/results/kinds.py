"""Kinds of result: the figure, the reading and the citations of each, declared where the kind is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from memlens.errors import MemlensError, OptionError, ResultError, check_cites, check_option
from memlens.registry import Registry
from memlens.results.groups import join_groups
from memlens.results.plots.layers import plot_by_dimensions
from memlens.results.plots.selection import ALWAYS, Selection
from memlens.results.result import Result


@dataclass(frozen=True)
class Kind:
    """One kind of result.

    Attributes:
        name: As in `Result.kind`.
        plot: Draws it: ``plot(result, selection, **own_options) -> Figure``, with a
            `memlens.results.plots.selection.Selection`; or, marked by `chooses`, returns such a function.
        reading: Says in a few sentences what the numbers are: ``reading(result, metric) -> str``.
        cites: Pairs of a key of the bibliography and what it is cited for; empty where the kind is ours.

    Raises:
        OptionError: The name is empty, `plot` or `reading` cannot be called, or `cites` are no pairs.
    """

    name: str
    plot: Callable[..., Any]
    reading: Callable[[Result, str | None], str]
    cites: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            raise OptionError("a kind of result needs a name, such as 'head_ablation'.")
        for part in ("plot", "reading"):
            if not callable(getattr(self, part)):
                raise OptionError(f"the kind {self.name!r} needs a function as its {part}: give {part}=...")
        check_cites(f"the kind {self.name!r}", self.cites)


KINDS = Registry[Kind](
    "kind of result",
    of=Kind,
    modules=[
        "memlens.results.statistics.tradeoff", "memlens.sweeps.run", "memlens.recall",
        "memlens.instruments", "memlens.studies",
    ],
)  # fmt: skip
"""Every kind of result, by name."""


def register_kind(
    name: str,
    *,
    plot: Callable[..., Any],
    reading: Callable[[Result, str | None], str],
    cites: tuple[tuple[str, str], ...] = (),
) -> Kind:
    """Declare a kind of result, in the module that makes such results; see `Kind`.

    Raises:
        OptionError: The name is taken, or something is missing.
    """
    return KINDS.add(name, Kind(name, plot, reading, cites))


def plot_result(result: Result, metric: str | None = None, **options: Any) -> go.Figure:
    """Return the figure of a result, by its kind; an unknown kind is drawn by its dimensions.

    Args:
        result: Any result.
        metric: One metric; all by default, with a menu.
        options: Fields of `memlens.results.plots.selection.Selection`, and the kind's own options.

    Raises:
        OptionError: An option that this kind of figure does not have.
        SiteError: A sequence or stream that the result does not have.
        ResultError: The plot function of the kind returned no figure.
    """
    plot: Any = KINDS[result.kind].plot if result.kind in KINDS else plot_by_dimensions
    if getattr(plot, "chooses", False):
        plot = plot(result)
    defaults: dict[str, Any] = getattr(plot, "takes", {})
    own = getattr(plot, "__kwdefaults__", None) or {}
    for name in options:
        check_option("plot option", name, sorted({*defaults, *own, *ALWAYS}))
    shared = {name: value for name, value in options.items() if name not in own}
    rest = {name: value for name, value in options.items() if name in own}
    figure = plot(result, Selection(metric, **{**defaults, **shared}), **rest)
    if not isinstance(figure, go.Figure):
        raise ResultError(
            f"the plot function of the kind {result.kind!r} returned {type(figure).__name__}: it must return "
            "a plotly Figure."
        )
    return figure


def overlay(results: Mapping[str, Result], metric: str | None = None, **options: Any) -> go.Figure:
    """Draw several results of one kind in one figure, with one line (or one map) for each.

    Args:
        results: Name in the legend to result, such as `{"memorized": a, "control": b}`.
        metric: As for `Result.plot`.
        options: As for `Result.plot`, without `group`.

    Raises:
        ResultError: The results are of different kinds, or there are none.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> rare, often = (ml.ablate_mlps(model, s, progress=False) for s in (seqs[:3], seqs[-3:]))
        >>> figure = ml.overlay({"rare": rare, "often": often})
        >>> {"rare", "often"} <= {line.name for line in figure.data}
        True
    """
    joined = join_groups(results)
    if "title" not in options:
        counts = ", ".join(f"{name}: {result.data.sizes['sequence']}" for name, result in results.items())
        options["title"] = f"{joined.kind.replace('_', ' ').capitalize()} ({counts} sequences)"
    return plot_result(joined, metric, group="group", **options)


def reading(
    result: Result, metric: str | None = None, *, sequence: str | None = None, stream: str = "resid_post"
) -> str:
    """Return a few sentences that summarize a result.

    They describe the numbers; they are not tests. The largest of many sites is named as such, and the number
    of sites whose interval excludes 0 is compared with the number expected by chance. Sentences about harm
    follow the metric's direction; without one they speak of change.

    Args:
        result: Any result.
        metric: The metric to describe; the first by default.
        sequence: The id of the one sequence to describe; all by default.
        stream: The stream to describe, where several were decoded.

    Returns:
        Plain text; empty for an unknown kind, or for a result without the values that its reading needs.

    Raises:
        ResultError: The kind's own reading is not a text.

    Example:
        >>> import xarray as xr
        >>> data = xr.Dataset({"exact_match": ("sequence", [1.0, 1.0, 0.0, 1.0])})
        >>> reading(Result.create(data, kind="recall"))
        'The exact match, mean over 4 sequences, is 0.75 (95 % interval 0.301 to 0.954).'
    """
    if result.kind not in KINDS:
        return ""
    try:
        if sequence is not None:
            ids = result["sequence"].values.astype(str)
            result = Result(result.data.isel(sequence=ids == str(sequence)))
        if "stream" in result.data.dims:
            result = Result(result.data.sel(stream=stream))
        said = KINDS[result.kind].reading(result, metric)
    except (MemlensError, KeyError, ValueError, StopIteration):
        return ""
    if not isinstance(said, str):
        raise ResultError(
            f"the reading of the kind {result.kind!r} returned {said!r}: it must return a text."
        )
    return said
