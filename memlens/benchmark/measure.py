"""Running localizers on one organism and comparing their rankings with what was planted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from memlens.benchmark.localizer import LOCALIZERS, Localizer, component_shape
from memlens.benchmark.scores import mean_ranks, score_ranking
from memlens.organisms.planting.carriers import COMPONENT_KINDS, ComponentKind
from memlens.sequences.set import SequenceSet

VARIANTS: Mapping[str, str] = {
    "": "the method as it is",
    "less others": "less the mean of its scores on other sequences",
    "z-scored": "less that mean, over their standard deviation",
    "less twin": "less its scores in the model without the memory",
    "on another sequence": "control: its scores on a sequence that was not planted",
}
"""What is made of a method's scores, with words for each."""

AVERAGED = ("zero ablation", "integrated gradients")
"""Localizers whose z-scored rankings are averaged into a further one."""


def measure_organism(
    model: Any,
    sequences: SequenceSet,
    others: SequenceSet,
    truth: pd.DataFrame,
    *,
    twin: Any = None,
    localizers: Sequence[str] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Score every localizer on an organism.

    Args:
        model: The organism as a TransformerLens model.
        sequences: What was planted.
        others: Sequences of the same kind that were not; the first of them is the control sequence.
        truth: As `planting.folder.truth_table` gives it. Kinds of component that it does not name are ranked
            for carriers without truth only to show chance, and are left out here.
        twin: The model without the memory, for the variant "less twin"; left out by default.
        localizers: Names; all by default.
        seed: For methods that draw.

    Returns:
        One row per kind of component, localizer and variant: `component`, `localizer`, `variant`, `control`,
        the measures of `score_ranking` (means over the planted sequences), and `seconds` (of the method on
        the planted sequences alone).
    """
    names = list(localizers) if localizers is not None else LOCALIZERS.names()
    rows: list[dict[str, Any]] = []
    for component in COMPONENT_KINDS:
        own: Any = truth[truth["kind"] == component]
        if own.empty:
            continue
        planted, graded = _arrays(model, component, own)
        specific: dict[str, np.ndarray] = {}
        costs: dict[str, float] = {}
        for name in names:
            method = LOCALIZERS[name].given(twin)
            if component not in method.components:
                continue
            start = time.perf_counter()
            scores = method(model, sequences, component=component, others=others, seed=seed)
            costs[name] = seconds = time.perf_counter() - start
            variants = _variants(method, scores, model, sequences, others, component, twin, seed)
            if name in AVERAGED and "z-scored" in variants:
                specific[name] = variants["z-scored"]
            rows += [
                {
                    "component": component, "localizer": name, "variant": variant,
                    "control": method.control or variant == "on another sequence",
                    **_measured(values, planted, graded), "seconds": seconds,
                }
                for variant, values in variants.items()
            ]  # fmt: skip
        if len(specific) == len(AVERAGED):
            values = np.stack([mean_ranks(list(each)) for each in zip(*specific.values(), strict=True)])
            seconds = sum(costs[name] for name in AVERAGED)
            rows.append(
                {
                    "component": component, "localizer": "averaged ranks", "variant": "z-scored",
                    "control": False,
                    **_measured(values, planted, graded), "seconds": seconds,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def _measured(values: np.ndarray, planted: np.ndarray, graded: np.ndarray) -> dict[str, float]:
    return pd.DataFrame([score_ranking(each, planted, graded) for each in values]).mean().to_dict()


def _arrays(model: Any, component: ComponentKind, truth: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    planted = np.zeros(component_shape(model, component), dtype=bool)
    graded = np.zeros(planted.shape)
    at = (truth["layer"].to_numpy(int), truth["index"].to_numpy(int))
    planted[at], graded[at] = truth["planted"].to_numpy(bool), truth["graded"].to_numpy(float)
    return planted, graded


def _variants(
    method: Localizer,
    scores: np.ndarray,
    model: Any,
    sequences: SequenceSet,
    others: SequenceSet,
    component: ComponentKind,
    twin: Any,
    seed: int,
) -> dict[str, np.ndarray]:
    found = {"": scores}
    if method.control:
        return found
    if method.specific:
        there = method(model, others, component=component, others=others, seed=seed)
        mean, spread = there.mean(0), there.std(0, ddof=1)
        found["less others"] = scores - mean
        found["z-scored"] = (scores - mean) / np.maximum(spread, 1e-6 + 1e-3 * spread.mean())
    else:
        there = method(model, others[:1], component=component, others=others[1:], seed=seed)
    found["on another sequence"] = there[:1]
    if twin is not None and method.specific:
        found["less twin"] = scores - method(twin, sequences, component=component, others=others, seed=seed)
    return found
