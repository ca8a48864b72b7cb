"""Which memorized sequences can be reached through MLPs, through heads, through both or neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pandas as pd

from memlens.errors import EmptySetError, OptionError, check_option
from memlens.forward.components import Component
from memlens.forward.exclusive import computes
from memlens.instruments.edit.editing import HOWS, check_used, edit_weights, used_by
from memlens.instruments.edit.options import How, VectorSearch
from memlens.recall.score import score_recall
from memlens.sequences.set import SequenceSet
from memlens.sweeps.run import sweep

Locate = Callable[[SequenceSet], Iterable[Component | str]]
"""Returns the components to edit for a set of one sequence."""


@computes
def split_by_reach(
    model: Any,
    sequences: SequenceSet,
    *,
    neurons: Locate,
    heads: Locate,
    neuron_how: How = "output_vector",
    head_how: How = "zero",
    keep: SequenceSet | None = None,
    strength: float = 1.0,
    search: VectorSearch | None = None,
    copied: float = 0.5,
) -> pd.DataFrame:
    """Edit each sequence's own neurons, and apart from that its own heads, and see which edit suppresses it.

    A sequence is reachable through MLPs if the model recalls it (exact match) and no longer does when its
    neurons are edited; through heads likewise.

    Args:
        model: A TransformerLens model.
        sequences: Memorized sequences.
        neurons: Which neurons (or MLPs) to edit for one sequence, such as
            ``lambda one: memlens.benchmark.rank(model, one, "neuron", others=others).top(20)``.
        heads: Which heads (or attention).
        neuron_how: Kind of edit of the neurons; see `edit_weights`.
        head_how: Kind of edit of the heads.
        keep: As of `edit_weights`, for the searched edits; the sequence itself is left out of it.
        strength: As of `edit_weights`; for "zero" at most 1.
        search: Parameters of the search of output vectors.
        copied: The smallest `copied_share` with which a continuation copies its prefix.

    Returns:
        One row per sequence: `id`; `recalled`; `mlp_logprob` and `head_logprob`, the change of the target's
        mean log-probability under each edit (nats); `mlp_reachable` and `head_reachable`; `reach`: "both",
        "MLP", "head", "neither", or "not recalled"; `copied_share` and `copies_prefix`.

    Raises:
        EmptySetError: There are no sequences.
        OptionError: A kind of edit that needs a reference ("mean"), an option that neither kind uses, or what
            `edit_weights` raises.

    Source: the split is that of arXiv 2606.18767 (of which only the abstract was known to us), with edits of
    our own.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> often = seqs[seqs.table["copies"].to_numpy() == 256][:2]
        >>> split = ml.instruments.split_by_reach
        >>> found = split(model, often, neurons=lambda one: ["L0N5"], heads=lambda one: ["L0H1", "L0H4"],
        ...               neuron_how="zero")
        >>> bool(found["reach"].isin(["both", "MLP", "head", "neither"]).all())
        True
    """
    if not len(sequences):
        raise EmptySetError("there are no sequences to split: give at least one.")
    hows = list(dict.fromkeys((neuron_how, head_how)))
    for how in hows:
        check_option("how", how, HOWS)
    if "mean" in hows:
        raise OptionError("a mean needs a reference set: give another kind of edit.")
    for name, locate in (("neurons", neurons), ("heads", heads)):
        if not callable(locate):
            raise OptionError(
                f"{name} is a {type(locate).__name__}: give a function that returns the components for a set "
                "of one sequence."
            )
    check_used(hows, keep=keep, search=search)
    if hows == ["zero"] and strength > 1:
        raise OptionError(f"strength={strength} with how='zero': give a number above 0 and at most 1.")
    if not 0 <= copied <= 1:
        raise OptionError(f"copied={copied}: give a share of the continuation, from 0 to 1.")
    trivial = score_recall(model, sequences, generate=False, metrics=("trivial",), progress=False).table
    rows = []
    for i, name in enumerate(sequences.ids):
        one = sequences[i : i + 1]
        others = None if keep is None else _without(keep, one)
        edits = []
        plans: list[tuple[str, Locate, How]] = [("mlp", neurons, neuron_how), ("head", heads, head_how)]
        for site, locate, how in plans:
            full = strength if how in ("output_vector", "norm_preserving") else min(strength, 1.0)
            used = used_by(how, sequences=one, keep=others, search=search)
            edit = edit_weights(model, locate(one), how, strength=full, progress=False, **used)
            edits.append(replace(edit, coords={"site": site}))
        found = sweep(model, one, edits, progress=False)
        recalled = bool(found.baseline("exact_match").item() == 1)
        lost = (found["exact_match"].sel(site=["mlp", "head"]).values[0] == 0) & recalled
        change = found.effect("target_logprob").sel(site=["mlp", "head"]).values[0]
        share = float(trivial["copied_share"].iloc[i])
        rows.append(
            {
                "id": name,
                "recalled": recalled,
                "mlp_logprob": float(change[0]),
                "head_logprob": float(change[1]),
                "mlp_reachable": bool(lost[0]),
                "head_reachable": bool(lost[1]),
                "reach": _REACH[bool(lost[0]), bool(lost[1])] if recalled else "not recalled",
                "copied_share": share,
                "copies_prefix": share >= copied,
            }
        )
    return pd.DataFrame(rows)


_REACH = {(True, True): "both", (True, False): "MLP", (False, True): "head", (False, False): "neither"}


def _without(seqs: SequenceSet, one: SequenceSet) -> SequenceSet:
    own = tuple(one.rows()[0])
    return seqs[[i for i, row in enumerate(seqs.rows()) if tuple(row) != own]]
