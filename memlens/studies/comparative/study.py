"""The comparative study: what many models' memorization has in common, and what is a family's own.

After Chen et al., "A Comparative Analysis of LLM Memorization at Statistical and Internal Levels" (arXiv
2603.21658). The paper's full text was not at hand: what is known of it, and how, stands beside every claim;
where a detail is not known the choice is a named option that the report lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from memlens.errors import EmptySetError, OptionError
from memlens.report.bibliography import Citation, family_citation
from memlens.sequences.set import SequenceSet
from memlens.studies.comparative.config import StudyModel, parse_model
from memlens.studies.comparative.measure import measure_model
from memlens.studies.comparative.options import ComparativeOptions
from memlens.studies.comparative.report.sections import Report
from memlens.studies.comparative.store import SavedModel, saved_models
from memlens.studies.running import StudyDirectory, StudyRun

_SECTIONS = (
    ("models", "Every model", "One row a model; the parts below say what the columns are."),
    (
        "claims", "What the paper found, and what is found here",
        "The paper's directional findings as far as they are known, each judged by one number.",
    ),
    ("rates", "Rate and size", ""),
    ("compression", "Compression of prompts", ""),
    ("domains", "Domains", ""),
    ("frequency", "Token frequency", ""),
    ("training", "Copies and training time", ""),
    ("noise", "Perturbation and recovery", ""),
    ("layers", "Middle layers", ""),
    ("heads", "Attention heads", ""),
    ("signatures", "Signatures of families", ""),
)  # fmt: skip


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
) -> StudyRun:
    """Compare how several models memorize, and write results and a report to a folder.

    Each model is measured by itself, into `out/models/NAME-FINGERPRINT`: recall, compression of prompts,
    token frequency, checkpoints, noise and recovery, decoding, ablation of every head. What stands there from
    the same weights, sequences and options is not computed again, so that a model can be added later and a
    run that stopped goes on. Tables, tests, figures and the report are made anew from these folders each
    time.

    With one or two models the parts that need more say so.

    Args:
        models: Names ("zoo/pythia-s", a hub name, a folder; "NAME@REVISION"), `StudyModel`, its fields as a
            mapping, or loaded models.
        sequences: One source of sequences for `load_sequences`, whose column `domain` tells domains, or a
            mapping of domain to source. Each model reads it with its own tokenizer.
        out: The folder.
        options: See `ComparativeOptions`.
        include_saved: Also compare the models that the folder holds from earlier runs, without loading them.
        title: Heading of the report.
        command: The command line that makes it again, for the report.
        progress: Show progress bars.

    Returns:
        The report's path, the findings, and what failed. A model or a part that fails is named in the report
        and does not stop the others.

    Raises:
        EmptySetError: No models.
        OptionError: A model twice.
        ResultError: A model's folder is damaged.

    Example:
        >>> import memlens as ml, tempfile
        >>> run = ml.studies.study_comparative(["zoo/pythia-s"], "zoo", tempfile.mkdtemp())  # doctest: +SKIP
        >>> run.report.name  # doctest: +SKIP
        'report.html'
    """
    chosen = options or ComparativeOptions()
    entries = [parse_model(model) for model in models]
    out = Path(out)
    _check(entries, include_saved)
    of_sequences = {"prefix_len": chosen.prefix_len, "max_targets": chosen.max_targets}
    settings = {
        "study": "comparative",
        **{name: value for name, value in asdict(chosen).items() if name not in of_sequences},
        "models": {entry.label: _told(entry) for entry in entries},
        "sequences": {"source": _words(sequences), **of_sequences},
        "include_saved": include_saved,
    }
    folder = StudyDirectory(
        out,
        title=title or "How models memorize, compared",
        settings=settings,
        command=command,
        fresh=True,
    )
    folder.add_citations(Citation("chen2026", "the study that this one follows"))
    for name, heading, lead in _SECTIONS:
        folder.add_section(name, heading, lead)
    saved = _measured(entries, sequences, out / "models", chosen, folder, progress=progress)
    if include_saved:
        known = {model.label for model in saved}
        saved += [model for model in saved_models(out / "models") if model.label not in known]
    if any(model.has("recall") for model in saved):
        _compare([model for model in saved if model.has("recall")], folder, chosen)
    return folder.done()


def _measured(
    entries: Sequence[StudyModel],
    sequences: Any,
    root: Path,
    options: ComparativeOptions,
    folder: StudyDirectory,
    *,
    progress: bool,
) -> list[SavedModel]:
    saved: list[SavedModel] = []
    for entry in entries:

        def work(entry: StudyModel = entry) -> None:
            saved.append(measure_model(entry, sequences, root, options, folder, progress=progress))

        folder.step(entry.label, work)
    return saved


def _compare(models: list[SavedModel], folder: StudyDirectory, options: ComparativeOptions) -> None:
    """Make all tables, figures and findings from what is saved."""
    models = sorted(models, key=lambda m: (m.control, m.family, int(m.facts["n_params"]), m.label))
    folder.add_citations(*(c for m in models for c in family_citation(m.family, str(m.facts["model"]))))
    parts = Report(models, folder, options)
    for name, work in (
        ("rate and size", parts.rates),
        ("compression", parts.compression),
        ("domains", parts.domains),
        ("token frequency", parts.frequency),
        ("copies and training time", parts.training),
        ("noise", parts.noise),
        ("middle layers", parts.layers),
        ("heads", parts.heads),
        ("signatures", parts.signatures),
        ("summary", parts.summary),
        ("options", parts.other_options),
        ("findings", parts.claims),
    ):
        folder.step(f"over all models: {name}", work)


def _check(entries: Sequence[StudyModel], include_saved: bool) -> None:
    if not entries and not include_saved:
        raise EmptySetError("there are no models to compare: name at least one.")
    labels = [entry.label for entry in entries]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise OptionError(f"the model {twice[0]!r} is named twice: name each once.")


def _told(entry: StudyModel) -> str:
    """Return what is asked of a model beyond its name."""
    usual = StudyModel(entry.name).settings()
    said = {key: value for key, value in entry.settings().items() if value != usual[key]}
    return ", ".join(f"{key} {value}" for key, value in said.items()) or "as it is"


def _words(sequences: Any) -> Any:
    """Return the sources as JSON would hold them."""
    if isinstance(sequences, Mapping):
        return {str(domain): _words(source) for domain, source in sequences.items()}
    if isinstance(sequences, SequenceSet):
        return {"sequences": len(sequences), **sequences.attrs}
    return str(sequences)
