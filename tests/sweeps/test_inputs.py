"""Inputs of the wrong kind are named, before any forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

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
