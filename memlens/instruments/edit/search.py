"""Which edit removes most recitation for least loss of ability? Searched on one half, judged on the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import EmptySetError, OptionError, check_option
from memlens.forward.components import Component
from memlens.forward.exclusive import computes
from memlens.instruments.edit.editing import HOWS, check_used, control_edits, edit_weights, used_by
from memlens.instruments.edit.options import How, VectorSearch
from memlens.instruments.edit.weight_edit import EditMaker, WeightEdit
from memlens.instruments.tasks.evaluate import evaluate_tasks
from memlens.instruments.tasks.tasks import ChoiceTask
from memlens.results.groups import halves, take_half
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_sweep
from memlens.results.readings import read_effects
from memlens.results.result import Result
from memlens.results.statistics.tradeoff import OVER, Tradeoff, edit_tradeoff, tasks_above_chance
from memlens.sequences.set import SequenceSet
from memlens.sweeps.run import sweep

_METRICS = ("exact_match", "target_accuracy", "target_logprob")


@dataclass(frozen=True, eq=False)
class EditSearch:
    """The effects of weight edits, made and chosen on one half of the data and scored on the other.

    Attributes:
        recall: Kind "weight_edits": exact match, target accuracy and target log-probability
            `(sequence, edit)` of all sequences, both halves.
        accuracy: Kind "task_accuracy" `(sequence, edit)`: the questions of all tasks.
        edits: The edits by their label.
        table: One row per edit: `edit` (its label), `how`, `count` (components), `strength`, `control` (""
            for an edit of the ranked components, "components" for one of random components that was made in
            the same way, "direction" for a random change of the same size), `size` (Euclidean norm of the
            change), `selectivity_chosen` (on the choosing half), and on the scoring half the columns of
            `Tradeoff.table`.
        best: The label of the most selective edit of each `how` on the choosing half, and of "any".
        choosing: The trade-off on the choosing half.
        scoring: The trade-off on the scoring half.
        settings: All parameters.
    """

    recall: Result
    accuracy: Result
    edits: Mapping[str, WeightEdit]
    table: pd.DataFrame
    best: Mapping[str, str]
    choosing: Tradeoff
    scoring: Tradeoff
    settings: Mapping[str, Any]

    @property
    def edit(self) -> WeightEdit:
        """The edit that was chosen: the most selective one on the choosing half."""
        return self.edits[self.best["any"]]

    def best_table(self) -> pd.DataFrame:
        """Return the chosen edit of each `how`, scored on the half that it did not see, with its controls.

        `components_removed` and `components_cost` are the means over the edits of random components that
        were made in the same way, `direction_removed` and `direction_cost` those over random changes of the
        same size; NaN if there are none.
        """
        table = self.table.set_index("edit")
        rows = []
        for how, label in self.best.items():
            row = table.loc[label]
            same = (table[["how", "count", "strength"]] == row[["how", "count", "strength"]]).all(axis=1)
            found = {"search": how, "edit": label, **row.drop("control").to_dict()}
            for control in ("components", "direction"):
                theirs = table[same & (table["control"] == control)]
                found |= {f"{control}_{name}": theirs[name].mean() for name in ("removed", "cost")}
            rows.append(found)
        return pd.DataFrame(rows)


@computes
def search_edits(
    model: Any,
    sequences: SequenceSet,
    tasks: Sequence[ChoiceTask],
    ranking: Sequence[Component | str],
    *,
    hows: Sequence[How] = ("zero", "output_vector", "norm_preserving"),
    counts: Sequence[int] = (10, 30),
    strengths: Sequence[float] = (1.0,),
    keep: SequenceSet | None = None,
    reference: SequenceSet | None = None,
    search: VectorSearch | None = None,
    over: str = "max",
    n_random: int = 2,
    n_resamples: int = 2000,
    seed: int = 0,
    out: str | Path | None = None,
    **options: Any,
) -> EditSearch:
    r"""Edit the first components of a ranking in several ways and search for the most selective edit.

    The sequences, and the questions of each task, are divided into two halves. Edits are made on the first
    half of the sequences (`edit_weights`) and chosen by their selectivity on the first halves; everything is
    scored on the second (`memlens.tasks.edit_tradeoff`, as sets of bypassed layers are). For comparison, each
    kind of edit is also made for random components of the same layers with the same budget, and random
    changes of the same size are made to the ranked components.

    Args:
        model: A TransformerLens model.
        sequences: Memorized sequences.
        tasks: The abilities that the model should keep.
        ranking: Heads or neurons, the most important first; rank them on other sequences, or on the first
            half (``memlens.results.groups.halves(len(sequences), seed)[0]``).
        hows: Kinds of edit, as of `edit_weights`.
        counts: How many of the first components.
        strengths: As of `edit_weights`; those above 1 do not apply to "zero" and "mean".
        keep: What is to stay, for the searched edits.
        reference: For "mean"; the first half of the sequences by default.
        search: Parameters of the search of output vectors.
        over: Whether the cost is the largest ("max") or the "mean" loss over tasks.
        n_random: Number of random sets of components, and of random directions, for each edit.
        n_resamples: Resamples of the bootstraps.
        seed: Seed of the halves, the controls and the bootstraps.
        out: A folder that keeps finished parts of the two sweeps, as for `sweep`.
        options: Further options of `sweep`.

    Returns:
        See `EditSearch`; `.best_table()` is its finding and `.edit` the chosen edit.

    Raises:
        EmptySetError: Fewer than four sequences, no tasks, or an empty ranking.
        OptionError: An unknown kind of edit, a count above the length of the ranking, or an option that none
            of the kinds uses.
        ResultError: The model recites nothing, or is not above chance on any task.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> some = ml.load_sequences("zoo", model)[::5]
        >>> seqs = ml.score_recall(model, some, generate=False, progress=False).memorized()
        >>> tasks = ml.tasks.local_tasks("zoo", model, names=["agreement"], n=20)
        >>> small = {"hows": ["zero"], "counts": [2], "n_random": 1, "progress": False}
        >>> found = ml.instruments.search_edits(model, seqs, tasks, ["L0H4", "L1H7"], **small)
        >>> found.table["edit"].tolist()
        ['zero 2', 'zero 2, random components 0', 'zero 2, random direction 0']
    """
    check_option("over", over, OVER)
    for name, values in (("hows", hows), ("counts", counts), ("strengths", strengths)):
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise OptionError(f"{name}={values!r}: give a list.")
    hows, counts, strengths = list(hows), list(counts), list(strengths)
    for how in hows:
        check_option("how", how, HOWS)
    if not all(isinstance(count, Integral) for count in counts):
        raise OptionError(f"counts={counts}: give whole numbers.")
    check_used(hows, keep=keep, reference=reference, search=search)
    components = EditMaker(model).components(ranking)
    if len(sequences) < 4 or not tasks or not components:
        raise EmptySetError(
            f"{len(sequences)} sequences, {len(tasks)} tasks and {len(components)} components: give at least "
            "four sequences, one task and one component."
        )
    if not hows or not counts or min(counts) < 1 or max(counts) > len(components) or n_random < 0:
        raise OptionError(
            f"hows={list(hows)}, counts={list(counts)}, n_random={n_random} of a ranking of "
            f"{len(components)}: give at least one kind of edit, counts from 1 to {len(components)} and at "
            "least 0 random ones."
        )
    if not strengths or (set(hows) <= {"zero", "mean"} and max(strengths) > 1):
        raise OptionError(f"strengths={list(strengths)} with hows={list(hows)}: give some, at most 1.")
    first = sequences[halves(len(sequences), seed)[0]]
    made: dict[str, tuple[WeightEdit, dict[str, Any]]] = {}
    for how in hows:
        forget = None if how == "mean" and reference is not None else first
        shared = used_by(how, sequences=forget, keep=keep, reference=reference, search=search)
        shared["progress"] = options.get("progress", True)
        for count in counts:
            for strength in strengths:
                if how in ("zero", "mean") and strength > 1:
                    continue
                facts = {"how": how, "count": count, "strength": strength}
                for label, control, edit in _with_controls(
                    model, components[:count], how, strength, shared, n_random, seed
                ):
                    made[label] = edit, {**facts, "control": control, "size": edit.size}
    edits = [replace(edit, name=label, coords={"edit": label}) for label, (edit, _) in made.items()]
    folders = [None if out is None else Path(out) / name for name in ("recall", "tasks")]
    settings: dict[str, Any] = {
        "hows": list(hows), "counts": list(counts), "strengths": list(strengths), "over": over,
        "search": asdict(search or VectorSearch()), "n_random": n_random, "n_resamples": n_resamples,
        "seed": seed,
    }  # fmt: skip
    recall = sweep(
        model, sequences, edits, _METRICS, kind="weight_edits", settings=settings, out=folders[0], **options
    )
    accuracy = evaluate_tasks(model, tasks, edits, out=folders[1], **options)
    counted = tasks_above_chance(accuracy)
    choosing, scoring = (
        edit_tradeoff(
            take_half(recall, part, seed), take_half(accuracy, part, seed, within="task"), over=over,
            tasks=counted or None, n_resamples=n_resamples, seed=seed,
        )
        for part in (0, 1)
    )  # fmt: skip
    table = pd.DataFrame([{"edit": label, **facts} for label, (_, facts) in made.items()])
    table["selectivity_chosen"] = choosing.selectivity
    table = table.join(scoring.table().drop(columns="edit"))
    return EditSearch(
        recall, accuracy, {e.name: e for e in edits}, table, _best(table), choosing, scoring,
        {**settings, "tasks": counted},
    )  # fmt: skip


def _best(table: pd.DataFrame) -> dict[str, str]:
    """The most selective edit of each kind on the choosing half, and of all."""
    own = table.loc[table["control"] == ""]
    own = own.sort_values(by="selectivity_chosen", ascending=False, kind="stable")
    best = {str(how): str(label) for how, label in zip(own["how"][::-1], own["edit"][::-1], strict=True)}
    return {**{how: best[how] for how in dict.fromkeys(table["how"])}, "any": str(own["edit"].iloc[0])}


def _with_controls(
    model: Any,
    components: Sequence[Component],
    how: How,
    strength: float,
    shared: Mapping[str, Any],
    n_random: int,
    seed: int,
) -> Iterator[tuple[str, str, WeightEdit]]:
    """An edit and its controls: a label, the kind of control and the edit."""
    share = "" if strength == 1 else f" x {strength:g}"
    label = f"{how} {len(components)}{share}"
    edit = edit_weights(model, components, how, strength=strength, **shared)
    yield label, "", edit
    for draw in range(n_random):
        others = random_components(model, components, seed=seed + draw)
        control = edit_weights(model, others, how, strength=strength, **shared)
        yield f"{label}, random components {draw}", "components", control
    for draw, control in enumerate(control_edits(model, edit, "direction", n=n_random, seed=seed)):
        yield f"{label}, random direction {draw}", "direction", control


def random_components(model: Any, components: Sequence[Component], *, seed: int = 0) -> list[Component]:
    """Return as many other heads or neurons of the same layers, drawn at random.

    Raises:
        OptionError: Whole MLPs, attention or layers, or a layer with too few others.
    """
    maker, random = EditMaker(model), np.random.default_rng([seed, 20_262])
    found = []
    for layer, kind in dict.fromkeys((c.layer, c.kind) for c in components):
        counts: dict[str, int] = {
            "head": maker.trunk.n_heads,
            "neuron": maker.parts(layer).maps["out"].weight.shape[1],
        }
        same = [c for c in components if (c.layer, c.kind) == (layer, kind)]
        like, used = same[0], [c.index for c in same]
        pool = [index for index in range(counts.get(kind, 0)) if index not in set(used)]
        if len(pool) < len(used):
            raise OptionError(
                f"layer {layer} has {len(pool)} other components of the kind {kind!r} and {len(used)} are "
                "edited: there is no random set of this size."
            )
        drawn = random.choice(pool, len(used), replace=False)
        found += [replace(like, layer=layer, index=int(index)) for index in sorted(drawn.tolist())]
    return found


register_kind(
    "weight_edits", plot=plot_sweep, reading=read_effects, cites=(("hakimi2026", "editing output vectors"),)
)
