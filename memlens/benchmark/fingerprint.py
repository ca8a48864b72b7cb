"""The fingerprint of planting: whether the weights alone, without any input, show where a memory is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from memlens.benchmark.suites import Suite, material
from memlens.organisms.planting.certificate import fingerprints
from memlens.organisms.planting.plant import KEPT, Keep, PlantingOptions, plant, recalled

FINGERPRINT = "fingerprint.parquet"
"""File in a run's folder with a table of `fingerprint_table`, which the report shows."""


def fingerprint_table(
    model: str = "zoo/pythia-s",
    carrier: str = "neurons=1%",
    *,
    keep: Sequence[Keep] = KEPT,
    sequences: int = 2,
    seed: int = 100,
    options: PlantingOptions | None = None,
) -> pd.DataFrame:
    """Plant the same sequences in several ways, and measure what the weights alone tell about the carrier.

    The way of the INJ benchmark (Chang et al. 2024) is `keep=["nothing"]`: the trained rows grow, and their
    norm finds them whatever the input is. What a method that reads norms scores there is not localization.

    Args:
        model: The base model.
        carrier: What is planted into.
        keep: What planting keeps of each changed row; see `PlantingOptions.keep`.
        sequences: Organisms for each way; each holds one sequence of its own.
        seed: Of the first organism.
        options: How memories are planted, but for `keep`.

    Returns:
        One row per way, kind of component and statistic of the weights, with means over organisms: `keep`,
        `kind`, `statistic`, `auc_base` and `auc` (ROC AUC in the base model and in the organism),
        `average_precision_base`, `average_precision`, `recall` (share of planted tokens that are the first
        choice) and `organisms` (their number).

    Raises:
        OptionError: An unknown carrier or way.
        SequenceError: The model has too few sequences.

    Example:
        >>> table = fingerprint_table("zoo/pythia-xs", "heads=2", keep=["entries"], sequences=1)
        >>> table["statistic"].tolist()
        ['norm', 'kurtosis', 'distance_from_mean']
    """
    options = options or PlantingOptions()
    texts = material(model, Suite(models=(model,), carriers=(carrier,), sequences=sequences))
    found = []
    for way in keep:
        for i in range(sequences):
            made = plant(
                texts.base(), texts.planted[[i]], carrier, heldout=texts.training, seed=seed + i,
                options=replace(options, keep=way),
            )  # fmt: skip
            recall = float(np.mean(recalled(made.model, made.sequences, options.planted).accuracy.numpy()))
            found.append(fingerprints(made).assign(keep=way, recall=recall, organisms=1))
    keys = ["keep", "kind", "statistic"]
    table = pd.concat(found).groupby(keys, sort=False)
    means: pd.DataFrame = table.mean(numeric_only=True)  # pyright: ignore[reportAssignmentType]
    return means.assign(organisms=table["organisms"].sum()).reset_index()
