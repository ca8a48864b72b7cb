"""Copies and training time: recall by copies, and when a sequence is memorized and forgotten."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Bool, Int

from memlens.errors import ResultError
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_strengths
from memlens.results.readings import read_strengths
from memlens.results.result import Result
from memlens.studies.idioms.findings import share_of


def copies_table(table: pd.DataFrame, column: str = "copies") -> pd.DataFrame:
    """Return the rate at each number of copies; empty where the table does not tell copies.

    Returns:
        Columns `copies`, `n`, `rate`, `low`, `high` (Wilson, 95 %).

    >>> copies_table(pd.DataFrame({"copies": [1, 1, 8], "exact_match": [0, 1, 1]}))["rate"].tolist()
    [0.5, 1.0]
    """
    columns = ["copies", "n", "rate", "low", "high"]
    if column not in table:
        return pd.DataFrame(columns=columns)
    rows = []
    for copies, part in table.groupby(column):
        share = share_of(part["exact_match"])
        rows.append((copies, share.n, share.value, share.low, share.high))
    return pd.DataFrame(rows, columns=columns)


def join_steps(tables: dict[int, pd.DataFrame]) -> Result:
    """Join the recall tables of one model's checkpoints.

    Args:
        tables: Training step to recall table, all of the same sequences.

    Returns:
        Kind "recall_over_training": `exact_match`, `matching_prefix`, `target_accuracy` `(sequence, step)`.

    Raises:
        ResultError: No checkpoints, or tables of different sequences.
    """
    if not tables:
        raise ResultError("there are no checkpoints to join: give at least one step.")
    steps = sorted(tables)
    ids = tables[steps[0]]["id"].tolist()
    if any(tables[step]["id"].tolist() != ids for step in steps):
        raise ResultError("the checkpoints were scored on different sequences: score all on one set.")
    first = tables[steps[0]]
    names = ("exact_match", "matching_prefix", "target_accuracy")
    arrays = {
        name: (("sequence", "step"), np.stack([tables[step][name].to_numpy(float) for step in steps], 1))
        for name in names
    }
    coords: dict[str, object] = {"sequence": np.array(ids, dtype=object), "step": steps}
    for name in ("domain", "copies"):
        if name in first:
            values = first[name].to_numpy()
            coords[name] = ("sequence", values if values.dtype.kind in "iuf" else values.astype(str))
    return Result.create(xr.Dataset(arrays, coords), kind="recall_over_training", settings={"steps": steps})


def training_events(hits: Bool[np.ndarray, "seq step"], steps: Int[np.ndarray, " step"]) -> pd.DataFrame:
    """Return for each sequence when it is first memorized, and whether it is forgotten and learned again.

    Only the given steps are seen: what happens between two of them and is undone is not counted.

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
    ever = hits.any(1)
    first = np.where(ever, np.asarray(steps, dtype=float)[hits.argmax(1)], np.nan)
    lost = (hits[:, :-1] & ~hits[:, 1:]).sum(1)
    gained = (~hits[:, :-1] & hits[:, 1:]).sum(1)
    relearned = np.where(ever, gained + hits[:, 0] - 1, 0)
    return pd.DataFrame({"first": first, "forgotten": lost, "relearned": relearned, "last": hits[:, -1]})


def training_table(hits: Bool[np.ndarray, "seq step"], steps: Int[np.ndarray, " step"]) -> pd.DataFrame:
    """Return the rate over training and what changed since the step before.

    Returns:
        Columns `step`, `n`, `rate`, `low`, `high` (Wilson), `new` (first memorized here), `forgotten`
        (recalled at the step before and not here), `relearned` (recalled here and earlier, not at the step
        before).
    """
    rows = []
    for i, step in enumerate(np.asarray(steps).tolist()):
        share, here = share_of(hits[:, i]), hits[:, i]
        before = hits[:, i - 1] if i else np.zeros(len(hits), dtype=bool)
        earlier = hits[:, :i].any(1)
        rows.append(
            (
                step, share.n, share.value, share.low, share.high, int((here & ~earlier).sum()),
                int((before & ~here).sum()), int((here & earlier & ~before).sum()),
            )
        )  # fmt: skip
    columns = ["step", "n", "rate", "low", "high", "new", "forgotten", "relearned"]
    return pd.DataFrame(rows, columns=columns)


register_kind("recall_over_training", plot=plot_strengths, reading=read_strengths)
