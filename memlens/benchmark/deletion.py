"""Deletion: what is lost when the first k components of a ranking are set to zero together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from memlens.benchmark.localizer import component_shape
from memlens.forward.components import ComponentKind
from memlens.instruments.ablate.replacing import Cell, Replacement
from memlens.sequences.set import SequenceSet
from memlens.sweeps.run import sweep

_METRIC = "target_logprob"
_SITES = {"head": "z", "neuron": "mlp_post", "layer_mlp": "mlp_out", "layer_attention": "attn_out"}
RANDOM_SETS = 8
"""Equally large random sets that deletion is compared with."""
MOST_OTHERS = 8
"""Most other sequences on which deletion is measured."""

TopK = tuple[int, ...]
"""Components by their place in the flattened scores, sorted."""


def top_k(scores: np.ndarray, k: int) -> TopK:
    """Return the k components with the highest scores; of equal ones, the first.

    >>> top_k(np.array([[0.1, 0.5], [0.9, 0.2]]), 2)
    (1, 2)
    """
    return tuple(sorted(np.argsort(-scores.ravel(), kind="stable")[:k].tolist()))


def deletions(
    model: Any,
    sequences: SequenceSet,
    others: SequenceSet,
    component: ComponentKind,
    sets: Sequence[Sequence[TopK]],
    *,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Set each ranking's first components to zero and measure what the model loses.

    Args:
        model: A TransformerLens model.
        sequences: The planted sequences.
        others: Others; at most `MOST_OTHERS` of them are used.
        component: The kind of component.
        sets: For each ranking one set per planted sequence, or a single one for all of them. All sets have
            one size.
        seed: Draws the random sets.

    Returns:
        For each ranking, in nats per target token: `deletion`, the fall of the target log-probability on the
        planted sequences; `deletion_others`, the same on the others; `deletion_specific`, their difference;
        and `deletion_random`, the `deletion_specific` of random sets of the same size, mean over
        `RANDOM_SETS`.
    """
    shape = component_shape(model, component)
    size, k = shape[0] * shape[1], len(sets[0][0])
    random = np.random.default_rng([seed, 7])
    drawn = [tuple(sorted(random.choice(size, k, replace=False).tolist())) for _ in range(RANDOM_SETS)]
    distinct = list(dict.fromkeys([*(s for ranking in sets for s in ranking), *drawn]))
    place = {chosen: i for i, chosen in enumerate(distinct)}
    cells: list[Cell] = [
        (f"delete {i}", _parts(chosen, shape, component), {"ranking": i}) for chosen, i in place.items()
    ]
    few = others[:MOST_OTHERS]
    here, there = (_lost(model, seqs, component, cells) for seqs in (sequences, few))
    control = np.mean([here[:, place[s]].mean() - there[:, place[s]].mean() for s in drawn])
    found = []
    for ranking in sets:
        own = [place[s] for s in ranking]
        planted = here[np.arange(len(own)), own].mean() if len(own) == len(here) else here[:, own].mean()
        other = there[:, own].mean()
        found.append(
            {
                "deletion": float(planted), "deletion_others": float(other),
                "deletion_specific": float(planted - other), "deletion_random": float(control),
            }
        )  # fmt: skip
    return found


def _lost(model: Any, sequences: SequenceSet, component: ComponentKind, cells: list[Cell]) -> np.ndarray:
    """Return the fall of the target log-probability, `(sequence, set)`."""
    edits = Replacement("zero").interventions(model, sequences, _SITES[component], cells)
    result = sweep(model, sequences, edits, (_METRIC,), progress=False)
    return -result.effect(_METRIC).transpose("sequence", "ranking").values


def _parts(chosen: TopK, shape: tuple[int, int], component: ComponentKind) -> dict[int, list[int] | None]:
    """Return the chosen components of each layer; None for a layer's whole output."""
    parts: dict[int, Any] = {}
    for layer, index in zip(*np.unravel_index(chosen, shape), strict=True):
        if component.startswith("layer"):
            parts[int(layer)] = None
        else:
            parts.setdefault(int(layer), []).append(int(index))
    return parts
