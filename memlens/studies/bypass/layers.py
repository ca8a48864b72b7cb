"""Single layers bypassed: what is recited, what it costs on tasks, and both against each other (E1 to E5).

Begins with what all parts of the study share: `BypassInputs` and `BypassContext`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from tqdm.auto import tqdm

from memlens.benchmark.recommend import ranked_by
from memlens.errors import EmptySetError, check_option
from memlens.forward.trunk import Trunk
from memlens.instruments.bypass.bypass import attention_bypasses, bypass_attention, bypassed
from memlens.instruments.tasks.evaluate import evaluate_tasks
from memlens.instruments.tasks.tasks import ChoiceTask
from memlens.models.provenance import describe
from memlens.organisms.training.architectures import untrained_like
from memlens.recall.corpus.memorized_set import MemorizedSet
from memlens.recall.scores import RecallScores
from memlens.report.model import FigureRequest
from memlens.results.groups import join_groups, take_half
from memlens.results.result import Result
from memlens.results.statistics.tasks import task_summary
from memlens.results.statistics.tradeoff import Tradeoff, edit_tradeoff, join_frontier, tasks_above_chance
from memlens.sequences.checks import eos_mask
from memlens.sequences.set import SequenceSet
from memlens.studies.bypass import findings as find
from memlens.studies.bypass.findings import MEMORIZED, TEXTS, UNTRAINED
from memlens.studies.bypass.options import BypassOptions
from memlens.studies.localization.findings import bypassed_layer
from memlens.studies.running import StudyDirectory, at_most, matched_with

LEAST = 4
"""Fewest memorized sequences: their halves have intervals."""
_GROUPS = (MEMORIZED, "not memorized", "predictable")

Kept = tuple[str, Callable[..., Result]]
"""A sweep that keeps its parts: its name, and what runs it (see `StudyDirectory.kept`)."""

METRICS = ("exact_match", "target_accuracy", "target_logprob", "completion_entropy", "matching_prefix")
"""Of every layer, from one teacher-forced sweep."""


@dataclass(frozen=True, eq=False)
class BypassInputs:
    """One model of the attention-bypass study.

    Attributes:
        model: A TransformerLens model.
        sequences: What `build_memorized_set` found; or sequences that the model recites; or a mapping with
            the groups "memorized" and, matched with it, "not memorized" (not recited) and "predictable"
            (predicted well without being recited).
        tasks: Benchmark tasks; see `ChoiceTask`.
        name: Its name in results; by default the name it was loaded under.

    Raises:
        EmptySetError: Fewer than 4 memorized sequences.
        OptionError: An unknown group.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> inputs = ml.studies.BypassInputs(model, ml.load_sequences("zoo", model)[-4:])
        >>> list(inputs.groups)
        ['memorized']
    """

    model: Any
    sequences: MemorizedSet | SequenceSet | Mapping[str, SequenceSet]
    tasks: Sequence[ChoiceTask] = ()
    name: str = ""

    def __post_init__(self) -> None:
        for name in self.groups:
            check_option("group", name, _GROUPS)
        if (n := len(self.groups.get(MEMORIZED, ()))) < LEAST:
            raise EmptySetError(
                f"{n} memorized sequences: halves and intervals need {LEAST} or more. Scan more text with "
                "build_memorized_set, or take a larger model."
            )
        if not self.name:
            object.__setattr__(self, "name", str(describe(self.model)["model"]))

    @property
    def scan(self) -> MemorizedSet | None:
        """What `build_memorized_set` found, if the groups come from there."""
        return self.sequences if isinstance(self.sequences, MemorizedSet) else None

    @property
    def groups(self) -> dict[str, SequenceSet]:
        """The sequences by group, without empty groups."""
        given: Any = self.sequences
        if isinstance(given, MemorizedSet):
            given = dict(zip(_GROUPS, (given.memorized, given.unmemorized, given.predictable), strict=True))
        elif isinstance(given, SequenceSet):
            given = {MEMORIZED: given}
        return {str(name): seqs for name, seqs in given.items() if seqs is not None and len(seqs)}


@dataclass(eq=False)
class BypassContext:
    """A model with its sequences, the folder, the options, and what was measured so far."""

    inputs: BypassInputs
    folder: StudyDirectory
    options: BypassOptions
    progress: bool
    swept: dict[str, Result] = field(default_factory=dict)
    headed: dict[str, Result] = field(default_factory=dict)
    tasks: Result | None = None

    def __post_init__(self) -> None:
        self.model: Any = self.inputs.model
        self.n_layers: int = Trunk(self.model).n_layers
        self.groups: dict[str, SequenceSet] = self.inputs.groups
        self.groups = self.chosen(self.options.max_sequences)

    @cached_property
    def twin(self) -> Any:
        """The model's shape with fresh weights."""
        return untrained_like(self.model, seed=self.options.seed)

    @property
    def resampling(self) -> dict[str, Any]:
        """The number of resamples of every bootstrap, and the seed."""
        return {"n_resamples": self.options.n_resamples, "seed": self.options.seed}

    def chosen(self, most: int) -> dict[str, SequenceSet]:
        """Return at most `most` memorized sequences, and of the controls those matched with them."""
        memorized = at_most(self.groups[MEMORIZED], most, self.options.seed)
        found = {MEMORIZED: memorized}
        for name, seqs in self.groups.items():
            if name != MEMORIZED:
                found[name] = at_most(matched_with(memorized, seqs), most, self.options.seed)
        return {name: seqs for name, seqs in found.items() if len(seqs)}

    def measured(self, most: int) -> Iterator[tuple[str, Any, SequenceSet]]:
        """Yield what is measured: each group's name, model and sequences, with the untrained weights last."""
        groups = self.chosen(most)
        for name, seqs in groups.items():
            yield name, self.model, seqs
        if self.options.untrained_control:
            yield UNTRAINED, self.twin, groups[MEMORIZED]

    def show(
        self,
        name: str,
        result: Result,
        *,
        figures: Sequence[Mapping[str, Any]] | None = None,
        reading: str | None = None,
        ranked: str = "",
        **options: Any,
    ) -> None:
        """Save a result, with the words and figures (options of `Result.plot`) from `texts.yaml`.

        `figures` replaces those figures, and `options` are added to each. `reading` belongs to the first one;
        the others, and the first one without it, have that of `texts.yaml`, or as any result of its kind.
        `ranked` is added to the words.
        """
        words = dict(TEXTS["results"][name])
        drawn = words.pop("figures")
        requests: list[FigureRequest] = []
        for number, figure in enumerate(figures or drawn):
            chosen = {**figure, **options}
            own = chosen.pop("reading", None)
            requests.append(FigureRequest(chosen, reading=own if number or reading is None else reading))
        words["lead"] = f"{words.get('lead', '')} {ranked}".strip()
        self.folder.add_result(name, result, figures=requests, **words)

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """Save a table, with the words that `texts.yaml` has for it."""
        self.folder.add_table(name, frame, **TEXTS["tables"][name])

    def bypass(self, model: Any, seqs: SequenceSet, name: str) -> Kept:
        """Return the sweep that bypasses each layer alone."""
        work = partial(bypass_attention, model, seqs, mode=self.options.mode, metrics=METRICS)
        return f"blocks_{name}", partial(work, progress=self.progress)

    def evaluate(self, inputs: BypassInputs, name: str) -> Kept:
        """Return the sweep that answers the tasks with each layer bypassed."""
        edits = attention_bypasses(inputs.model, mode=self.options.mode)
        return name, partial(evaluate_tasks, inputs.model, inputs.tasks, edits, progress=self.progress)


def layers(study: BypassContext) -> None:
    """E1: bypass each layer alone, on every group and on untrained weights."""
    for name, model, seqs in study.measured(study.options.max_sequences):
        study.swept[name] = study.folder.kept(*study.bypass(model, seqs, name))
    ranked = ranked_by("attention bypass", "layer_attention", str(describe(study.model)["family"]))
    reading = find.layers_in_words(study.swept[MEMORIZED])
    study.show("blocks", join_groups(study.swept), reading=reading, ranked=ranked)
    scan = study.inputs.scan
    if scan is not None:
        counts = pd.DataFrame({"windows": scan.counts}).reset_index(names="of the scan")
        study.table("scan", counts.loc[counts["windows"] > 0])
        study.table("balance", scan.balance())
    study.folder.find(find.recited(study.swept, len(study.inputs.groups[MEMORIZED])))
    study.folder.find(bypassed_layer(study.swept, study.options.seed))


def accuracies(study: BypassContext) -> None:
    """E2: the accuracy on every task under the bypass of each layer."""
    if not study.inputs.tasks:
        study.folder.add_failure("tasks", "no tasks were given: what a bypass costs is not known.")
        return
    study.tasks = study.folder.kept(*study.evaluate(study.inputs, "tasks"))
    parts = {"parts": study.options.quartiles}
    drawn = TEXTS["results"]["tasks"]["figures"]
    figures = [{**figure, **parts} if "parts" in figure else figure for figure in drawn]
    study.show("tasks", study.tasks, figures=figures, **study.resampling)
    study.table("task_summary", task_summary(study.tasks, **study.resampling))


def free_running(study: BypassContext) -> None:
    """E1: decode the memorized sequences freely under each bypass, for the score M."""
    if not study.options.free_running or MEMORIZED not in study.swept:
        return
    seqs = study.chosen(study.options.max_free_running)[MEMORIZED]
    bar = tqdm(total=study.n_layers + 1, desc="free decoding", unit="layer", disable=not study.progress)
    with bar:
        base, *values = (_decoded(study, seqs, layer, bar) for layer in (None, *range(study.n_layers)))
    variables: dict[str, Any] = {}
    for name in ("memorization_score", "matching_prefix", "exact_match"):
        each = [scores.table[name].to_numpy(float) for scores in values]
        variables[name] = (("sequence", "layer"), np.column_stack(each))
        variables[f"{name}_baseline"] = ("sequence", base.table[name].to_numpy(float))
    data = xr.Dataset(
        variables, {"sequence": seqs.table["id"].astype(str).tolist(), "layer": range(study.n_layers)}
    )
    banned = bool(base.attrs["ban_eos"])
    settings = {"mode": study.options.mode, "decoding": "greedy, free-running", "ban_eos": banned}
    result = Result.create(data, kind="attention_bypass", settings=settings, **describe(study.model))
    study.show("free_running", result)


def frontier(study: BypassContext, others: Iterable[BypassInputs | Callable[[], BypassInputs]]) -> None:
    """E3 and E4: exact match against accuracy, for this model and the others."""
    parts: dict[str, tuple[Result, Result]] = {}
    if MEMORIZED in study.swept and study.tasks is not None:
        parts[study.inputs.name] = (study.swept[MEMORIZED], study.tasks)
    for number, given in enumerate(others):
        study.folder.step(f"further model {number + 1}", lambda given=given: _other(study, given, parts))
    if not parts:
        return
    (figure,) = TEXTS["results"]["frontier"]["figures"]
    panels = (
        [{**figure, "title": "Recitation against ability: one panel per model"}] if len(parts) > 1 else None
    )
    study.show("frontier", join_frontier(parts, **study.resampling), figures=panels)
    tables = []
    for name, (recall, accuracy) in parts.items():
        if not tasks_above_chance(accuracy):
            study.folder.find(find.nothing_to_lose(name, accuracy))
            continue
        choosing, scoring = (_tradeoff(study, recall, accuracy, part) for part in (0, 1))
        table = scoring.table().assign(selectivity_chosen=choosing.selectivity)
        table.insert(0, "model", name)
        tables.append(table)
        if name == study.inputs.name:
            study.folder.find(find.selective_layer(choosing, scoring, study.swept, study.options))
    if tables:
        table = pd.concat(tables, ignore_index=True)
        study.table("selectivity", table)
        if len(tables) > 1:
            study.folder.find(find.scaling(table, study.options.quartiles))


def quartiles(study: BypassContext) -> None:
    """E5: drops by quartile of depth, language against reasoning."""
    if study.tasks is None or MEMORIZED not in study.swept:
        return
    table = find.quartile_table(
        study.swept[MEMORIZED],
        study.tasks,
        tasks=tasks_above_chance(study.tasks),
        parts=study.options.quartiles,
        **study.resampling,
    )
    study.table("quartiles", table)
    for finding in find.by_quartile(table, study.swept):
        study.folder.find(finding)


def _decoded(study: BypassContext, seqs: SequenceSet, layer: int | None, bar: tqdm) -> RecallScores:
    """Score one bypass with free decoding."""
    bypass = nullcontext() if layer is None else bypassed(study.model, layer, mode=study.options.mode)
    eos = getattr(study.model.tokenizer, "eos_token_id", None)
    ban = study.options.ban_eos and eos is not None and not bool(eos_mask(seqs, eos).any())
    with bypass:
        scores = study.folder.scored(
            "free_running", study.model, seqs, metrics=(), ban_eos=ban, progress=False
        )
    bar.update()
    return scores


def _other(
    study: BypassContext,
    given: BypassInputs | Callable[[], BypassInputs],
    parts: dict[str, tuple[Result, Result]],
) -> None:
    inputs, seqs, works = further(study, given)
    recall, accuracy = (study.folder.kept(*work) for work in works)
    parts[inputs.name] = recall, accuracy
    about = {**describe(inputs.model), "memorized": dict(seqs.attrs)}
    study.folder.add_settings({f"further model {inputs.name}": about})


def further(
    study: BypassContext, given: BypassInputs | Callable[[], BypassInputs]
) -> tuple[BypassInputs, SequenceSet, list[Kept]]:
    """Return a further model with its sequences and sweeps."""
    inputs = given if isinstance(given, BypassInputs) else given()
    seqs = at_most(inputs.groups[MEMORIZED], study.options.max_sequences, study.options.seed)
    works = [
        study.bypass(inputs.model, seqs, f"of_{inputs.name}"),
        study.evaluate(inputs, f"tasks_of_{inputs.name}"),
    ]
    return inputs, seqs, works


def _tradeoff(study: BypassContext, recall: Result, accuracy: Result, part: int) -> Tradeoff:
    return edit_tradeoff(
        take_half(recall, part, study.options.seed),
        take_half(accuracy, part, study.options.seed, within="task"),
        over=study.options.over,
        tasks=tasks_above_chance(accuracy),
        **study.resampling,
    )
