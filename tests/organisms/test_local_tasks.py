"""Tasks in the language of the zoo's corpus: new, balanced, and answered by the model that is shipped."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
import xarray as xr

import memlens as ml
from memlens.errors import OptionError
from memlens.organisms.corpus.corpus import Corpus
from memlens.organisms.local_tasks import LOCAL_TASKS
from memlens.organisms.training.architectures import untrained_like

CHANCE = {"agreement": 0.5, "tense": 0.5, "last_word": 0.0}
"""Of the others: a quarter."""


@pytest.fixture(scope="module")
def model() -> Any:
    return ml.load_model("zoo/pythia-s")


@pytest.fixture(scope="module")
def tasks(model: Any) -> dict[str, ml.tasks.ChoiceTask]:
    return {task.name: task for task in ml.tasks.local_tasks("zoo", model)}


def texts(model: Any, task: ml.tasks.ChoiceTask) -> list[str]:
    """The questions with their right answers."""
    rows, gold = task.requests.rows(), task.requests.table["gold"]
    return [model.tokenizer.decode(row) for row, right in zip(rows, gold, strict=True) if right]


def test_there_are_both_groups_and_a_hundred_questions_each(tasks: dict[str, ml.tasks.ChoiceTask]) -> None:
    assert {task.group for task in tasks.values()} == {"language", "reasoning"}
    for name, task in tasks.items():
        assert (len(task), task.chance) == (100, CHANCE.get(name, 0.25))


def test_same_seed_same_questions(model: Any, tasks: dict[str, ml.tasks.ChoiceTask]) -> None:
    again = ml.tasks.local_tasks("zoo", model)
    other = ml.tasks.local_tasks("zoo", model, seed=1)
    for task, same, new in zip(tasks.values(), again, other, strict=True):
        assert same.requests.rows() == task.requests.rows()
        assert not set(texts(model, new)) & set(texts(model, task))


def test_right_choices_are_spread_evenly_and_questions_differ(
    model: Any, tasks: dict[str, ml.tasks.ChoiceTask]
) -> None:
    for task in tasks.values():
        counts = task.gold.sum(0)
        assert counts.sum() == 100
        assert counts.max() - counts.min() <= 1
        assert len(set(texts(model, task))) == 100
        choices = task.requests.table.groupby("question")["text"]
        assert (choices.nunique() == choices.size()).all()
        assert task.requests.attrs["truncated"] == 0


@pytest.mark.slow
def test_no_question_was_trained_on(
    model: Any, tasks: dict[str, ml.tasks.ChoiceTask], shipped_corpus: Corpus
) -> None:
    rows = "\x00".join(shipped_corpus.tokenizer.batch_decode(shipped_corpus.rows))
    assert "\n" in rows
    assert rows.count("At last ") > 100
    for task in tasks.values():
        assert not [text for text in texts(model, task) if text in rows]


def test_arithmetic_is_right_and_its_wrong_results_are_wrong(
    model: Any, tasks: dict[str, ml.tasks.ChoiceTask]
) -> None:
    table, rows = tasks["arithmetic"].requests.table, tasks["arithmetic"].requests.rows()
    for row, gold in zip(rows, table["gold"], strict=True):
        last = model.tokenizer.decode(row).splitlines()[-1]
        assert eval(last.replace("=", "==")) == gold


def test_variables_are_defined_where_right_and_nowhere_else(
    model: Any, tasks: dict[str, ml.tasks.ChoiceTask]
) -> None:
    task = tasks["variables"]
    for row, gold in zip(task.requests.rows(), task.requests.table["gold"], strict=True):
        source = model.tokenizer.decode(row)
        before, name = source.rsplit("return ", 1)
        words = before.partition("(")[2].replace(",", " ").replace(")", " ").split()
        assert (name.strip() in words) == gold


def test_twins_differ_in_inflection_alone() -> None:
    for name in ("agreement", "tense"):
        drawn = [LOCAL_TASKS[name].draw(Random(i)) for i in range(50)]
        for question in drawn:
            assert question.gold != question.others[0]
            assert len(question.gold.split()) == len(question.others[0].split())
        shared = [len(set(q.gold.split()) & set(q.others[0].split())) / len(q.gold.split()) for q in drawn]
        assert np.mean(shared) > 0.4


def corrected(model: Any, tasks: dict[str, ml.tasks.ChoiceTask]) -> xr.DataArray:
    """The tasks' means, 0 for guessing and 1 for knowing all, with intervals."""
    metric = "accuracy_chance_corrected"
    return ml.evaluate_tasks(model, list(tasks.values())).mean_ci(metric=metric, group="task")[metric]


def test_the_shipped_model_answers_and_its_untrained_twin_guesses(
    model: Any, tasks: dict[str, ml.tasks.ChoiceTask]
) -> None:
    found = corrected(model, tasks)
    assert (found.sel(statistic="low") > 0.2).all()
    assert float(found.sel(statistic="mean").mean()) > 0.7
    few = {name: task.take(slice(50)) for name, task in tasks.items()}
    guessed = corrected(untrained_like(model), few)
    assert (guessed.sel(statistic="low") < 0.1).all()
    assert float(guessed.sel(statistic="mean").mean()) < 0.1


def test_some_tasks_and_errors(model: Any) -> None:
    some = ml.tasks.local_tasks("zoo", model.tokenizer, names=["tense", "cloze"], n=7)
    assert [(task.name, len(task)) for task in some] == [("tense", 7), ("cloze", 7)]
    with pytest.raises(OptionError, match="family='hub'"):
        ml.tasks.local_tasks("hub", model)
    with pytest.raises(OptionError, match=r"task='tens'.*'tense'"):
        ml.tasks.local_tasks("zoo", model, names=["tens"])
    with pytest.raises(OptionError, match="n=0"):
        ml.tasks.local_tasks("zoo", model, n=0)
    with pytest.raises(OptionError, match="give model="):
        ml.tasks.local_tasks()
