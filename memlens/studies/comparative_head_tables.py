"""Tables over all models of their attention heads: overlap of important heads, and profiles over depth.

As in `comparative_tables`, from saved results only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from memlens.results import Result
from memlens.results.statistics import bootstrap_means
from memlens.studies.comparative_heads import HeadEffects, rank_agreement
from memlens.studies.comparative_options import IMPORTANCES, ComparativeOptions
from memlens.studies.comparative_overlap import head_overlap, head_table
from memlens.studies.comparative_profiles import layer_profile, on_grid, similarity_matrix
from memlens.studies.comparative_store import SavedModel
from memlens.studies.comparative_tables import each
from memlens.studies.statistics import Estimate

__all__ = [
    "Profiles",
    "effects_of",
    "head_pairs",
    "heads",
    "importance_agreement",
    "overlaps",
    "profiles_of",
    "universal_heads",
]


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
