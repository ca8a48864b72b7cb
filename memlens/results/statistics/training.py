"""When sequences are memorized, forgotten and learned again over the checkpoints of a training run."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from memlens.results.statistics.estimates import share_estimate


def training_events(hits: Bool[np.ndarray, "seq step"], steps: Int[np.ndarray, " step"]) -> pd.DataFrame:
    """Return for each sequence when it is first memorized, and whether it is forgotten and learned again.

    Only the given steps are seen: a change that is undone between two of them is not counted.

    Args:
        hits: Whether each sequence is recalled exactly at each step.
        steps: The steps, ascending.

    Returns:
        Columns `first` (the first step at which it is recalled; NaN for never), `forgotten` (how often it is
        recalled at one step and not at the next), `relearned` (how often it is recalled again after that),
        `last` (whether it is recalled at the last step).

    >>> found = training_events(np.array([[0, 1, 0, 1], [0, 0, 0, 0]], dtype=bool), np.array([1, 2, 4, 8]))
    >>> found.to_numpy(float).tolist()[0]
    [2.0, 1.0, 1.0, 1.0]
    """
    first = np.where(hits.any(1), np.asarray(steps, dtype=float)[hits.argmax(1)], np.nan)
    changes = {name: found.sum(1) for name, found in _changes(hits).items() if name != "new"}
    return pd.DataFrame({"first": first, **changes, "last": hits[:, -1]})


def _changes(hits: Bool[np.ndarray, "seq step"]) -> dict[str, Bool[np.ndarray, "seq step"]]:
    """Return where sequences are first memorized, forgotten, and learned again."""
    before = np.pad(hits, ((0, 0), (1, 0)))[:, :-1]
    earlier = np.maximum.accumulate(before, axis=1)
    return {"new": hits & ~earlier, "forgotten": before & ~hits, "relearned": hits & earlier & ~before}


def training_table(hits: Bool[np.ndarray, "seq step"], steps: Int[np.ndarray, " step"]) -> pd.DataFrame:
    """Return the rate over training and what changed since the previous step.

    Returns:
        Columns `step`, `n`, `rate`, `low`, `high` (Wilson), `new` (first memorized here), `forgotten`
        (recalled at the previous step and not here), `relearned` (recalled here and earlier, but not at the
        previous step).
    """
    rates = pd.DataFrame([share_estimate(here).row("rate") for here in hits.T])
    rates.insert(0, "step", steps)
    return rates.assign(**{name: found.sum(0) for name, found in _changes(hits).items()})
