"""Conditions of one continuation compared: which heads and layers differ, and who wins a conflict."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from memlens import figures
from memlens.errors import check_option
from memlens.figures.labels import metric_text
from memlens.results.kinds import register_kind
from memlens.results.plots.selection import Selection, takes
from memlens.results.result import Result
from memlens.results.statistics.comparison import compare_groups
from memlens.results.statistics.estimates import Estimate, mean_estimate, share_estimate

CITES = (("yao2023", "knowledge in the prompt instead of the weights"),)


def condition_difference(result: Result, first: str = "repeated", second: str = "alone") -> Result:
    """Return the difference of two conditions, sequence by sequence.

    Args:
        result: Of `context_or_weights` or `context_patching`.
        first: One condition.
        second: The condition that is subtracted.

    Returns:
        Kind "context_difference": the variables of the result without `condition`. `Result.effect` is the
        effect of a head in the first condition less that in the second; ``mean_ci(of="effect")`` gives means
        with intervals over sequences.

    Raises:
        OptionError: The result does not have such a condition.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[-3:].first_targets(8)
        >>> found = ml.detect.context_or_weights(model, seqs, progress=False)
        >>> ml.detect.condition_difference(found).effect("target_logprob").dims
        ('sequence', 'layer', 'head')
    """
    for name in (first, second):
        check_option("condition", name, result["condition"].values.tolist())
    a, b = (result.data.sel(condition=name, drop=True) for name in (first, second))
    about = {**result.data.attrs, "kind": "context_difference"}
    found = (a - b).assign_attrs({**about, "conditions": f"{first} less {second}"})
    for name, array in found.data_vars.items():
        array.attrs = dict(result.data[name].attrs)
    return Result(found)


def context_heads(
    result: Result,
    metric: str = "target_logprob",
    *,
    control: Result | None = None,
    first: str = "repeated",
    second: str = "alone",
    seed: int = 0,
) -> xr.Dataset:
    """Say which heads or layers differ between two conditions, and whether they do so beyond a control.

    Args:
        result: Of `context_or_weights` or `context_patching`.
        metric: "target_logprob", whose effects are compared, or another variable by head or layer, such as a
            statistic of attention, or "attn_logprob" and "mlp_logprob" of patching.
        control: The same of sequences that the model does not recall. Then differences are compared: those
            of the result's sequences with those of the control's, by pairs if these name their matches.
        first: One condition.
        second: The condition that is subtracted.
        seed: Of resamples and permutations.

    Returns:
        As `memlens.compare_groups`: `difference`, `low`, `high`, `p` and `p_corrected` (over all sites),
        `(layer, head)` or `(layer)`. Two sequences have no interval.

    Raises:
        OptionError: The result does not have such a condition.
        ResultError: Fewer than two sequences, or the two results have other sites.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[-3:].first_targets(8)
        >>> found = ml.detect.context_or_weights(model, seqs, progress=False)
        >>> ml.detect.context_heads(found)["difference"].dims
        ('layer', 'head')
    """
    of = _of(result, metric)
    for name in (first, second):
        check_option("condition", name, result["condition"].values.tolist())
    if control is not None:
        ours, theirs = (condition_difference(r, first, second) for r in (result, control))
    else:
        data = result.data.assign_coords(match=("sequence", result["sequence"].values))
        ours, theirs = (Result(data.sel(condition=name, drop=True)) for name in (first, second))
    return compare_groups(ours, theirs, metric, of=of, seed=seed)


def which_wins(result: Result, by: str = "copies") -> pd.DataFrame:
    """Say whether the context or the weights win where they disagree.

    The context wins in a sequence if, in the condition `conflict`, the wrong continuation, which stands in
    the prompt, is more likely than the memorized one.

    Args:
        result: Of `context_or_weights`.
        by: A coordinate along `sequence`; one row in all if the result does not have it.

    Returns:
        One row per value: the value, `n`; `memorized` and `wrong`, the mean log-probabilities per token of
        the two continuations in the conflict, nats, and `memorized_alone`; `context_wins`, the share of
        sequences, with `low` and `high` (Wilson's interval; NaN for fewer than three sequences); and
        `wins_alone`, the share in which the wrong continuation is the likelier one after the prefix alone:
        what `context_wins` would be if the context did nothing.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[-3:].first_targets(8)
        >>> found = ml.detect.context_or_weights(model, seqs, progress=False)
        >>> table = ml.detect.which_wins(found)
        >>> bool(table["context_wins"].between(0, 1).all())
        True
    """
    data = result.data.sel(condition="conflict")
    own, wrong = (data[name].values for name in ("target_logprob_baseline", "wrong_logprob"))
    before = result.data.sel(condition="alone")
    alone, wrong_alone = (before[name].values for name in ("target_logprob_baseline", "wrong_logprob"))
    groups = data[by].values if by in data.coords else np.full(len(own), "all")
    rows = []
    for value in np.unique(groups):
        here = groups == value
        share = share_estimate(wrong[here] > own[here])
        rows.append(
            {
                by: value, "memorized": own[here].mean(), "wrong": wrong[here].mean(),
                "memorized_alone": alone[here].mean(), **share.row("context_wins"),
                "wins_alone": (wrong_alone[here] > alone[here]).mean(),
            }
        )  # fmt: skip
    columns = [by, "n", "memorized", "wrong", "memorized_alone", "context_wins", "low", "high", "wins_alone"]
    return pd.DataFrame(rows, columns=columns)


@takes(of=None, group=None)
def plot_context(result: Result, s: Selection, *, condition: str = "difference") -> go.Figure:
    """Draw each head or layer: repeated less alone, or in one condition."""
    check_option("condition", condition, [*result["condition"].values.tolist(), "difference"])
    if condition == "difference":
        return plot_difference(condition_difference(result), s)
    chosen = Result(result.data.sel(condition=condition, drop=True))
    return _drawn(chosen, s, f"condition: {condition}", signed=False)


@takes(of=None, group=None)
def plot_difference(result: Result, s: Selection) -> go.Figure:
    """Draw the difference of two conditions for each head or layer."""
    return _drawn(result, s, result.data.attrs["conditions"], signed=True)


def _drawn(result: Result, s: Selection, about: str, *, signed: bool) -> go.Figure:
    name = s.metric or "target_logprob"
    of = s.of or _of(result, name)
    if "head" not in result[name].dims:
        ci, caption = s.drawn(result, ("layer",), f"Each layer, {about}", of=of, names=[name])
        return figures.line_over_layers(ci, **caption)
    note = s.note(result, [name], of)
    ci, caption = s.drawn(result, ("layer", "head"), f"Each head, {about}", of=of, names=[name], note=note)
    return figures.heatmap_layer_head(ci, signed=signed or of == "effect", **caption)


def _of(result: Result, metric: str) -> Literal["value", "effect"]:
    return "effect" if f"{metric}_baseline" in result.data else "value"


def read_context(result: Result, metric: str | None) -> str:
    """Say how likely the continuation is in each condition, who wins, and which head differs most."""
    logprob = result["target_logprob_baseline"]
    said = ", ".join(
        f"{mean_estimate(logprob.sel(condition=c)).text('nats')} {c}" for c in result["condition"].values
    )
    wins = result["wrong_logprob"] > logprob
    share = share_estimate(wins.sel(condition="conflict"))
    return (
        f"Over {len(logprob)} sequences, the mean log-probability of the memorized continuation is {said}. "
        f"In the conflict the context wins in a share of {share.text()}. "
        + read_difference(condition_difference(result), metric)
    )


def read_difference(result: Result, metric: str | None) -> str:
    """Say for which head or layer two conditions differ most."""
    name = metric or "target_logprob"
    number, place, most = largest(result, name)
    words = metric_text(name, result[name])
    what = words.label
    if _of(result, name) == "effect":
        change = "ablation" if result.settings.get("direction") is None else "patching"
        what = f"the effect of {change} on the {words.label}"
    sites = "heads" if "head" in result[name].dims else "layers"
    return (
        f"Of {number} {sites}, {what} differs most ({result.data.attrs['conditions']}) for {place}: "
        f"{most.text(words.unit)}."
    )


def largest(result: Result, name: str) -> tuple[int, str, Estimate]:
    """Return the number of heads or layers, the one with the largest mean effect or value, and that mean."""
    values = result.effect(name) if _of(result, name) == "effect" else result[name]
    means = values.mean("sequence").values
    index = [int(i) for i in np.unravel_index(np.nanargmax(np.abs(means)), means.shape)]
    head = f"head {index[1]} of " if len(index) > 1 else ""
    place = f"{head}layer {result['layer'].values[index[0]]}"
    return means.size, place, mean_estimate(values[(slice(None), *index)])


register_kind("context_difference", plot=plot_difference, reading=read_difference)
