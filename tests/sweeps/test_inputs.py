"""Inputs of the wrong kind are named, before any forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import memlens as ml

EDIT = ml.Intervention("no MLP 0", [("blocks.0.hook_mlp_out", lambda x, hook: 0 * x)])
USES: dict[str, Callable[[Any, Any], Any]] = {
    "score_recall": lambda model, seqs: ml.score_recall(model, seqs, progress=False),
    "sweep": lambda model, seqs: ml.sweep(model, seqs, [EDIT], progress=False),
    "decode_residual": lambda model, seqs: ml.decode_residual(model, seqs, progress=False),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("given", [["a text"], [[5, 6, 7]]], ids=["texts", "ids"])
def test_what_is_no_set_of_sequences(tiny_model: Callable[..., Any], use: Any, given: Any) -> None:
    with pytest.raises(ml.errors.SequenceError, match="a list is not a SequenceSet: read it with"):
        use(tiny_model("gpt_neox"), given)


def test_one_intervention_in_place_of_a_list(tiny_model: Callable[..., Any]) -> None:
    seqs = ml.SequenceSet.from_tokens([[5, 6, 7]], 2)
    with pytest.raises(ml.errors.InterventionError, match=r"one Intervention \('no MLP 0'\): give a list"):
        ml.sweep(tiny_model("gpt_neox"), seqs, EDIT, progress=False)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("engine", ["fast", "reference"])
@pytest.mark.parametrize("returned", ["first row", "list"])
def test_a_hook_that_returns_another_shape_is_named(
    tiny_model: Callable[..., Any], engine: str, returned: str
) -> None:
    """One sequence's activation would be taken for that of all of them."""

    def hook(x: Any, hook: Any) -> Any:
        return x[:1] if returned == "first row" else [x]

    edit = ml.Intervention("first", [("blocks.0.hook_mlp_out", hook)])
    seqs = ml.SequenceSet.from_tokens([[5, 6, 7], [7, 6, 5]], 2)
    says = (
        r"hook on 'blocks\.0\.hook_mlp_out' of intervention 'first' returned (\(1, \d, \d+\)|list): it must"
    )
    with pytest.raises(ml.errors.InterventionError, match=says):
        ml.sweep(tiny_model("gpt_neox"), seqs, [edit], engine=engine, progress=False)


@pytest.mark.parametrize("name", ["sequence", "target", "layer"])
def test_a_metric_is_not_called_like_a_dimension(tiny_model: Callable[..., Any], name: str) -> None:
    metric = ml.Metric(lambda logits, ids, mask: logits.sum((1, 2)), name=name)
    edit = ml.Intervention("no MLP 0", EDIT.hooks, {"layer": 0})
    seqs = ml.SequenceSet.from_tokens([[5, 6, 7]], 2)
    with pytest.raises(ml.errors.OptionError, match=f"metric '{name}' is called like a dimension"):
        ml.sweep(tiny_model("gpt_neox"), seqs, [edit], [metric], progress=False)


@pytest.mark.parametrize("name", ["sequence", "target"])
def test_a_coordinate_is_not_called_like_a_dimension_of_every_result(
    tiny_model: Callable[..., Any], name: str
) -> None:
    edit = ml.Intervention("no MLP 0", EDIT.hooks, {name: 0})
    seqs = ml.SequenceSet.from_tokens([[5, 6, 7]], 2)
    with pytest.raises(ml.errors.OptionError, match=f"have the coordinate '{name}'"):
        ml.sweep(tiny_model("gpt_neox"), seqs, [edit], progress=False)


def test_a_hook_on_a_full_device_is_left_to_who_takes_smaller_portions(
    tiny_model: Callable[..., Any],
) -> None:
    """As an error of the hook it would end the sweep, instead of halving its portions."""
    asked: list[int] = []

    def hungry(x: Any, hook: Any) -> Any:
        asked.append(len(x))
        if len(asked) == 1:
            raise torch.OutOfMemoryError
        return 0 * x

    edits = [ml.Intervention(f"edit {i}", [("blocks.0.hook_mlp_out", hungry)], {"layer": i}) for i in (0, 1)]
    seqs = ml.SequenceSet.from_tokens([[5, 6, 7]], 2)
    swept = ml.sweep(tiny_model("gpt_neox"), seqs, edits, progress=False, seed=0)
    plain = ml.sweep(tiny_model("gpt_neox"), seqs, [EDIT], progress=False)
    assert len(asked) > 2
    assert (abs(swept["target_logprob"].values - plain["target_logprob"].values) < 1e-5).all()
