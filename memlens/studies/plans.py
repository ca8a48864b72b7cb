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


def plan_works(model: Any, works: Works, note: str = "", *, calibrate: bool = True) -> PlanTable:
    """Return what each sweep would cost on this machine.

    Args:
        model: A TransformerLens model.
        works: The sequences and interventions of each sweep, by its name.
        note: What the numbers leave out.
        calibrate: Also estimate the seconds, from a few timed layers.
    """
    import pandas as pd

    import memlens as ml

    rows = []
    for name, (seqs, edits) in works.items():
        cost = ml.plan(model, seqs, edits, calibrate=calibrate)
        seconds = {"seconds": cost.expected_seconds} if calibrate else {}
        rows.append(
            {
                "work": name,
                "sequences": cost.n_sequences,
                "interventions": cost.n_interventions,
                "block_forwards": cost.block_forwards,
                "times_fewer": cost.reference_block_forwards / max(1, cost.block_forwards),
                "gflop": (cost.block_flops + cost.unembed_flops) / 1e9,
                "mib": cost.bytes / 2**20,
                "parts": cost.n_parts,
                "part_gflop": cost.part_flops / 1e9,
                **seconds,
            }
        )
    frame = pd.DataFrame(rows)
    said = [] if rows else ["nothing to sweep"]
    if rows and calibrate:
        said.append(f"the sweeps together about {frame['seconds'].sum():,.0f} s here, nothing else included")
    return PlanTable(
        frame,
        "Sweeps; 'times_fewer': than one full forward pass per intervention",
        [*said, *filter(None, [note])],
        {"works": frame.to_dict("records"), "note": note},
    )
