"""The comparative study: what memorization has in common across models, and what is specific to a family.

After Chen et al., "A Comparative Analysis of LLM Memorization at Statistical and Internal Levels" (arXiv
2603.21658). The paper's full text was not available: every claim says what is known of it and how; where a
detail is not known, the choice is a named option that the report lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from memlens.errors import EmptySetError, MemlensError, OptionError
from memlens.files import expanded, made_folder
from memlens.report.bibliography import Citation, family_citation
from memlens.sequences.set import SequenceSet
from memlens.store.executors import run_parts
from memlens.store.sharing import Part, check_finished, do_share
from memlens.studies.comparative.config import StudyModel, parse_model
from memlens.studies.comparative.figures import FIGURES
from memlens.studies.comparative.findings import TEXTS, as_finding, in_sentences
from memlens.studies.comparative.measure import ModelsJob, measure_model
from memlens.studies.comparative.options import ComparativeOptions
from memlens.studies.comparative.store import SavedModel, saved_models
from memlens.studies.comparative.tables import Made
from memlens.studies.running import StudyDirectory, StudyRun, last_of_all


def study_comparative(
    models: Sequence[str | StudyModel | Mapping[str, Any] | Any],
    sequences: str | SequenceSet | Mapping[str, Any],
    out: str | Path,
    *,
    options: ComparativeOptions | None = None,
    include_saved: bool = False,
    title: str | None = None,
    command: str | None = None,
    progress: bool = True,
    part: Part | None = None,
    executor: Any = None,
) -> StudyRun:
    """Compare how several models memorize, and write results and a report to a folder.

    Each model is measured by itself, into `out/models/NAME-FINGERPRINT`: recall, compression of prompts,
    token frequency, checkpoints, noise and recovery, decoding, ablation of every head. What is already there
    from the same weights, sequences and options is not computed again, so that a model can be added later and
    an interrupted run can go on. Tables, tests, figures and the report are made anew from these folders each
    time.

    With one or two models, the parts that need more say so.

    Args:
        models: Names ("zoo/pythia-s", a hub name, a folder; "NAME@REVISION"), `StudyModel`, its fields as a
            mapping, or loaded models.
        sequences: One source of sequences for `load_sequences`, whose column `domain` names the domains, or a
            mapping of domain to source. Each model reads it with its own tokenizer.
        out: The folder.
        options: See `ComparativeOptions`.
        include_saved: Also compare the models that the folder holds from earlier runs, without loading them.
        title: Heading of the report.
        command: The command line that makes it again, for the report.
        progress: Show progress bars.
        part: Measure only a share of the models, as for `sweep`; the worker that finishes last writes the
            report.
        executor: Measure the models on the workers of an executor, as for `sweep`.

    Returns:
        The report's path, the findings, and what failed. A model or a part that fails is named in the report
        and does not stop the others.

    Raises:
        EmptySetError: No models.
        OptionError: A model given twice.
        UnfinishedError: With `part`: this share is done, and models of others are missing.
        ResultError: A model's folder is damaged.

    Example:
        >>> import memlens as ml, tempfile
        >>> run = ml.studies.study_comparative(["zoo/pythia-s"], "zoo", tempfile.mkdtemp())  # doctest: +SKIP
        >>> run.report.name  # doctest: +SKIP
        'report.html'
    """
    options = options or ComparativeOptions()
    entries, out = [parse_model(model) for model in models], expanded(out)
    _check(entries, include_saved)
    if part is not None:
        job = ModelsJob(entries, sequences, out / "models", options)
        names = list(job.entries)
        do_share(part, names, made_folder(job.folder), job.done, job.work)
        check_finished(names, job.folder, job.done)
        with last_of_all(out):
            job.forget()
            return study_comparative(
                models, sequences, out, options=options, include_saved=include_saved, title=title,
                command=command, progress=progress,
            )  # fmt: skip
    of_sequences = {"prefix_len": options.prefix_len, "max_targets": options.max_targets}
    settings = {
        "study": "comparative",
        **{name: value for name, value in asdict(options).items() if name not in of_sequences},
        "models": {entry.label: _told(entry) for entry in entries},
        "sequences": {"source": _words(sequences), **of_sequences},
        "include_saved": include_saved,
    }
    title = title or "How models memorize, compared"
    folder = StudyDirectory(
        out, title=title, summary=TEXTS["summary"], settings=settings, command=command, fresh=True
    )
    folder.add_citations(Citation("chen2026", "the study that this one follows"))
    for name, words in TEXTS["sections"].items():
        folder.add_section(name, words["title"], words.get("lead", ""))
    saved: list[SavedModel] = []
    if executor is not None:
        job = ModelsJob(entries, sequences, made_folder(out / "models"), options)
        job.forget()
        with tqdm(total=len(entries), disable=not progress, unit="model") as bar:
            run_parts(executor, job, list(job.entries), on_done=lambda *_: bar.update())
        for name in job.entries:
            found, failures = job.take(name)
            saved += found
            for step, message in failures.items():
                folder.failed(step, MemlensError(message))
    for entry in entries if executor is None else ():

        def work(entry: StudyModel = entry) -> None:
            saved.append(measure_model(entry, sequences, out / "models", options, folder, progress=progress))

        folder.step(entry.label, work)
    if include_saved:
        known = {model.label for model in saved}
        saved += [model for model in saved_models(out / "models") if model.label not in known]
    if scored := [model for model in saved if model.has("recall")]:
        _compare(scored, folder, options)
    return folder.done()


def _compare(models: list[SavedModel], folder: StudyDirectory, options: ComparativeOptions) -> None:
    """Make all tables, figures and findings from what is saved."""
    models = sorted(models, key=lambda m: (m.control, m.family, m.size, m.label))
    folder.add_citations(*(c for m in models for c in family_citation(m.family, str(m.facts["model"]))))
    made = Made(models, options)

    def table(name: str) -> None:
        found = made.make(name)
        if len(found):
            folder.add_table(name, found, **_filled(TEXTS["tables"][name], made))

    def figure(name: str) -> None:
        words = _filled(TEXTS["figures"][name], made)
        shown = {key: words.pop(key) for key in ("section", "reading")}
        found = FIGURES[name].of(made, **words)
        if found is not None:
            folder.add_figure(name, found, **shown)

    for name in TEXTS["tables"]:
        folder.step(f"over all models: table {name}", partial(table, name), part="over all models")
    for name in FIGURES:
        folder.step(f"over all models: figure {name}", partial(figure, name), part="over all models")
    for section, words in TEXTS["sections"].items():
        empty = words.get("empty")
        if empty and not len(made.table(empty["table"])):
            note = pd.DataFrame([_filled({"note": empty["note"]}, made)])
            folder.add_table(f"{section}_note", note, title="Not here", section=section)

    def findings() -> None:
        for item in made.judged:
            folder.find(as_finding(item))
        folder.add_summary(in_sentences(made.judged))

    folder.step("over all models: findings", findings, part="over all models")


def _filled(words: Mapping[str, str], made: Made) -> dict[str, str]:
    return {name: text.format(made=made) for name, text in words.items()}


def _check(entries: Sequence[StudyModel], include_saved: bool) -> None:
    if not entries and not include_saved:
        raise EmptySetError("there are no models to compare: name at least one.")
    labels = [entry.label for entry in entries]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise OptionError(f"the model {twice[0]!r} is named twice: name each once.")


def _told(entry: StudyModel) -> str:
    """Return the settings of a model beyond its name, in words."""
    usual = StudyModel(entry.name).settings()
    said = {key: value for key, value in entry.settings().items() if value != usual[key]}
    return ", ".join(f"{key} {value}" for key, value in said.items()) or "as it is"


def _words(sequences: Any) -> Any:
    """Return the sources as JSON."""
    if isinstance(sequences, Mapping):
        if list(sequences) == [""]:  # one source whose table names the domains
            return _words(sequences[""])
        return {str(domain): _words(source) for domain, source in sequences.items()}
    if isinstance(sequences, SequenceSet):
        return {"sequences": len(sequences), **sequences.attrs}
    return str(sequences)
