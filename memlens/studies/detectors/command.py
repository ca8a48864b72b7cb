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
    text: str | None = None
    """General text for the curvature, in the forms of the sequences; for the zoo's own sequences its held-out
    texts."""

    def read(self, call: Call) -> dict[str, Any]:
        """Load the model, the sequences and the canaries; the zoo has tasks of its own."""
        import memlens as ml

        given = super().read(call)
        model, zoo = given["model"], self.sequences == "zoo"
        source = self.canaries or ("zoo:identifiers" if zoo else None)
        if source is not None:
            given["canaries"] = ml.load_sequences(source, model, limit=self.limit)
            given["slots"] = ml.detect.digit_slots(model, self.digits)
        if text := self.text or ("zoo:heldout" if zoo else None):
            given["text"] = ml.load_sequences(text, model, limit=self.limit)
        if zoo:
            given["tasks"] = ml.tasks.local_tasks("zoo", model, names=["arithmetic", "agreement"])
        return given

    def plan(self, call: Call) -> PlanTable:
        """Count the sweeps of the study: dose curves, curvature, and heads and layers in three prompts."""
        import memlens as ml
        from memlens.studies.comparative.plan import counted_edit

        model, options = call.load(), call.options
        seqs, zoo, layers = self.load(model), self.sequences == "zoo", range(len(model.blocks))

        def counted(site: str, number: int) -> list[ml.Intervention]:
            return [counted_edit(site, layers, i) for i in range(number)]

        few, n_shifts = seqs[: options.max_steered], 1 + options.n_random
        doses = counted("mlp_post", len(options.alphas) * n_shifts)
        works: dict[str, tuple[ml.SequenceSet, Any]] = {"steer along behaviour neurons": (few, doses)}
        if zoo:
            doses = counted("mlp_post", len(options.answering_alphas) * n_shifts)
            works["steer along neurons of recalling or answering"] = few, doses
        if zoo or self.text:
            text = ml.load_sequences(self.text or "zoo:heldout", model, limit=self.limit)
            edits = counted("mlp_out", 2 * len(options.kept))
            works["curvature, recalled"] = few, edits
            works["curvature, other text"] = text[: min(options.max_text, len(text) // 2)], edits
        works |= self._context_works(model, seqs[: options.max_context], options)
        return plan_works(model, works, NOTE, calibrate=False, on=call.on)

    @staticmethod
    def _context_works(model: Any, seqs: Any, options: DetectorOptions) -> dict[str, tuple[Any, Any]]:
        """Return the sweeps over prompts that hold the text once or twice; none if it fits once only."""
        import memlens as ml
        from memlens.studies.comparative.plan import counted_edit
        from memlens.studies.plans import blank_sequences

        prefix = int(seqs.prefix_len.max())
        fit = ml.detect.longest_targets(model, seqs, options=options.context())
        once = prefix + min(fit, options.context_targets, int(seqs.n_targets.max()))
        if 2 * once >= model.cfg.n_ctx:
            return {}
        alone = blank_sequences(len(seqs), once, prefix)
        twice = blank_sequences(len(seqs), 2 * once + 1, once + 1 + prefix)
        layers = range(len(model.blocks))
        heads = [counted_edit("z", [layer], i) for layer in layers for i in range(model.cfg.n_heads)]
        whole = [counted_edit(site, [layer]) for layer in layers for site in ("attn_out", "mlp_out")]
        prompts = {"alone": alone, "repeated": twice, "conflict": twice}
        works = {f"ablate heads, {name}": (prompt, heads) for name, prompt in prompts.items()}
        prompts = {"alone": alone, "repeated": twice, "copied": twice}
        patched = [*heads, *whole]
        return works | {f"patch heads and layers, {name}": (p, patched) for name, p in prompts.items()}


STUDIES.add(
    "detectors",
    Study(
        run="memlens.studies.detectors.study:study_detectors",
        options=DetectorOptions,
        inputs=DetectorInputs,
        help="Run every detector: what does each tell of recall beyond copies and other confounds?",
        example="memlens run detectors --model zoo/pythia-s --sequences zoo --out my-detectors",
        alone="the parts of this study follow from one another (neurons are found, then steered along), and "
        "few of them are sweeps that could be shared",
        sizes=("max_sequences", "max_steered", "max_canaries", "max_text", "max_modules", "max_context"),
        scales={
            "": "max_sequences",
            "recall": "sequences",
            "attention by class": "sequences",
            "recalling or answering": "max_sequences",
            "curvature": "max_text",
            "modules": "max_modules",
            "context or weights": "max_context",
            "context patching": "max_context",
            "exposure": "max_canaries",
            "prediction invariance": "max_canaries",
            "reading": "",
            "report": "",
        },
    ),
)
