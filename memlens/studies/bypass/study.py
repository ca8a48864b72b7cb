"""The attention-bypass study: what each block's attention gives to recitation, and what else hangs on it.

After Menta, Agrawal and Agarwal, "Analyzing Memorization in LLMs through the Lens of Model Attribution"
(arXiv 2501.05078). The bypass is theirs; the matched controls, intervals, halves, the search over sets of
blocks, selectivity and bounds are ours, and every choice is a named parameter that the report lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from memlens.models.provenance import describe
from memlens.report.bibliography import Citation
from memlens.studies.bypass import blocks as part
from memlens.studies.bypass import sides as side
from memlens.studies.bypass import words as text
from memlens.studies.bypass.context import BypassContext
from memlens.studies.bypass.options import BypassInputs, BypassOptions
from memlens.studies.running import StudyDirectory, StudyRun


def study_attention_bypass(
    inputs: BypassInputs,
    out: str | Path,
    *,
    others: Iterable[BypassInputs | Callable[[], BypassInputs]] = (),
    options: BypassOptions | None = None,
    title: str | None = None,
    command: str | None = None,
    progress: bool = True,
) -> StudyRun:
    """Study what each block's attention gives to recitation and to ability; write results and a report.

    1. The bypass of each block (E1): exact match, token accuracy, entropy and log-probability, on memorized,
       not memorized and predictable text and on untrained weights; with free decoding the score M.
    2. Accuracy on tasks under the same bypasses (E2), raw and corrected for chance.
    3. Recitation against ability (E3), and the same for further models, say other sizes (E4).
    4. Drops by quartile of depth, language against reasoning (E5).
    5. Sets of blocks bypassed together: suffixes, quartiles, greedy and exact search for the most selective,
       chosen on one half of the data and scored on the other (E6).
    6. Bounds of what a bypass can change against what it does change (E7).
    7. Controls (E8): other edits of attention, the MLP and single heads, on the same groups.

    Args:
        inputs: The model, its memorized sequences and controls, and the tasks.
        out: The folder; results are saved there one by one. A second call with the same arguments takes up
            the sweeps where they stopped.
        others: Further models for step 3; a function is called when its turn comes, so that only one is held
            in memory.
        options: See `BypassOptions`.
        title: Heading of the report.
        command: The command line that makes it again, for the report.
        progress: Show progress bars.

    Returns:
        The report's path, the findings, and what failed. A step that fails is named in the report and does
        not stop those that do not need it.

    Raises:
        SequenceError, VocabularyError: The sequences do not fit; before any forward pass.

    Example:
        >>> import memlens as ml, tempfile
        >>> model = ml.load_model("zoo/pythia-s")
        >>> found = ml.recall.build_memorized_set(model, corpus_rows, n=128)  # doctest: +SKIP
        >>> tasks = ml.tasks.local_tasks("zoo", model)
        >>> inputs = ml.studies.BypassInputs.of(model, found, tasks)  # doctest: +SKIP
        >>> run = ml.studies.study_attention_bypass(inputs, tempfile.mkdtemp())  # doctest: +SKIP
        >>> run.report.name  # doctest: +SKIP
        'report.html'
    """
    chosen = options or BypassOptions()
    settings = {
        "study": "attention bypass",
        **asdict(chosen),
        "model": describe(inputs.model),
        **{name: {**seqs.attrs, "sequences": len(seqs)} for name, seqs in inputs.groups.items()},
        "tasks": {
            task.name: {"group": task.group, "questions": len(task), "chance": task.chance}
            for task in inputs.tasks
        },
    }
    folder = StudyDirectory(
        out,
        title=title or f"What attention gives to recitation in {inputs.name}",
        lead=text.LEAD,
        settings=settings,
        command=command,
        fresh=True,
    )
    folder.add_citations(Citation("menta2025", "the study that this one follows"))
    study = BypassContext(inputs, folder, chosen, progress=progress)
    folder.step("bypass of each block", lambda: part.blocks(study))
    folder.step("tasks", lambda: part.accuracies(study))
    folder.step("free decoding", lambda: part.free_running(study))
    folder.step("recitation against ability", lambda: part.frontier(study, others))
    folder.step("quartiles of depth", lambda: part.quartiles(study))
    folder.step("sets of blocks", lambda: side.joint(study))
    folder.step("single heads", lambda: side.heads(study))
    folder.step("other edits", lambda: side.edits(study))
    folder.step("bounds", lambda: side.bounds(study))
    return folder.done()
