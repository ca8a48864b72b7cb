"""Tables of the attention-bypass study: drops by quartile of depth, and what free decoding gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from memlens.results.groups import layers_label, quartiles
from memlens.results.result import Result
from memlens.results.statistics.intervals import bootstrap_means, quantile_interval
from memlens.results.statistics.tasks import task_tables
from memlens.results.statistics.tradeoff import removed_share

MEASURES = ("relative_drop", "relative_drop_chance_corrected")
GAP = "language minus reasoning"
Draws = Float[np.ndarray, "draw layer"]


def quartile_table(
    recall: Result,
    accuracy: Result,
    *,
    tasks: Sequence[str],
    parts: int = 4,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return what bypassing single blocks costs, averaged over the blocks of each part of depth.

    Args:
        recall: Bypass of each block, on memorized sequences.
        accuracy: The same on tasks.
        tasks: Tasks that count: those with something to lose (`tasks_above_chance`).
        parts: In how many parts depth is cut.
        level: Coverage of the intervals.
        n_resamples: Of the bootstraps over sequences, and over questions within tasks.
        seed: Of the bootstraps.

    Returns:
        Columns `what` ("recitation", a group of tasks, or the gap between language and reasoning), `measure`,
        `part` (1 is the first), `layers`, `mean`, `low`, `high`. Drops are relative to the unchanged model
        and positive where something is lost; of tasks raw and corrected for chance. A group's drop is the
        mean over its tasks.
    """
    drawn: dict[tuple[str, str], tuple[Draws, Draws]] = {}
    base = recall.baseline("exact_match").values.astype(float)
    exact = recall["exact_match"].transpose("sequence", "layer").values.astype(float)
    values = np.column_stack([base, exact])
    drawn["recitation", "relative_drop"] = (
        removed_share(values.mean(0)[None]),
        removed_share(bootstrap_means(values, n_resamples, seed)),
    )
    tables = {name: table for name, table in task_tables(accuracy).items() if name in tasks}
    for measure in MEASURES:
        each = {
            name: (
                table.measured(lambda t: t.mean(0, keepdims=True))[measure],
                table.measured(lambda t, n=i: bootstrap_means(t, n_resamples, seed + 1 + n))[measure],
            )
            for i, (name, table) in enumerate(tables.items())
        }
        for group in dict.fromkeys(table.group for table in tables.values()):
            mine = [each[name] for name, table in tables.items() if table.group == group]
            value, draws = (np.nanmean([pair[i] for pair in mine], 0) for i in (0, 1))
            drawn[group, measure] = value, draws
        if ("language", measure) in drawn and ("reasoning", measure) in drawn:
            both = drawn["language", measure], drawn["reasoning", measure]
            drawn[GAP, measure] = both[0][0] - both[1][0], both[0][1] - both[1][1]
    rows = []
    for (what, measure), (value, draws) in drawn.items():
        for number, layers in enumerate(quartiles(value.shape[1], parts), 1):
            low, high = quantile_interval(draws[:, layers].mean(1, keepdims=True), level)
            rows.append(
                {
                    "what": what,
                    "measure": measure,
                    "part": number,
                    "layers": layers_label(layers),
                    "mean": float(value[0, layers].mean()),
                    "low": float(low[0]),
                    "high": float(high[0]),
                }
            )
    return pd.DataFrame(rows)
