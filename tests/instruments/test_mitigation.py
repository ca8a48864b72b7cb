"""The table of a mitigation: each number against an independent one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import EmptySetError, InterventionError, OptionError, SequenceError
from memlens.instruments.edit.editing import control_edits, edit_weights
from memlens.instruments.edit.export import export_edited
from memlens.instruments.edit.mitigation import MitigationOptions, evaluate_mitigation, shortened
from memlens.instruments.edit.weight_edit import weight_edit
from memlens.recall.columns import near_verbatim_columns
from memlens.sequences.set import SequenceSet
from tests.small import ragged

QUICK = MitigationOptions(n_random=1, replaced=(1,))


@pytest.fixture(scope="module")
def zoo() -> tuple[Any, SequenceSet]:
    model = ml.load_model("zoo/pythia-s")
    seqs = ml.load_sequences("zoo", model)
    often = seqs[seqs.table["copies"].to_numpy() == 256]
    return model, ml.score_recall(model, often, generate=False, progress=False).memorized()


def test_an_edit_that_changes_nothing_has_no_effect(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "hooked"), ragged(6)
    found = evaluate_mitigation(
        model,
        weight_edit(model, "nothing", []),
        seqs[:3],
        others=seqs[3:],
        text=ragged(4, seed=3),
        options=QUICK,
    )
    assert found.table["change"].tolist() == [0] * len(found.table)
    assert found.table["before"].tolist() == found.table["after"].tolist()
    assert "random directions" in found.settings["without_controls"]
    assert "log-probability" in found._repr_html_()


def test_every_number_is_that_of_a_measurement_of_its_own(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "hooked"), ragged(6)
    target, others, text, near = seqs[:3], seqs[3:], ragged(4, seed=3), ragged(5, seed=4)
    edit = edit_weights(model, ["L0H1", "L1N7", "L2N30"])
    found = evaluate_mitigation(model, edit, target, others=others, text=text, neighbors=near, options=QUICK)
    options: dict[str, Any] = {"progress": False}
    before = ml.score_recall(model, target, **options).table
    with ml.applied(model, edit):
        after = ml.score_recall(model, target, **options).table
        half = ml.score_recall(model, shortened(target, 0.5), **options).table
        kept, loss, beside = (ml.measure(model, s)["target_logprob"] for s in (others, text, near))
    row = found["log-probability"]
    assert row["n"] == 3
    assert row["before"] == pytest.approx(before["target_logprob"].mean(), abs=1e-5)
    assert row["after"] == pytest.approx(after["target_logprob"].mean(), abs=1e-5)
    assert row["change"] == pytest.approx(row["after"] - row["before"], abs=1e-6)
    assert row["change_low"] <= row["change"] <= row["change_high"]
    assert found["memorization score"]["after"] == pytest.approx(after["memorization_score"].mean())
    assert found["0.5 of the prefix: exact match"]["after"] == half["exact_match"].mean()
    assert found["others: log-probability"]["after"] == pytest.approx(kept.mean(), abs=1e-5)
    assert found["text: loss"]["after"] == pytest.approx(-loss.mean(), abs=1e-5)
    assert found["neighbors: exact match"]["n"] == len(beside)
    (control,) = control_edits(model, edit, "direction", n=1)
    with ml.applied(model, control):
        random = ml.measure(model, target)["target_logprob"].mean() - before["target_logprob"].mean()
    assert row["random directions"] == pytest.approx(random, abs=1e-5)
    assert np.isfinite(row["random components"])


def test_what_comes_instead_is_found(zoo: tuple[Any, SequenceSet]) -> None:
    """An intervention that turns one prefix into another makes the model recite the other sequence."""
    model, seqs = zoo
    one, two, rest = seqs[:1], seqs[1:2], seqs[2:6]
    n = int(one.prefix_len[0])
    assert int(two.prefix_len[0]) == n
    with torch.no_grad():
        other = model.embed(two.tokens[:, :n])

    def swap(x: torch.Tensor, hook: Any) -> torch.Tensor:
        if x.shape[1] < n:
            return x
        return torch.cat([other.expand(len(x), -1, -1), x[:, n:]], 1)

    edit = ml.Intervention("swap", [("blocks.0.hook_resid_pre", swap)])
    alone = evaluate_mitigation(model, edit, one, others=rest, options=QUICK)
    assert alone["exact match"]["after"] == 0
    assert alone["another memory, exactly"]["after"] == 0
    found = evaluate_mitigation(model, edit, one, others=rest, memorized=seqs, options=QUICK)
    assert found["another memory, exactly"]["before"] == 0
    assert found["another memory, exactly"]["after"] == 1
    (row,) = found.instead.to_dict("records")
    assert (row["under"], row["target"], row["other"]) == ("edited", one.ids[0], two.ids[0])
    truth = two.halves()[1]
    assert near_verbatim_columns([row["generated"]], truth)["edit_similarity"].tolist() == [1.0]
    assert np.isnan(found["exact match"]["change_low"])  # one sequence has no interval


@pytest.mark.slow
def test_an_exported_model_is_evaluated_as_its_edit(zoo: tuple[Any, SequenceSet], tmp_path: Path) -> None:
    model, seqs = zoo
    tasks = ml.tasks.local_tasks("zoo", model, names=["agreement"], n=20)
    edit = edit_weights(model, ["L0H4", "L0H1", "L1H7"])
    folder = export_edited(model, edit, tmp_path / "out")
    shared: dict[str, Any] = {"others": seqs[4:10], "tasks": tasks, "options": QUICK}
    shared["retain"] = ml.load_model("zoo/pythia-s-clean")
    ours = evaluate_mitigation(model, edit, seqs[:4], **shared)
    theirs = evaluate_mitigation(model, folder, seqs[:4], **shared)
    names = ["measure", "n"]
    assert ours.table[names].equals(theirs.table[names])
    np.testing.assert_allclose(ours.table["after"], theirs.table["after"], atol=1e-3)
    assert {"random directions", "random components"} <= set(ours.table)
    assert "random directions" not in theirs.table
    assert 0 < ours["unlearning depth"]["after"] < 1
    assert ours["agreement: accuracy"]["n"] == 20
    assert ours["others: exact match"]["before"] == 1


def test_controls_of_ones_own_and_why_there_are_none(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "hooked"), ragged(6)
    target, others = seqs[:3], seqs[3:]
    first, *more = ml.edits.attention_bypasses(model)
    found = evaluate_mitigation(model, first, target, others=others, options=QUICK)
    assert "in_transformers" in found.settings["without_controls"]["random components"]
    found = evaluate_mitigation(model, first, target, others=others, controls={"layers": more}, options=QUICK)
    effects = ml.sweep(model, target, more, progress=False).effect("target_logprob")
    assert found["log-probability"]["layers"] == pytest.approx(float(effects.mean()), abs=1e-5)
    assert found["log-probability"]["layers_low"] <= found["log-probability"]["layers_high"]


def test_what_cannot_be_evaluated_is_refused(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "hooked"), ragged(6)
    edit = edit_weights(model, ["L0H1"])
    with pytest.raises(EmptySetError, match="others has no sequences"):
        evaluate_mitigation(model, edit, seqs, others=seqs[:0])
    with pytest.raises(OptionError, match="in target and in others"):
        evaluate_mitigation(model, edit, seqs[:3], others=seqs[2:])
    refused: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"edit": 5}, InterventionError, "int is not an edit"),
        ({"edit": []}, InterventionError, "there is no edit"),
        ({"others": ["a"]}, SequenceError, "others is a list, not a SequenceSet"),
        ({"options": {"n_random": 0}}, OptionError, "options="),
        ({"controls": [edit]}, OptionError, "controls is a list"),
        ({"controls": {"mine": []}}, InterventionError, "there is no edit"),
        ({"controls": {"change_low": [edit]}}, OptionError, "'change_low' is a column"),
    ]
    for options, error, message in refused:
        given: dict[str, Any] = {"edit": edit, "target": seqs[:3], "others": seqs[3:], **options}
        with pytest.raises(error, match=message):
            evaluate_mitigation(model, **given)
    long = MitigationOptions(n_random=0, replaced=(1, 40))
    found = evaluate_mitigation(model, edit, seqs[:3], others=seqs[3:], options=long)
    shortest = int(seqs[:3].prefix_len.min())
    told = f"the shortest prefix has {shortest} tokens."
    assert found.settings["without_prompts"] == {"40 of the prefix replaced": told}
    with pytest.raises(OptionError, match="was not measured"):
        found["agreement: accuracy"]
    assert not [name for name in found.table if str(name).startswith("random")]
