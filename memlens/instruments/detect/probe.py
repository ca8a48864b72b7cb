"""A regularized linear probe whose scores are out of fold: no row is scored by a probe that saw its group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from memlens.errors import ResultError


def cross_validated_scores(
    features: Float[np.ndarray, "row feature"],
    label: Bool[np.ndarray, "row"],
    group: Int[np.ndarray, "row"],
    *,
    strengths: Sequence[float],
    folds: int,
    inner_folds: int,
    seed: int,
) -> Float[np.ndarray, "row"]:
    """Return each row's log-odds of the label by a logistic probe that was fitted without the row's group.

    Nested cross-validation: in each outer fold the strength of the L2 penalty is chosen by the mean area
    under the ROC curve over inner folds of the other groups. Features are standardized, and missing ones
    replaced by the mean, on the rows that a probe is fitted to. Both labels are spread evenly over folds
    where the groups allow it.

    Args:
        features: One row per token or sequence; NaN is a missing value.
        label: What is predicted.
        group: Rows of one group are never on both sides of a split.
        strengths: Inverse penalties C to choose from; with one, there is no inner loop.
        folds: Outer folds.
        inner_folds: Inner folds; at most as many as there are groups to fit to.
        seed: Of the division into folds.

    Raises:
        ResultError: There are fewer groups with either label than outer folds, or one of them is missing.
    """
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold

    least = min(len(np.unique(group[label])), len(np.unique(group[~label])))
    if least < folds:
        raise ResultError(
            f"a probe with {folds} folds needs as many groups of each label, and one label has {least}: give "
            "more sequences, or fewer folds."
        )
    scores = np.empty(len(label))
    outer = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in outer.split(features, label, group):
        probe = _probe(strengths[0])
        if len(strengths) > 1 and len(set(group[train])) > 1:
            inner = StratifiedGroupKFold(
                min(inner_folds, len(set(group[train]))), shuffle=True, random_state=seed
            )
            grid = {"logisticregression__C": list(strengths)}
            # An inner fold without one of the labels has no area and is skipped by the mean of the others.
            splits = [
                (a, b)
                for a, b in inner.split(features[train], label[train], group[train])
                if len(set(label[train][a])) == len(set(label[train][b])) == 2
            ]
            probe = GridSearchCV(probe, grid, scoring="roc_auc", cv=splits) if splits else probe
        scores[test] = probe.fit(features[train], label[train]).decision_function(features[test])
    return scores


def _probe(strength: float) -> Any:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fill = SimpleImputer(keep_empty_features=True)
    return make_pipeline(fill, StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
