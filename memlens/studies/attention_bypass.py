"""The attention-bypass study: what each block's attention gives to recitation, and what else hangs on it.

After Menta, Agrawal and Agarwal, "Analyzing Memorization in LLMs through the Lens of Model Attribution"
(arXiv 2501.05078). The bypass is theirs; the matched controls, intervals, halves, the search over sets of
blocks, selectivity and bounds are ours, and every choice is a named parameter that the report lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from memlens.attribution import bypass_attention, bypass_intervention, bypassed, evaluate_tasks
from memlens.attribution.bounds import attention_bypass_bounds
from memlens.attribution.bypass_predictor import bypass_predictor, predictor_agreement
from memlens.attribution.layer_sets import LayerSetSearch, search_layer_sets, take_half
from memlens.errors import MemlensError
from memlens.models.provenance import describe
from memlens.models.trunk import Trunk
from memlens.organisms.untrained import untrained_like
from memlens.recall.score import score_recall
from memlens.recall.scores import RecallScores
from memlens.report import FigureRequest
from memlens.results import Result, join_groups
from memlens.results.frontier import join_frontier
from memlens.results.task_summary import task_summary
from memlens.results.tradeoff import Tradeoff, edit_tradeoff, tasks_above_chance
from memlens.sequences import SequenceSet
from memlens.studies import bypass_control_findings as control
from memlens.studies import bypass_findings as find
from memlens.studies import bypass_texts as text
from memlens.studies.bypass_controls import (
    MEMORIZED,
    UNTRAINED,
    control_edits,
    control_table,
    depth_table,
)
from memlens.studies.bypass_options import BypassInputs, BypassOptions
from memlens.studies.bypass_tables import quartile_table
from memlens.studies.running import StudyDirectory, StudyRun, at_most
from memlens.sweeps import sweep
from memlens.sweeps.fingerprint import fingerprint, model_fingerprint, sequences_fingerprint

__all__ = ["study_attention_bypass"]

METRICS = ("exact_match", "target_accuracy", "target_logprob", "completion_entropy", "matching_prefix")
"""Of every block, from one teacher-forced sweep."""
_CONTROL_METRICS = ("target_logprob", "completion_entropy", "exact_match")


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
        >>> found = ml.build_memorized_set(model, corpus_rows, n=128)  # doctest: +SKIP
        >>> inputs = ml.BypassInputs.of(model, found, ml.local_tasks("zoo", model))  # doctest: +SKIP
        >>> run = ml.study_attention_bypass(inputs, tempfile.mkdtemp())  # doctest: +SKIP
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
    study = _BypassStudy(inputs, folder, chosen, progress=progress)
    folder.step("bypass of each block", study.blocks)
    folder.step("tasks", study.accuracies)
    folder.step("free decoding", study.free_running)
    folder.step("recitation against ability", lambda: study.frontier(others))
    folder.step("quartiles of depth", study.quartiles)
    folder.step("sets of blocks", study.joint)
    folder.step("other edits", study.edits)
    folder.step("single heads", study.heads)
    folder.step("bounds", study.bounds)
    return folder.done()


class _BypassStudy:
    def __init__(
        self, inputs: BypassInputs, folder: StudyDirectory, options: BypassOptions, *, progress: bool
    ) -> None:
        self.inputs, self.folder, self.options, self.progress = inputs, folder, options, progress
        self.model, self.n_layers = inputs.model, Trunk(inputs.model).n_layers
        self.groups = {name: self._some(seqs, options.max_sequences) for name, seqs in inputs.groups.items()}
        self.swept: dict[str, Result] = {}
        self.tasks: Result | None = None
        self._twin: Any = None

    def blocks(self) -> None:
        """E1: bypass each block alone, on every group and on untrained weights."""
        for name, seqs in self.groups.items():
            self.swept[name] = self._bypass(self.model, seqs, name)
        if self.options.untrained_control:
            self.swept[UNTRAINED] = self._bypass(self.twin, self.groups[MEMORIZED], UNTRAINED)
        joined = join_groups(self.swept)
        figures = [FigureRequest({"metric": metric, "group": "group"}, reading="") for metric in METRICS[:4]]
        figures[0] = FigureRequest(
            {"metric": "exact_match", "group": "group"}, reading=find.blocks_in_words(self.swept[MEMORIZED])
        )
        figures.append(
            FigureRequest({"metric": "target_logprob", "group": "group", "of": "effect"}, reading="")
        )
        self.folder.add_result(
            "blocks", joined, title="Attention of each block bypassed: what is recited",
            lead=text.BLOCKS_LEAD, figures=figures,
        )  # fmt: skip
        self.folder.find(find.recited(self.swept, self.inputs))
        self.folder.find(find.needed_block(self.swept, self.options.seed))

    def accuracies(self) -> None:
        """E2: the accuracy on every task under the bypass of each block."""
        if not self.inputs.tasks:
            self.folder.add_failure("tasks", "no tasks were given: what a bypass costs is not known.")
            return
        self.tasks = self._evaluate(self.inputs, "tasks")
        options = {"n_resamples": self.options.n_resamples, "seed": self.options.seed}
        self.folder.add_result(
            "tasks", self.tasks, title="Attention of each block bypassed: what it costs on tasks",
            lead=text.TASKS_LEAD,
            figures=[
                FigureRequest({"group": "task_group", **options}, reading=""),
                FigureRequest({"group": "task", "metric": "accuracy", **options}, reading=""),
            ],
        )  # fmt: skip
        self.folder.add_table(
            "task_summary", task_summary(self.tasks, **options), title="Every task and group", section="tasks"
        )

    def free_running(self) -> None:
        """E1: decode the memorized sequences freely under each bypass, for the score M."""
        if not self.options.free_running or MEMORIZED not in self.swept:
            return
        seqs = self._some(self.groups[MEMORIZED], self.options.max_free_running)
        values = [self._decoded(seqs, layer) for layer in range(self.n_layers)]
        base = self._decoded(seqs, None)
        columns = ("memorization_score", "matching_prefix", "exact_match")
        variables = {
            name: (("sequence", "layer"), np.column_stack([v.table[name].to_numpy(float) for v in values]))
            for name in columns
        }
        variables |= {f"{name}_baseline": ("sequence", base.table[name].to_numpy(float)) for name in columns}
        data = xr.Dataset(
            variables, {"sequence": seqs.table["id"].astype(str).tolist(), "layer": range(self.n_layers)}
        )
        result = Result.create(
            data,
            kind="attention_bypass",
            settings={"mode": self.options.mode, "decoding": "greedy, free-running"},
            **describe(self.model),
        )
        self.folder.add_result(
            "free_running", result, title="Free decoding with each block bypassed",
            lead="Greedy decoding from the prefix; M is the share of positions at which it equals the truth.",
            figures=[FigureRequest({"metric": "memorization_score"}, reading="")],
        )  # fmt: skip

    def frontier(self, others: Iterable[BypassInputs | Callable[[], BypassInputs]]) -> None:
        """E3 and E4: exact match against accuracy, for this model and the others."""
        parts: dict[str, tuple[Result, Result]] = {}
        if MEMORIZED in self.swept and self.tasks is not None:
            parts[self.inputs.name] = (self.swept[MEMORIZED], self.tasks)
        for number, given in enumerate(others):
            self.folder.step(f"further model {number + 1}", lambda given=given: self._other(given, parts))
        if not parts:
            return
        options = {"n_resamples": self.options.n_resamples, "seed": self.options.seed}
        many = "one panel for each model" if len(parts) > 1 else "one dot for each block"
        self.folder.add_result(
            "frontier", join_frontier(parts, **options), title="Recitation against ability",
            lead=text.FRONTIER_LEAD,
            figures=[FigureRequest({"title": f"Recitation against ability: {many}"}, reading="")],
        )  # fmt: skip
        tables = []
        for name, (recall, accuracy) in parts.items():
            try:
                found = {part: self._tradeoff(recall, accuracy, part) for part in (0, 1)}
            except MemlensError as error:
                self.folder.failed(f"selectivity of {name}", error)
                continue
            scored = found[1].table()
            chosen = pd.DataFrame({"selectivity_chosen": found[0].selectivity})
            tables.append(pd.concat([scored, chosen], axis=1).assign(model=name))
            if name == self.inputs.name:
                self.folder.find(find.selective_block(found[0], found[1], self.swept, self.options))
        if tables:
            table = pd.concat(tables, ignore_index=True)
            table.insert(0, "model", table.pop("model"))
            self.folder.add_table(
                "selectivity", table, title="Selectivity of each block", note=text.SELECTIVITY_NOTE,
                section="frontier",
            )  # fmt: skip
            if table["model"].nunique() > 1:
                self.folder.find(find.scaling(table, self.options.quartiles))

    def quartiles(self) -> None:
        """E5: drops by quartile of depth, language against reasoning."""
        if self.tasks is None or MEMORIZED not in self.swept:
            return
        table = quartile_table(
            self.swept[MEMORIZED],
            self.tasks,
            tasks=tasks_above_chance(self.tasks),
            parts=self.options.quartiles,
            n_resamples=self.options.n_resamples,
            seed=self.options.seed,
        )
        self.folder.add_table(
            "quartiles", table, title="Mean drop by part of depth, one block bypassed at a time",
            note="Drops are shares of what the unchanged model has; tasks at chance are left out.",
            section="tasks",
        )  # fmt: skip
        for finding in find.by_quartile(table, self.swept):
            self.folder.find(finding)

    def joint(self) -> None:
        """E6: sets of blocks bypassed together."""
        if not self.options.joint_sequences or not self.inputs.tasks:
            return
        options = self.options
        tasks = self.inputs.tasks
        if options.joint_questions is not None:
            tasks = [task.take(slice(0, options.joint_questions)) for task in tasks]
        search = search_layer_sets(
            self.model,
            self._some(self.inputs.memorized, options.joint_sequences),
            tasks,
            mode=options.mode,
            over=options.over,
            greedy_size=options.greedy_size,
            exact_layers=options.exact_layers,
            exact_pool=options.exact_pool,
            n_random=options.n_random,
            n_resamples=options.n_resamples,
            seed=options.seed,
            out=self._place("sets"),
            progress=self.progress,
        )
        best, areas = search.best_table(), search.areas()
        pair = join_frontier(
            {self.inputs.name: (search.recall, search.accuracy)},
            n_resamples=options.n_resamples,
            seed=options.seed,
        )
        self.folder.add_result(
            "sets", pair, title="Sets of blocks bypassed together", lead=text.SETS_LEAD,
            figures=[FigureRequest({"title": "Recitation against ability: sets of blocks"}, reading="")],
        )  # fmt: skip
        search.recall.save(self.folder.path / "sets_recall.nc")
        search.accuracy.save(self.folder.path / "sets_tasks.nc")
        for name, frame, words in (
            ("best_sets", best, "What each search chose, scored on the other half"),
            ("areas", areas, "Area under the frontier, by family of sets"),
            ("every_set", search.table, "Every set that was tried"),
        ):
            self.folder.add_table(name, frame, title=words, section="sets")
        self.folder.find(find.best_set(best, areas, search, self._elsewhere(search)))

    def edits(self) -> None:
        """E8: other edits of each layer, on every group and on untrained weights."""
        if not self.options.edits:
            return
        seqs = {
            name: self._some(group, self.options.control_sequences) for name, group in self.groups.items()
        }
        results = {name: self._edited(self.model, group, name) for name, group in seqs.items()}
        if self.options.untrained_control:
            results[UNTRAINED] = self._edited(self.twin, seqs[MEMORIZED], UNTRAINED)
        joined = join_groups(results)
        figures = [
            FigureRequest({"metric": "target_logprob", "title": "Every edit, on memorized text"}, reading="")
        ]
        self.folder.add_result(
            "edits", results[MEMORIZED], title="Other edits of each layer", lead=text.EDITS_LEAD,
            figures=figures,
        )  # fmt: skip
        self.folder.add_result(
            "edits_by_group", joined, title="The bypass beside its controls, by group",
            figures=[
                FigureRequest(
                    {"metric": "target_logprob", "edit": edit, "group": "group", "title": f"Edit: {edit}"},
                    reading="",
                )
                for edit in self.options.edits
            ],
        )  # fmt: skip
        options = {"n_resamples": self.options.n_resamples, "seed": self.options.seed}
        table = control_table(results, parts=self.options.quartiles, **options)
        depth = depth_table(results, **options)
        self.folder.add_table(
            "controls", table, title="What is special to memorized text", note=text.CONTROLS_NOTE,
            section="edits",
        )  # fmt: skip
        self.folder.add_table(
            "depth", depth, title="How the size of each edit's effect goes with depth", note=text.DEPTH_NOTE,
            section="edits",
        )  # fmt: skip
        self.folder.find(control.special(table))
        self.folder.find(control.any_stack(depth))

    def heads(self) -> None:
        """E8: the bypass of single heads."""
        if not self.options.heads:
            return
        seqs = self._some(self.groups[MEMORIZED], self.options.control_sequences)
        result = bypass_attention(
            self.model, seqs, mode="identity", over="head", metrics=_CONTROL_METRICS,
            out=self._place("heads"), progress=self.progress,
        )  # fmt: skip
        self.folder.add_result(
            "heads", result, title="Single heads bypassed",
            figures=[FigureRequest({"metric": "target_logprob"})],
        )  # fmt: skip
        self.folder.find(control.heads_against_blocks(result, self.swept.get(MEMORIZED), self.options.seed))

    def bounds(self) -> None:
        """E7: what a bypass can change, and what it does change."""
        n = self.options.bounds_sequences
        if not n:
            return
        seqs = self._some(self.groups[MEMORIZED], n)
        result = attention_bypass_bounds(self.model, seqs, progress=self.progress)
        self.folder.add_result(
            "bounds", result, title="Bounds of what a bypass can change", lead=text.BOUNDS_LEAD,
            figures=[FigureRequest(reading=""), FigureRequest({"metric": "kl"}, reading="")],
        )  # fmt: skip
        agreements = []
        models = {"this model": self.model}
        if self.options.untrained_control:
            models[UNTRAINED] = self.twin
        for name, model in models.items():
            measured = (
                result if name == "this model" else attention_bypass_bounds(model, seqs, progress=False)
            )
            guessed = bypass_predictor(model, seqs, progress=False)
            for predictor in ("predictor", "relative_predictor"):
                if self.n_layers > 2:
                    found = predictor_agreement(
                        guessed, measured, "kl", predictor=predictor, seed=self.options.seed
                    )
                    agreements.append({"weights": name, **asdict(found)})
        if agreements:
            self.folder.add_table(
                "predictor", pd.DataFrame(agreements),
                title="How well a guess from one pass orders the layers", section="bounds",
            )  # fmt: skip
        self.folder.find(control.bounded(result, pd.DataFrame(agreements)))

    @property
    def twin(self) -> Any:
        """The model's shape with fresh weights."""
        if self._twin is None:
            self._twin = untrained_like(self.model, seed=self.options.seed)
        return self._twin

    def _some(self, seqs: SequenceSet, most: int) -> SequenceSet:
        return at_most(seqs, most, self.options.seed)

    def _place(self, name: str) -> Path:
        return Path(self.folder.path) / "sweeps" / name.replace(" ", "_").replace("/", "_")

    def _bypass(self, model: Any, seqs: SequenceSet, name: str) -> Result:
        return bypass_attention(
            model, seqs, mode=self.options.mode, metrics=METRICS, out=self._place(f"blocks_{name}"),
            progress=self.progress,
        )  # fmt: skip

    def _evaluate(self, inputs: BypassInputs, name: str) -> Result:
        layers = range(Trunk(inputs.model).n_layers)
        edits = [
            bypass_intervention(inputs.model, layer, mode=self.options.mode, coords={"layer": layer})
            for layer in layers
        ]
        return evaluate_tasks(
            inputs.model, inputs.tasks, edits, out=self._place(name), progress=self.progress
        )

    def _edited(self, model: Any, seqs: SequenceSet, name: str) -> Result:
        edits = control_edits(model, seqs, self.options.edits, self.n_layers)
        return sweep(
            model, seqs, edits, _CONTROL_METRICS, kind="bypass_controls",
            settings={"edits": list(self.options.edits)}, out=self._place(f"edits_{name}"),
            progress=self.progress,
        )  # fmt: skip

    def _tradeoff(self, recall: Result, accuracy: Result, part: int) -> Tradeoff:
        seed = self.options.seed
        return edit_tradeoff(
            take_half(recall, part, seed),
            take_half(accuracy, part, seed, within="task"),
            over=self.options.over,
            tasks=tasks_above_chance(take_half(accuracy, 0, seed, within="task")) or None,
            n_resamples=self.options.n_resamples,
            seed=seed,
        )

    def _other(
        self, given: BypassInputs | Callable[[], BypassInputs], parts: dict[str, tuple[Result, Result]]
    ) -> None:
        inputs = given if isinstance(given, BypassInputs) else given()
        seqs = self._some(inputs.memorized, self.options.max_sequences)
        recall = self._bypass(inputs.model, seqs, f"of_{inputs.name}")
        parts[inputs.name] = recall, self._evaluate(inputs, f"tasks_of_{inputs.name}")
        self.folder.add_settings(
            {f"further model {inputs.name}": {**describe(inputs.model), "memorized": dict(seqs.attrs)}}
        )

    def _decoded(self, seqs: SequenceSet, layer: int | None) -> RecallScores:
        """Score one bypass with free decoding; kept, so that a second call has it at once."""
        about = fingerprint([model_fingerprint(self.model), sequences_fingerprint(seqs), self.options.mode])
        place = self._place("free_running") / f"{about}-{'base' if layer is None else layer}.parquet"
        if place.is_file():
            return RecallScores.load(place)
        if layer is None:
            scores = score_recall(self.model, seqs, metrics=(), progress=False)
        else:
            with bypassed(self.model, layer, mode=self.options.mode):
                scores = score_recall(self.model, seqs, metrics=(), progress=self.progress)
        place.parent.mkdir(parents=True, exist_ok=True)
        scores.save(place)
        return scores

    def _elsewhere(self, search: LayerSetSearch) -> dict[str, Result]:
        """What the best set does to text that is not recited."""
        layers = search.sets[search.best["any"]]
        edit = bypass_intervention(self.model, layers, mode=self.options.mode)
        return {
            name: sweep(
                self.model, self._some(group, self.options.control_sequences), [edit], ("target_logprob",),
                out=self._place(f"best_set_{name}"), progress=False,
            )
            for name, group in self.groups.items()
        }  # fmt: skip
