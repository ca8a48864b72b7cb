"""The command `memlens run localize`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from memlens.options import options_class
from memlens.studies.localization.options import LocalizeOptions
from memlens.studies.plans import NOTE, PlanTable, plan_works
from memlens.studies.registry import STUDIES, Call, SequenceChoice, Study

if TYPE_CHECKING:
    from memlens.sequences.set import SequenceSet
    from memlens.studies.plans import Works


@options_class
class LocalizeInputs(SequenceChoice):
    """A model and the sequences that it may recall."""

    def plan(self, call: Call) -> PlanTable:
        """Count the three sweeps."""
        model = call.load()
        return plan_works(
            model, localize_works(model, self.load(model), call.options), NOTE, calibrate=False, on=call.on
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


STUDIES.add(
    "localize",
    Study(
        run="memlens.studies.localization.study:localize",
        options=LocalizeOptions,
        inputs=LocalizeInputs,
        shares=True,
        help="Score, decode, ablate, bypass and patch: where does this model recall these sequences?",
        example="memlens run localize --model zoo/pythia-s --sequences zoo --out my-run",
        sizes=(
            "max_sequences",
            "max_patched",
            "ranked_sequences",
            "explored_memorized",
            "explored_controls",
        ),
        scales={
            "": "max_sequences",
            "recall": "sequences",
            "decoding": "sequences",
            "patching": "max_patched",
            "patching from the donor": "max_sequences",
            "rankings": "ranked_sequences",
            "explorer": "explored_memorized",
            "reading": "",
            "report": "",
        },
    ),
)
