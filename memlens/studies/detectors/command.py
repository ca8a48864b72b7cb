"""The command `memlens run detectors`."""

from __future__ import annotations

from typing import Any

from pydantic import PositiveInt

from memlens.options import options_class
from memlens.studies.detectors.options import DetectorOptions
from memlens.studies.plans import NOTE, PlanTable, plan_works
from memlens.studies.registry import STUDIES, Call, SequenceChoice, Study


@options_class
class DetectorInputs(SequenceChoice):
    """A model, the sequences that it may recall, and canaries."""

    canaries: str | None = None
    """Sequences of one format, such as identifiers, for exposure and prediction invariance; for the zoo's own
    sequences its identifiers."""
    digits: PositiveInt = 6
    """How many digits the continuation of a canary has."""

    def read(self, call: Call) -> dict[str, Any]:
        """Load the model, the sequences and the canaries; the zoo has tasks of its own."""
        import memlens as ml

        given = super().read(call)
        model, zoo = given["model"], self.sequences == "zoo"
        source = self.canaries or ("zoo:identifiers" if zoo else None)
        if source is not None:
            given["canaries"] = ml.load_sequences(source, model, limit=self.limit)
            given["slots"] = ml.detect.digit_slots(model, self.digits)
        if zoo:
            given["tasks"] = ml.tasks.local_tasks("zoo", model, names=["arithmetic", "agreement"])
        return given

    def plan(self, call: Call) -> PlanTable:
        """Count the dose curve, the one sweep of the study."""
        import memlens as ml
        from memlens.studies.comparative.plan import counted_edit

        model, options = call.load(), call.options
        seqs = self.load(model)[: options.max_steered]
        number = len(options.alphas) * (1 + options.n_random)
        edits = [counted_edit("mlp_post", range(len(model.blocks)), i) for i in range(number)]
        works: dict[str, tuple[ml.SequenceSet, Any]] = {"steer along behaviour neurons": (seqs, edits)}
        return plan_works(model, works, NOTE, calibrate=False)


STUDIES.add(
    "detectors",
    Study(
        run="memlens.studies.detectors.study:study_detectors",
        options=DetectorOptions,
        inputs=DetectorInputs,
        help="Run every detector: what does each tell of recall beyond copies and other confounds?",
        example="memlens run detectors --model zoo/pythia-s --sequences zoo --out my-detectors",
        sizes=("max_sequences", "max_steered", "max_canaries"),
        scales={
            "": "max_sequences",
            "recall": "sequences",
            "exposure": "max_canaries",
            "prediction invariance": "max_canaries",
            "reading": "",
            "report": "",
        },
    ),
)
