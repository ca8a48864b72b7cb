"""inspect_ai's evaluation of a model under an intervention is that of its own greedy continuations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import memlens as ml
from memlens.cli.making import continuations
from memlens.instruments.tasks import inspect_model

PROMPTS = ["Mara was", "The key of the"]


@pytest.mark.slow
def test_answers_are_the_greedy_continuations_under_the_intervention(tmp_path: Any) -> None:
    inspect = pytest.importorskip("inspect_ai")
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import exact
    from inspect_ai.solver import generate

    model = ml.load_model("zoo/pythia-s")
    layers = [2, 4]
    expected = [model.tokenizer.decode(ids) for ids in continuations(model, PROMPTS, layers=layers, n=6)]
    plain = [model.tokenizer.decode(ids) for ids in continuations(model, PROMPTS, layers=[], n=6)]
    assert expected != plain
    samples = [Sample(input=prompt, target=text) for prompt, text in zip(PROMPTS, expected, strict=True)]
    task = inspect.Task(dataset=samples, solver=generate(max_tokens=6), scorer=exact())
    bypass = ml.edits.attention_bypasses(model, layers=layers)
    under = ml.tasks.as_inspect(model, bypass)
    (log,) = inspect.eval(task, model=under, log_dir=str(tmp_path), display="none")
    assert log.status == "success", log.error
    assert [sample.output.completion for sample in log.samples] == expected
    (log,) = inspect.eval(task, model=ml.tasks.as_inspect(model), log_dir=str(tmp_path), display="none")
    assert [sample.output.completion for sample in log.samples] == plain
    (log,) = inspect.eval(task, model=under, log_dir=str(tmp_path), display="none", temperature=0.7)
    assert log.status == "error"
    assert "answers here are greedy" in log.error.message


def test_messages_become_one_text_in_the_form_of_the_chat_template() -> None:
    said = [
        SimpleNamespace(role="system", content="Be brief.", text="Be brief."),
        SimpleNamespace(role="user", content="Why?", text="Why?"),
    ]
    plain = SimpleNamespace(chat_template=None)
    assert inspect_model._text(plain, said) == "Be brief.\n\nWhy?"
    asked: list[Any] = []
    chat = SimpleNamespace(
        chat_template="…", apply_chat_template=lambda turns, **how: asked.append((turns, how))
    )
    inspect_model._text(chat, said)
    ((turns, how),) = asked
    assert turns[1] == {"role": "user", "content": "Why?"}
    assert how == {"tokenize": False, "add_generation_prompt": True}
    picture = SimpleNamespace(role="user", content=[SimpleNamespace(type="image")], text="")
    with pytest.raises(ml.errors.OptionError, match="reads text only"):
        inspect_model._text(plain, [picture])


def test_without_inspect_ai_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_model, "find_spec", lambda name: None)
    with pytest.raises(ml.errors.ModelLoadError, match=r"pip install 'memlens\[inspect\]'"):
        ml.tasks.as_inspect(None)
