"""Tasks of lm-evaluation-harness, each as a `ChoiceTask`: one sweep answers them under every intervention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import groupby
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from memlens.attribution.task_encoding import PairEncoder
from memlens.attribution.task_questions import Question
from memlens.attribution.tasks import ChoiceTask
from memlens.errors import ModelLoadError, OptionError, SourceNotFoundError, near_matches

if TYPE_CHECKING:
    from memlens.attribution.lm_eval_model import LensLM
    from memlens.sweeps import Intervention

__all__ = ["LM_EVAL_TASKS", "as_lm_eval", "tasks_from_lm_eval"]

LM_EVAL_TASKS: Mapping[str, str] = MappingProxyType(
    {
        "lambada_openai": "language",
        "hellaswag": "language",
        "arc_easy": "reasoning",
        "piqa": "reasoning",
        "winogrande": "reasoning",
    }
)
"""The tasks taken by default, and the group of each.

arXiv 2501.05078 speaks of five benchmarks, and of language and reasoning tasks; which ones, and in which
group, is our reading of its figures.
"""

_KINDS = ("multiple_choice", "loglikelihood")
_FEWSHOT_SEED = 1234
"""lm-eval's own default."""


def tasks_from_lm_eval(
    names: str | Sequence[Any] | None = None,
    model: Any = None,
    *,
    limit: int | None = None,
    groups: Mapping[str, str] | None = None,
    num_fewshot: int | None = None,
    task_manager: Any = None,
    prepend_bos: bool | None = None,
) -> list[ChoiceTask]:
    """Make tasks of lm-evaluation-harness' own requests: its data, prompts, choices and right answers.

    Needs the extra `eval`, and the tasks' data sets (from the Hugging Face hub or its cache).

    Args:
        names: lm-eval's names of tasks (a group or tag stands for all of its tasks), or its task objects;
            `LM_EVAL_TASKS` by default. Every task whose requests are log-likelihoods is taken.
        model: A TransformerLens model, or a Hugging Face tokenizer.
        limit: Only the first so many questions of each task.
        groups: Group of each task by name; on top of `LM_EVAL_TASKS`, "other" where neither says.
        num_fewshot: Examples in front of each question; by default as many as the task says.
        task_manager: lm-eval's `TaskManager`, say one with `include_path=` for task files of your own; by
            default one that knows the tasks lm-eval comes with.
        prepend_bos: See `PairEncoder.of`; lm-eval's `add_bos_token`.

    Returns:
        One task for each name. `evaluate_tasks` gives what lm-eval calls `acc` and `acc_norm`.

    Raises:
        ModelLoadError: lm-eval is not installed.
        OptionError: An unknown name, or a task that generates text or scores with a function of its own.
        SourceNotFoundError: A task or its data cannot be read.
    """
    _check_installed()
    if limit is not None and limit < 1:
        raise OptionError(f"limit={limit} asks nothing: give 1 or more questions.")
    encoder = PairEncoder.of(model, prepend_bos=prepend_bos)
    wanted = [names] if isinstance(names, str) else list(LM_EVAL_TASKS if names is None else names)
    known = {**LM_EVAL_TASKS, **(groups or {})}
    made = []
    for name, task in _loaded(wanted, task_manager).items():
        _check(name, task)
        chance = None if task.OUTPUT_TYPE == "multiple_choice" else 0.0
        questions = _questions(name, task, limit, num_fewshot)
        group = known.get(name, "other")
        made.append(ChoiceTask.from_questions(questions, encoder, name=name, group=group, chance=chance))
    return made


def as_lm_eval(
    model: Any,
    interventions: Intervention | Sequence[Intervention] = (),
    *,
    batch_size: int | None = None,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> LensLM:
    """Give a model under interventions to lm-evaluation-harness: any of its tasks, its data, its scores.

    For many interventions on multiple-choice tasks `tasks_from_lm_eval` with `evaluate_tasks` is many times
    faster; this is for tasks that generate, for perplexities, and for scores of lm-eval's own making.

    Args:
        model: A TransformerLens model.
        interventions: Held on the model for every request, in this order; none for the model as it is. A
            hook that differs by sequence (`ByBatch`) needs `sweep`.
        batch_size: Requests together; chosen to a memory budget by default.
        prepend_bos: See `PairEncoder.of`; lm-eval's `add_bos_token`.
        progress: Show bars.

    Returns:
        What `lm_eval.simple_evaluate(model=...)` takes. Its `loglikelihood`, `loglikelihood_rolling` and
        `generate_until` (greedy) equal `HFLM`'s on the unchanged model.

    Raises:
        ModelLoadError: lm-eval is not installed.
        SiteError: A hook name that the model does not have.
        OptionError: The model has no tokenizer.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> lm = ml.as_lm_eval(model, ml.bypass_intervention(model, [5]), progress=False)
        >>> from lm_eval import simple_evaluate
        >>> scores = simple_evaluate(lm, tasks=["arc_easy"], limit=100)  # doctest: +SKIP
    """
    _check_installed()
    from memlens.attribution.lm_eval_model import LensLM
    from memlens.sweeps import Intervention

    some = (interventions,) if isinstance(interventions, Intervention) else tuple(interventions)
    return LensLM(model, some, batch_size=batch_size, prepend_bos=prepend_bos, progress=progress)


def _check_installed() -> None:
    if find_spec("lm_eval") is None:
        raise ModelLoadError(
            "lm-evaluation-harness is not installed: run `pip install 'memlens[eval]'`, or give tasks as "
            "files (ChoiceTask.from_jsonl)."
        )


def _loaded(wanted: Sequence[Any], manager: Any) -> dict[str, Any]:
    """Return lm-eval's task objects by name."""
    from lm_eval.tasks import TaskManager

    by_name = [name for name in wanted if isinstance(name, str)]
    ready = {task.task_name: task for task in wanted if not isinstance(task, str)}
    if not by_name:
        return ready
    manager = TaskManager() if manager is None else manager
    for name in by_name:
        if name not in manager.all_tasks:
            hint = near_matches(name, manager.all_tasks)
            raise OptionError(f"lm-eval has no task {name!r}: see `lm-eval ls tasks`.{hint}")
    found = dict(ready)
    for name in by_name:
        try:
            found |= manager.load([name])["tasks"]
        except Exception as error:  # what `datasets` raises where data is missing differs with the task
            raise SourceNotFoundError(
                f"lm-eval's task {name!r} or its data cannot be read ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no reason given'}): connect to the hub, or "
                "take tasks from files (ChoiceTask.from_jsonl)."
            ) from error
    return found


def _check(name: str, task: Any) -> None:
    from lm_eval.api.task import ConfigurableTask

    kind = getattr(task, "OUTPUT_TYPE", None)
    if kind not in _KINDS:
        raise OptionError(f"lm-eval's task {name!r} asks for {kind}: only log-likelihoods are taken.")
    if not isinstance(task, ConfigurableTask) or callable(task.config.process_results):
        raise OptionError(
            f"lm-eval's task {name!r} scores its answers by a function of its own: leave it out."
        )


def _questions(name: str, task: Any, limit: int | None, num_fewshot: int | None) -> list[Question]:
    if num_fewshot is not None:
        task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    task.build_all_requests(limit=limit)
    by_question = groupby(task.instances, key=lambda instance: instance.doc_id)
    return [_question(f"{name}-{number}", task, list(instances)) for number, instances in by_question]


def _question(name: str, task: Any, instances: Sequence[Any]) -> Question:
    """Make a question of one document's requests, in order of their choices."""
    doc = instances[0].doc
    pairs = [instance.args[:2] for instance in sorted(instances, key=lambda instance: instance.idx)]
    if task.OUTPUT_TYPE == "loglikelihood":
        (context, target), *_ = pairs
        return Question((context,), (target,), (0,), (len(target),), name)
    choices = task.doc_to_choice(doc)
    pairs = pairs[: len(choices)]  # unconditional requests of acc_mutual_info come after these
    contexts, continuations = zip(*pairs, strict=True)
    return Question(contexts, continuations, _gold(name, task, doc, choices), tuple(map(len, choices)), name)


def _gold(name: str, task: Any, doc: Any, choices: Sequence[str]) -> tuple[int, ...]:
    """Return the right choices as lm-eval reads them: a number, a text, or several."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    numbers = [
        choices.index(one) if isinstance(one, str) and one in choices else one
        for one in (gold if isinstance(gold, list | tuple) else [gold])
    ]
    if not numbers or not all(isinstance(one, int) and 0 <= one < len(choices) for one in numbers):
        raise OptionError(f"{name} of lm-eval has the answer {gold!r}, which is none of {list(choices)}.")
    return tuple(map(int, numbers))
