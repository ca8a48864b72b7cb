"""Tasks of questions with choices: how they are tokenized, scored, swept and summarized."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import memlens as ml
from memlens.errors import (
    EmptySetError,
    FileFormatError,
    OptionError,
    ResultError,
    SequenceError,
    SourceNotFoundError,
)
from memlens.instruments.tasks.encoding import PairEncoder
from memlens.instruments.tasks.tasks import joined_requests
from memlens.models.bos import puts_bos_first
from tests.tiny import D_VOCAB, N_CTX, tiny_tokenizer

Model = Callable[..., Any]


def words(rng: np.random.Generator, n: int) -> str:
    return " ".join(f"w{i}" for i in rng.integers(0, D_VOCAB - 1, n))


def records(n: int = 12, n_choices: int = 3, seed: int = 0) -> list[dict[str, Any]]:
    """Random questions with contexts and choices of many lengths."""
    rng = np.random.default_rng(seed)
    return [
        {
            "context": words(rng, int(rng.integers(1, 12))),
            "choices": [words(rng, int(rng.integers(1, 5))) for _ in range(n_choices)],
            "gold": int(rng.integers(n_choices)),
        }
        for _ in range(n)
    ]


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def transformers_logprob(model: Any, context: str, choice: str) -> float:
    """The sum of a choice's log-probabilities, from a plain Hugging Face forward without padding."""
    given, scored = ids(context), ids(choice)
    with torch.no_grad():
        logits = model(torch.tensor([given + scored])).logits[0, len(given) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(scored)[:, None]).sum())


def test_accuracies_are_those_of_plain_transformers(
    tiny_model: Model, tiny_folder: Callable[[str], Path]
) -> None:
    asked = records(40)
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder("gpt_neox"))
    lps = np.array([[transformers_logprob(hf, r["context"], c) for c in r["choices"]] for r in asked])
    lengths = np.array([[len(c) for c in r["choices"]] for r in asked])
    gold = np.array([r["gold"] for r in asked])
    model = tiny_model("gpt_neox")
    result = ml.evaluate_tasks(model, [ml.tasks.ChoiceTask.from_records(asked, model, name="t")])
    right, right_norm = lps.argmax(1) == gold, (lps / lengths).argmax(1) == gold
    assert (right != right_norm).any()
    np.testing.assert_array_equal(result["accuracy"].values, right)
    np.testing.assert_array_equal(result["accuracy_norm"].values, right_norm)
    np.testing.assert_allclose(result["gold_logprob"].values, lps[np.arange(40), gold], atol=1e-4)
    corrected = result["accuracy_chance_corrected"].mean()
    assert float(corrected) == pytest.approx((right.mean() - 1 / 3) / (1 - 1 / 3))


def test_scores_by_hand(tiny_model: Model) -> None:
    """Four characters against two: the longer choice wins once its length is allowed for."""
    asked = [
        {"context": "w1", "choices": ["w2", "w3 w4"], "gold": 1},
        {"context": "w1", "choices": ["w2", "w3", "w44"], "gold": [0, 2]},
        {"context": "w1", "choices": ["w5"]},
    ]
    task = ml.tasks.ChoiceTask.from_records(asked, tiny_model("gpt_neox"))
    logprob = np.array([-2.0, -4.0, -3.0, -1.0, -0.5, -9.0])
    found = task.score(logprob, np.array([0.0, 0, 0, 0, 0, 1]))
    assert found["accuracy"].tolist() == [0, 1, 1]  # -2 > -4; -0.5 is right; greedy
    assert found["accuracy_norm"].tolist() == [1, 1, 1]  # -2/2 < -4/5; -0.5/3
    assert found["gold_logprob"].tolist() == [-4, -0.5, -9]
    assert task.chance == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert task.n_choices.tolist() == [2, 3, 1]
    logprob[1] = np.nan
    assert np.isnan(task.score(logprob, np.zeros(6))["accuracy"]).tolist() == [True, False, False]


def test_first_of_equal_choices_is_taken(tiny_model: Model) -> None:
    asked = [{"context": "w1", "choices": ["w2", "w2"], "gold": gold} for gold in (0, 1)]
    model = tiny_model("gpt_neox")
    result = ml.evaluate_tasks(model, [ml.tasks.ChoiceTask.from_records(asked, model)])
    assert result["accuracy"].values.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("family", "backend"), [("gpt_neox", "auto"), ("gpt_neo", "auto"), ("llama_gqa", "bridge")]
)
def test_a_sweep_equals_single_forwards_under_a_bypass(tiny_model: Model, family: str, backend: str) -> None:
    model = tiny_model(family, backend)
    tasks = [
        ml.tasks.ChoiceTask.from_records(records(8), model, name="three", group="reasoning"),
        ml.tasks.ChoiceTask.from_records(records(6, 1, seed=1), model, name="one", group="language"),
    ]
    layers = range(model.cfg.n_layers)
    edits = ml.edits.attention_bypasses(model)
    result = ml.evaluate_tasks(model, tasks, edits, progress=False)
    assert result["accuracy"].dims == ("sequence", "layer")
    for layer in layers:
        expected = [_alone(model, task, layer) for task in tasks]
        for metric in ("accuracy", "accuracy_norm"):
            wanted = np.concatenate([part[metric] for part in expected])
            np.testing.assert_array_equal(result[metric].sel(layer=layer).values, wanted)
        wanted = np.concatenate([part["gold_logprob"] for part in expected])
        np.testing.assert_allclose(result["gold_logprob"].sel(layer=layer).values, wanted, atol=1e-4)
    changed = result.effect("gold_logprob").values
    assert (np.abs(changed).max(0) > 1e-3).all()


def _alone(model: Any, task: ml.tasks.ChoiceTask, layer: int) -> dict[str, np.ndarray]:
    """Score a task from one forward a request, with the bypass held."""
    logprobs, greedy = [], []
    prefixes = task.requests.prefix_len.tolist()
    with ml.bypassed(model, layer), torch.no_grad():
        for row, start in zip(task.requests.rows(), prefixes, strict=True):
            logits = model(torch.tensor([row]))[0, start - 1 : -1].double().log_softmax(-1)
            targets = torch.tensor(row[start:])
            logprobs.append(float(logits.gather(-1, targets[:, None]).sum()))
            greedy.append(float((logits.argmax(-1) == targets).all()))
    return task.score(np.array(logprobs), np.array(greedy))


def test_baselines_stand_beside_and_groups_are_coordinates(tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    tasks = [
        ml.tasks.ChoiceTask.from_records(records(8, seed=s), model, name=name, group=group)
        for s, (name, group) in enumerate([("b", "reasoning"), ("a", "language")])
    ]
    edits = ml.edits.attention_bypasses(model, layers=[0])
    result = ml.evaluate_tasks(model, tasks, edits, out=tmp_path / "tasks", progress=False)
    plain = ml.evaluate_tasks(model, tasks)
    for metric in plain.metrics:
        np.testing.assert_allclose(result.baseline(metric), plain[metric], atol=1e-4)
    means = result.mean_ci(metric="accuracy", group="task")
    assert means["task"].values.tolist() == ["b", "a"]
    first = result["accuracy"].values[:8].mean()
    assert float(means["accuracy"].sel(task="b", statistic="mean")[0]) == pytest.approx(first)
    assert result.mean_ci(group="task_group").sizes["task_group"] == 2
    assert result.settings["tasks"]["b"] == {"group": "reasoning", "questions": 8, "chance": 1 / 3}
    assert result.kind == "task_accuracy"
    saved = ml.load_result(tmp_path / "tasks" / "result.nc")
    np.testing.assert_array_equal(saved["accuracy"], result["accuracy"])
    again = ml.evaluate_tasks(model, tasks, edits, out=tmp_path / "tasks", progress=False)
    np.testing.assert_array_equal(again["accuracy"], result["accuracy"])
    assert result.plot("accuracy", group="task").data


def test_tokenized_as_the_harness_does(tiny_model: Model) -> None:
    encoder = PairEncoder.of(ml.load_model("zoo/pythia-s"))
    tokenizer = encoder.tokenizer

    def bare(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    moved = encoder("Mara was ", "old")
    assert (moved.context, moved.continuation) == (bare("Mara was"), bare(" old"))
    empty = encoder("", "Mara")
    assert (empty.context, empty.continuation) == ([tokenizer.bos_token_id], bare("Mara"))
    joined = encoder("12 + 3", "4 =")  # one token a digit: the boundary is where it was
    assert joined.context + joined.continuation == bare("12 + 34 =")
    cut, whole = encoder("Mara was in Vel", "den now. He"), bare("Mara was in Velden now. He")
    assert cut.context == bare("Mara was in Vel") != whole[: len(cut.context)]  # a word is cut in two
    assert cut.continuation == whole[len(cut.context) :]
    with pytest.raises(SequenceError, match="no token to give"):
        encoder("  ", "Mara")
    with pytest.raises(SequenceError, match="no token to score"):
        encoder("Mara", "")


def test_bos_follows_the_checkpoint_unless_told(tiny_model: Model) -> None:
    model = tiny_model("gpt_neox")
    assert model.tokenizer.encode("w1") == [D_VOCAB - 1, 1]  # TransformerLens' form of the tokenizer
    assert not puts_bos_first(model)
    assert PairEncoder.of(model)("w1", " w2").context == [1]
    assert PairEncoder.of(model, prepend_bos=True)("w1", " w2").context == [D_VOCAB - 1, 1]
    assert puts_bos_first(model.tokenizer)
    assert PairEncoder.of(model.tokenizer)("w1", " w2").context == [D_VOCAB - 1, 1]
    assert PairEncoder.of(tiny_tokenizer())("w1", " w2").context == [1]
    text = "<|endoftext|> w1"
    assert PairEncoder.of(model, prepend_bos=True)(text, " w2").context == [D_VOCAB - 1, 1]


def test_long_contexts_lose_their_first_tokens(tiny_model: Model) -> None:
    model = tiny_model("gpt_neox")
    long = {"context": " ".join(["w1"] * 10 + ["w2"] * N_CTX), "choices": ["w3", "w4 w5"], "gold": 0}
    task = ml.tasks.ChoiceTask.from_records([long], model)
    assert task.requests.rows()[0] == [2] * N_CTX + [3]  # the last token is scored, not fed
    assert task.requests.rows()[1] == [2] * (N_CTX - 1) + [4, 5]
    assert task.requests.attrs["truncated"] == 2
    with pytest.raises(SequenceError, match=f"{N_CTX + 1} tokens"):
        ml.tasks.ChoiceTask.from_records(
            [{"context": "w1", "choices": ["w1 " * (N_CTX + 1)], "gold": 0}], model
        )


def test_contexts_may_differ_by_choice(tiny_model: Model) -> None:
    record = {"context": ["w1 w2", "w1 w3"], "choices": ["w9", "w9"], "gold": 1}
    task = ml.tasks.ChoiceTask.from_records([record], tiny_model("gpt_neox"))
    assert task.requests.rows() == [[1, 2, 9], [1, 3, 9]]


def test_taking_some_questions_keeps_their_scores(tiny_model: Model) -> None:
    model = tiny_model("gpt_neox")
    task = ml.tasks.ChoiceTask.from_records(records(9), model)
    all_of_it = ml.evaluate_tasks(model, [task])
    for chosen in ([7, 2, 4], slice(1, None, 2)):
        some = ml.evaluate_tasks(model, [task.take(chosen)])
        picked = all_of_it.data.isel(sequence=chosen)
        assert some["sequence"].values.tolist() == picked["sequence"].values.tolist()
        np.testing.assert_array_equal(some["accuracy"], picked["accuracy"])


def write(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_jsonl(tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    asked = records(5)
    task = ml.tasks.ChoiceTask.from_jsonl(
        write(tmp_path / "quiz.jsonl", [*asked, ""]), model, group="language"
    )
    assert (task.name, task.group, len(task)) == ("quiz", "language", 5)
    assert task.requests.rows() == ml.tasks.ChoiceTask.from_records(asked, model).requests.rows()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is not a record"),
        ({"choices": ["w1"]}, "line 2 has no 'context'"),
        ({"context": "w1"}, "line 2 has no 'choices'"),
        ({"context": "w1", "choices": []}, "line 2: choices=.. is not a list of texts"),
        ({"context": "w1", "choices": "w2"}, "line 2: choices='w2' is not a list of texts"),
        ({"context": "w1", "choices": ["w2", ""], "gold": 0}, "is not a list of texts"),
        ({"context": "w1", "choices": ["w2", "w3"]}, "line 2: gold=None is not a choice"),
        ({"context": "w1", "choices": ["w2", "w3"], "gold": 2}, "gold=2 is not a choice: give .* 0 to 1"),
        ({"context": "w1", "choices": ["w2", "w3"], "gold": "w2"}, "gold='w2' is not a choice"),
        ({"context": ["w1"], "choices": ["w2", "w3"], "gold": 0}, "is neither a text nor one per choice"),
        ({"context": 3, "choices": ["w2", "w3"], "gold": 0}, "context=3 is neither a text"),
    ],
)
def test_jsonl_errors_name_the_line(tiny_model: Model, tmp_path: Path, line: object, reason: str) -> None:
    path = write(tmp_path / "quiz.jsonl", [records(1)[0], line])
    with pytest.raises(FileFormatError, match=reason):
        ml.tasks.ChoiceTask.from_jsonl(path, tiny_model("gpt_neox"))


def test_what_cannot_be_a_task_is_said(tiny_model: Model, tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    task = ml.tasks.ChoiceTask.from_records(records(2), model)
    with pytest.raises(SourceNotFoundError, match=r"no file .*none\.jsonl"):
        ml.tasks.ChoiceTask.from_jsonl(tmp_path / "none.jsonl", model)
    with pytest.raises(EmptySetError, match="no questions"):
        ml.tasks.ChoiceTask.from_records([], model)
    with pytest.raises(EmptySetError, match="no tasks"):
        ml.evaluate_tasks(model, [])
    with pytest.raises(OptionError, match="two have the same name"):
        joined_requests([task, task])
    with pytest.raises(OptionError, match="is not a ChoiceTask"):
        ml.evaluate_tasks(model, [task.requests])  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match=r"chance=1\.5"):
        ml.tasks.ChoiceTask.from_records(records(2), model, chance=1.5)
    with pytest.raises(OptionError, match="no interventions"):
        ml.evaluate_tasks(model, [task], out=tmp_path)
    with pytest.raises(OptionError, match="has no tokenizer"):
        PairEncoder.of(object())


@pytest.fixture(scope="module")
def made_up() -> ml.Result:
    """A result whose means are known: two tasks of one group, one of another."""
    import xarray as xr

    base = np.repeat([1.0, 0.0, 1.0, 0.0, 1.0], [60, 40, 30, 20, 50])
    edited = np.repeat([1.0, 0.0, 1.0, 0.0, 0.0], [50, 50, 25, 25, 50])[:, None]
    task = np.repeat(["big", "small", "alone"], [100, 50, 50])
    data = xr.Dataset(
        {
            "accuracy": (("sequence", "layer"), edited),
            "accuracy_norm": (("sequence", "layer"), edited),
            "accuracy_baseline": ("sequence", base),
        },
        {
            "sequence": [str(i) for i in range(200)],
            "layer": [3],
            "task": ("sequence", task),
            "task_group": ("sequence", np.repeat(["reasoning", "language"], [150, 50])),
            "chance": ("sequence", np.repeat([0.25, 0.5, 0.0], [100, 50, 50])),
        },
    )
    return ml.Result.create(data, kind="task_accuracy")


def test_summary_by_hand(made_up: ml.Result) -> None:
    table = ml.tasks.task_summary(made_up).set_index(["scope", "name", "measure"])
    means = table["mean"]
    assert means["task", "big", "accuracy"] == pytest.approx(0.5)
    assert means["task", "big", "accuracy_chance_corrected"] == pytest.approx(0.25 / 0.75)
    assert means["task", "big", "relative_drop"] == pytest.approx(0.1 / 0.6)
    assert means["task", "big", "relative_drop_chance_corrected"] == pytest.approx(0.1 / 0.35)
    assert means["task", "alone", "relative_drop"] == 1
    drops = [means["task", name, "relative_drop"] for name in ("big", "small")]
    assert means["group", "reasoning", "relative_drop"] == pytest.approx(np.mean(drops))
    assert means["group", "reasoning", "accuracy"] == pytest.approx(0.5)  # of tasks, not of questions
    assert table.loc[("group", "reasoning", "accuracy"), ["tasks", "questions", "layer"]].tolist() == [
        2,
        150,
        3,
    ]
    ordered = table.dropna()
    assert (ordered["low"] <= ordered["mean"] + 1e-12).all()
    assert (ordered["mean"] <= ordered["high"] + 1e-12).all()


def test_intervals_are_of_the_size_theory_says(made_up: ml.Result) -> None:
    table = ml.tasks.task_summary(made_up, n_resamples=4000).set_index(["scope", "name", "measure"])
    widths = table["high"] - table["low"]
    one = 2 * 1.96 * np.sqrt(0.25 / 100)
    assert widths["task", "big", "accuracy"] == pytest.approx(one, rel=0.1)
    group = 2 * 1.96 * np.sqrt((0.25 / 100 + 0.25 / 50) / 4)  # mean of two independent tasks
    assert widths["group", "reasoning", "accuracy"] == pytest.approx(group, rel=0.1)


def test_nothing_to_lose_has_no_relative_drop(made_up: ml.Result) -> None:
    data = made_up.data.assign(accuracy_baseline=made_up.data["accuracy_baseline"] * 0)
    table = ml.tasks.task_summary(ml.Result(data), n_resamples=50).set_index("measure")
    assert table.loc["relative_drop", ["mean", "low", "high"]].isna().all().all()
    assert table.loc["accuracy", ["mean", "low", "high"]].notna().all().all()


def test_summary_of_something_else_is_refused(made_up: ml.Result) -> None:
    with pytest.raises(OptionError, match="level=2"):
        ml.tasks.task_summary(made_up, level=2)
    with pytest.raises(ResultError, match="sweep result is not an evaluation of tasks"):
        ml.tasks.task_summary(ml.Result(made_up.data.assign_attrs(kind="sweep")))


def test_tasks_of_files_need_no_lm_eval() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; import memlens as ml; print(ml.tasks.ChoiceTask)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ChoiceTask" in done.stdout, done.stderr
