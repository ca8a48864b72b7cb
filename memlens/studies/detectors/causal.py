"""The parts of the study that change the model: answering, curvature, modules, context or weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import EmptySetError
from memlens.instruments.detect.behaviour import steering_curve, steering_doses
from memlens.instruments.detect.context.comparing import context_heads, which_wins
from memlens.instruments.detect.context.measure import context_or_weights
from memlens.instruments.detect.context.patching import context_patching
from memlens.instruments.detect.context.sets import longest_targets
from memlens.instruments.detect.curvature import curvature_edits
from memlens.instruments.detect.generalizing import answered_questions, recall_or_generalize
from memlens.instruments.detect.modular import modular_view
from memlens.instruments.screen.gradients import attribute_ablation
from memlens.instruments.tasks.evaluate import evaluate_tasks
from memlens.instruments.tasks.tasks import ChoiceTask
from memlens.report.bibliography import Citation
from memlens.report.model import FigureRequest
from memlens.results.result import Result
from memlens.results.statistics.estimates import mean_estimate, share_estimate
from memlens.sequences.set import SequenceSet
from memlens.studies.detectors import findings as find
from memlens.studies.detectors.options import DetectorOptions
from memlens.studies.running import StudyDirectory, at_most, matched_with
from memlens.sweeps.run import sweep

SWEPT = ("exact_match", "target_logprob")
_PATCHED = ("target_logprob", "attn_logprob", "mlp_logprob")


@dataclass(eq=False)
class Detecting:
    """What every part of the study needs.

    Attributes:
        model: The model.
        folder: The run's folder.
        options: Of the study.
        progress: Show progress bars.
    """

    model: Any
    folder: StudyDirectory
    options: DetectorOptions
    progress: bool

    def few(self, seqs: SequenceSet, most: int) -> SequenceSet:
        """Return at most so many sequences, chosen by the study's seed."""
        return at_most(seqs, most, self.options.seed)

    def steer(
        self,
        name: str,
        neurons: Result,
        seqs: SequenceSet,
        tasks: Sequence[ChoiceTask],
        alphas: Sequence[float],
    ) -> None:
        """Measure recall against the dose of steering, and what tasks lose; the finding has the same name."""
        n_random = self.options.n_random
        work = partial(
            steering_curve, self.model, neurons, self.few(seqs, self.options.max_steered), alphas,
            n_random=n_random, progress=self.progress,
        )  # fmt: skip
        curve, cost = self.folder.kept(name, work), None
        self.folder.add_result(name, curve, title=find.TEXTS["titles"][name])
        if tasks:
            doses = steering_doses(self.model, neurons, alphas, n_random=n_random)
            cost = evaluate_tasks(self.model, tasks, doses, progress=self.progress)
            table = task_table(cost)
            self.folder.add_table(f"{name}_tasks", table, title="What steering costs", section=name)
        self.folder.find(find.steering(curve, cost, name))


def task_table(result: Result) -> pd.DataFrame:
    """Return the mean accuracy at each dose and direction, with the baseline's, by task."""
    found = result.mean_ci("sequence", metric="accuracy", group="task")["accuracy"]
    base = result["accuracy_baseline"].groupby(result["task"]).mean()
    frame = found.reset_coords(drop=True).to_dataset("statistic").to_dataframe().reset_index()
    unchanged = base.to_dataframe("unchanged")["unchanged"].reset_index()
    return frame.merge(unchanged, on="task")


def generalize(
    run: Detecting, recalled: SequenceSet, matched: SequenceSet, tasks: Sequence[ChoiceTask]
) -> None:
    """Find the neurons that tell recalling from answering new questions, test them, and steer along them."""
    named = [task for task in tasks if task.name == run.options.generalizing_task] or list(tasks)
    questions = answered_questions(run.model, named, progress=run.progress)
    found = recall_or_generalize(
        run.model, recalled, questions, matched, options=run.options.generalizing(), progress=run.progress
    )
    run.folder.add_result("generalizing", found.neurons, title=find.TEXTS["titles"]["generalizing"])
    run.folder.add_table(
        "generalizing_groups", found.comparisons, title="What these neurons tell apart",
        section="generalizing", note=find.TEXTS["generalizing"]["note"],
    )  # fmt: skip
    run.folder.find(find.generalizing(found, [task.name for task in named]))
    run.steer("generalizing_steering", found.neurons, found.held_out, tasks, run.options.answering_alphas)


def curvature(run: Detecting, recalled: SequenceSet, text: SequenceSet, tasks: Sequence[ChoiceTask]) -> None:
    """Keep the directions of large curvature on half of a text; measure recall, the other half and tasks."""
    if len(text) < 2:
        raise EmptySetError(
            "text needs two or more sequences: one half gives the curvature, one is measured."
        )
    order = np.random.default_rng(run.options.seed).permutation(len(text))
    own, other = (run.few(text[np.sort(order[part::2])], run.options.max_text) for part in (0, 1))
    edits = curvature_edits(
        run.model, own, run.options.kept, matrices=run.options.matrices, n_random=1, seed=run.options.seed
    )
    few = run.few(recalled, run.options.max_steered)
    found = {}
    for name, seqs in (("curvature", few), ("curvature_text", other)):
        found[name] = run.folder.kept(
            name, partial(sweep, run.model, seqs, edits, SWEPT, progress=run.progress)
        )
    run.folder.add_result(
        "curvature", found["curvature"], title=find.TEXTS["titles"]["curvature"],
        figures=[FigureRequest({"title": find.TEXTS["curvature"]["figure"]})],
    )  # fmt: skip
    run.folder.add_citations(Citation("merullo2025", "curvature and recitation"))
    cost = evaluate_tasks(run.model, tasks, edits, progress=run.progress) if tasks else None
    table = curvature_table(found["curvature"], found["curvature_text"], cost)
    share = {edit.about["kept"]: edit.about["share_of_entries"] for edit in edits}
    table.insert(2, "share_of_entries", [share[kept] for kept in table["kept"].tolist()])
    run.folder.add_table(
        "curvature_costs", table, title="What is left", section="curvature",
        note=find.TEXTS["curvature"]["note"],
    )  # fmt: skip
    of_mildest = share[max(share)]
    run.folder.find(
        find.curvature(found["curvature"], found["curvature_text"], cost, of_mildest, run.options.matrices)
    )


def curvature_table(recalled: Result, text: Result, cost: Result | None) -> pd.DataFrame:
    """Return recall, the log-probability of other text and accuracy for each share and choice of entries."""
    rows = []
    for kept in recalled["kept"].values.tolist():
        for entries in recalled["entries"].values.tolist():
            at = {"kept": kept, "entries": entries}
            measured = {
                "recalled": share_estimate(recalled["exact_match"].sel(at)),
                "text_logprob": mean_estimate(text["target_logprob"].sel(at)),
            }
            if cost is not None:
                measured["accuracy"] = share_estimate(cost["accuracy"].sel(at))
            ends = {
                f"{name}{tail}": value
                for name, one in measured.items()
                for tail, value in (("", one.value), ("_low", one.low), ("_high", one.high))
            }
            rows.append({**at, **ends})
    return pd.DataFrame(rows)


def modules(run: Detecting, recalled: SequenceSet) -> None:
    """Count the neurons that carry half of the effect in each group, and what groups share."""
    options = run.options
    effects = attribute_ablation(
        run.model, run.few(recalled, options.max_modules), site="mlp_post", steps=options.module_steps,
        progress=run.progress,
    )  # fmt: skip
    counts, shared = modular_view(
        effects, group=options.modules_by, n_resamples=options.n_module_draws, seed=options.seed
    )
    run.folder.add_section("modules", find.TEXTS["modules"]["title"], find.TEXTS["modules"]["lead"])
    run.folder.add_figure(
        "modules",
        find.module_figure(counts, options.modules_by, effects),
        section="modules",
        reading=find.TEXTS["modules"]["reading"],
    )
    run.folder.add_table("modules", counts, title="Neurons that carry half of the harm", section="modules")
    run.folder.add_table("modules_shared", shared, title="What two groups share", section="modules")
    run.folder.find(find.modules(counts, shared, options.modules_by))


def context_sequences(run: Detecting, recalled: SequenceSet, matched: SequenceSet) -> list[SequenceSet]:
    """Return a few recalled sequences and their controls, short enough to stand in the prompt twice.

    Only recalled sequences that have a control are taken, so that pairs are compared.
    """
    if "matched_to" in matched.table:
        have = recalled.table["id"].astype(str).isin(matched.table["matched_to"].astype(str))
        recalled = recalled[np.flatnonzero(have)]
    chosen = run.few(recalled, run.options.max_context)
    sides = chosen, run.few(matched_with(chosen, matched), run.options.max_context)
    options = run.options.context()
    return [
        seqs.first_targets(
            min(run.options.context_targets, longest_targets(run.model, seqs, options=options))
        )
        for seqs in sides
    ]


def _measured(
    run: Detecting, name: str, measure: Callable[..., Result], recalled: SequenceSet, matched: SequenceSet
) -> tuple[Result, Result]:
    """Measure recalled and matched sequences, and add both results to the run."""
    options, title = run.options.context(), find.TEXTS["titles"][name]
    found, control = (
        measure(run.model, seqs, options=options, progress=run.progress)
        for seqs in context_sequences(run, recalled, matched)
    )
    run.folder.add_result(name, found, title=title)
    run.folder.add_result(f"{name}_matched", control, title=f"{title}: matched sequences")
    return found, control


def context(run: Detecting, recalled: SequenceSet, matched: SequenceSet) -> None:
    """Ablate heads where the continuation is recalled and where it stands in the prompt."""
    found, control = _measured(run, "context", context_or_weights, recalled, matched)
    wins = which_wins(found)
    run.folder.add_table("context_wins", wins, title="Who wins a conflict", section="context")
    heads = context_heads(found, control=control, seed=run.options.seed)
    table = heads.to_dataframe().reset_index().sort_values("p_corrected", kind="stable").head(20)
    run.folder.add_table(
        "context_heads", table, title="Heads that differ most, beyond matched sequences", section="context"
    )
    run.folder.find(find.context(found, control))
    run.folder.find(find.context_sites("context_heads", {"heads": heads}))


def patching(run: Detecting, recalled: SequenceSet, matched: SequenceSet) -> None:
    """Patch heads and layers where the continuation is recalled and where it is copied."""
    found, control = _measured(run, "context_patching", context_patching, recalled, matched)
    compared = {name: context_heads(found, name, control=control, seed=run.options.seed) for name in _PATCHED}
    table = pd.concat(
        [part.to_dataframe().reset_index().assign(patched=name) for name, part in compared.items()]
    )
    run.folder.add_table(
        "context_patching_sites", table.sort_values("p_corrected", kind="stable").head(20),
        title="Heads and layers that differ most, beyond matched sequences", section="context_patching",
    )  # fmt: skip
    words = ("heads", "attention layers", "MLPs")
    run.folder.find(find.patched(found, control))
    run.folder.find(find.context_sites("patched_sites", dict(zip(words, compared.values(), strict=True))))
