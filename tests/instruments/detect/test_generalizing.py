"""Recalling against generalizing: right answers, and a third group that tells behaviour from text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import EmptySetError, OptionError
from memlens.forward.hooks import hook_name
from tests.devices import dev
from tests.instruments.detect.test_separation import random_set

RECORDS = [
    {"context": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{i + 7}", f"w{i + 9}"], "gold": i % 3}
    for i in range(12)
]


def task(model: Any, records: Any, name: str) -> Any:
    return ml.tasks.ChoiceTask.from_records(records, model, name=name)


@torch.no_grad()
def test_answered_questions_are_those_with_the_likeliest_choice_correct(
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    tasks = [task(model, RECORDS, "one"), task(model, RECORDS[:5], "two")]
    found = ml.detect.answered_questions(model, tasks, progress=False)
    wanted = []
    for one in tasks:
        own = one.requests
        for question, rows in own.table.groupby("question_id", sort=False).groups.items():
            scores = []
            for row in rows:
                tokens, start = torch.tensor([own.rows()[row]]), int(own.prefix_len[row])
                logprob = model(tokens)[0].log_softmax(-1)
                scores.append(float(logprob[range(start - 1, tokens.shape[1] - 1), tokens[0, start:]].sum()))
            if own.table["gold"][rows[int(np.argmax(scores))]]:
                wanted.append(question)
    assert found.table["question_id"].tolist() == wanted
    assert 0 < len(wanted) < 17
    assert found.table["gold"].all()
    wrong = [r for r in RECORDS if f"one-{RECORDS.index(r):04d}" not in wanted]
    with pytest.raises(EmptySetError, match=f"none of the {len(wrong)} questions"):
        ml.detect.answered_questions(model, [task(model, wrong, "hard")], progress=False)


def marked(model: Any, neuron: int, tokens: range) -> tuple[str, Any]:
    """A hook that raises a neuron of layer 1 wherever the token is one of these."""
    seen: list[torch.Tensor] = []
    model.embed.register_forward_pre_hook(lambda module, given: seen.append(given[0]))

    def raise_neuron(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts = acts.clone()
        acts[..., neuron] += 100.0 * ((seen[-1] >= tokens.start) & (seen[-1] < tokens.stop))
        return acts

    return hook_name("mlp_post", 1), raise_neuron


def test_neurons_of_the_text_do_not_pass_for_neurons_of_recall(tiny_folder: Any) -> None:
    """Neuron 7 is high in recalled sequences alone; neuron 9 in matched ones too, which are of their kind."""
    model = ml.load_model(tiny_folder("gpt_neox"), backend="bridge", device=dev())
    sums = random_set(12, 80, 100, "sum", 0)
    recalled, matched = random_set(12, 0, 40, "r", 1), random_set(12, 40, 80, "m", 2)
    of_recall, of_text = marked(model, 7, range(40)), marked(model, 9, range(80))
    options = ml.detect.GeneralizingOptions(layers=(1,), share=1 / 64, n_splits=2, folds=2)
    chosen, area = [], []
    for hook in (of_recall, of_text):
        with model.hooks(fwd_hooks=[hook]):
            found = ml.detect.recall_or_generalize(
                model, recalled, sums, matched, options=options, progress=False
            )
        neurons = found.neurons["chosen"].values[0]
        chosen.append(int(neurons.argmax()))
        assert neurons.sum() == 1
        table = found.comparisons[found.comparisons["baseline"] == "confounds"]
        by_choice = table.set_index(["neurons", "compared"])["area"]
        area.append([by_choice["recalled or generalizing", pair] for pair in PAIRS])
        assert found.shared == float(hook is of_text)
        assert set(by_choice.index.get_level_values(0)) == {PAIRS[0], PAIRS[2]}
        assert len(found.held_out) == 6
        assert set(found.held_out.ids) < set(recalled.ids)
        assert not set(found.held_out.ids) & set(found.neurons["sequence"].values)
    assert chosen == [7, 9]
    assert area[0][:2] == [1.0, 1.0]  # recalled sequences against both others
    assert area[1][0] == area[1][2] == 1.0
    assert abs(area[1][1] - 0.5) < 0.45  # the text's neuron does not tell recalled from matched


PAIRS = ("recalled or generalizing", "recalled or matched", "matched or generalizing")


def test_settings_are_checked_before_anything_runs(tiny_model: Callable[..., Any]) -> None:
    model, three = tiny_model("gpt_neox", "bridge"), [random_set(4, 0, 9, name, 0) for name in "abc"]
    with pytest.raises(EmptySetError, match="there are 1 generalizing sequences"):
        ml.detect.recall_or_generalize(model, three[0], three[1][:1], three[2], progress=False)
    with pytest.raises(OptionError):
        ml.detect.GeneralizingOptions(folds=1)
