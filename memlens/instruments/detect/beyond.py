"""Several detectors side by side: what each tells beyond the confounds, by the same test for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt

from memlens.errors import OptionError
from memlens.instruments.detect.confounds import CONFOUNDS, COPIES, Confound
from memlens.instruments.detect.groups import Groups
from memlens.instruments.detect.probe import cross_validated_scores
from memlens.instruments.detect.separation import area_of
from memlens.options import options_class
from memlens.results.statistics.agreement import rank_correlation, roc_gain, standard_interval
from memlens.results.statistics.estimates import Estimate
from memlens.results.statistics.intervals import FEWEST


@options_class
class BeyondOptions:
    """Options of `beyond_confounds`.

    Example:
        >>> import memlens as ml
        >>> ml.detect.BeyondOptions(folds=3).folds
        3
    """

    confounds: tuple[Confound, ...] = CONFOUNDS
    """What the baseline knows of a sequence, besides copies."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Folds of the cross-validation; they divide pairs of sequences."""
    strength: PositiveFloat = 1.0
    """Inverse L2 penalty C of the logistic probes."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the intervals."""
    n_resamples: PositiveInt = 1000
    """Resamples of the intervals of gains and correlations."""
    seed: int = 0
    """Seed of folds and resamples."""


def beyond_confounds(
    groups: Groups,
    scores: Mapping[str, Float[np.ndarray, "seq"]],
    known: pd.DataFrame,
    *,
    options: BeyondOptions | None = None,
) -> pd.DataFrame:
    """Return, for each detector, how its score separates the groups alone and in addition to the confounds.

    A logistic probe with cross-validation by pairs is fitted to the confounds, and to the confounds with the
    score as one more feature; the gain is the difference of their areas under the ROC curve, on the sequences
    that have a score. Where the confounds include copies, the gain is what a detector knows of recall that
    the number of copies does not say.

    Args:
        groups: Recalled and matched sequences.
        scores: By name, one number per sequence; NaN where there is none. Scores that were fitted must be out
            of fold.
        known: What `confounds` returned for the same sequences.
        options: See `BeyondOptions`.

    Returns:
        One row per detector and baseline ("confounds", "confounds and copies", the latter where copies are
        known and vary): `detector`, `baseline`, `recalled` and `matched` (numbers of sequences), `area` of
        the score alone with `low` and `high`, `baseline_area`, `gain` with `gain_low` and `gain_high`; and
        `copies_correlation` (Spearman) with `copies_low` and `copies_high`. Intervals take three sequences.

    Raises:
        OptionError: A score has another length.
        ResultError: There are fewer pairs with a score than folds.

    Source: ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> groups = ml.detect.Groups.of(seqs[-8:], seqs[:8])
        >>> known = ml.detect.confounds(model, groups.sequences, progress=False)
        >>> options = ml.detect.BeyondOptions(folds=2, n_resamples=50)
        >>> scores = ml.measure(model, groups.sequences, ["target_logprob"])
        >>> set(ml.detect.beyond_confounds(groups, scores, known, options=options)["detector"])
        {'target_logprob'}
    """
    options, rows = options or BeyondOptions(), []
    for name, given in scores.items():
        score = np.asarray(given, float)
        if score.shape != (len(groups),):
            raise OptionError(
                f"the score {name!r} has the shape {score.shape}: give one number for each of the "
                f"{len(groups)} sequences."
            )
        here = np.isfinite(score)
        label = groups.recalled[here]
        value, low, high = area_of(score[here], label, options.level)
        about = {
            "detector": name, "recalled": int(label.sum()), "matched": int((~label).sum()),
            "area": value, "low": low, "high": high,
            **_with_copies(score, here, known, options),
        }  # fmt: skip
        for baseline, table in _baselines(known, options).items():
            rows.append({**about, "baseline": baseline, **_gain(groups, score, here, table, options)})
    return pd.DataFrame(rows)


def _baselines(known: pd.DataFrame, options: BeyondOptions) -> dict[str, Float[np.ndarray, "seq feature"]]:
    plain = known[list(options.confounds)].to_numpy(float)
    found = {"confounds": plain} if options.confounds else {}
    if COPIES in known and np.ptp(known[COPIES].to_numpy(float)) > 0:
        found["confounds and copies"] = np.column_stack([plain, known[COPIES]])
    return found


def _gain(
    groups: Groups, score: np.ndarray, here: np.ndarray, table: np.ndarray, options: BeyondOptions
) -> dict[str, float]:
    label, pair = groups.recalled[here], groups.pair[here]
    settings: dict[str, Any] = {
        "strengths": (options.strength,), "folds": options.folds, "inner_folds": 2, "seed": options.seed,
    }  # fmt: skip
    alone = cross_validated_scores(table[here], label, pair, **settings)
    both = cross_validated_scores(np.column_stack([table[here], score[here]]), label, pair, **settings)
    resampling = {name: asdict(options)[name] for name in ("level", "n_resamples", "seed")}
    gain, low, high = roc_gain(both, alone, label, **resampling)
    return {"baseline_area": area_of(alone, label)[0], "gain": gain, "gain_low": low, "gain_high": high}


def _with_copies(
    given: np.ndarray, here: np.ndarray, known: pd.DataFrame, options: BeyondOptions
) -> dict[str, float]:
    """Return the rank correlation with copies, over all sequences of both groups."""
    names = ("copies_correlation", "copies_low", "copies_high")
    score = given[here]
    if COPIES not in known or len(score) < FEWEST:
        return dict.fromkeys(names, np.nan)
    copies = known[COPIES].to_numpy(float)[here]
    value = float(rank_correlation(score, copies))
    rows = np.random.default_rng(options.seed).integers(0, len(score), (options.n_resamples, len(score)))
    ends = standard_interval(
        value, rank_correlation(score[rows], copies[rows]), options.level, -1.0, len(score)
    )
    return dict(zip(names, (value, *ends), strict=True))


def gain_of(row: Mapping[str, Any]) -> Estimate:
    """Return the gain in a row of `beyond_confounds` as an estimate."""
    n = int(row["recalled"]) + int(row["matched"])
    return Estimate(float(row["gain"]), float(row["gain_low"]), float(row["gain_high"]), n)
