"""The attention-bypass study: what each layer's attention contributes to recitation and to other abilities.

After Menta, Agrawal and Agarwal, "Analyzing Memorization in LLMs through the Lens of Model Attribution"
(arXiv 2501.05078). The bypass is theirs; the matched controls, intervals, halves, the search over sets of
layers, selectivity and bounds are ours, and every choice is a named parameter that the report lists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from memlens.errors import UnfinishedError
from memlens.instruments.tasks.tasks import ChoiceTask
from memlens.models.provenance import describe
from memlens.recall.corpus.memorized_set import MemorizedSet
from memlens.report.bibliography import Citation
from memlens.sequences.set import SequenceSet
from memlens.store.sharing import Part, parse_part
from memlens.studies.bypass import layers as steps
from memlens.studies.bypass import sides as side
from memlens.studies.bypass.findings import TEXTS
from memlens.studies.bypass.layers import BypassContext, BypassInputs
from memlens.studies.bypass.options import BypassOptions
from memlens.studies.running import StudyDirectory, StudyRun, last_of_all, unfinished_together

_LOG = logging.getLogger(__name__)


def study_attention_bypass(
    model: Any,
    sequences: MemorizedSet | SequenceSet | Mapping[str, SequenceSet],
    out: str | Path,
    *,
    tasks: Sequence[ChoiceTask] = (),
    others: Iterable[BypassInputs | Callable[[], BypassInputs]] = (),
    name: str = "",
    options: BypassOptions | None = None,
    title: str | None = None,
    command: str | None = None,
    progress: bool = True,
    part: Part | None = None,
    executor: Any = None,
) -> StudyRun:
    """Study what each layer's attention contributes to recitation and to ability; write results and a report.

    1. The bypass of each layer (E1): exact match, token accuracy, entropy and log-probability, on memorized,
       not memorized and predictable text and on untrained weights; with free decoding the score M.
    2. Accuracy on tasks under the same bypasses (E2), raw and corrected for chance.
    3. Recitation against ability (E3), and the same for further models, say other sizes (E4).
    4. Drops by quartile of depth, language against reasoning (E5).
    5. Sets of layers bypassed together: suffixes, quartiles, greedy and exact search for the most selective,
       chosen on one half of the data and scored on the other (E6).
    6. Bounds of what a bypass can change against what it does change (E7).
    7. Controls (E8): other interventions on attention, the MLP and single heads, on the same groups.

    Args:
        model: A TransformerLens model.
        sequences: What `build_memorized_set` found; or sequences that the model recites; or a mapping with
            the groups "memorized" and, matched with it, "not memorized" and "predictable".
        out: The folder; results are saved there one by one. A second call with the same arguments continues
            the sweeps where they stopped.
        tasks: Benchmark tasks that measure what a bypass costs; without any, its cost is not known.
        others: Further models for step 3, each as `BypassInputs(model, sequences, tasks, name)`, or a
            function that returns it, called when it is needed, so that one model at a time is in memory.
        name: The model's name in results; by default the name it was loaded under.
        options: See `BypassOptions`.
        title: Heading of the report.
        command: The command line that repeats the run, for the report.
        progress: Show progress bars.
        part: Only a share of the sweeps' parts, as for `sweep`: layers, tasks, heads, other interventions and
            the first round of the search over sets of layers, also of further models. The worker that
            finishes last does the rest and writes the report.
        executor: Do the sweeps on the workers of an executor, as for `sweep`.

    Returns:
        The report's path, the findings, and what failed.

    Raises:
        SequenceError, VocabularyError: The sequences do not fit, before any forward pass.
        EmptySetError: Fewer than 4 memorized sequences.
        UnfinishedError: With `part`: this share is done, and parts of others are missing.

    Example:
        >>> import memlens as ml, tempfile
        >>> model = ml.load_model("zoo/pythia-s")
        >>> found = ml.recall.build_memorized_set(model, corpus_rows, n=128)  # doctest: +SKIP
        >>> tasks = ml.tasks.local_tasks("zoo", model)
        >>> out = tempfile.mkdtemp()
        >>> run = ml.studies.study_attention_bypass(model, found, out, tasks=tasks)  # doctest: +SKIP
        >>> run.report.name  # doctest: +SKIP
        'report.html'
    """
    if part is not None:
        parse_part(part)
    chosen, others = options or BypassOptions(), others if part is None else list(others)
    inputs = BypassInputs(model, sequences, tasks, name)
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
    title = title or TEXTS["title"].format(name=inputs.name)

    def study(**sharing: Any) -> BypassContext:
        folder = StudyDirectory(
            out,
            title=title,
            lead=TEXTS["lead"],
            summary=TEXTS.summary(name=inputs.name),
            settings=settings,
            command=command,
            fresh="part" not in sharing,
        )
        folder.sharing = {name: value for name, value in sharing.items() if value is not None}
        return BypassContext(inputs, folder, chosen, progress=progress)

    if part is None:
        return _run(study(executor=executor), others)
    _share(study(part=part), others)
    with last_of_all(out):
        return _run(study(), others)


def _run(study: BypassContext, others: Iterable[BypassInputs | Callable[[], BypassInputs]]) -> StudyRun:
    study.folder.add_citations(Citation("menta2025", "the study that this one follows"))
    for name, work in (
        ("bypass of each layer", steps.layers),
        ("tasks", steps.accuracies),
        ("free decoding", steps.free_running),
        ("recitation against ability", partial(steps.frontier, others=others)),
        ("quartiles of depth", steps.quartiles),
        ("sets of layers", side.joint),
        ("single heads", side.heads),
        ("other interventions", side.edits),
        ("bounds", side.bounds),
    ):
        study.folder.step(name, partial(work, study))
    return study.folder.done()


def _share(study: BypassContext, others: Iterable[BypassInputs | Callable[[], BypassInputs]]) -> None:
    """Do a share of the sweeps only; raises `UnfinishedError` while parts of others are missing."""
    options = study.options
    works: list[tuple[str, Callable[..., Any]]]
    works = [study.bypass(m, s, name) for name, m, s in study.measured(options.max_sequences)]
    if study.inputs.tasks:
        works.append(study.evaluate(study.inputs, "tasks"))
    if (search := side.joint_search(study)) is not None:
        works.append(("sets", search))
    for wanted, sweep in ((options.heads, side.head_sweep), (options.edits, side.edit_sweep)):
        if wanted:
            works += [sweep(study, m, s, name) for name, m, s in study.measured(options.control_sequences)]
    with unfinished_together() as attempt:
        for name, work in works:
            with attempt(), _left_to_the_report(name):
                study.folder.kept(name, work)
        for number, other in enumerate(others):
            with _left_to_the_report(f"further model {number + 1}"):
                for name, work in steps.further(study, other)[2]:
                    with attempt():
                        study.folder.kept(name, work)


@contextmanager
def _left_to_the_report(name: str) -> Iterator[None]:
    """Go on after a sweep that fails: the worker that finishes last meets the error again and records it."""
    try:
        yield
    except UnfinishedError:
        raise
    except Exception as error:
        _LOG.warning("%s failed, which the report will say: %s", name, error)
