"""Benchmark tasks as log-likelihood requests: questions with choices, one sequence per choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from memlens.errors import EmptySetError, FileFormatError, OptionError, SourceNotFoundError
from memlens.files import expanded
from memlens.instruments.tasks.encoding import PairEncoder
from memlens.sequences.readers.sources import json_lines
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import tokenizer_attrs


@dataclass(frozen=True)
class Question:
    """A question before it is tokenized.

    Attributes:
        contexts: The text given, one per choice.
        continuations: The text scored, one per choice.
        gold: Numbers of the correct choices.
        characters: Length of each choice, by which `accuracy_norm` divides.
        name: Name of the question, unique within its task.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: tuple[int, ...]
    characters: tuple[int, ...]
    name: str

    @classmethod
    def of(cls, record: Mapping[str, Any], name: str, delimiter: str = " ") -> Question:
        """Make a question from a record.

        Args:
            record: `context` (one text, or one per choice), `choices` (texts), and `gold` (the number of the
                correct choice, or several numbers; optional if there is only one choice).
            name: Name of the question.
            delimiter: Text between context and choice; not counted in `characters`.

        Raises:
            FileFormatError: A field is missing or has the wrong type, or `gold` is not a choice.
        """
        for field in ("context", "choices"):
            if field not in record:
                raise FileFormatError(f"{name} has no {field!r}: a question needs context, choices and gold.")
        choices, context = record["choices"], record["context"]
        texts = isinstance(choices, list | tuple) and all(isinstance(c, str) and c for c in choices)
        if not choices or not texts:
            raise FileFormatError(f"{name}: choices={choices!r} is not a list of texts.")
        contexts = [context] * len(choices) if isinstance(context, str) else context
        if not isinstance(contexts, list | tuple) or len(contexts) != len(choices):
            raise FileFormatError(f"{name}: context={context!r} is neither a text nor one per choice.")
        gold = record.get("gold", 0 if len(choices) == 1 else None)
        numbers = list(gold) if isinstance(gold, list | tuple) else [gold]
        if not numbers or not all(type(n) is int and 0 <= n < len(choices) for n in numbers):
            raise FileFormatError(
                f"{name}: gold={gold!r} is not a choice: give a number from 0 to {len(choices) - 1}."
            )
        return cls(
            tuple(contexts), tuple(f"{delimiter}{choice}" for choice in choices), tuple(numbers),
            tuple(map(len, choices)), name,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ChoiceTask:
    """A benchmark as one `SequenceSet`: each sequence is a context (prefix) with one choice (continuation).

    Attributes:
        name: Name of the task.
        group: The group it belongs to, such as "language" or "reasoning".
        requests: One row per choice of each question, in order; its table holds `question` (number),
            `question_id`, `choice` (number), `gold` (whether the choice is correct) and `characters`.
        chance: Accuracy of guessing: the mean over questions of the share of choices that are correct. A
            question with a single choice, which is correct if greedy decoding produces it, counts as 0.

    Raises:
        OptionError: `chance` is not in [0, 1).

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> record = {"context": "The old lamp", "choices": ["is", "are"], "gold": 0}
        >>> task = ml.tasks.ChoiceTask.from_records([record], model, name="agreement", group="language")
        >>> len(task), task.chance, task.requests.table["text"].tolist()
        (1, 0.5, [' is', ' are'])
    """

    name: str
    group: str
    requests: SequenceSet
    chance: float

    def __post_init__(self) -> None:
        if not 0 <= self.chance < 1:
            raise OptionError(f"chance={self.chance} of {self.name!r}: give a number from 0 to below 1.")

    @classmethod
    def from_records(
        cls,
        records: Iterable[Mapping[str, Any]],
        model: Any,
        *,
        name: str = "task",
        group: str = "other",
        delimiter: str = " ",
        chance: float | None = None,
        prepend_bos: bool | None = None,
    ) -> ChoiceTask:
        """Make a task from records.

        Args:
            records: `{"context": text, "choices": [text, …], "gold": number}`; see `Question.of`. An `id`
                names the question.
            model: A TransformerLens model, or a Hugging Face tokenizer.
            name: Name of the task.
            group: Group of the task.
            delimiter: Text between context and choice.
            chance: Accuracy of guessing, in place of the one that follows from the numbers of choices.
            prepend_bos: See `PairEncoder.of`.

        Raises:
            FileFormatError: A record lacks a field, or its `gold` is not the number of a choice.
            EmptySetError: There are no records.
            SequenceError: A request leaves no token to score, or is too long for the model.
        """
        questions = [
            Question.of(record, str(record.get("id", f"{name}-{number:04d}")), delimiter)
            for number, record in enumerate(records)
        ]
        encoder = PairEncoder.of(model, prepend_bos=prepend_bos)
        return cls.from_questions(questions, encoder, name=name, group=group, chance=chance)

    @classmethod
    def from_jsonl(cls, path: str | Path, model: Any, **options: Any) -> ChoiceTask:
        """Read a task from a file with one record per line; see `from_records` for the other arguments.

        The task is named after the file by default.

        Raises:
            SourceNotFoundError: There is no such file.
            FileFormatError: A line is not a record or not a question; the message names the line.
        """
        path = expanded(path)
        if not path.is_file():
            raise SourceNotFoundError(f"there is no file {path}: a task is one JSON record per line.")
        records = []
        for place, record in json_lines(path):
            if not isinstance(record, dict):
                raise FileFormatError(f"{place} is not a record: {str(record)[:40]!r}.")
            Question.of(record, place)
            records.append(record)
        return cls.from_records(records, model, **{"name": path.stem, **options})

    @classmethod
    def from_questions(
        cls,
        questions: Sequence[Question],
        encoder: PairEncoder,
        *,
        name: str,
        group: str,
        chance: float | None = None,
    ) -> ChoiceTask:
        """Make a task from questions that `encoder` tokenizes; see `from_records` for the rest."""
        if not questions:
            raise EmptySetError(f"the task {name!r} has no questions: give at least one.")
        pairs, table = [], []
        for number, question in enumerate(questions):
            for choice, texts in enumerate(zip(question.contexts, question.continuations, strict=True)):
                pairs.append(encoder(*texts))
                row = (f"{question.name}/{choice}", name, group, number, question.name, choice)
                table.append((*row, choice in question.gold, question.characters[choice], texts[1]))
        if chance is None:
            shares = [len(set(q.gold)) / len(q.continuations) for q in questions if len(q.continuations) > 1]
            chance = float(sum(shares) / max(1, len(questions)))
        rows = [[*pair.context, *pair.continuation] for pair in pairs]
        full = encoder.n_ctx is not None and max(map(len, rows)) > encoder.n_ctx
        requests = SequenceSet.from_tokens(
            rows,
            [len(pair.context) for pair in pairs],
            table=pd.DataFrame(table, columns=list(_COLUMNS)),
            attrs={
                **tokenizer_attrs(encoder.tokenizer),
                "source": name,
                "prepend_bos": encoder.bos,
                "truncated": sum(pair.dropped > 0 for pair in pairs),
                **({"last_token_fed": False} if full else {}),
            },
        )
        return cls(name, group, requests, chance)

    def __len__(self) -> int:
        return len(self.question_ids)

    def __repr__(self) -> str:
        return f"ChoiceTask({self.name!r}, {self.group}, {len(self)} questions, chance {self.chance:.2f})"

    @cached_property
    def question_ids(self) -> list[str]:
        """Names of the questions, in order."""
        return list(dict.fromkeys(self.requests.table["question_id"]))

    @cached_property
    def _rows(self) -> Int[np.ndarray, "question choice"]:
        """The request of each choice; -1 pads questions with fewer choices than others."""
        choice, number = (self.requests.table[c].to_numpy(int) for c in ("choice", "question"))
        _, first, question = np.unique(number, return_index=True, return_inverse=True)
        rows = np.full((len(first), choice.max() + 1), -1)
        rows[first.argsort().argsort()[question], choice] = np.arange(len(choice))
        return rows

    @property
    def n_choices(self) -> Int[np.ndarray, "question"]:
        """Number of choices of each question."""
        return (self._rows >= 0).sum(1)

    @property
    def gold(self) -> Bool[np.ndarray, "question choice"]:
        """Which choices are correct."""
        return self.requests.table["gold"].to_numpy(bool)[self._rows] & (self._rows >= 0)

    def take(self, questions: Sequence[int] | slice) -> ChoiceTask:
        """Return the task with some of its questions: `task.take(slice(0, None, 2))` has every other one."""
        return ChoiceTask(self.name, self.group, self.requests[self.requests_of(questions)], self.chance)

    def requests_of(self, questions: Sequence[int] | slice) -> list[int]:
        """Return the row numbers of some questions' requests, in the order of `take`."""
        chosen = self._rows[questions]
        return chosen[chosen >= 0].tolist()

    def score(
        self, logprob: Float[np.ndarray, "request *site"], greedy: Float[np.ndarray, "request *site"]
    ) -> dict[str, Float[np.ndarray, "question *site"]]:
        r"""Turn a model's scores of the requests into scores of the questions.

        A choice's score is the sum of its tokens' log-probabilities :math:`\ell_c` (`accuracy`), or
        :math:`\ell_c` divided by its characters (`accuracy_norm`). A question counts 1 if the first of the
        choices with the best score is correct; one with a single choice, if greedy decoding produces it. NaN
        if one of the scores is NaN.

        Args:
            logprob: Sum over the continuation's tokens, in nats.
            greedy: 1 if every token of the continuation is the arg-max.

        Returns:
            `accuracy` and `accuracy_norm` (0 or 1), and `gold_logprob` (nats, of the best correct choice).
        """
        site = (None,) * (logprob.ndim - 1)
        there, gold = (self._rows >= 0)[(..., *site)], self.gold[(..., *site)]
        characters = self.requests.table["characters"].to_numpy(float)[self._rows][(..., *site)]
        found = np.where(there, logprob[self._rows], -np.inf)
        single = (self.n_choices == 1)[(..., *site)]
        right = greedy[self._rows[:, 0]]
        out = {}
        for metric, scores in (("accuracy", found), ("accuracy_norm", found / characters)):
            best = np.nan_to_num(scores, nan=-np.inf, neginf=-np.inf).argmax(1)[:, None]
            hit = np.take_along_axis(np.broadcast_to(gold, scores.shape), best, 1)[:, 0]
            out[metric] = np.where(np.isnan(scores).any(1), np.nan, np.where(single, right, hit))
        out["gold_logprob"] = np.where(gold, found, -np.inf).max(1)
        return out


_COLUMNS = ("id", "task", "task_group", "question", "question_id", "choice", "gold", "characters", "text")


def joined_requests(tasks: Sequence[ChoiceTask]) -> SequenceSet:
    """Return the requests of all tasks as one set, task after task.

    Raises:
        EmptySetError: There are no tasks.
        OptionError: Two tasks have the same name, or something is not a task.
        SequenceError: Two tasks have a question with the same name.
    """
    if not tasks:
        raise EmptySetError("there are no tasks to evaluate: give at least one.")
    for task in tasks:
        if not isinstance(task, ChoiceTask):
            raise OptionError(f"{task!r} is not a ChoiceTask: make one with ChoiceTask.from_records.")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise OptionError(f"tasks {names}: two have the same name; rename one.")
    joined = tasks[0].requests
    for task in tasks[1:]:
        joined = joined.concat(task.requests)
    truncated = sum(int(task.requests.attrs.get("truncated", 0)) for task in tasks)
    full = any(task.requests.attrs.get("last_token_fed") is False for task in tasks)
    more = {"last_token_fed": False} if full else {}
    return joined.with_attrs(source=", ".join(names), truncated=truncated, **more)
