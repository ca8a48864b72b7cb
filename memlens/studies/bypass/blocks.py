"""Single blocks bypassed: what is recited, what it costs on tasks, and both against each other (E1 to E5).

Begins with what all parts of the study share: `BypassInputs` and `BypassContext`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
import yaml
from tqdm.auto import tqdm

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
from memlens.sequences.set import SequenceSet
from memlens.studies.bypass import findings as find
from memlens.studies.bypass.findings import MEMORIZED, UNTRAINED
from memlens.studies.bypass.options import BypassOptions
from memlens.studies.localization.findings import bypassed_layer
from memlens.studies.running import StudyDirectory, at_most

_GROUPS = (MEMORIZED, "not memorized", "predictable")

TEXTS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("texts.yaml").read_text(encoding="utf-8"))
"""What the report says about its sections."""

METRICS = ("exact_match", "target_accuracy", "target_logprob", "completion_entropy", "matching_prefix")
"""Of every block, from one teacher-forced sweep."""


@dataclass(frozen=True, eq=False)
class BypassInputs:
    """One model of the attention-bypass study.

    Attributes:
        model: A TransformerLens model.
        sequences: What `build_memorized_set` found; or sequences that the model recites; or a mapping with
            the groups "memorized" and, matched to it, "not memorized" (not recited) and "predictable"
            (predicted well without being recited).
        tasks: Benchmark tasks; see `ChoiceTask`.
        name: Its name in results; by default the name it was loaded under.

    Raises:
        EmptySetError: Fewer than 4 memorized sequences.
        OptionError: An unknown group.
    """

    model: Any
    sequences: MemorizedSet | SequenceSet | Mapping[str, SequenceSet]
    tasks: Sequence[ChoiceTask] = ()
    name: str = ""

    def __post_init__(self) -> None:
        for name in self.groups:
            check_option("group", name, _GROUPS)
        if (n := len(self.groups.get(MEMORIZED, ()))) < 4:
            raise EmptySetError(
                f"{n} memorized sequences: halves and intervals need 4 or more. Scan more text with "
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


class BypassContext:
    """A model with its sequences, the folder, the options, and what was measured so far."""

    inputs: BypassInputs
    folder: StudyDirectory
    options: BypassOptions
    progress: bool
    model: Any
    n_layers: int
    groups: dict[str, SequenceSet]

    def __init__(
        self, inputs: BypassInputs, folder: StudyDirectory, options: BypassOptions, *, progress: bool
    ) -> None:
        self.inputs, self.folder, self.options, self.progress = inputs, folder, options, progress
        self.model, self.n_layers = inputs.model, Trunk(inputs.model).n_layers
        self.groups = inputs.groups
        self.groups = self.chosen(options.max_sequences)
        self.swept: dict[str, Result] = {}
        self.headed: dict[str, Result] = {}
        self.tasks: Result | None = None
        self._twin: Any = None

    @property
    def twin(self) -> Any:
        """The model's shape with fresh weights."""
        if self._twin is None:
            self._twin = untrained_like(self.model, seed=self.options.seed)
        return self._twin

    def chosen(self, most: int) -> dict[str, SequenceSet]:
        """Return at most `most` memorized sequences, and of the controls those matched to them."""
        found = dict(self.groups)
        found[MEMORIZED] = at_most(found[MEMORIZED], most, self.options.seed)
        ids = found[MEMORIZED].table["id"].astype(str).tolist()
        for name, seqs in found.items():
            if name != MEMORIZED and "matched_to" in seqs.table:
                mine = np.flatnonzero(seqs.table["matched_to"].astype(str).isin(ids))
                found[name] = seqs[mine.tolist()]
            found[name] = at_most(found[name], most, self.options.seed)
        return {name: seqs for name, seqs in found.items() if len(seqs)}

    def bypass(self, model: Any, seqs: SequenceSet, name: str) -> Result:
        """Bypass each block alone."""
        work = partial(bypass_attention, model, seqs, mode=self.options.mode, metrics=METRICS)
        return self.folder.kept(f"blocks_{name}", partial(work, progress=self.progress))

    def evaluate(self, inputs: BypassInputs, name: str) -> Result:
        """Answer the tasks with each block bypassed."""
        edits = attention_bypasses(inputs.model, mode=self.options.mode)
        work = partial(evaluate_tasks, inputs.model, inputs.tasks, edits, progress=self.progress)
        return self.folder.kept(name, work)


def blocks(study: BypassContext) -> None:
    """E1: bypass each block alone, on every group and on untrained weights."""
    for name, seqs in study.groups.items():
        study.swept[name] = study.bypass(study.model, seqs, name)
    if study.options.untrained_control:
        study.swept[UNTRAINED] = study.bypass(study.twin, study.groups[MEMORIZED], UNTRAINED)
    joined = join_groups(study.swept)
    words = {
        "exact_match": "What is recited exactly",
        "target_accuracy": "Right tokens",
        "target_logprob": "Log-probability of the truth",
        "completion_entropy": "Entropy of the continuation",
    }
    figures = [
        FigureRequest(
            {"metric": metric, "group": "group", "title": f"{title}, one block bypassed at a time"},
            reading=find.blocks_in_words(study.swept[MEMORIZED]) if metric == "exact_match" else "",
        )
        for metric, title in words.items()
    ]
    change = {"metric": "target_logprob", "group": "group", "of": "effect"}
    figures.append(
        FigureRequest({**change, "title": "What each bypass takes from the log-probability"}, reading="")
    )
    study.folder.add_result(
        "blocks", joined, title="Attention of each block bypassed: what is recited",
        lead=TEXTS["blocks"], figures=figures,
    )  # fmt: skip
    scan = study.inputs.scan
    if scan is not None:
        counts = pd.DataFrame({"windows": scan.counts}).reset_index(names="of the scan")
        study.folder.add_table(
            "scan", counts.loc[counts["windows"] > 0], title="What the scan of the corpus met",
            section="blocks",
        )  # fmt: skip
        study.folder.add_table(
            "balance", scan.balance(), title="How alike memorized sequences and their controls are",
            note=TEXTS["balance"], section="blocks",
        )  # fmt: skip
    study.folder.find(find.recited(study.swept, len(study.inputs.groups[MEMORIZED])))
    study.folder.find(bypassed_layer(study.swept, study.options.seed))


def accuracies(study: BypassContext) -> None:
    """E2: the accuracy on every task under the bypass of each block."""
    if not study.inputs.tasks:
        study.folder.add_failure("tasks", "no tasks were given: what a bypass costs is not known.")
        return
    study.tasks = study.evaluate(study.inputs, "tasks")
    options = {"n_resamples": study.options.n_resamples, "seed": study.options.seed}
    by_part = {"group": "task_group", "parts": study.options.quartiles, **options}
    drops = {"relative_drop": "raw", "relative_drop_chance_corrected": "corrected for chance"}
    study.folder.add_result(
        "tasks", study.tasks, title="Attention of each block bypassed: what it costs on tasks",
        lead=TEXTS["tasks"],
        figures=[
            FigureRequest({"group": "task_group", **options}, reading=""),
            FigureRequest({"group": "task", "metric": "accuracy", **options}, reading=""),
            *(
                FigureRequest(
                    {**by_part, "metric": metric, "title": f"Mean drop by part of depth, {words}"}, reading=""
                )
                for metric, words in drops.items()
            ),
        ],
    )  # fmt: skip
    study.folder.add_table(
        "task_summary", task_summary(study.tasks, **options), title="Every task and group", section="tasks"
    )


def free_running(study: BypassContext) -> None:
    """E1: decode the memorized sequences freely under each bypass, for the score M."""
    if not study.options.free_running or MEMORIZED not in study.swept:
        return
    seqs = study.chosen(study.options.max_free_running)[MEMORIZED]
    with tqdm(
        total=study.n_layers + 1, desc="free decoding", unit="block", disable=not study.progress
    ) as bar:
        base, *values = (_decoded(study, seqs, layer, bar) for layer in (None, *range(study.n_layers)))
    columns = ("memorization_score", "matching_prefix", "exact_match")
    variables = {
        name: (("sequence", "layer"), np.column_stack([v.table[name].to_numpy(float) for v in values]))
        for name in columns
    }
    variables |= {f"{name}_baseline": ("sequence", base.table[name].to_numpy(float)) for name in columns}
    data = xr.Dataset(
        variables, {"sequence": seqs.table["id"].astype(str).tolist(), "layer": range(study.n_layers)}
    )
    result = Result.create(
        data,
        kind="attention_bypass",
        settings={"mode": study.options.mode, "decoding": "greedy, free-running"},
        **describe(study.model),
    )
    study.folder.add_result(
        "free_running", result, title="Free decoding with each block bypassed",
        lead=TEXTS["free_running"],
        figures=[
            FigureRequest(
                {"metric": "memorization_score", "title": "Score M, one block bypassed at a time"}, reading=""
            )
        ],
    )  # fmt: skip


def frontier(study: BypassContext, others: Iterable[BypassInputs | Callable[[], BypassInputs]]) -> None:
    """E3 and E4: exact match against accuracy, for this model and the others."""
    parts: dict[str, tuple[Result, Result]] = {}
    if MEMORIZED in study.swept and study.tasks is not None:
        parts[study.inputs.name] = (study.swept[MEMORIZED], study.tasks)
    for number, given in enumerate(others):
        study.folder.step(f"further model {number + 1}", lambda given=given: _other(study, given, parts))
    if not parts:
        return
    options = {"n_resamples": study.options.n_resamples, "seed": study.options.seed}
    many = "one panel for each model" if len(parts) > 1 else "one dot for each block"
    study.folder.add_result(
        "frontier", join_frontier(parts, **options), title="Recitation against ability",
        lead=TEXTS["frontier"],
        figures=[FigureRequest({"title": f"Recitation against ability: {many}"}, reading="")],
    )  # fmt: skip
    tables = []
    for name, (recall, accuracy) in parts.items():
        if not tasks_above_chance(accuracy):
            study.folder.find(find.nothing_to_lose(name, accuracy))
            continue
        found = {part: _tradeoff(study, recall, accuracy, part) for part in (0, 1)}
        scored = found[1].table()
        chosen = pd.DataFrame({"selectivity_chosen": found[0].selectivity})
        tables.append(pd.concat([scored, chosen], axis=1).assign(model=name))
        if name == study.inputs.name:
            study.folder.find(find.selective_block(found[0], found[1], study.swept, study.options))
    if tables:
        table = pd.concat(tables, ignore_index=True)
        table.insert(0, "model", table.pop("model"))
        study.folder.add_table(
            "selectivity", table, title="Selectivity of each block", note=TEXTS["selectivity"],
            section="frontier",
        )  # fmt: skip
        if len(set(table["model"])) > 1:
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
        n_resamples=study.options.n_resamples,
        seed=study.options.seed,
    )
    study.folder.add_table(
        "quartiles", table, title="Mean drop by part of depth, one block bypassed at a time",
        note=TEXTS["quartiles"],
        section="tasks",
    )  # fmt: skip
    for finding in find.by_quartile(table, study.swept):
        study.folder.find(finding)


def _decoded(study: BypassContext, seqs: SequenceSet, layer: int | None, bar: tqdm) -> RecallScores:
    """Score one bypass with free decoding."""
    bypass = nullcontext() if layer is None else bypassed(study.model, layer, mode=study.options.mode)
    with bypass:
        scores = study.folder.scored("free_running", study.model, seqs, metrics=(), progress=False)
    bar.update()
    return scores


def _other(
    study: BypassContext,
    given: BypassInputs | Callable[[], BypassInputs],
    parts: dict[str, tuple[Result, Result]],
) -> None:
    inputs = given if isinstance(given, BypassInputs) else given()
    seqs = at_most(inputs.groups[MEMORIZED], study.options.max_sequences, study.options.seed)
    recall = study.bypass(inputs.model, seqs, f"of_{inputs.name}")
    parts[inputs.name] = recall, study.evaluate(inputs, f"tasks_of_{inputs.name}")
    study.folder.add_settings(
        {f"further model {inputs.name}": {**describe(inputs.model), "memorized": dict(seqs.attrs)}}
    )


def _tradeoff(study: BypassContext, recall: Result, accuracy: Result, part: int) -> Tradeoff:
    seed = study.options.seed
    return edit_tradeoff(
        take_half(recall, part, seed),
        take_half(accuracy, part, seed, within="task"),
        over=study.options.over,
        tasks=tasks_above_chance(accuracy) or None,
        n_resamples=study.options.n_resamples,
        seed=seed,
    )
