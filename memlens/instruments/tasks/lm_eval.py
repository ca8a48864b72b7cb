"""lm-evaluation-harness: its tasks for memlens, and models under interventions for it (extra `eval`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain, groupby
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from memlens.errors import ModelLoadError, OptionError, SourceNotFoundError, near_matches
from memlens.forward.baseline import teacher_forced_stats
from memlens.forward.generate import greedy_continuations
from memlens.instruments.tasks.encoding import PairEncoder, PairTokens
from memlens.instruments.tasks.tasks import ChoiceTask, Question
from memlens.models.provenance import describe
from memlens.sequences.set import SequenceSet
from memlens.sweeps.contexts import applied
from memlens.sweeps.interventions import Intervention

if TYPE_CHECKING or find_spec("lm_eval") is None:

    class LM:
        """Stands for lm-eval's own class, which has no type annotations, and for its absence."""

        cache_hook: Any = SimpleNamespace(add_partial=lambda *answer: None)

else:
    from lm_eval.api.model import LM


@dataclass(eq=False)
class LensLM(LM):
    """A model under interventions, as lm-evaluation-harness takes models; made by `as_lm_eval`.

    Attributes:
        model: A TransformerLens model.
        interventions: Applied to the model for every request, in this order.
        encoder: Tokenizes the requests.
        requests_at_once: Batch size; None chooses it to fit a memory budget.
        progress: Whether to show progress bars.
    """

    model: Any
    interventions: tuple[Intervention, ...]
    encoder: PairEncoder
    requests_at_once: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, a key of lm-eval's cache of requests."""
        return str(getattr(self.encoder.tokenizer, "name_or_path", ""))

    @property
    def max_length(self) -> int:
        """The model's context length in tokens."""
        return int(self.model.cfg.n_ctx)

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval records in its results: model, revision, interventions."""
        return {**describe(self.model), "interventions": [edit.name for edit in self.interventions]}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return, per (context, continuation), its log-probability in nats and whether it is greedy."""
        pairs = [self.encoder(*request.args[:2]) for request in requests]
        found = self._scored(pairs, disable_tqdm)
        self._remember("loglikelihood", requests, found)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts, in windows as long as the model's context allows."""
        from lm_eval.utils import get_rolling_token_windows

        (first,) = self.encoder.prompt("")
        windows: list[list[PairTokens]] = []
        for request in requests:
            ids = self.encoder.ids(request.args[0])
            cut = get_rolling_token_windows(ids, first, self.max_length, context_len=1)
            windows.append(
                [PairTokens([*given[: len(given) - len(asked) + 1]], asked) for given, asked in cut]
            )
        values = iter(logprob for logprob, _ in self._scored([*chain(*windows)], disable_tqdm))
        found = [sum(next(values) for _ in parts) for parts in windows]
        self._remember("loglikelihood_rolling", requests, found)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy continuations, each cut before the first string that ends an answer.

        Raises:
            OptionError: The task asks for samples, or for more tokens than fit the model's context.
        """
        groups: dict[int, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[_greedy_tokens(request.args[1])].append(i)
        found: dict[int, str] = {}
        for n, some in groups.items():
            rows = [self._given(requests[i].args[0], n) for i in some]
            seqs = SequenceSet.from_tokens([row + [0] * n for row in rows], [len(row) for row in rows])
            with applied(self.model, *self.interventions):
                decoded = greedy_continuations(self.model, seqs, **self._options(disable_tqdm))
            for i, ids in zip(some, decoded.tolist(), strict=True):
                found[i] = self._answer(ids, requests[i].args[1])
            self._remember("generate_until", [requests[i] for i in some], [found[i] for i in some])
        return [found[i] for i in range(len(requests))]

    def _options(self, disable_tqdm: bool) -> dict[str, Any]:
        return {"batch_size": self.requests_at_once, "progress": self.progress and not disable_tqdm}

    def _remember(self, kind: str, requests: Sequence[Any], answers: Sequence[Any]) -> None:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)

    def _scored(self, pairs: Sequence[PairTokens], disable_tqdm: bool) -> list[tuple[float, bool]]:
        if not pairs:
            return []
        rows = [[*pair.context, *pair.continuation] for pair in pairs]
        seqs = SequenceSet.from_tokens(
            rows, [len(pair.context) for pair in pairs], attrs={"last_token_fed": False}
        )
        with applied(self.model, *self.interventions):
            stats = teacher_forced_stats(self.model, seqs, **self._options(disable_tqdm))
        total = stats.logprob.double().masked_fill(~stats.mask, 0).sum(1)
        greedy = (stats.correct | ~stats.mask).all(1)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _given(self, context: str, n: int) -> list[int]:
        """Tokens of a context, cut on the left so that `n` more fit the model."""
        room = self.max_length - n
        if room < 1:
            raise OptionError(
                f"max_gen_toks={n} leaves no room for the question in {self.max_length} tokens of context."
            )
        return self.encoder.prompt(context)[-room:]

    def _answer(self, ids: list[int], options: dict[str, Any]) -> str:
        end = self.encoder.tokenizer.eos_token_id
        ids = ids[: ids.index(end)] if end in ids else ids
        text = self.encoder.tokenizer.decode(ids)
        until = options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text


def _greedy_tokens(options: dict[str, Any]) -> int:
    """Return how many tokens a request asks for; a request for samples is an error."""
    if options.get("do_sample") and options.get("temperature", 1.0) != 0:
        raise OptionError(
            f"a task asks for samples ({dict(options)}), but answers here are greedy: set do_sample to false."
        )
    return int(options.get("max_gen_toks", 256))  # the default of lm-eval


LM_EVAL_TASKS: Mapping[str, str] = MappingProxyType(
    {
        "lambada_openai": "language",
        "hellaswag": "language",
        "arc_easy": "reasoning",
        "piqa": "reasoning",
        "winogrande": "reasoning",
    }
)
"""The default tasks and the group of each.

arXiv 2501.05078 reports five benchmarks, grouped into language and reasoning tasks; which ones, and in which
group, is our reading of its figures.
"""


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
    """Make tasks from those of lm-evaluation-harness, with its data, prompts, choices and correct answers.

    Needs the extra `eval`, and the tasks' data sets (from the Hugging Face hub or its cache).

    Args:
        names: lm-eval's task names (a group or tag stands for all of its tasks), or its task objects;
            `LM_EVAL_TASKS` by default. Any task whose requests are log-likelihoods will do.
        model: A TransformerLens model, or a Hugging Face tokenizer.
        limit: Use at most this many questions per task.
        groups: Group of each task by name, in addition to `LM_EVAL_TASKS`; otherwise "other".
        num_fewshot: Number of examples before each question; by default the task's own.
        task_manager: lm-eval's `TaskManager`, such as one with `include_path=` for your own task files; by
            default one with the tasks that lm-eval ships.
        prepend_bos: See `PairEncoder.of`; lm-eval's `add_bos_token`.

    Returns:
        One task per name. `evaluate_tasks` computes what lm-eval calls `acc` and `acc_norm`.

    Raises:
        ModelLoadError: lm-eval is not installed.
        OptionError: The name is unknown, or the task generates text or scores with its own function.
        SourceNotFoundError: A task or its data cannot be read.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> tasks = ml.tasks.from_lm_eval(["arc_easy"], model, limit=100)  # reads the hub  # doctest: +SKIP
    """
    _check_installed()
    if limit is not None and limit < 1:
        raise OptionError(f"limit={limit} leaves no question: give 1 or more.")
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
    """Wrap a model under interventions for lm-evaluation-harness, for any of its tasks and scores.

    For many interventions on multiple-choice tasks, `tasks_from_lm_eval` with `evaluate_tasks` is many times
    faster; this is for tasks that generate, for perplexities, and for lm-eval's other scores.

    Args:
        model: A TransformerLens model.
        interventions: Applied to the model for every request, in this order; none for the unchanged model. A
            hook that differs between sequences (`ByBatch`) needs `sweep`.
        batch_size: Requests at a time; chosen to fit a memory budget by default.
        prepend_bos: See `PairEncoder.of`; lm-eval's `add_bos_token`.
        progress: Show progress bars.

    Returns:
        A model for `lm_eval.simple_evaluate(model=...)`. Its `loglikelihood`, `loglikelihood_rolling` and
        `generate_until` (greedy) equal `HFLM`'s on the unchanged model.

    Raises:
        ModelLoadError: lm-eval is not installed.
        SiteError: The model does not have one of the hooks.
        OptionError: The model has no tokenizer.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> bypass = ml.edits.attention_bypasses(model, layers=[5])
        >>> lm = ml.tasks.as_lm_eval(model, bypass, progress=False)
        >>> from lm_eval import simple_evaluate
        >>> scores = simple_evaluate(lm, tasks=["arc_easy"], limit=100)  # doctest: +SKIP
    """
    _check_installed()
    return lens_lm(model, interventions, prepend_bos, batch_size, progress)


def lens_lm(
    model: Any,
    interventions: Intervention | Sequence[Intervention],
    prepend_bos: bool | None,
    batch_size: int | None = None,
    progress: bool = False,
) -> LensLM:
    """Return a model under interventions that answers requests, whether lm-eval is installed or not."""
    some = (interventions,) if isinstance(interventions, Intervention) else tuple(interventions)
    encoder = PairEncoder.of(model, prepend_bos=prepend_bos)
    with applied(model, *some):
        pass  # unknown hook names, and hooks that need a sweep, raise here
    return LensLM(model, some, encoder, batch_size, progress)


def _check_installed() -> None:
    if find_spec("lm_eval") is None:
        raise ModelLoadError(
            "lm-evaluation-harness is not installed: run `pip install 'memlens[eval]'`, or read tasks from "
            "files (ChoiceTask.from_jsonl)."
        )


def _loaded(wanted: Sequence[Any], manager: Any) -> dict[str, Any]:
    """Return lm-eval's task objects by name."""
    from lm_eval.tasks import TaskManager

    by_name = [name for name in wanted if isinstance(name, str)]
    found = {task.task_name: task for task in wanted if not isinstance(task, str)}
    manager = TaskManager() if manager is None and by_name else manager
    for name in by_name:
        if name not in manager.all_tasks:
            hint = near_matches(name, manager.all_tasks)
            raise OptionError(f"lm-eval has no task {name!r}: see `lm-eval ls tasks`.{hint}")
    for name in by_name:
        try:
            found |= manager.load([name])["tasks"]
        except Exception as error:  # which class `datasets` raises for missing data depends on the task
            raise SourceNotFoundError(
                f"lm-eval's task {name!r} or its data cannot be read ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no reason given'}): connect to the hub, or "
                "read tasks from files (ChoiceTask.from_jsonl)."
            ) from error
    return found


def _check(name: str, task: Any) -> None:
    from lm_eval.api.task import ConfigurableTask

    kind = getattr(task, "OUTPUT_TYPE", None)
    if kind not in ("multiple_choice", "loglikelihood"):
        raise OptionError(f"lm-eval's task {name!r} asks for {kind}: only log-likelihoods are supported.")
    if not isinstance(task, ConfigurableTask) or callable(task.config.process_results):
        raise OptionError(f"lm-eval's task {name!r} scores its answers with its own function: leave it out.")


def _questions(name: str, task: Any, limit: int | None, num_fewshot: int | None) -> list[Question]:
    if num_fewshot is not None:
        task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=1234)  # the default of lm-eval
    task.build_all_requests(limit=limit)
    by_question = groupby(task.instances, key=lambda instance: instance.doc_id)
    return [_question(f"{name}-{number}", task, list(instances)) for number, instances in by_question]


def _question(name: str, task: Any, instances: Sequence[Any]) -> Question:
    """Make a question from the requests of one document, in the order of its choices."""
    doc = instances[0].doc
    pairs = [instance.args[:2] for instance in sorted(instances, key=lambda instance: instance.idx)]
    if task.OUTPUT_TYPE == "loglikelihood":
        (context, target), *_ = pairs
        return Question((context,), (target,), (0,), (len(target),), name)
    choices = task.doc_to_choice(doc)
    pairs = pairs[: len(choices)]  # followed by the unconditional requests of acc_mutual_info
    contexts, continuations = zip(*pairs, strict=True)
    return Question(contexts, continuations, _gold(name, task, doc, choices), tuple(map(len, choices)), name)


def _gold(name: str, task: Any, doc: Any, choices: Sequence[str]) -> tuple[int, ...]:
    """Return the correct choices as lm-eval reads them: a number, a text, or several."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    numbers = [
        choices.index(one) if isinstance(one, str) and one in choices else one
        for one in (gold if isinstance(gold, list | tuple) else [gold])
    ]
    if not numbers or not all(isinstance(one, int) and 0 <= one < len(choices) for one in numbers):
        raise OptionError(f"{name} of lm-eval has the answer {gold!r}, which is none of {list(choices)}.")
    return tuple(map(int, numbers))
