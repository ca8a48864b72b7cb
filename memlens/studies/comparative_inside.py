"""Tables over all models of what goes on inside them: noise, middle layers, heads, profiles.

As in `comparative_tables`, from saved results only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from memlens.results import Result
from memlens.results.statistics import bootstrap_means
from memlens.studies.comparative_heads import HeadEffects, rank_agreement
from memlens.studies.comparative_layers import burst, crossing, depth_curve, group_values
from memlens.studies.comparative_measure import CONTROL, MEMORIZED
from memlens.studies.comparative_noise import noise_table, over_draws, recovery_gap, recovery_table
from memlens.studies.comparative_options import ComparativeOptions
from memlens.studies.comparative_overlap import head_overlap, head_table
from memlens.studies.comparative_profiles import layer_profile, on_grid, similarity_matrix
from memlens.studies.comparative_store import SavedModel
from memlens.studies.comparative_tables import each

__all__ = [
    "Profiles",
    "bursts",
    "decodings",
    "effects_of",
    "gaps",
    "head_pairs",
    "heads",
    "importance_agreement",
    "noises",
    "overlaps",
    "profiles_of",
    "recoveries",
    "similarities",
]


def noises(models: Sequence[SavedModel], options: ComparativeOptions) -> pd.DataFrame:
    """Return rate, spread and structural share at each strength of the noise (see `noise_table`)."""

    def table(model: SavedModel) -> pd.DataFrame:
        return noise_table(
            model.result("noise"), options.structural, n_resamples=options.n_resamples, seed=options.seed
        )

    return each(models, "noise", table)


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
    `crossing`, `crossing_low`, `crossing_high` (relative depth after which the mean is above 1/2; NaN: never),
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


# ---- heads -----------------------------------------------------------------------------------------------


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
    others = [m for m in ("target_logprob", "target_accuracy", "exact_match") if m != options.importance]

    def table(model: SavedModel) -> pd.DataFrame:
        result = model.result("heads")
        first = importance(result, options.importance)
        rows = [(other, rank_agreement(first, importance(result, other))) for other in others]
        return pd.DataFrame(rows, columns=["other", "spearman"]).assign(
            importance=options.importance, n=result.data.sizes["sequence"]
        )

    return each(models, "heads", table)


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

    def within_minus_across(self, similarity: np.ndarray) -> float:
        """Return mean similarity of pairs within families minus that of pairs across."""
        upper = np.triu_indices(len(self.labels), 1)
        codes = pd.factorize(np.array(self.families))[0]
        same = codes[upper[0]] == codes[upper[1]]
        return float(similarity[upper][same].mean() - similarity[upper][~same].mean())


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
    rng = np.random.default_rng(options.seed)
    seen, drawn, frames = [], [], []
    for model in chosen:
        values = importance(model.result(part), options.importance).transpose("sequence", "layer", "head")
        shape = values.shape[1:]
        means = bootstrap_means(
            values.values.reshape(len(values), -1), n_draws, int(rng.integers(2**31))
        ).reshape(n_draws, *shape)
        kinds = {"kind": options.profile, "fraction": options.top_fraction}
        profile, samples = (
            layer_profile(values.mean("sequence").values, **kinds),
            layer_profile(means, **kinds),
        )
        low, high = np.percentile(samples, [2.5, 97.5], axis=0)
        layers = np.arange(shape[0])
        frames.append(
            pd.DataFrame(
                {
                    "model": model.label, "family": model.family, "layer": layers,
                    "depth": (layers + 0.5) / shape[0], "mean": profile, "low": low, "high": high,
                }
            )
        )  # fmt: skip
        seen.append(on_grid(profile, options.profile_bins))
        drawn.append(np.stack([on_grid(row, options.profile_bins) for row in samples]))
    profiles = np.array(seen).reshape(len(chosen), options.profile_bins)
    pairs = (
        [similarity_matrix(np.stack([d[i] for d in drawn]), options.similarity) for i in range(n_draws)]
        if chosen
        else []
    )
    by_layer = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["model", "family"])
    return Profiles(
        [model.label for model in chosen],
        [model.family for model in chosen],
        profiles,
        by_layer,
        similarity_matrix(profiles, options.similarity) if chosen else np.zeros((0, 0)),
        np.array(pairs),
    )
