"""Running localizers on one organism and comparing their rankings with what was planted."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from memlens.benchmark.cost import Cost, Timer, forward_operations, operations
from memlens.benchmark.deletion import deletions, top_k
from memlens.benchmark.localizer import LOCALIZERS, Localizer, component_shape
from memlens.benchmark.scores import (
    Z_EDGES,
    less_others,
    mean_ranks,
    overlap,
    planted_ranks,
    score_ranking,
    z_scored,
)
from memlens.forward.components import COMPONENT_KINDS, ComponentKind
from memlens.forward.exclusive import computes
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

RERUN_BELOW = 60
"""A method whose scores depend on its seed or references is run again on every organism, for `uniqueness`,
if it costs less than this many forward passes; a costlier one only on the first organism of a run."""

Costs = MutableMapping[tuple[str, str], Cost]
"""What each localizer costs, by kind of component and name."""


@computes
def measure_organism(
    model: Any,
    sequences: SequenceSet,
    others: SequenceSet,
    truth: pd.DataFrame,
    *,
    twin: Any = None,
    localizers: Sequence[str] | None = None,
    seed: int = 0,
    costs: Costs | None = None,
) -> pd.DataFrame:
    """Score every localizer on an organism.

    Args:
        model: The organism as a TransformerLens model.
        sequences: What was planted.
        others: Sequences of the same kind that were not; the first of them is the control sequence.
        truth: As `planting.folder.truth_table` gives it. Kinds of component that it does not name are left
            out. With a column `draw` it holds several truths, one per draw, over which the measures are
            means; this is for carriers without a truth, to show that methods are at chance.
        twin: The model without the memory, for the variant "less twin"; left out by default.
        localizers: Names; all by default.
        seed: For methods that draw.
        costs: What is known of the localizers' costs, from a model of this size. What is missing is counted,
            which runs each method three times more, and added.

    Returns:
        One row per kind of component, localizer and variant: `component`, `localizer`, `variant`, `control`,
        `twin` (whether it needs the model without the memory), the measures of `score_ranking` (means over
        the planted sequences), and

        - `seconds`, `cpu_seconds`, `forwards` (see `Cost`): of the method on the planted sequences alone.
          The variants "less others" and "z-scored" cost `forwards_others` on top, once per model, and "less
          twin" as much again;
        - `uniqueness`: overlap (Jaccard index) of the first k. For the method as it is, between this run and
          one with another seed and half of the others as reference, 1 where neither matters; for "less
          others" and "z-scored", between the two halves of the others;
        - `deletion`, `deletion_others`, `deletion_specific`, `deletion_random`: see `deletions`; NaN where
          the truth is drawn;
        - `planted_ranks`: the ranks of the planted components, from 1, of all planted sequences together;
          `n_rankings`, how many sequences were ranked; for "z-scored", `z_counts` and `z_planted`: how many
          components, and planted ones, have a z between the edges `Z_EDGES`.

    Example:
        >>> import memlens as ml
        >>> organism = ml.zoo.read_organism("organism")  # of `memlens organisms plant`  # doctest: +SKIP
        >>> model, truth = ml.load_model(organism.model), ml.zoo.truth_table(organism)  # doctest: +SKIP
        >>> others = ml.load_sequences("zoo", model)[:16]  # doctest: +SKIP
        >>> ml.benchmark.measure_organism(model, organism.sequences, others, truth)  # doctest: +SKIP
    """
    names = list(localizers) if localizers is not None else LOCALIZERS.names()
    costs = {} if costs is None else costs
    one = forward_operations(model, sequences) if len(sequences) else 1
    rows: list[dict[str, Any]] = []
    for component in COMPONENT_KINDS:
        own: Any = truth[truth["kind"] == component]
        if own.empty:
            continue
        study = _Study(model, sequences, others, component, twin, seed, one)
        found: list[_Ranking] = []
        for name in names:
            method = LOCALIZERS[name].given(twin)
            if component in method.components:
                found += study.rankings(method, costs, needs_twin=LOCALIZERS[name].twin)
        found += _averaged(found)
        rows += _rows(study, found, own)
    return pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class _Ranking:
    """One variant of a method's scores; `again` are two versions of it that uniqueness compares."""

    localizer: str
    variant: str
    control: bool
    scores: np.ndarray
    cost: dict[str, float]
    again: tuple[np.ndarray, np.ndarray] | None = None
    twin: bool = False


@dataclass(frozen=True, eq=False)
class _Study:
    """One organism and one kind of component; `one` is the operations of a forward pass."""

    model: Any
    sequences: SequenceSet
    others: SequenceSet
    component: ComponentKind
    twin: Any
    seed: int
    one: int

    @property
    def halves(self) -> tuple[slice, slice] | None:
        """Two halves of the others, of at least two each."""
        return (slice(0, None, 2), slice(1, None, 2)) if len(self.others) > 3 else None

    def rankings(self, method: Localizer, costs: Costs, *, needs_twin: bool) -> list[_Ranking]:
        run = partial(method, component=self.component, others=self.others, seed=self.seed)
        timer = Timer()
        scores = run(self.model, self.sequences)
        timer.stop()
        there, again = None, None
        key = self.component, method.name
        first = key not in costs
        if first:
            counted = operations(partial(run, self.model, self.sequences))[1] / self.one
            counted_there, varies = 0.0, True
            if method.specific and not method.control:
                there, work = operations(partial(run, self.model, self.others))
                counted_there = work / self.one
            if self.halves is not None:
                again = self._again(method)
                other = self._again(method, 0)  # no reference in common, so that no draw can be the same
                varies = not np.allclose(again, other, rtol=1e-4, atol=1e-6)
            costs[key] = Cost(counted, counted_there, varies)
        known = costs[key]
        if self.halves is not None and not first:
            again = scores
            if known.varies:
                again = self._again(method) if known.forwards < RERUN_BELOW else None
        cost = {
            **timer.columns(), "forwards": known.forwards, "forwards_others": known.forwards_others,
        }  # fmt: skip
        made = partial(_Ranking, method.name, cost=cost, twin=needs_twin)
        found = [made("", method.control, scores, again=None if again is None else (scores, again))]
        if method.control:
            return found
        if method.specific:
            there = run(self.model, self.others) if there is None else there
            for variant, compare in (("less others", less_others), ("z-scored", z_scored)):
                twice = None
                if self.halves is not None:
                    twice = compare(scores, there[self.halves[0]]), compare(scores, there[self.halves[1]])
                found.append(made(variant, False, compare(scores, there), again=twice))
        else:
            there = method(
                self.model, self.others[:1], component=self.component, others=self.others[1:], seed=self.seed
            )
        found.append(made("on another sequence", True, there[:1]))
        if self.twin is not None and method.specific and not needs_twin:
            own = run(self.twin, self.sequences)
            found.append(replace(made("less twin", False, scores - own), twin=True))
        return found

    def _again(self, method: Localizer, half: int = 1) -> np.ndarray:
        """Return the scores under another seed and half of the others."""
        others = self.others[half::2]
        return method(
            self.model, self.sequences, component=self.component, others=others, seed=self.seed + 2 - half
        )


def _averaged(found: list[_Ranking]) -> list[_Ranking]:
    """Return the averaged ranks of the z-scored rankings of `AVERAGED`, if all are there."""
    parts = [r for r in found if r.localizer in AVERAGED and r.variant == "z-scored"]
    if len(parts) < len(AVERAGED):
        return []

    def together(several: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack([mean_ranks(list(each)) for each in zip(*several, strict=True)])

    twice = [p.again for p in parts if p.again is not None]
    again = None
    if len(twice) == len(parts):
        again = together([a for a, _ in twice]), together([b for _, b in twice])
    cost = {name: sum(p.cost[name] for p in parts) for name in parts[0].cost}
    return [_Ranking("averaged ranks", "z-scored", False, together([p.scores for p in parts]), cost, again)]


def _rows(study: _Study, found: list[_Ranking], truth: pd.DataFrame) -> list[dict[str, Any]]:
    drawn = "draw" in truth
    groups: Any = truth.groupby("draw") if drawn else [(0, truth)]
    truths = [_arrays(study.model, study.component, own) for _, own in groups]
    k = int(truths[0][0].sum())
    rows = []
    for ranking in found:
        scored = [score_ranking(each, *pair) for pair in truths for each in ranking.scores]
        rows.append(
            {
                "component": study.component, "localizer": ranking.localizer, "variant": ranking.variant,
                "control": ranking.control, "twin": ranking.twin, **pd.DataFrame(scored).mean().to_dict(),
                **ranking.cost, "uniqueness": _uniqueness(ranking, k),
            }
        )  # fmt: skip
        if not drawn:
            rows[-1] |= _calibration(ranking, truths[0][0])
    if found and not drawn and 0 < k < truths[0][0].size:
        sets = [[top_k(each, k) for each in r.scores] for r in found]
        lost = deletions(study.model, study.sequences, study.others, study.component, sets, seed=study.seed)
        rows = [row | own for row, own in zip(rows, lost, strict=True)]
    return rows


def _uniqueness(ranking: _Ranking, k: int) -> float:
    if ranking.again is None or not k:
        return float("nan")
    return float(np.mean([overlap(a, b, k) for a, b in zip(*ranking.again, strict=True)]))


def _calibration(ranking: _Ranking, planted: np.ndarray) -> dict[str, Any]:
    ranks = [rank for each in ranking.scores for rank in planted_ranks(each, planted)]
    found: dict[str, Any] = {"planted_ranks": ranks, "n_rankings": len(ranking.scores)}
    if ranking.variant == "z-scored" and ranking.localizer != "averaged ranks":
        found["z_counts"] = np.histogram(ranking.scores, Z_EDGES)[0].tolist()
        found["z_planted"] = np.histogram(ranking.scores[:, planted], Z_EDGES)[0].tolist()
    return found


def _arrays(model: Any, component: ComponentKind, truth: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    planted = np.zeros(component_shape(model, component), dtype=bool)
    graded = np.zeros(planted.shape)
    at = (truth["layer"].to_numpy(int), truth["index"].to_numpy(int))
    planted[at], graded[at] = truth["planted"].to_numpy(bool), truth["graded"].to_numpy(float)
    return planted, graded
