"""The split of sequences by what reaches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import memlens as ml
from memlens.errors import EmptySetError, OptionError
from memlens.instruments.edit.editing import edit_weights
from memlens.instruments.edit.reach import split_by_reach
from tests.small import ragged


def test_each_sequence_is_split_by_its_own_edits() -> None:
    model = ml.load_model("zoo/pythia-s")
    seqs = ml.load_sequences("zoo", model)
    seqs = seqs[seqs.table["copies"].to_numpy() == 256][:2].concat(seqs[:1])
    asked: list[str] = []

    def none(one: Any) -> list[str]:
        asked.extend(one.ids)
        return ["L5N0"]

    found = split_by_reach(
        model, seqs, neurons=none, heads=lambda one: ["L0 attention", "L1 attention"], neuron_how="zero"
    ).set_index("id")
    assert asked == list(seqs.ids)
    recalled = ml.score_recall(model, seqs, progress=False).table["exact_match"].to_numpy() == 1
    assert recalled[:2].all()
    assert found["recalled"].tolist() == recalled.tolist()
    assert found["reach"].tolist()[:2] == ["head", "head"]
    edit = edit_weights(model, ["L0 attention", "L1 attention"])
    effect = ml.sweep(model, seqs[:2], [edit], progress=False).effect("target_logprob").values[:, 0]
    assert found["head_logprob"].tolist()[:2] == pytest.approx(effect.tolist(), abs=1e-4)
    copied = ml.score_recall(model, seqs, progress=False).table["copied_share"].tolist()
    assert found["copied_share"].tolist() == copied
    assert found["copies_prefix"].tolist() == [share >= 0.5 for share in copied]
    if not recalled[2]:
        assert found["reach"].tolist()[2] == "not recalled"


def test_the_kept_set_leaves_out_the_sequence_itself(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "hooked"), ragged()
    search = ml.instruments.VectorSearch(steps=2)
    options: dict[str, Any] = {
        "neurons": lambda one: ["L1N3"],
        "heads": lambda one: ["L0H1"],
        "search": search,
    }
    kept = split_by_reach(model, seqs[:1], keep=seqs, **options)
    alone = split_by_reach(model, seqs[:1], keep=seqs[1:], **options)
    assert kept.equals(alone)
    assert kept["reach"].tolist() == ["not recalled"]


def test_what_cannot_be_split_is_refused(tiny_model: Callable[..., Any]) -> None:
    model, one = tiny_model("gpt_neox", "hooked"), ["L0H1"]
    with pytest.raises(EmptySetError):
        split_by_reach(model, ragged()[:0], neurons=lambda _: one, heads=lambda _: one)
    with pytest.raises(OptionError, match="reference"):
        split_by_reach(model, ragged(), neurons=lambda _: one, heads=lambda _: one, head_how="mean")
    with pytest.raises(OptionError, match="neurons is a list: give a function"):
        split_by_reach(model, ragged(), neurons=one, heads=lambda _: one)  # pyright: ignore[reportArgumentType]
    refused: list[tuple[dict[str, Any], str]] = [
        ({"keep": ragged()}, "how='zero' does not use keep"),
        ({"search": ml.instruments.VectorSearch(steps=2)}, "how='zero' does not use search"),
        ({"strength": 2.0}, "strength=2.0 with how='zero'"),
        ({"copied": 7}, "copied=7: give a share"),
    ]
    for options, message in refused:
        with pytest.raises(OptionError, match=message):
            split_by_reach(
                model, ragged(), neurons=lambda _: one, heads=lambda _: one, neuron_how="zero", **options
            )
