"""What a study would cost, counted before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from memlens.sequences.set import SequenceSet
    from memlens.sweeps.interventions import Intervention

    Works = Mapping[str, tuple["SequenceSet", Sequence["Intervention"]]]

NOTE = (
    "Counted as if as many sequences were recalled as are examined at most; each matched control group costs "
    "the same again."
)


@dataclass(frozen=True)
class PlanTable:
    """The cost of a study.

    Attributes:
        table: What is printed.
        title: Its heading.
        notes: Lines below it.
        document: The same as one JSON object.
    """

    table: pd.DataFrame
    title: str
    notes: Sequence[str]
    document: Mapping[str, Any]


def blank_sequences(n: int, length: int, prefix_len: int) -> SequenceSet:
    """Return sequences of which only the lengths matter."""
    import torch

    import memlens as ml

    return ml.SequenceSet.from_tokens(torch.zeros((n, length), dtype=torch.long), prefix_len)


def plan_works(model: Any, works: Works, note: str = "") -> PlanTable:
    """Return what each sweep would cost on this machine.

    Args:
        model: A TransformerLens model.
        works: The sequences and interventions of each sweep, by its name.
        note: What the numbers leave out.
    """
    import pandas as pd

    import memlens as ml

    rows = []
    for name, (seqs, edits) in works.items():
        cost = ml.plan(model, seqs, edits)
        rows.append(
            {
                "work": name,
                "sequences": cost.n_sequences,
                "interventions": cost.n_interventions,
                "block_forwards": cost.block_forwards,
                "times_fewer": cost.reference_block_forwards / max(1, cost.block_forwards),
                "gflop": (cost.block_flops + cost.unembed_flops) / 1e9,
                "mib": cost.bytes / 2**20,
                "seconds": cost.expected_seconds,
            }
        )
    frame = pd.DataFrame(rows)
    total = f"together about {frame['seconds'].sum():,.0f} s on this machine" if rows else "nothing to run"
    return PlanTable(
        frame,
        "Cost; 'times_fewer': than one full forward pass per intervention",
        [total, *([note] if note else [])],
        {"works": frame.to_dict("records"), "note": note},
    )
