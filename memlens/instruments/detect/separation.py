"""How well activations tell recalled from matched sequences, and what they add to known confounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from scipy import stats

from memlens import figures
from memlens.forward.exclusive import computes
from memlens.forward.hooks import chosen_layers
from memlens.forward.trunk import Trunk
from memlens.instruments.detect.confounds import CONFOUNDS, COPIES, Confound, confounds
from memlens.instruments.detect.groups import Groups, Tokens, mean_over_targets, residuals_at_targets
from memlens.instruments.detect.probe import cross_validated_scores
from memlens.options import options_class
from memlens.results.kinds import register_kind
from memlens.results.plots.selection import Selection, takes
from memlens.results.result import Result
from memlens.results.statistics.agreement import roc_area, roc_gain
from memlens.results.statistics.comparison import corrected
from memlens.results.statistics.estimates import Estimate
from memlens.results.statistics.intervals import STATISTICS
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result

ACTIVATIONS, SHUFFLED = "activations", "shuffled labels"
WITHOUT_COPIES, WITH_COPIES = "confounds", "confounds and copies"


@options_class
class SeparationOptions:
    """Options of `separation`; the result records all of them.

    Example:
        >>> import memlens as ml
        >>> ml.detect.SeparationOptions(folds=3).folds
        3
    """

    layers: tuple[NonNegativeInt, ...] | None = None
    """Layers; all by default."""
    max_targets: PositiveInt = 4
    """Most target tokens of each sequence that the probe sees, evenly spaced."""
    confounds: tuple[Confound, ...] = CONFOUNDS
    """What the baseline knows of a sequence; the target's place and its log frequency always count."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Outer folds of the cross-validation; they divide pairs of sequences."""
    inner_folds: Annotated[int, Field(ge=2)] = 3
    """Inner folds, which choose the probe's penalty."""
    strengths: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.001, 0.03, 1.0)
    """Inverse L2 penalties C that the inner folds choose from."""
    top: PositiveInt = 5
    """Neurons of each layer that are chosen on one half of the pairs and measured on the other."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the intervals."""
    n_resamples: PositiveInt = 1000
    """Resamples of the intervals of gains."""
    seed: int = 0
    """Seed of folds, halves, shuffles and resamples."""


@computes
def separation(
    model: Any,
    recalled: SequenceSet,
    matched: SequenceSet,
    *,
    options: SeparationOptions | None = None,
    token_counts: Int[np.ndarray, "vocab"] | None = None,
    progress: bool = True,
) -> Result:
    r"""Measure how well neurons and layers separate recalled from matched sequences, beyond the confounds.

    *Neurons.* With each neuron's activation (the input of the MLP's output matrix) averaged over the
    positions that predict targets, `neuron_area` is the probability that a recalled sequence's is above a
    matched one's, ties counted half; `cohens_d` is :math:`(\bar a - \bar b) / s` with the pooled standard
    deviation; `p` is that of the Mann-Whitney test, corrected over all neurons and layers
    (Benjamini-Hochberg). In each layer the `top` neurons whose area is furthest from 1/2 are chosen on one
    half of the pairs; `held_out_area` is measured on the other half.

    *Layers.* A logistic probe on the residual stream after the layer, at some of the targets, with nested
    cross-validation that never separates a sequence (or a pair) from its own tokens; see
    `cross_validated_scores`. A sequence's `score` is the mean log-odds of its tokens, each by a probe that
    has not seen its pair. The entries of `features`:

    - "confounds": the baseline: what `confounds` returns, the target's place in the continuation and its log
      frequency; "confounds and copies": with the number of copies, where it is known and varies;
    - "activations"; "activations, confounds" and "activations, confounds and copies": both together;
    - "shuffled labels": activations, fitted and measured with labels that were shuffled among the pairs.

    `area` is the area under the ROC curve of the scores over sequences, `gain` the area of activations with a
    baseline minus that of the baseline alone (bootstrap over sequences). If the gain's interval includes 0,
    nothing was detected beyond the confounds. Activations at target positions carry the model's certainty, so
    an area near 1 alone does not show that a model "knows" that it recalls.

    Args:
        model: A TransformerLens model.
        recalled: Sequences that the model recalls.
        matched: Sequences that it does not recall, such as `RecallScores.matched_controls`.
        options: See `SeparationOptions`.
        token_counts: See `confounds`.
        progress: Show progress bars.

    Returns:
        Kind "separation": `score` `(sequence, features, layer)` in log-odds, with the coordinate `group`;
        `area` `(features, layer, statistic)`, `gain` `(baseline, layer, statistic)`; `neuron_area`,
        `cohens_d` and `p` `(layer, neuron)`; `held_out_area` `(layer, rank, statistic)` with the coordinate
        `chosen_neuron`. A `statistic` is mean (the value), low or high; with fewer than three sequences in a
        group there is no interval.

    Raises:
        EmptySetError: A group is empty.
        ResultError: There are fewer sequences in a group than folds.
        SiteError: A layer that does not exist.

    Source: the question and simple classifiers on activations of memorized tokens are those of arXiv
    2412.01014; the baseline of confounds, nested cross-validation by pair, controls and intervals are ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> recall = ml.score_recall(model, ml.load_sequences("zoo", model), generate=False, progress=False)
        >>> options = ml.detect.SeparationOptions(layers=(1,), folds=2, strengths=(0.03,), n_resamples=50)
        >>> groups = recall.memorized()[:20], recall.matched_controls()[:20]
        >>> found = ml.detect.separation(model, *groups, options=options, progress=False)
        >>> found["area"].dims, found["gain"].dims
        (('features', 'layer', 'statistic'), ('baseline', 'layer', 'statistic'))
    """
    options, groups = options or SeparationOptions(), Groups.of(recalled, matched)
    layers = chosen_layers(options.layers, Trunk(model).n_layers)
    seqs = groups.sequences
    known = confounds(model, seqs, token_counts=token_counts, progress=progress)
    neurons = mean_over_targets(model, seqs, "mlp_post", layers, progress=progress, desc="neurons")
    tokens = residuals_at_targets(model, seqs, layers, options.max_targets, progress=progress)
    scores = _scores(groups, tokens, _baselines(groups, tokens, known, options, token_counts), options)
    variables = {**_of_neurons(groups, neurons, options), **_of_layers(groups, scores, options)}
    baselines = [name for name in scores if name in (WITHOUT_COPIES, WITH_COPIES)]
    chosen = variables.pop("chosen_neuron")
    coords = {
        "layer": layers,
        "features": list(scores),
        "baseline": baselines,
        "statistic": list(STATISTICS),
        "neuron": np.arange(neurons.shape[2]),
        "rank": np.arange(chosen[1].shape[1]),
        "chosen_neuron": chosen,
    }
    settings = {
        **asdict(options),
        "site": "resid_post",
        "n_recalled": len(recalled),
        "n_matched": len(matched),
    }
    return make_result("separation", model, seqs, variables, coords, settings)


def _baselines(
    groups: Groups,
    tokens: Tokens,
    known: pd.DataFrame,
    options: SeparationOptions,
    token_counts: np.ndarray | None,
) -> dict[str, Float[np.ndarray, "token feature"]]:
    """Return the confounds of each token: those of its sequence, its place, and its own log frequency."""
    seqs = groups.sequences
    counts = np.bincount(seqs.tokens.numpy()[seqs.mask.numpy()]) if token_counts is None else token_counts
    own = np.log1p(counts.astype(float))[seqs.target_ids.numpy()[tokens.row, tokens.place]]
    plain = [known[name].to_numpy(float)[tokens.row] for name in options.confounds]
    found = {WITHOUT_COPIES: np.column_stack([*plain, tokens.place, own])}
    if COPIES in known:
        copies = known[COPIES].to_numpy(float)
        if np.ptp(copies) > 0:
            found[WITH_COPIES] = np.column_stack([found[WITHOUT_COPIES], copies[tokens.row]])
    return found


def _scores(
    groups: Groups, tokens: Tokens, baselines: dict[str, np.ndarray], options: SeparationOptions
) -> dict[str, Float[np.ndarray, "seq layer"]]:
    """Return each sequence's score by every set of features, in every layer."""
    label, pair = groups.recalled[tokens.row], groups.pair[tokens.row]
    shuffled = shuffled_labels(groups, options.seed)[tokens.row]

    def scored(features: np.ndarray, labels: np.ndarray = label) -> Float[np.ndarray, "seq"]:
        by_token = cross_validated_scores(
            features, labels, pair, strengths=options.strengths, folds=options.folds,
            inner_folds=options.inner_folds, seed=options.seed,
        )  # fmt: skip
        total = np.bincount(tokens.row, by_token, minlength=len(groups))
        return total / np.bincount(tokens.row, minlength=len(groups))

    def by_layer(features: Callable[[np.ndarray], np.ndarray], labels: np.ndarray = label) -> np.ndarray:
        each = [scored(features(tokens.acts[:, i]), labels) for i in range(tokens.acts.shape[1])]
        return np.stack(each, axis=1)

    n_layers = tokens.acts.shape[1]
    found = {name: np.tile(scored(table)[:, None], n_layers) for name, table in baselines.items()}
    found[ACTIVATIONS] = by_layer(lambda acts: acts)
    for name, table in baselines.items():
        found[f"{ACTIVATIONS}, {name}"] = by_layer(lambda acts, table=table: np.hstack([acts, table]))
    found[SHUFFLED] = by_layer(lambda acts: acts, shuffled)
    return found


def shuffled_labels(groups: Groups, seed: int) -> Bool[np.ndarray, "seq"]:
    """Return the control's labels: in each pair at random, and shuffled among sequences without a pair."""
    rng, label = np.random.default_rng(seed), groups.recalled
    found, alone = np.empty_like(label), []
    for pair in range(int(groups.pair.max()) + 1):
        rows = np.flatnonzero(groups.pair == pair)
        if len(rows) > 1:
            found[rows] = rng.permutation(label[rows])
        else:
            alone.extend(rows)
    found[alone] = rng.permutation(label[alone])
    return found


def _of_layers(
    groups: Groups, scores: dict[str, np.ndarray], options: SeparationOptions
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    n_layers = next(iter(scores.values())).shape[1]
    area = np.full((len(scores), n_layers, 3), np.nan)
    shuffled = shuffled_labels(groups, options.seed)
    for i, (name, score) in enumerate(scores.items()):
        label = shuffled if name == SHUFFLED else groups.recalled
        area[i] = [area_of(score[:, layer], label, options.level) for layer in range(n_layers)]
    resampling = {"level": options.level, "n_resamples": options.n_resamples, "seed": options.seed}
    gain = [
        [
            roc_gain(
                scores[f"{ACTIVATIONS}, {name}"][:, i], scores[name][:, i], groups.recalled, **resampling
            )
            for i in range(n_layers)
        ]
        for name in scores
        if name in (WITHOUT_COPIES, WITH_COPIES)
    ]
    return {
        "score": (("sequence", "features", "layer"), np.stack(list(scores.values()), axis=1)),
        "area": (("features", "layer", "statistic"), area),
        "gain": (("baseline", "layer", "statistic"), np.array(gain)),
    }


def area_of(score: np.ndarray, label: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Return `roc_area` as value, low and high."""
    found = roc_area(score, label, level=level)
    return found.area, found.low, found.high


def _of_neurons(
    groups: Groups, acts: Float[np.ndarray, "seq layer neuron"], options: SeparationOptions
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    label, top = groups.recalled, min(options.top, acts.shape[2])
    area, p = neuron_areas(acts, label)
    choose, measure = groups.halves(options.seed)
    distance = np.abs(neuron_areas(acts[choose], label[choose])[0] - 0.5)
    chosen = np.argsort(-distance, axis=1, kind="stable")[:, :top]
    held_out = np.full((*chosen.shape, 3), np.nan)
    if 0 < label[measure].sum() < len(measure):
        for layer, rank in np.ndindex(chosen.shape):
            values = acts[measure, layer, chosen[layer, rank]]
            held_out[layer, rank] = area_of(values, label[measure], options.level)
    sites = ("layer", "neuron")
    return {
        "neuron_area": (sites, area),
        "cohens_d": (sites, cohens_d(acts[label], acts[~label])),
        "p": (sites, corrected(p.ravel()).reshape(p.shape)),
        "held_out_area": (("layer", "rank", "statistic"), held_out),
        "chosen_neuron": (("layer", "rank"), chosen),
    }


def neuron_areas(
    acts: Float[np.ndarray, "seq layer neuron"], label: Bool[np.ndarray, "seq"]
) -> tuple[Float[np.ndarray, "layer neuron"], Float[np.ndarray, "layer neuron"]]:
    """Return the area under the ROC curve of every neuron, and the p value of the Mann-Whitney test."""
    ours, theirs = acts[label].astype(float), acts[~label].astype(float)
    found: Any = stats.mannwhitneyu(ours, theirs, axis=0, method="asymptotic")
    return found.statistic / (len(ours) * len(theirs)), np.where(np.isnan(found.pvalue), 1.0, found.pvalue)


def cohens_d(
    ours: Float[np.ndarray, "seq *site"], theirs: Float[np.ndarray, "other *site"]
) -> Float[np.ndarray, "*site"]:
    r"""Return :math:`(\bar a - \bar b)/s` with the pooled standard deviation; NaN without any spread.

    >>> cohens_d(np.array([[1.0], [3.0]]), np.array([[0.0], [2.0]])).round(3).tolist()
    [0.707]
    """
    n, m = len(ours), len(theirs)
    squares = sum(((part - part.mean(0)) ** 2).sum(0, dtype=float) for part in (ours, theirs))
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(squares / (n + m - 2))
        gap = ours.mean(0, dtype=float) - theirs.mean(0, dtype=float)
        return np.where(spread > 0, gap / spread, np.nan)


def separating_neurons(result: Result) -> pd.DataFrame:
    """Return the neurons chosen by `separation`, with what they separate on the other half of the pairs.

    Returns:
        Columns `layer`, `neuron`, `held_out_area` with `low` and `high`, and over all sequences `area`,
        `cohens_d` and the corrected `p`; the held-out areas furthest from 1/2 first.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> recall = ml.score_recall(model, ml.load_sequences("zoo", model), generate=False, progress=False)
        >>> options = ml.detect.SeparationOptions(layers=(1,), folds=2, strengths=(0.03,), n_resamples=50)
        >>> groups = recall.memorized()[:12], recall.matched_controls()[:12]
        >>> found = ml.detect.separation(model, *groups, options=options, progress=False)
        >>> set(ml.detect.separating_neurons(found)["layer"])
        {1}
    """
    data = result.data
    rows = []
    for i, j in np.ndindex(data["chosen_neuron"].shape):
        neuron = int(data["chosen_neuron"].values[i, j])
        value, low, high = data["held_out_area"].values[i, j].tolist()
        site = {name: float(data[name].values[i, neuron]) for name in ("neuron_area", "cohens_d", "p")}
        rows.append(
            {
                "layer": int(data["layer"].values[i]), "neuron": neuron, "held_out_area": value, "low": low,
                "high": high, "area": site["neuron_area"], "cohens_d": site["cohens_d"], "p": site["p"],
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    far = np.argsort(-np.abs(table["held_out_area"].to_numpy(float) - 0.5), kind="stable")
    return table.iloc[far].reset_index(drop=True)


def estimate_at(array: xr.DataArray, n: int) -> Estimate:
    """Return the estimate in an array `[statistic]`, over `n` sequences."""
    value, low, high = (float(array.sel(statistic=name)) for name in STATISTICS)
    return Estimate(value, low, high, n)


@takes()
def plot_separation(result: Result, s: Selection) -> go.Figure:
    """Draw the areas of every set of features over layers."""
    words = {"label": "area under the ROC curve", "units": "0.5 = chance"}
    area = result["area"].transpose("statistic", "layer", "features").assign_attrs(words)
    count = f"{result.data.sizes['sequence']} sequences, {100 * result.settings['level']:g} % interval"
    subtitle = " · ".join((count, str(result.data.attrs.get("model", ""))))
    title = s.title or "What tells recalled from matched sequences"
    return figures.line_over_layers(xr.Dataset({"area": area}), title=title, subtitle=subtitle)


def read_separation(result: Result, metric: str | None) -> str:
    """Say what the best layer's activations separate, what the confounds do, and what is gained."""
    data, n = result.data, result.data.sizes["sequence"]
    area = result["area"]
    layer = int(area.sel(features=ACTIVATIONS, statistic="mean").argmax("layer"))
    at = {name: estimate_at(area.sel(features=name).isel(layer=layer), n) for name in area["features"].values}
    said = (
        f"The activations after layer {data['layer'].values[layer]}, the best of {data.sizes['layer']}, "
        f"separate recalled from matched sequences with an area of {at[ACTIVATIONS].text()}; with shuffled "
        f"labels it is {at[SHUFFLED].text()}."
    )
    for name in data["baseline"].values.tolist():
        gain = estimate_at(result["gain"].sel(baseline=name).isel(layer=layer), n)
        said += f" The {name} alone reach {at[name].text()}; activations add {gain.text()}"
        beyond = "" if not gain.known else (
            ", more than nothing." if gain.low > 0 else ": nothing is shown beyond them."
        )  # fmt: skip
        said += beyond or "."
    return said


register_kind(
    "separation",
    plot=plot_separation,
    reading=read_separation,
    cites=(("slonski2024", "activations that separate memorized from other tokens"),),
)
