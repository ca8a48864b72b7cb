"""Tables over all models, made from what is saved of each: recall, size, domains, frequency, training.

Each function takes the saved models and gives one tidy table with the columns `model` and `family`, without
the models that lack what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate, mean_estimate, median_estimate
from memlens.results.statistics.intervals import bootstrap_means
from memlens.studies.comparative.analyze.domains import domain_table, structural_gap, structural_share
from memlens.studies.comparative.analyze.frequency import (
    boundary_gap,
    boundary_table,
    bucket_labels,
    frequency_by_offset,
    frequency_threshold,
    mean_log_frequencies,
)
from memlens.studies.comparative.analyze.heads import HeadEffects, head_overlap, head_table, rank_agreement
from memlens.studies.comparative.analyze.layers import burst, crossing, depth_curve, group_values
from memlens.studies.comparative.analyze.noise import (
    noise_table,
    over_draws,
    recovery_gap,
    recovery_table,
    structural_change,
)
from memlens.studies.comparative.analyze.profiles import layer_profile, on_grid, similarity_matrix
from memlens.studies.comparative.analyze.rates import depth_of, depth_table, rate_row, score_of, score_spread
from memlens.studies.comparative.analyze.training import copies_table, training_events, training_table
from memlens.studies.comparative.measure import CONTROL, MEMORIZED
from memlens.studies.comparative.options import IMPORTANCES, ComparativeOptions
from memlens.studies.comparative.store import SavedModel
from memlens.studies.idioms.findings import share_of


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


def noises(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return rate, spread and structural share at each strength of the noise (see `noise_table`)."""

    def table(model: SavedModel) -> pd.DataFrame:
        return noise_table(
            model.result("noise"), options.structural, n_resamples=options.n_resamples, seed=options.seed
        )

    return each(models, "noise", table)


def structural_changes(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return how the structural share changes under the strongest noise (see `structural_change`)."""

    def row(model: SavedModel) -> pd.DataFrame:
        found = structural_change(
            model.result("noise"), options.structural, n_resamples=options.n_resamples, seed=options.seed
        )
        return pd.DataFrame([{"change": found.value, "low": found.low, "high": found.high, "n": found.n}])

    return each(models, "noise", row)


def recoveries(models: Sequence[SavedModel], seed: int = 0) -> pd.DataFrame:
    """Return the similarity regained by each group at each strength (see `recovery_table`)."""
    return each(models, "recovery", lambda model: recovery_table(model.result("recovery"), seed=seed))


def gaps(models: Sequence[SavedModel], seed: int = 0) -> pd.DataFrame:
    """Return how much more similarity memorized sequences regain than their matched controls.

    Columns `alpha`, `pairs`, `gap`, `low`, `high` (bootstrap over pairs); below 0 memorized regain less.
    """

    def table(model: SavedModel) -> pd.DataFrame:
        result, groups = model.result("recovery"), model.groups
        matched = groups.loc[groups["group"] == CONTROL, "matched_to"].to_numpy()
        rows = []
        for alpha in result["alpha"].values.tolist():
            if len(matched) > 1:
                found = recovery_gap(result, alpha, MEMORIZED, CONTROL, matched, seed=seed)
                rows.append((alpha, found.n, found.value, found.low, found.high))
        return pd.DataFrame(rows, columns=["alpha", "pairs", "gap", "low", "high"])

    return each(models, "recovery", table)


def similarities(models: Sequence[SavedModel], alpha: float, options: ComparativeOptions) -> pd.DataFrame:
    """Return the similarity to the clean residual after each block, at one strength.

    Columns `group`, `layer`, `depth` (relative), `mean`, `low`, `high`, `n`.
    """

    def table(model: SavedModel) -> pd.DataFrame:
        result = model.result("recovery")
        data = over_draws(result["similarity"]).sel(alpha=alpha).transpose("sequence", "layer")
        labels, total = result["group"].values.astype(str), int(model.facts["n_layers"])
        frames = []
        for group in dict.fromkeys(labels.tolist()):
            values = data.values[labels == group]
            curve = depth_curve(values, n_resamples=options.n_resamples, seed=options.seed)
            layers = data["layer"].values
            frames.append(curve.assign(group=group, layer=layers, depth=(layers + 1) / total))
        return pd.concat(frames, ignore_index=True)

    return each(models, "recovery", table)


def decodings(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return the decoding probability after each block.

    Columns `group`, `token` ("true": the continuation's own; "predicted": what the model ends with), `layer`,
    `depth`, `mean`, `low`, `high`, `n`.
    """

    def table(model: SavedModel) -> pd.DataFrame:
        result, frames = model.result("decoding"), []
        for group in dict.fromkeys(result["group"].values.astype(str).tolist()):
            for token, metric in (("true", "probability"), ("predicted", "predicted_probability")):
                values = group_values(result, metric, group)
                curve = depth_curve(values, n_resamples=options.n_resamples, seed=options.seed)
                frames.append(curve.assign(group=group, token=token))
        return pd.concat(frames, ignore_index=True)

    return each(models, "decoding", table)


def bursts(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return where the decoding probability of the true token bursts, and where its mean passes 1/2.

    Columns `group`, `n`, `burst`, `low`, `high` (relative depth of the block with the largest rise),
    `crossing`, `crossing_low`, `crossing_high` (relative depth after which the mean is above 1/2),
    `before_last`, `before_low`, `before_high` (mean probability after the last block but one), `late_share`
    (share of the whole rise that comes in the later half of the blocks).
    """

    def table(model: SavedModel) -> pd.DataFrame:
        result, rows = model.result("decoding"), []
        for group in dict.fromkeys(result["group"].values.astype(str).tolist()):
            values = group_values(result, "probability", group)
            where, over = (
                measure(values, n_resamples=options.n_resamples, seed=options.seed)
                for measure in (burst, crossing)
            )
            curve = depth_curve(values, n_resamples=options.n_resamples, seed=options.seed)
            means, last = curve["mean"].to_numpy(), curve.iloc[max(len(curve) - 2, 0)]
            rise = means[-1] - means[0]
            late = (means[-1] - means[(len(means) - 1) // 2]) / rise if rise > 0 else np.nan
            rows.append(
                (
                    group, len(values), where.value, where.low, where.high, over.value, over.low, over.high,
                    last["mean"], last["low"], last["high"], late,
                )
            )  # fmt: skip
        columns = [
            "group", "n", "burst", "low", "high", "crossing", "crossing_low", "crossing_high", "before_last",
            "before_low", "before_high", "late_share",
        ]  # fmt: skip
        return pd.DataFrame(rows, columns=columns)

    return each(models, "decoding", table)


def importance(result: Result, metric: str) -> xr.DataArray:
    """Return what each sequence loses when each head is ablated: positive where the head helped."""
    return -result.effect(metric)


def effects_of(model: SavedModel, options: ComparativeOptions, part: str = "heads") -> HeadEffects:
    """Return a model's saved head ablation as `HeadEffects`."""
    result = model.result(part)
    return HeadEffects(
        importance(result, options.importance),
        result["domain"].values,
        fraction=options.top_fraction,
        least=options.min_per_domain,
    )


def overlaps(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return how far important heads are shared (see `head_overlap`), with `heads`, `k` and `domains`."""

    def table(model: SavedModel) -> pd.DataFrame:
        effects = effects_of(model, options)
        found = head_overlap(
            effects, n_permutations=options.n_permutations, n_splits=options.n_splits,
            n_resamples=options.n_resamples, seed=options.seed,
        )  # fmt: skip
        return found.assign(heads=effects.n_heads, k=effects.k, domains=len(effects.domains))

    return each(models, "heads", table)


def head_pairs(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return the overlap of every two domains in every model."""
    return each(models, "heads", lambda model: effects_of(model, options).pairs())


def heads(models: Sequence[SavedModel], options: ComparativeOptions, most: int = 8) -> pd.DataFrame:
    """Return the most important heads of every model, with the number of domains whose set they are in."""
    return each(models, "heads", lambda model: head_table(effects_of(model, options)).head(most))


def importance_agreement(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return how far importance by the chosen metric ranks heads as importance by the others does."""
    others = [m for m in IMPORTANCES if m != options.importance]

    def table(model: SavedModel) -> pd.DataFrame:
        result = model.result("heads")
        first = importance(result, options.importance)
        rows = [(other, rank_agreement(first, importance(result, other))) for other in others]
        return pd.DataFrame(rows, columns=["other", "spearman"]).assign(
            importance=options.importance, n=result.data.sizes["sequence"]
        )

    return each(models, "heads", table)


def universal_heads(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return the heads that are important in every domain, with their number and what chance gives.

    Columns `heads` (all), `k` (in a set), `domains`, `universal` (their number), `by_chance` (expected
    number: all heads times (k / heads) to the power of the domains), `which` (such as "L0H4").
    """

    def row(model: SavedModel) -> pd.DataFrame:
        effects = effects_of(model, options)
        if len(effects.domains) < 2:
            return pd.DataFrame()
        found = effects.universal()
        chance = effects.n_heads * (effects.k / effects.n_heads) ** len(effects.domains)
        numbers = {"heads": effects.n_heads, "k": effects.k, "domains": len(effects.domains)}
        which = ", ".join(f"L{layer}H{head}" for layer, head in found)
        return pd.DataFrame([{**numbers, "universal": len(found), "by_chance": chance, "which": which}])

    return each(models, "heads", row)


@dataclass(frozen=True, eq=False)
class Profiles:
    """The layer profiles of several models.

    Attributes:
        labels: The models.
        families: Their families.
        profiles: On the common grid.
        by_layer: Each model's own layers: `model`, `family`, `layer`, `depth`, `mean`, `low`, `high`.
        similarity: Of all pairs.
        drawn: The same under bootstrap resamples of every model's sequences.
    """

    labels: list[str]
    families: list[str]
    profiles: Float[np.ndarray, "model bin"]
    by_layer: pd.DataFrame
    similarity: Float[np.ndarray, "model model"]
    drawn: Float[np.ndarray, "draw model model"]

    def within_minus_across(self) -> Estimate | None:
        """Return the mean similarity of pairs within families minus that of pairs across.

        The interval is over sequences (basic bootstrap: resampled profiles are less alike than the sample's).
        None where there are no pairs of both kinds.
        """
        upper = np.triu_indices(len(self.labels), 1)
        codes = pd.factorize(np.array(self.families, dtype=object))[0]
        same = codes[upper[0]] == codes[upper[1]]
        if not same.any() or same.all():
            return None
        pairs = self.drawn[:, upper[0], upper[1]]
        value = self.similarity[upper][same].mean() - self.similarity[upper][~same].mean()
        low, high = np.percentile(pairs[:, same].mean(1) - pairs[:, ~same].mean(1), [2.5, 97.5])
        return Estimate(float(value), float(2 * value - high), float(2 * value - low), len(self.labels))


def profiles_of(
    models: Sequence[SavedModel], options: ComparativeOptions, part: str = "heads", n_draws: int = 200
) -> Profiles:
    """Return how important heads are spread over depth in every model, and how alike that is.

    Args:
        models: The models; those without saved heads are left out.
        options: Of the study.
        part: "heads", or "heads_untrained" for the twins of random weights.
        n_draws: Bootstrap resamples of the sequences.
    """
    chosen = [model for model in models if model.has("heads") and (model.path / f"{part}.nc").exists()]
    seen, drawn, frames = [], [], []
    for i, model in enumerate(chosen):
        frame, profile, samples = _profile(model, part, options, n_draws, options.seed + i)
        frames.append(frame)
        seen.append(on_grid(profile, options.profile_bins))
        drawn.append(np.stack([on_grid(row, options.profile_bins) for row in samples]))
    profiles = np.array(seen).reshape(len(chosen), options.profile_bins)
    pairs = [similarity_matrix(np.stack(rows), options.similarity) for rows in zip(*drawn, strict=True)]
    return Profiles(
        [model.label for model in chosen],
        [model.family for model in chosen],
        profiles,
        pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["model", "family"]),
        similarity_matrix(profiles, options.similarity),
        np.array(pairs) if chosen else np.zeros((0, 0, 0)),
    )


def _profile(
    model: SavedModel, part: str, options: ComparativeOptions, n_draws: int, seed: int
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """Return a model's profile by layer as a table and an array, and its bootstrap draws."""
    values = importance(model.result(part), options.importance).transpose("sequence", "layer", "head").values
    means = bootstrap_means(values.reshape(len(values), -1), n_draws, seed).reshape(-1, *values.shape[1:])
    kinds: dict[str, Any] = {"kind": options.profile, "fraction": options.top_fraction}
    profile, samples = layer_profile(values.mean(0), **kinds), layer_profile(means, **kinds)
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    layers = np.arange(len(profile))
    frame = pd.DataFrame(
        {"layer": layers, "depth": (layers + 0.5) / len(layers), "mean": profile, "low": low, "high": high}
    )
    return frame.assign(model=model.label, family=model.family), profile, samples
