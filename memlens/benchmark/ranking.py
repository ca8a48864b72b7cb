"""`rank`: the components of a model in the order of a localizer, with what the benchmark found of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from memlens.benchmark.localizer import LOCALIZERS, Scores
from memlens.benchmark.measure import AVERAGED
from memlens.benchmark.recommend import CHEAP, affordable, method_name, recommended, what_is_known
from memlens.benchmark.scores import less_others, mean_ranks, z_scored
from memlens.errors import OptionError, SequenceError
from memlens.forward.components import Component, ComponentKind
from memlens.models.provenance import describe
from memlens.sequences.set import SequenceSet

FEWEST_OTHERS = 4
"""Fewest other sequences that "less others" and "z-scored" are computed with."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """The components of a kind, ranked.

    Attributes:
        table: One row per component, the first ranked first: `layer`, `index` and `score`, the mean over
            sequences (for "averaged ranks", of ranks).
        method: The localizer and its variant, in words.
        evidence: What the benchmark found of it, in one sentence.
        component: The kind.
    """

    table: pd.DataFrame
    method: str
    evidence: str
    component: ComponentKind

    def top(self, n: int) -> list[Component]:
        """Return the first `n` components, for `memlens.edits.edit_weights` and the like."""
        first = self.table.head(n)
        pairs = zip(first["layer"].tolist(), first["index"].tolist(), strict=True)
        return [Component(self.component, layer, index) for layer, index in pairs]


def best_method(
    component: ComponentKind, others: SequenceSet | None, most_forwards: float, family: str
) -> tuple[str, str]:
    """Return the localizer, and its variant, that the benchmark prefers at an acceptable cost, for `rank`.

    Args:
        component: "head", "neuron", "layer_mlp" or "layer_attention".
        others: The other sequences, of which "less others" and "z-scored" need at least `FEWEST_OTHERS`.
        most_forwards: As of `affordable`.
        family: Of the model, as `describe` names it.
    """
    best = affordable(component, most_forwards, family=family)
    localizer, variant = CHEAP[component] if best is None else (best.localizer, best.variant)
    return localizer, "" if others is None or len(others) < FEWEST_OTHERS else variant


def rank(
    model: Any,
    sequences: SequenceSet,
    component: ComponentKind = "head",
    *,
    others: SequenceSet | None = None,
    localizer: str | None = None,
    variant: str | None = None,
    seed: int = 0,
) -> Ranking:
    """Rank the components of a model by where sequences are stored.

    Args:
        model: A TransformerLens model.
        sequences: What is asked about.
        component: "head", "neuron", "layer_mlp" or "layer_attention".
        others: Sequences of the same kind that the model has not memorized; "less others" and "z-scored" need
            at least `FEWEST_OTHERS`.
        localizer: A localizer, or "averaged ranks"; by default the recommended one, with its variant.
        variant: "", "less others" or "z-scored"; "" by default where `localizer` is given.
        seed: For methods that draw.

    Raises:
        OptionError: An unknown localizer or variant, or one that does not rank this kind of component.
        SequenceError: A variant that needs other sequences, and too few of them.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> found = ml.benchmark.rank(model, seqs[:1], "neuron", others=seqs[-8:], localizer="gate gradient")
        >>> found.method, len(found.table), len(found.top(2))
        ('gate gradient', 3072, 2)
    """
    if localizer is None:
        chosen = recommended(component)
        localizer, variant = chosen.localizer, chosen.variant if variant is None else variant
    variant = variant or ""
    if variant not in ("", "less others", "z-scored"):
        raise OptionError(f"variant={variant!r}: choose from '', 'less others' and 'z-scored'.")
    names = AVERAGED if localizer == "averaged ranks" else (localizer,)
    if variant and (others is None or len(others) < FEWEST_OTHERS):
        n = 0 if others is None else len(others)
        raise SequenceError(
            f"{method_name(localizer, variant)} needs at least {FEWEST_OTHERS} other sequences, there are "
            f"{n}: give others=, or variant=''."
        )
    reference = sequences if others is None else others
    scores = [_scores(model, sequences, reference, component, name, variant, seed) for name in names]
    combined = scores[0]
    if localizer == "averaged ranks":
        combined = np.stack([mean_ranks(list(each)) for each in zip(*scores, strict=True)])
    mean = combined.mean(0)
    layer, index = (axis.ravel() for axis in np.indices(mean.shape))
    table = pd.DataFrame({"layer": layer, "index": index, "score": mean.ravel()})
    table = table.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)
    family = str(describe(model)["family"])
    evidence = what_is_known(localizer, variant, component, family)
    return Ranking(table, method_name(localizer, variant), evidence, component)


def _scores(
    model: Any,
    sequences: SequenceSet,
    others: SequenceSet,
    component: ComponentKind,
    name: str,
    variant: str,
    seed: int,
) -> Scores:
    method = LOCALIZERS[name]
    own = method(model, sequences, component=component, others=others, seed=seed)
    if not variant:
        return own
    there = method(model, others, component=component, others=others, seed=seed)
    return less_others(own, there) if variant == "less others" else z_scored(own, there)
