"""What a study's sweeps would cost, counted before anything runs (`--plan`, `memlens plan`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memlens.cli.console import OUT, print_json, print_table, records

if TYPE_CHECKING:
    from memlens.instruments.tasks.tasks import ChoiceTask
    from memlens.sequences.set import SequenceSet
    from memlens.studies.bypass.options import BypassOptions
    from memlens.studies.idioms.options import IdiomOptions
    from memlens.studies.localization.study import LocalizeOptions
    from memlens.sweeps.interventions import Intervention

    Works = Mapping[str, tuple["SequenceSet", Sequence["Intervention"]]]


PLAN_NOTE = (
    "Counted as if as many sequences were recalled as are examined at most; matched controls cost the same "
    "again each."
)


def localize_works(model: Any, seqs: SequenceSet, options: LocalizeOptions | None = None) -> Works:
    """Return the sweeps of `localize`, on all sequences or on as many as `options` examine."""
    import memlens as ml

    some = seqs if options is None else seqs[: options.max_sequences]
    patched = seqs if options is None else seqs[: options.max_patched]
    return {
        "ablate each head": (some, ml.edits.head_ablations(model, some)),
        "bypass each layer": (some, ml.edits.attention_bypasses(model)),
        "patch layer x position": (patched, ml.edits.activation_patches(model, patched)),
    }


def idiom_works(model: Any, items: SequenceSet, options: IdiomOptions) -> Works:
    """Return the knock-out grid of the idiom study: k by window by first layer by choice of neurons."""
    from memlens.forward.read_weights import value_vectors
    from memlens.instruments.ablate.neurons import knock_out_sizes
    from memlens.studies.comparative.plan import counted_edit

    n_layers, width = len(model.blocks), int(value_vectors(model, 0).shape[0])
    works: dict[str, tuple[SequenceSet, Sequence[Intervention]]] = {}
    for word, keep in (("dominant", False), ("all other", True)):
        if not options.knock_out or (keep and not options.non_top):
            continue
        ks, windows = knock_out_sizes(n_layers, width, options.top_k, options.windows, keep=keep)
        edits = [
            counted_edit("mlp_post", range(first, first + window), number)
            for window in windows
            for first in range(n_layers - window + 1)
            for number in range(len(ks))
        ]
        works[f"knock out {word} neurons"] = (items[: options.max_items], edits)
        if not keep and len(options.selections) > 1:
            chosen = edits * (len(options.selections) - 1) * options.n_draws
            works["the same, chosen otherwise"] = (items[: options.max_controls], chosen)
    return works


def bypass_works(
    model: Any, tasks: Sequence[ChoiceTask], options: BypassOptions, prefix_len: int, suffix_len: int
) -> Works:
    """Return the sweeps of the bypass study that are known before its sequences are."""
    import memlens as ml
    from memlens.instruments.tasks.tasks import joined_requests
    from memlens.studies.comparative.plan import blank_sequences

    blocks = ml.edits.attention_bypasses(model)
    examined = blank_sequences(options.max_sequences, prefix_len + suffix_len, prefix_len)
    works: dict[str, tuple[SequenceSet, Sequence[Intervention]]] = {"bypass each block": (examined, blocks)}
    if tasks:
        works["tasks, each block bypassed"] = (joined_requests(tasks), blocks)
    if options.heads:
        heads = ml.edits.attention_bypasses(model, over="head")
        works["bypass each head"] = (examined[: options.control_sequences], heads)
    return works


def print_plans(model: Any, works: Works, *, as_json: bool, note: str = "") -> None:
    """Print what each sweep would cost here: a table, or JSON."""
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
    if as_json:
        print_json({"works": records(frame), "note": note})
        return
    print_table(frame, "Cost; 'times_fewer' than one full forward for each intervention")
    OUT.print(f"together about {frame['seconds'].sum():,.0f} s on this machine" if rows else "nothing to run")
    if note:
        OUT.print(note)
