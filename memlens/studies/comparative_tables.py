"""Tables over all models, made from what is saved of each: recall, size, domains, frequency, training.

Each function takes the saved models and gives one tidy table with the columns `model` and `family`, without
the models that lack what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.results import Result
from memlens.studies.comparative_domains import domain_table, structural_gap, structural_share
from memlens.studies.comparative_frequency import (
    boundary_gap,
    boundary_table,
    bucket_labels,
    frequency_by_offset,
    frequency_threshold,
    mean_log_frequencies,
)
from memlens.studies.comparative_options import ComparativeOptions
from memlens.studies.comparative_rates import depth_of, depth_table, rate_row, score_of, score_spread
from memlens.studies.comparative_store import SavedModel
from memlens.studies.comparative_training import copies_table, training_events, training_table
from memlens.studies.idiom_findings import share_of
from memlens.studies.statistics import mean_estimate, median_estimate

__all__ = [
    "boundaries",
    "boundary_gaps",
    "compressions",
    "copies",
    "depths",
    "domains",
    "each",
    "event_table",
    "frequencies",
    "rates",
    "scores",
    "spreads",
    "steps",
    "structurals",
    "thresholds",
]


def each(models: Iterable[SavedModel], part: str, make: Callable[[SavedModel], pd.DataFrame]) -> pd.DataFrame:
    """Return one table of what is made of every model that has a part, with `model` and `family` in front."""
    frames = []
    for model in models:
        if model.has(part):
            frame = make(model)
            frames.append(frame.assign(model=model.label, family=model.family))
    frames = [frame for frame in frames if len(frame)]
    if not frames:
        return pd.DataFrame(columns=["model", "family"])
    joined = pd.concat(frames, ignore_index=True)
    return joined.loc[:, ["model", "family", *[c for c in joined if c not in ("model", "family")]]]


def rates(models: Sequence[SavedModel]) -> pd.DataFrame:
    """Return the rate of every model: `n_params`, `control`, `n`, `memorized`, `rate`, `low`, `high`.

    Also `mean_m`, and `depth`, the mean number of right tokens from the continuation's start, with its
    interval.
    """

    def row(model: SavedModel) -> pd.DataFrame:
        table = model.recall.table
        depth = mean_estimate(_array(depth_of(table).astype(float)))
        facts = {"n_params": int(model.facts["n_params"]), "control": model.control, **rate_row(table)}
        more = {"mean_m": score_of(table).mean(), "depth": depth.value}
        return pd.DataFrame([{**facts, **more, "depth_low": depth.low, "depth_high": depth.high}])

    return each(models, "recall", row)


def spreads(models: Sequence[SavedModel]) -> pd.DataFrame:
    """Return how M spreads in every model (see `score_spread`)."""
    return each(models, "recall", lambda model: score_spread(model.recall.table))


def scores(models: Sequence[SavedModel]) -> pd.DataFrame:
    """Return the share of sequences with M = 0, between and 1, and at either end with Wilson's interval."""

    def row(model: SavedModel) -> pd.DataFrame:
        m = score_of(model.recall.table)
        ends = share_of((m == 0) | (m == 1))
        parts = {"at_0": (m == 0).mean(), "between": ((m > 0) & (m < 1)).mean(), "at_1": (m == 1).mean()}
        return pd.DataFrame(
            [{**parts, "at_ends": ends.value, "low": ends.low, "high": ends.high, "n": ends.n}]
        )

    return each(models, "recall", row)


def depths(models: Sequence[SavedModel]) -> pd.DataFrame:
    """Return the rate against the length of the continuation in every model (see `depth_table`)."""
    return each(models, "recall", lambda m: depth_table(m.recall.table, m.recall.sequences.n_targets.numpy()))


def compressions(models: Sequence[SavedModel], seed: int = 0) -> pd.DataFrame:
    """Return how far prompts of memorized sequences can be cut.

    Columns `n`, `ratio`, `low`, `high` (mean of the fewest prompt tokens that work over all prompt tokens,
    with a bootstrap interval), `median`, `stable_ratio` (fewest from which on every length works), and
    `up_to_half`, `half_low`, `half_high` (share of sequences that need half of the prompt or less; Wilson).
    """

    def row(model: SavedModel) -> pd.DataFrame:
        result = model.result("compression")
        ratio = result["compression_ratio"].values
        ratio = ratio[np.isfinite(ratio)]
        mean, half = mean_estimate(_array(ratio), seed=seed), share_of(ratio <= 0.5)
        stable = np.nan
        if "stable_compression_ratio" in result.data:
            stable = float(result["stable_compression_ratio"].mean())
        numbers = {"n": mean.n, "ratio": mean.value, "low": mean.low, "high": mean.high}
        numbers |= {"median": median_estimate(ratio, seed=seed).value, "stable_ratio": stable}
        return pd.DataFrame(
            [{**numbers, "up_to_half": half.value, "half_low": half.low, "half_high": half.high}]
        )

    return each(models, "compression", row)


def domains(models: Sequence[SavedModel], structural: Sequence[str]) -> pd.DataFrame:
    """Return rates and shares of every domain in every model (see `domain_table`)."""
    return each(models, "recall", lambda model: domain_table(model.recall.table, structural))


def structurals(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return how structural text stands against free text in every model, domains counting alike.

    Columns `gap`, `low`, `high` (mean rate of structural domains minus that of the others),
    `structural_share`, `share_low`, `share_high` (among the memorized). NaN where there is one kind only.
    """

    def row(model: SavedModel) -> pd.DataFrame:
        table = model.recall.table
        hits, labels = table["exact_match"].to_numpy(float), table["domain"].to_numpy(str)
        chances: dict[str, int] = {"n_resamples": options.n_resamples, "seed": options.seed}
        gap = structural_gap(hits, labels, options.structural, **chances)
        share = structural_share(hits, labels, options.structural, **chances)
        numbers = {"gap": gap.value, "low": gap.low, "high": gap.high, "n": len(hits)}
        numbers |= {"structural_share": share.value, "share_low": share.low, "share_high": share.high}
        return pd.DataFrame([{**numbers, "n_params": int(model.facts["n_params"])}])

    return each(models, "recall", row)


def _frequency_parts(model: SavedModel, options: ComparativeOptions) -> tuple[Result, np.ndarray, np.ndarray]:
    m = score_of(model.recall.table)
    return model.result("frequency"), m, bucket_labels(m, half_width=options.half_width)


def frequencies(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return the mean token frequency at each place in each bucket (see `frequency_by_offset`)."""

    def table(model: SavedModel) -> pd.DataFrame:
        result, _, buckets = _frequency_parts(model, options)
        return frequency_by_offset(result, buckets, seed=options.seed)

    return each(models, "frequency", table)


def boundaries(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return the change of frequency at the first continuation token (see `boundary_table`)."""

    def table(model: SavedModel) -> pd.DataFrame:
        result, _, buckets = _frequency_parts(model, options)
        found = boundary_table(result, buckets, seed=options.seed)
        return found.assign(counted_in=result.settings["counted_in"])

    return each(models, "frequency", table)


def boundary_gaps(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return how much more the frequency rises at the boundary for M = 1 than for M = 0 (`boundary_gap`)."""

    def row(model: SavedModel) -> pd.DataFrame:
        result, _, buckets = _frequency_parts(model, options)
        gap = boundary_gap(result, buckets, seed=options.seed)
        return pd.DataFrame([{"gap": gap.value, "low": gap.low, "high": gap.high, "n": gap.n}])

    return each(models, "frequency", row)


def thresholds(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return the frequency that best parts memorized from unmemorized (see `frequency_threshold`)."""

    def table(model: SavedModel) -> pd.DataFrame:
        result, m, _ = _frequency_parts(model, options)
        labels = model.recall.table["domain"].to_numpy()
        return frequency_threshold(mean_log_frequencies(result), m, labels, below=options.unmemorized_below)

    return each(models, "frequency", table)


def copies(models: Sequence[SavedModel]) -> pd.DataFrame:
    """Return the rate at each number of copies in every model (see `copies_table`)."""
    return each(models, "recall", lambda model: copies_table(model.recall.table))


def steps(models: Sequence[SavedModel]) -> pd.DataFrame:
    """Return the rate at each checkpoint, and what was learned and forgotten since the one before."""
    return each(models, "training", lambda model: training_table(*_hits(model)))


def event_table(models: Sequence[SavedModel]) -> pd.DataFrame:
    """Return by number of copies (where known) when sequences are first memorized, and whether forgotten.

    Columns `copies` ("all", or the number), `n`, `ever`, `median_first` (step, of those that ever are),
    `ever_forgotten` (share of those), `low`, `high` (Wilson), `relearned` (share of the forgotten),
    `kept` (share of those ever memorized that are at the last step).
    """

    def table(model: SavedModel) -> pd.DataFrame:
        events = training_events(*_hits(model))
        data = model.result("training").data
        groups: list[tuple[object, pd.DataFrame]] = [("all", events)]
        if "copies" in data.coords:
            values = data["copies"].values
            groups += [(str(value), events.loc[values == value]) for value in np.unique(values)]
        return pd.DataFrame([_event_row(name, part) for name, part in groups])

    return each(models, "training", table)


def _event_row(name: object, events: pd.DataFrame) -> dict[str, object]:
    ever: Any = events.loc[events["first"].notna()]
    lost = share_of(ever["forgotten"] > 0)
    again = ever[ever["forgotten"] > 0]
    return {
        "copies": name, "n": len(events), "ever": len(ever),
        "median_first": float(ever["first"].median()) if len(ever) else np.nan,
        "ever_forgotten": lost.value, "low": lost.low, "high": lost.high,
        "relearned": share_of(again["relearned"] > 0).value, "kept": share_of(ever["last"]).value,
    }  # fmt: skip


def _hits(model: SavedModel) -> tuple[np.ndarray, np.ndarray]:
    data = model.result("training").data["exact_match"].transpose("sequence", "step")
    return data.values == 1, data["step"].values


def _array(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims="sequence")
