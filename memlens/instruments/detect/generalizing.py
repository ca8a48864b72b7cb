"""Neurons that tell recalling from generalizing, beyond telling two kinds of text apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Annotated, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt

from memlens.errors import EmptySetError
from memlens.forward.exclusive import computes
from memlens.instruments.detect.behaviour import BehaviourOptions, behaviour_neurons, projection
from memlens.instruments.detect.beyond import BeyondOptions, beyond_confounds
from memlens.instruments.detect.confounds import COPIES, confounds
from memlens.instruments.detect.groups import Groups
from memlens.instruments.tasks.evaluate import evaluate_tasks
from memlens.instruments.tasks.tasks import ChoiceTask, joined_requests
from memlens.options import options_class
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet

GENERALIZING, OF_RECALL, OF_TEXT = "generalizing", "recalled or generalizing", "matched or generalizing"


@computes
def answered_questions(model: Any, tasks: Sequence[ChoiceTask], *, progress: bool = True) -> SequenceSet:
    """Return the questions that a model answers correctly, each with its answer as the continuation.

    They are the generalizing side of `recall_or_generalize`: a new sum has to be computed. A question counts
    if the correct choice is the likeliest one. Guessing is right as often as `ChoiceTask.chance` says, so
    among the questions of a task that the model hardly solves many are only guessed.

    Args:
        model: A TransformerLens model.
        tasks: Such as ``ml.tasks.local_tasks("zoo", model, names=["arithmetic"])``.
        progress: Show a progress bar.

    Returns:
        One sequence per question, with the columns of `ChoiceTask.requests` (`task`, `question_id`, …).

    Raises:
        EmptySetError: There are no tasks, or no question is answered correctly.
        OptionError: Two tasks have the same name.

    Source: ours, after the generalizing samples of arXiv 2412.18497.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> tasks = ml.tasks.local_tasks("zoo", model, names=["arithmetic"], n=20)
        >>> right = ml.detect.answered_questions(model, tasks, progress=False)
        >>> 0 < len(right) < 20, right.table["gold"].all()
        (True, np.True_)
    """
    accuracy = evaluate_tasks(model, tasks, progress=progress)["accuracy"].values
    requests = joined_requests(tasks)
    first = requests.table.drop_duplicates(["task", "question"]).index
    question = np.searchsorted(first.to_numpy(), np.arange(len(requests)), side="right") - 1
    # Of several correct choices the first stands for the question.
    gold = np.flatnonzero(requests.table["gold"].to_numpy(bool))
    numbers, place = np.unique(question[gold], return_index=True)
    right = gold[place][accuracy[numbers] == 1]
    if not len(right):
        raise EmptySetError(
            f"the model answers none of the {len(first)} questions correctly: give tasks that it solves."
        )
    return requests[right]


@options_class
class GeneralizingOptions(BehaviourOptions):
    """Options of `recall_or_generalize`; the result records those of `BehaviourOptions`.

    Example:
        >>> import memlens as ml
        >>> ml.detect.GeneralizingOptions(folds=3).folds
        3
    """

    max_targets: PositiveInt | None = 4
    """Most targets of each sequence that are read, from the first: answers are short, and the groups should
    be read over about as many positions. None for all."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Folds of the comparison with the confounds."""

    def of_neurons(self) -> BehaviourOptions:
        """Return the options of `behaviour_neurons`."""
        return BehaviourOptions(**{f.name: getattr(self, f.name) for f in fields(BehaviourOptions)})


@dataclass(frozen=True)
class RecallOrGeneralize:
    """What `recall_or_generalize` found.

    Attributes:
        neurons: Kind "behaviour_neurons", of half of the recalled and of the generalizing sequences; for
            `steered` and `steering_curve` on other sequences.
        held_out: The recalled sequences of the other half, for these.
        of_text: The neurons that tell matched from generalizing sequences, on the same half.
        shared: Share of the chosen neurons that `of_text` chose too.
        comparisons: One row per choice of neurons (`neurons`: "recalled or generalizing", or "matched or
            generalizing", the control), pair of groups (`compared`) and baseline, with the columns of
            `beyond_confounds`; there `recalled` and `matched` are the numbers of sequences of the first and
            of the second group.
    """

    neurons: Result
    held_out: SequenceSet
    of_text: Result
    shared: float
    comparisons: pd.DataFrame


@computes
def recall_or_generalize(
    model: Any,
    recalled: SequenceSet,
    generalizing: SequenceSet,
    matched: SequenceSet,
    *,
    options: GeneralizingOptions | None = None,
    progress: bool = True,
) -> RecallOrGeneralize:
    r"""Find the neurons that tell recalling from generalizing, and test them on a third group.

    `behaviour_neurons` of recalled against generalizing sequences also finds neurons that only tell texts of
    two kinds apart: a planted story is not a sum. The third group has the text of the first without its
    behaviour: matched sequences that are not recalled. Two choices of neurons are made on half of all
    sequences and score the other half, and the reverse (`projection`, standardized within each half):

    - of recalled against generalizing sequences;
    - of matched against generalizing ones: the control, which knows nothing of recall.

    Both scores are then compared between every two groups. If the first separates recalled from *matched*
    sequences, better than the control and beyond the confounds, its neurons go with recalling. If it
    separates matched from generalizing ones as well as it does recalled ones, they go with the kind of text.

    Args:
        model: A TransformerLens model.
        recalled: Sequences that the model recalls.
        generalizing: Sequences that it gets right without having seen them, such as `answered_questions`.
        matched: Sequences like `recalled` that it does not recall.
        options: See `GeneralizingOptions`.
        progress: Show progress bars.

    Raises:
        EmptySetError: A group has fewer than two sequences.
        ResultError: A group has fewer sequences than `folds`.
        SiteError: A layer that does not exist.
        SequenceError: Two groups have a sequence with the same id.

    Source: pairs of memorizing and generalizing samples and the choice of neurons are those of arXiv
    2412.18497 (read as its abstract); the third group, the control and the comparison with confounds are
    ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> recall = ml.score_recall(model, ml.load_sequences("zoo", model), generate=False, progress=False)
        >>> tasks = ml.tasks.local_tasks("zoo", model, names=["arithmetic"], n=40)
        >>> sums = ml.detect.answered_questions(model, tasks, progress=False)
        >>> found = ml.detect.recall_or_generalize(
        ...     model, recall.memorized(), sums, recall.matched_controls(), progress=False
        ... )
        >>> sorted(found.comparisons["compared"].unique())
        ['matched or generalizing', 'recalled or generalizing', 'recalled or matched']
    """
    options = options or GeneralizingOptions()
    groups = {"recalled": recalled, "matched": matched, GENERALIZING: generalizing}
    for name, seqs in groups.items():
        if len(seqs) < 2:
            raise EmptySetError(
                f"there are {len(seqs)} {name} sequences: two or more of each group are halved."
            )
    if options.max_targets is not None:
        groups = {name: seqs.first_targets(options.max_targets) for name, seqs in groups.items()}
    scores = {kind: {name: np.full(len(seqs), np.nan) for name, seqs in groups.items()} for kind in _KINDS}
    chosen: dict[str, list[Result]] = {kind: [] for kind in _KINDS}
    folds = _folds(groups, options.seed)
    for own, other in folds:
        for kind, first in _KINDS.items():
            sides = [groups[name][own[name]] for name in (first, GENERALIZING)]
            found = behaviour_neurons(
                model, *sides, names=(first, GENERALIZING), options=options.of_neurons(), progress=progress
            )
            values = {
                name: projection(model, found, seqs[other[name]], progress=progress)
                for name, seqs in groups.items()
            }
            every = np.concatenate(list(values.values()))
            for name, part in values.items():
                scores[kind][name][other[name]] = (part - every.mean()) / max(float(every.std()), 1e-12)
            chosen[kind].append(found)
    neurons, of_text = (chosen[kind][0] for kind in _KINDS)
    picked, control = (found["chosen"].values == 1 for found in (neurons, of_text))
    shared = float((picked & control).sum() / picked.sum())
    table = _compared(model, groups, scores, options, progress)
    return RecallOrGeneralize(neurons, recalled[folds[0][1]["recalled"]], of_text, shared, table)


_KINDS = {OF_RECALL: "recalled", OF_TEXT: "matched"}
"""The two choices of neurons, and the group that each has against the generalizing one."""

Rows = dict[str, Int[np.ndarray, "seq"]]


def _folds(groups: dict[str, SequenceSet], seed: int) -> list[tuple[Rows, Rows]]:
    """Return the rows of two halves of every group, as (own, other) and the reverse; pairs stay together."""
    pairs, n = Groups.of(groups["recalled"], groups["matched"]), len(groups["recalled"])
    order = np.random.default_rng(seed).permutation(len(groups[GENERALIZING]))
    sums = np.sort(order[::2]), np.sort(order[1::2])
    halves = [
        {"recalled": rows[rows < n], "matched": rows[rows >= n] - n, GENERALIZING: part}
        for rows, part in zip(pairs.halves(seed), sums, strict=True)
    ]
    return [(halves[0], halves[1]), (halves[1], halves[0])]


def _compared(
    model: Any,
    groups: dict[str, SequenceSet],
    scores: dict[str, dict[str, Float[np.ndarray, "seq"]]],
    options: GeneralizingOptions,
    progress: bool,
) -> pd.DataFrame:
    """Return `beyond_confounds` of both scores for every two groups."""
    tables = []
    beyond = BeyondOptions(folds=options.folds, seed=options.seed)
    for first, second in combinations(groups, 2):
        pair = Groups.of(groups[first], groups[second])
        known = confounds(model, pair.sequences, progress=progress)
        if COPIES in known and np.isnan(known[COPIES].to_numpy(float)).any():
            known = known.drop(columns=COPIES)  # nobody counted how often a sum occurs
        each = {kind: np.concatenate([by_name[first], by_name[second]]) for kind, by_name in scores.items()}
        found = beyond_confounds(pair, each, known, options=beyond)
        tables.append(found.rename(columns={"detector": "neurons"}).assign(compared=f"{first} or {second}"))
    return pd.concat(tables, ignore_index=True)
