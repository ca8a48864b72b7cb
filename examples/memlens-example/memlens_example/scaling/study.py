"""The study: score recall, scale each MLP, and write a report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from memlens.models.provenance import describe
from memlens.report.model import FigureRequest, Finding
from memlens.results.statistics.estimates import Estimate
from memlens.sequences.set import SequenceSet
from memlens.studies.running import StudyDirectory, StudyRun, at_most
from memlens_example.instrument import scale_mlps
from memlens_example.scaling.options import ScalingOptions


def study_scaling(
    model: Any,
    sequences: SequenceSet,
    out: str | Path,
    *,
    options: ScalingOptions | None = None,
    command: str | None = None,
    progress: bool = True,
) -> StudyRun:
    """Scale each MLP and see what is still recited; results and report are written to a folder."""
    options = options or ScalingOptions()
    settings = {"study": "scaling", "model": describe(model), **asdict(options)}
    folder = StudyDirectory(out, title="Scaled MLPs", settings=settings, command=command, fresh=True)
    recall = folder.scored("recall", model, sequences, progress=progress)
    memorized = at_most(recall.memorized(), options.max_sequences, options.seed)

    def scaling() -> None:
        given = {"factor": options.factor, "progress": progress}
        result = folder.kept("scaling", lambda out: scale_mlps(model, memorized, out=out, **given))
        folder.add_result("scaling", result, title="Each MLP scaled", figures=[FigureRequest()])
        means = result.mean_ci(metric="target_logprob", of="effect")["target_logprob"]
        worst = means.isel(layer=int(means.sel(statistic="mean").argmin("layer")))
        found = Estimate.of(worst)
        statement = f"Scaling the MLP of layer {int(worst['layer'])} harms recall most."
        if found.value >= 0:
            statement = "Scaling one MLP harms recall in no layer."
        folder.find(Finding.of("Which MLP", statement, found, unit="nats"))

    folder.step("scaling", scaling)
    return folder.done()
