"""What a study would cost, counted before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from memlens.sequences.set import SequenceSet
    from memlens.sweeps.interventions import Intervention
    from memlens.sweeps.roofline import Device

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
        parts: How many parts processes can share.
        part_gflop: The operations of the largest.
    """

    table: pd.DataFrame
    title: str
    notes: Sequence[str]
    document: Mapping[str, Any]
    parts: int = 0
    part_gflop: float = 0.0


def blank_sequences(n: int, length: int, prefix_len: int) -> SequenceSet:
    """Return sequences of which only the lengths matter."""
    import torch

    import memlens as ml

    return ml.SequenceSet.from_tokens(torch.zeros((n, length), dtype=torch.long), prefix_len)


def plan_works(
    model: Any, works: Works, note: str = "", *, calibrate: bool = True, on: Device | str | None = None
) -> PlanTable:
    """Return what each sweep would cost on this machine, or by the roofline on another device.

    Args:
        model: A TransformerLens model.
        works: The sequences and interventions of each sweep, by its name.
        note: What the numbers leave out.
        calibrate: Also estimate the seconds, from a few timed layers.
        on: The other device, as for `memlens.plan`.
    """
    import pandas as pd

    import memlens as ml
    from memlens.sweeps.roofline import LEFT_OUT, device_for

    place = next(model.parameters())
    device = None if on is None else device_for(on, place.device, place.dtype)
    calibrate = calibrate and device is None
    rows: list[dict[str, Any]] = []
    operators: dict[str, Any] = {}
    for name, (seqs, edits) in works.items():
        cost = ml.plan(model, seqs, edits, calibrate=calibrate, on=device)
        seconds: dict[str, Any] = {"seconds": cost.expected_seconds} if calibrate else {}
        if cost.roofline is not None:
            line = cost.roofline
            seconds = {"seconds": line.seconds, "memory_bound": line.memory_share, "fits": line.fits}
            operators[name] = line.to_frame().to_dict("records")
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
    document: dict[str, Any] = {"works": frame.to_dict("records"), "note": note}
    title = "Sweeps; 'times_fewer': than one full forward pass per intervention"
    if device is not None:
        document |= {"on": asdict(device), "operators": operators, "left_out": LEFT_OUT}
        title += f"; seconds on {device.name} by the roofline, 'memory_bound': the share that memory binds"
        if rows:
            said.append(f"the sweeps together at least {frame['seconds'].sum():.2g} s on {device.name}")
        said.append(f"Not counted: {', '.join(LEFT_OUT)}.")
    parts = sum(row["parts"] for row in rows)
    largest = max((row["part_gflop"] for row in rows), default=0.0)
    return PlanTable(frame, title, [*said, *filter(None, [note])], document, parts, largest)
