"""How important heads are spread over depth: a model's profile, and how similar the profiles of models are.

A profile is one number per layer, normalized to sum to 1 and interpolated to a common grid of relative depth,
so that models of different depth can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from memlens.errors import ResultError, check_option
from memlens.results.statistics.estimates import Estimate
from memlens.results.statistics.intervals import FEWEST, quantile_interval
from memlens.results.statistics.resampling import bootstrap_means
from memlens.studies.comparative.analyze.heads import top_set
from memlens.studies.comparative.analyze.rates import against_null, central
from memlens.studies.comparative.options import DEFAULTS, ComparativeOptions, ProfileKind, Similarity

_DRAWS = 200
"""Bootstrap resamples of every model's profile."""


def layer_profile(
    importance: Float[np.ndarray, "... layer head"], *, kind: str = "sum", fraction: float = 0.2
) -> Float[np.ndarray, "... layer"]:
    """Return the share of a model's importance in each layer; it sums to 1.

    Kinds: "sum" adds the importance of the heads in the top set, "count" counts them, "mean" averages all
    heads of a layer. Values below 0 count as 0. Where nothing is above 0 the profile is uniform.

    >>> layer_profile(np.array([[3.0, 0.1], [1.0, 0.0]]), kind="sum", fraction=0.5).tolist()
    [0.75, 0.25]
    >>> layer_profile(np.array([[3.0, 0.1], [1.0, 0.0]]), kind="count", fraction=0.5).tolist()
    [0.5, 0.5]
    """
    check_option("profile", kind, get_args(ProfileKind))
    shape = importance.shape
    if kind == "mean":
        values = np.maximum(importance.mean(-1), 0)
    else:
        chosen = top_set(importance.reshape(*shape[:-2], -1), fraction).reshape(shape)
        weight = np.ones(shape) if kind == "count" else np.maximum(importance, 0)
        values = np.where(chosen, weight, 0).sum(-1)
    total = values.sum(-1, keepdims=True)
    return np.where(total > 0, values / np.where(total > 0, total, 1), 1 / shape[-2])


def on_grid(profile: Float[np.ndarray, " layer"], bins: int) -> Float[np.ndarray, " bin"]:
    """Return a profile at `bins` points of relative depth; it sums to 1.

    Layer l of L is at (l + 1/2) / L, bin b of B at (b + 1/2) / B; linear between layers, constant beyond the
    first and the last.

    >>> on_grid(np.array([0.25, 0.75]), 4).round(3).tolist()
    [0.125, 0.188, 0.312, 0.375]
    """
    layers = (np.arange(len(profile)) + 0.5) / len(profile)
    values = np.interp((np.arange(bins) + 0.5) / bins, layers, profile)
    return values / values.sum()


def similarity_matrix(
    profiles: Float[np.ndarray, "model bin"], kind: str = "cosine"
) -> Float[np.ndarray, "model model"]:
    """Return the cosine (or Pearson's correlation: cosine after centering) of all pairs.

    A uniform profile has correlation 0 with everything.
    """
    check_option("similarity", kind, get_args(Similarity))
    rows = profiles - profiles.mean(1, keepdims=True) if kind == "pearson" else profiles
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.where(lengths > 1e-12, rows / np.maximum(lengths, 1e-12), 0)
    found = np.clip(rows @ rows.T, -1, 1)
    np.fill_diagonal(found, 1)
    return found


@dataclass(frozen=True, eq=False)
class Profiles:
    """The depth profiles of several models.

    Attributes:
        models: The models' names.
        families: Their families.
        by_layer: Each model's own layers: `model`, `family`, `layer`, `depth`, `mean`, `low`, `high`.
        similarity: Of all pairs.
        drawn: The same under bootstrap resamples of every model's sequences.
        fewest: Sequences of the model that has fewest.
    """

    models: list[str]
    families: list[str]
    by_layer: pd.DataFrame
    similarity: Float[np.ndarray, "model model"]
    drawn: Float[np.ndarray, "draw model model"]
    fewest: int = 0

    @classmethod
    def of(
        cls,
        importances: Mapping[str, xr.DataArray],
        families: Mapping[str, str],
        options: ComparativeOptions = DEFAULTS,
    ) -> Profiles:
        """Return how important heads are spread over depth in every model, and how similar the models are.

        Args:
            importances: Model to `(sequence, layer, head)`: loss of recall when the head is ablated.
            families: Model to its family.
            options: `profile`, `top_fraction`, `profile_bins`, `similarity` and `seed`.
        """
        if not importances:
            return cls([], [], pd.DataFrame(), np.zeros((0, 0)), np.zeros((0, 0, 0)))
        frames, grids = [], []
        for i, (model, importance) in enumerate(importances.items()):
            values = importance.transpose("sequence", "layer", "head").values
            drawn = bootstrap_means(values.reshape(len(values), -1), _DRAWS, options.seed + i)
            means = np.concatenate([values.mean(0)[None], drawn.reshape(-1, *values.shape[1:])])
            profiles = layer_profile(means, kind=options.profile, fraction=options.top_fraction)
            low, high = quantile_interval(profiles[1:], 0.95, len(values))
            layers = np.arange(values.shape[1])
            columns = {"layer": layers, "depth": (layers + 0.5) / len(layers), "mean": profiles[0]}
            frame = pd.DataFrame({"model": model, "family": families[model], **columns})
            frames.append(frame.assign(low=low, high=high))
            grids.append([on_grid(row, options.profile_bins) for row in profiles])
        every = np.stack([similarity_matrix(rows, options.similarity) for rows in np.swapaxes(grids, 0, 1)])
        names = list(importances)
        by_layer = pd.concat(frames, ignore_index=True)
        fewest = min(importance.sizes["sequence"] for importance in importances.values())
        return cls(names, [families[name] for name in names], by_layer, every[0], every[1:], fewest)

    def within_minus_across(self) -> Estimate | None:
        """Return the mean similarity of pairs within families minus that of pairs across.

        The interval is the basic bootstrap's over sequences, because resampled profiles are less similar than
        the sample's; there is none where a model has fewer than `FEWEST` sequences. None
        without pairs of both kinds.
        """
        upper, same = _pairs(pd.factorize(np.array(self.families, dtype=object))[0])
        if not same.any() or same.all():
            return None
        pairs = np.vstack([self.similarity[upper], self.drawn[:, *upper]])
        gaps = pairs[:, same].mean(1) - pairs[:, ~same].mean(1)
        value = float(gaps[0])
        if self.fewest < FEWEST:
            return Estimate(value, n=len(self.models))
        low, high = central(gaps[1:])
        return Estimate(value, 2 * value - high, 2 * value - low, len(self.models))


def _pairs(codes: Int[np.ndarray, " model"]) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """Return the places of all pairs of models in a matrix, and whether they are of one family."""
    upper = np.triu_indices(len(codes), 1)
    return upper, codes[upper[0]] == codes[upper[1]]


@dataclass(frozen=True, eq=False)
class FamilyTest:
    """Whether a model's family can be told from its profile.

    Attributes:
        table: One row per statistic: `statistic`, `value`, `null_mean`, `null_low`, `null_high`, `p`, `n`.
            "within": mean similarity of pairs of one family; "across": of two; "difference"; "accuracy": of
            the leave-one-out classification. `n` counts pairs, and for accuracy models that can be classified
            at all (their family has another one).
        predicted: One row per such model: `model`, `family`, `predicted`.
        labelings: Number of ways to assign the families' labels to the models; its inverse is the smallest
            possible p.
    """

    table: pd.DataFrame
    predicted: pd.DataFrame
    labelings: int


def family_test(
    similarity: Float[np.ndarray, "model model"],
    models: Sequence[str],
    families: Sequence[str],
    options: ComparativeOptions = DEFAULTS,
) -> FamilyTest:
    """Test whether profiles are more similar within families, and whether they reveal the family.

    Leave one out: each model is assigned to the family whose *other* models it is most similar to on average.
    The null of every number: family labels shuffled over the models, `p` the share of it at least as large.

    Args:
        similarity: Of all pairs of models.
        models: Their names.
        families: Their families.
        options: `n_permutations` and `seed` of the null.

    Raises:
        ResultError: There are fewer than three models, one family, or no family with two models.
    """
    codes, names = pd.factorize(np.asarray(families, dtype=object))
    sizes = np.bincount(codes)
    if len(models) < 3 or len(names) < 2 or sizes.max() < 2:
        raise ResultError(
            f"{len(models)} models of {len(names)} families say nothing about families: give three or more "
            "models, of two or more families, one of them with two or more."
        )
    rng = np.random.default_rng(options.seed)
    seen = _family_numbers(similarity, codes)
    shuffled = [rng.permutation(codes) for _ in range(options.n_permutations)]
    null = pd.DataFrame([_family_numbers(similarity, labels) for labels in shuffled])
    able, (_, same) = sizes[codes] > 1, _pairs(codes)
    counts = {"within": same.sum(), "across": (~same).sum(), "difference": len(same), "accuracy": able.sum()}
    rows = [
        {"statistic": name, "value": value, **against_null(value, null[name].to_numpy()), "n": counts[name]}
        for name, value in seen.items()
    ]
    guesses = names[_classified(similarity, codes)]
    predicted = pd.DataFrame({"model": models, "family": families, "predicted": guesses})
    labelings = math.factorial(len(codes)) // math.prod(math.factorial(n) for n in sizes.tolist())
    table = pd.DataFrame(rows).drop(columns="p_below").rename(columns={"p_above": "p"})
    return FamilyTest(table, predicted.loc[able].reset_index(drop=True), labelings)


def _family_numbers(similarity: np.ndarray, codes: Int[np.ndarray, " model"]) -> dict[str, float]:
    upper, same = _pairs(codes)
    values, able = similarity[upper], np.bincount(codes)[codes] > 1
    within, across = float(values[same].mean()), float(values[~same].mean())
    right = float((_classified(similarity, codes) == codes)[able].mean())
    return {"within": within, "across": across, "difference": within - across, "accuracy": right}


def _classified(similarity: np.ndarray, codes: Int[np.ndarray, " model"]) -> Int[np.ndarray, " model"]:
    """Return the family whose other models each model is most similar to on average."""
    members = (codes[:, None] == np.arange(codes.max() + 1)).astype(float)
    own = np.diag(similarity)[:, None] * members
    counts = members.sum(0) - members
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (similarity @ members - own) / counts
    return np.where(counts > 0, means, -np.inf).argmax(1)


def cluster(
    similarity: Float[np.ndarray, "model model"], method: str = "average"
) -> tuple[Float[np.ndarray, "merge 4"], list[int]]:
    """Return the merges of a hierarchical clustering (scipy's form) and the order of its leaves.

    The distance is 1 - similarity.

    >>> merges, order = cluster(np.array([[1, 0.2, 0.9], [0.2, 1, 0.1], [0.9, 0.1, 1]]))
    >>> merges[0, :2].tolist(), len(order)
    ([0.0, 2.0], 3)
    """
    distance = np.maximum(1 - similarity, 0)
    np.fill_diagonal(distance, 0)
    merges: Any = hierarchy.linkage(squareform(distance, checks=False), method)
    return merges, hierarchy.leaves_list(merges).tolist()
