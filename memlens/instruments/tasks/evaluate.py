"""Benchmark accuracy under every intervention, from one sweep over the requests of all tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from memlens.errors import OptionError
from memlens.forward.exclusive import computes
from memlens.instruments.tasks.tasks import ChoiceTask, joined_requests
from memlens.results.kinds import register_kind
from memlens.results.plots.tasks import plot_tasks
from memlens.results.readings import read_tasks
from memlens.results.result import Result
from memlens.results.statistics.resampling import slices
from memlens.results.storage import rows_at_once
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.labels import make_result
from memlens.sweeps.run import kept, measure, sweep

_METRICS = ("target_logprob", "exact_match")
_LABELS = {
    "accuracy": "1 if the likeliest choice is correct",
    "accuracy_norm": "1 if the choice with the highest log-probability per character is correct",
    "accuracy_chance_corrected": "(accuracy - chance) / (1 - chance)",
    "gold_logprob": "nats: log-probability of the correct choice, summed over its tokens",
}


@computes
def evaluate_tasks(
    model: Any,
    tasks: Sequence[ChoiceTask],
    interventions: Sequence[Intervention] = (),
    *,
    out: str | Path | None = None,
    **options: Any,
) -> Result:
    r"""Measure the accuracy on tasks under every intervention, with one `sweep` over all their requests.

    Each choice is a sequence whose continuation is scored; the layers before an intervention are computed
    once for all interventions. Log-likelihoods, `accuracy` and `accuracy_norm` are those of
    lm-evaluation-harness (`acc`, `acc_norm`); see `ChoiceTask.score`.

    Args:
        model: A TransformerLens model.
        tasks: The tasks.
        interventions: As for `sweep`; with none, only the unchanged model is measured.
        out: A folder that keeps finished parts, as for `sweep`.
        options: Further options of `sweep`, or of `measure` if there are no interventions.

    Returns:
        Kind "task_accuracy", one value per question (dimension `sequence`) and intervention:

        - `accuracy`, `accuracy_norm`: 0 or 1;
        - `accuracy_chance_corrected`: :math:`(a - c)/(1 - c)` with the task's chance level c, so that its
          mean over a task is 0 for guessing and 1 if every answer is correct;
        - `gold_logprob`: nats, summed over the tokens of the correct choice.

        Each has its baseline, the value without intervention. Along `sequence` run the coordinates `task`,
        `task_group`, `n_choices` and `chance`, for ``result.mean_ci(group="task")`` and `task_summary`.

    Raises:
        EmptySetError: There are no tasks.
        OptionError: Two tasks have the same name, or `out` is given without interventions.
        SequenceError, VocabularyError: The tasks were made for another tokenizer, or are too long.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> task = ml.tasks.local_tasks("zoo", model, names=["agreement"], n=4)[0]
        >>> bypasses = ml.edits.attention_bypasses(model)
        >>> result = ml.evaluate_tasks(model, [task], bypasses, progress=False)
        >>> result["accuracy"].dims, result.data.sizes["sequence"]
        (('sequence', 'layer'), 4)
    """
    requests = joined_requests(tasks)
    about = {t.name: {"group": t.group, "questions": len(t), "chance": t.chance} for t in tasks}
    settings = {"tasks": about}
    if interventions:
        swept = sweep(
            model, requests, interventions, _METRICS, kind="task_accuracy", settings=settings, out=out,
            **options,
        )  # fmt: skip
    elif out is not None:
        raise OptionError(f"out={str(out)!r} keeps a sweep, but there are no interventions: give some.")
    else:
        options.pop("progress", None)
        values = measure(model, requests, _METRICS, **options)
        variables = {name: ("sequence", array) for name, array in values.items()}
        swept = make_result("task_accuracy", model, requests, variables, {}, settings)
    return kept(_per_question(swept, tasks, requests.n_targets.numpy()), out)


def _per_question(swept: Result, tasks: Sequence[ChoiceTask], n_targets: np.ndarray) -> Result:
    """Turn scores of requests into scores of questions."""
    data = swept.data
    sites = {str(n): c for n, c in data.coords.items() if "sequence" not in c.dims}
    variables: dict[str, xr.Variable] = {}
    for tail in ("", "_baseline"):
        if f"target_logprob{tail}" not in data:
            continue
        mean, greedy = data[f"target_logprob{tail}"], data[f"exact_match{tail}"]
        values = mean.data.astype(float)
        total = values * n_targets.reshape(-1, *[1] * (values.ndim - 1))
        for name, array in _scored(tasks, total, greedy.data.astype(float)).items():
            variables[name + tail] = xr.Variable(mean.dims, array, {"long_name": _LABELS[name]})
    counted, in_order = [len(task) for task in tasks], {"keep_order": 1}
    coords = {
        "sequence": [name for task in tasks for name in task.question_ids],
        "task": ("sequence", np.repeat([task.name for task in tasks], counted), in_order),
        "task_group": ("sequence", np.repeat([task.group for task in tasks], counted), in_order),
        "chance": ("sequence", np.repeat([task.chance for task in tasks], counted)),
        "n_choices": ("sequence", np.concatenate([task.n_choices for task in tasks])),
    }
    return Result(xr.Dataset(variables, {**coords, **sites}, data.attrs))


def _scored(tasks: Sequence[ChoiceTask], total: Any, greedy: Any) -> dict[str, Any]:
    """Score the questions of all tasks; Dask arrays some questions at a time."""
    in_memory = isinstance(total, np.ndarray)
    parts: dict[str, list[Any]] = {name: [] for name in _LABELS}
    start = 0
    for task in tasks:
        rows = slice(start, start + len(task.requests))
        start = rows.stop
        own = task, total[rows], greedy[rows]
        for found in [_score(*own)] if in_memory else _left(*own):
            for name, array in found.items():
                parts[name].append(array)
    if in_memory:
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}
    import dask.array as da

    return {name: da.concatenate(arrays) for name, arrays in parts.items()}


def _score(task: ChoiceTask, total: np.ndarray, greedy: np.ndarray) -> dict[str, np.ndarray]:
    found = task.score(total, greedy)
    return {**found, "accuracy_chance_corrected": (found["accuracy"] - task.chance) / (1 - task.chance)}


def _left(task: ChoiceTask, total: Any, greedy: Any) -> Iterator[dict[str, Any]]:
    """Yield the scores of some questions after the other, which are computed when they are needed."""
    import dask.array as da
    from dask.delayed import delayed

    choices = int(task.n_choices.max())
    for some in slices(len(task), rows_at_once(choices * total.nbytes // len(total))):
        rows = task.requests_of(some)
        found: Any = delayed(_score)(task.take(some), total[rows], greedy[rows])
        shape = len(range(*some.indices(len(task)))), *total.shape[1:]
        yield {name: da.from_delayed(found[name], shape, float) for name in _LABELS}


register_kind("task_accuracy", plot=plot_tasks, reading=read_tasks)
