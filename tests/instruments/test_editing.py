"""Edits of output vectors: what they change, what they keep, and what the search finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import InterventionError, OptionError, SequenceError, SiteError
from memlens.forward.components import Component
from memlens.forward.read_blocks import read_parts
from memlens.forward.trunk import Trunk
from memlens.instruments.edit.editing import control_edits, edit_weights
from memlens.instruments.edit.export import edited_model
from memlens.instruments.edit.options import VectorSearch
from memlens.instruments.edit.search import search_edits
from memlens.instruments.edit.weight_edit import WeightEdit
from memlens.results.groups import halves
from tests.small import CASES, ragged
from tests.tiny import random_tokens

CHOSEN = ["L0N5", "L1N7", "L1N8", "L2N0"]
FEW = VectorSearch(steps=6, learning_rate=0.2)


def logits(model: Any, edit: ml.Intervention | None = None) -> torch.Tensor:
    with torch.no_grad():
        if edit is None:
            return model(random_tokens())
        with ml.applied(model, edit):
            return model(random_tokens())


def columns(model: Any, edit: WeightEdit) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The output vectors before and after, by layer and map."""
    found = []
    for change in edit.changes:
        part: Any = change.part
        old = read_parts(model, change.layer, parallel=Trunk(model).parallel).maps[part].weight
        assert change.index is not None
        found.append((old[:, change.index], change.weight))
    return found


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize(("family", "backend"), CASES)
def test_an_edit_to_zero_or_the_mean_is_the_ablation(
    family: str, backend: str, how: Any, tiny_model: Callable[..., Any]
) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    plain = logits(model)
    averaged: dict[str, Any] = {"reference": seqs} if how == "mean" else {}
    edit = edit_weights(model, ["L0H1", "L1H3"], how, **averaged)
    (same,) = ml.edits.head_set_ablations(model, seqs, {"a": [(0, 1), (1, 3)]}, mode=how)
    assert torch.allclose(logits(model, edit), logits(model, same), atol=1e-4)
    edit = edit_weights(model, CHOSEN, how, **averaged)
    (same,) = ml.edits.neuron_knock_outs(model, seqs, {"a": {0: [5], 1: [7, 8], 2: [0]}}, mode=how)
    assert torch.allclose(logits(model, edit), logits(model, same), atol=1e-4)
    assert not torch.allclose(logits(model, same), plain, atol=1e-3)
    if how == "zero":
        edit = edit_weights(model, ["L1 MLP", "L0 attention"])
        two = [*ml.edits.mlp_ablations(model, seqs, layers=[1])]
        two += ml.edits.attention_bypasses(model, layers=[0], mode="zero")
        assert torch.allclose(logits(model, edit), logits(model, two[0] + two[1]), atol=1e-4)


def test_strength_is_the_share_of_the_way(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "hooked")
    for old, new in columns(model, edit_weights(model, CHOSEN, strength=0.25)):
        torch.testing.assert_close(new, 0.75 * old)
    half = edit_weights(model, ["L1 MLP"], strength=0.5)
    assert torch.allclose(half.changes[0].bias, 0.5 * model.blocks[1].mlp.b_out)  # pyright: ignore[reportArgumentType]
    assert edit_weights(model, ["L1N3"]).size == pytest.approx(
        float(model.blocks[1].mlp.W_out[3].detach().norm())
    )


@pytest.mark.parametrize(
    ("family", "backend"),
    [("gpt_neox", "hooked"), ("olmo2", "bridge"), ("llama_gqa", "bridge"), ("gpt_bigcode", "bridge")],
)
@pytest.mark.parametrize("how", ["output_vector", "norm_preserving"])
def test_a_searched_edit_lowers_the_targets_within_its_budget(
    family: str, backend: str, how: Any, tiny_model: Callable[..., Any]
) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    needed = [p.requires_grad for p in model.parameters()]
    edit = edit_weights(model, CHOSEN, how, sequences=seqs, strength=0.5, search=FEW, progress=False)
    assert [p.requires_grad for p in model.parameters()] == needed
    measured = ml.sweep(model, seqs, [edit], progress=False)
    before, after = measured.baseline("target_logprob"), measured["target_logprob"]
    assert float(before.mean()) == pytest.approx(edit.about["target_logprob_before"], abs=1e-4)
    assert float(after.mean()) == pytest.approx(edit.about["target_logprob_after"], abs=1e-4)
    assert float(after.mean()) < float(before.mean()) - 1e-3
    for old, new in columns(model, edit):
        if how == "norm_preserving":
            torch.testing.assert_close(new.norm(dim=0), old.norm(dim=0))
        else:
            assert bool(((new - old).norm(dim=0) <= 0.5001 * old.norm(dim=0)).all())
    assert {c.part for c in edit.changes} == {"out"}
    with torch.no_grad():
        plain = edited_model(model, edit)(random_tokens()).logits
    assert torch.allclose(plain, logits(model, edit), atol=1e-4)


def test_the_first_step_follows_the_gradient(tiny_model: Callable[..., Any]) -> None:
    """Of one neuron with a tiny budget, the edit is minus the gradient of the log-probability, normalized."""
    model, seqs = tiny_model("gpt_neox", "hooked"), ragged(1)
    search = VectorSearch(steps=20, floor=-1e6)
    edit = edit_weights(
        model, ["L2N3"], "output_vector", sequences=seqs, strength=1e-3, search=search, progress=False
    )
    ((old, new),) = columns(model, edit)
    weight = model.blocks[2].mlp.W_out
    try:
        weight.requires_grad_(True)
        logprobs = model(seqs.tokens).log_softmax(-1)[0, :-1].gather(-1, seqs.tokens[0, 1:, None])[:, 0]
        loss = logprobs[int(seqs.prefix_len[0]) - 1 :].mean()
        (gradient,) = torch.autograd.grad(loss, weight)
    finally:
        weight.grad = None
    cosine = torch.cosine_similarity((new - old)[:, 0], -gradient[3], dim=0)
    assert float(cosine) > 0.98
    assert float((new - old).norm()) == pytest.approx(1e-3 * float(old.norm()), rel=1e-2)


def test_what_is_kept_changes_less(tiny_model: Callable[..., Any]) -> None:
    model, seqs, keep = tiny_model("gpt_neox", "hooked"), ragged(), ragged(6, seed=5)
    options: dict[str, Any] = {"sequences": seqs, "strength": 2.0, "progress": False}
    free = edit_weights(model, CHOSEN, "output_vector", search=FEW, **options)
    search = VectorSearch(steps=6, learning_rate=0.2, keep_weight=50.0)
    bound = edit_weights(model, CHOSEN, "output_vector", search=search, keep=keep, **options)
    change = ml.sweep(model, keep, [free, bound], progress=False).effect("target_logprob")
    loose, tight = np.abs(change.values).mean(0)
    assert tight < loose


def test_controls_have_the_size_of_the_edit(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "hooked")
    edit = edit_weights(model, CHOSEN, "output_vector", sequences=ragged(), search=FEW, progress=False)
    for control in control_edits(model, edit, "direction", n=2):
        for (old, new), (_, own) in zip(columns(model, control), columns(model, edit), strict=True):
            torch.testing.assert_close((new - old).norm(dim=0), (own - old).norm(dim=0))
            assert not torch.allclose(new, own)
    zero = edit_weights(model, [*CHOSEN, "L1H2"])
    one, two = control_edits(model, zero, "components", n=2, seed=3)
    assert {(c.layer, c.part): len(c.index) for c in one.changes if c.index is not None} == {
        (0, "out"): 1, (1, "out"): 2, (2, "out"): 1, (1, "o"): 8,
    }  # fmt: skip
    assert all(not change.weight.any() for change in one.changes)
    pairs = zip(one.changes, zero.changes, strict=True)
    assert all(not set(a.index.tolist()) & set(b.index.tolist()) for a, b in pairs)  # pyright: ignore[reportOptionalMemberAccess]
    assert any(a.index.tolist() != b.index.tolist() for a, b in zip(one.changes, two.changes, strict=True))  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.slow
def test_a_search_chooses_on_one_half_and_scores_on_the_other() -> None:
    model = ml.load_model("zoo/pythia-s")
    seqs = ml.score_recall(
        model, ml.load_sequences("zoo", model)[::4], generate=False, progress=False
    ).memorized()
    tasks = ml.tasks.local_tasks("zoo", model, names=["agreement"], n=40)
    ranked = ["L0N5", "L0N7", "L1N3", "L1N9", "L0N100", "L2N1"]
    found = search_edits(
        model, seqs, tasks, ranked, hows=["zero", "output_vector"], counts=[3, 6], n_random=1, n_resamples=50,
        search=VectorSearch(steps=3), progress=False,
    )  # fmt: skip
    table = found.table.set_index("edit")
    assert len(table) == 2 * 2 * 3
    assert set(found.best) == {"zero", "output_vector", "any"}
    own = table.loc[table["control"] == ""]
    assert found.best["any"] == own["selectivity_chosen"].idxmax()
    assert found.edit.components[0] == Component("neuron", 0, 5)
    first, second = halves(len(seqs), 0)
    made = found.edits["output_vector 6"]
    assert made.about["sequences"] == len(first)
    effect = ml.sweep(model, seqs[second], [made], progress=False)
    lost = 1 - float(effect["exact_match"].mean()) / float(effect.baseline("exact_match").mean())
    assert table.loc["output_vector 6", "removed"] == pytest.approx(lost)
    direction = found.edits["output_vector 6, random direction 0"]
    assert direction.size == pytest.approx(made.size, rel=1e-4)
    others = found.edits["output_vector 6, random components 0"].components
    assert [c.layer for c in others] == [0, 0, 0, 1, 1, 2]
    assert not set(others) & set(made.components)
    best = found.best_table().set_index("search")
    assert (
        best.loc["zero", "components_removed"]
        == table[
            (table["how"] == "zero")
            & (table["count"] == best.loc["zero", "count"])
            & (table["control"] == "components")
        ]["removed"].mean()
    )
    assert found.recall.plot() is not None


def test_one_text_is_one_component(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "hooked")
    assert edit_weights(model, "L1H2").components == (Component("head", 1, 2),)


def test_what_cannot_be_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "hooked")
    with pytest.raises(OptionError, match="how='erase'"):
        edit_weights(model, CHOSEN, "erase")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match=r"strength=1\.5"):
        edit_weights(model, CHOSEN, strength=1.5)
    for strength in (float("nan"), float("inf")):
        with pytest.raises(OptionError, match=r"a number above 0\.$"):
            edit_weights(model, CHOSEN, "output_vector", sequences=ragged(), strength=strength)
    with pytest.raises(OptionError, match="5 is not a component"):
        edit_weights(model, [5])  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="no whole layer"):
        edit_weights(model, ["L1"])
    with pytest.raises(OptionError, match="at least one"):
        edit_weights(model, [])
    with pytest.raises(SiteError, match="L0N999"):
        edit_weights(model, ["L0N999"])
    with pytest.raises(SequenceError, match="forgotten"):
        edit_weights(model, CHOSEN, "output_vector")
    with pytest.raises(SequenceError, match="keep holds no sequences"):
        edit_weights(model, CHOSEN, "output_vector", sequences=ragged(), keep=ragged()[:0])
    with pytest.raises(SequenceError, match="average"):
        edit_weights(model, CHOSEN, "mean")
    unused: list[tuple[Any, str, Any]] = [
        ("zero", "sequences", ragged()), ("zero", "keep", ragged()), ("zero", "reference", ragged()),
        ("zero", "search", FEW), ("mean", "keep", ragged()), ("mean", "search", FEW),
        ("output_vector", "reference", ragged()), ("norm_preserving", "reference", ragged()),
    ]  # fmt: skip
    for how, name, value in unused:
        with pytest.raises(OptionError, match=f"how='{how}' does not use {name}: leave it out, or"):
            edit_weights(model, CHOSEN, how, **{name: value})
    with pytest.raises(OptionError, match="give reference or sequences, not both"):
        edit_weights(model, CHOSEN, "mean", sequences=ragged(), reference=ragged())
    with pytest.raises(OptionError, match="keep_weight=5 weighs what is to stay"):
        edit_weights(model, CHOSEN, "output_vector", sequences=ragged(), search=VectorSearch(keep_weight=5))
    tasks: Any = ["a task"]  # is not reached
    refused: list[tuple[dict[str, Any], str]] = [
        ({"keep": ragged()}, "how='zero' does not use keep"),
        ({"reference": ragged()}, "how='zero' does not use reference"),
        ({"search": FEW}, "how='zero' does not use search"),
        ({"strengths": [0.5, 2]}, r"strengths=\[0.5, 2\] with hows=\['zero'\]"),
        ({"strengths": []}, r"strengths=\[\]"),
    ]
    for options, message in refused:
        with pytest.raises(OptionError, match=message):
            search_edits(model, ragged(), tasks, CHOSEN, hows=["zero"], counts=[1], **options)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"components": None}, "components is a NoneType"),
        ({"strength": "much"}, "strength='much'"),
        (
            {"how": "output_vector", "sequences": ragged(), "search": {"steps": 2}},
            "give memlens.instruments.Vec",
        ),
    ]
    for options, message in wrong:
        with pytest.raises(OptionError, match=message):
            edit_weights(model, **{"components": CHOSEN, **options})
    with pytest.raises(SequenceError, match="not a SequenceSet"):
        edit_weights(model, CHOSEN, "mean", reference=[[1, 2, 3]])  # pyright: ignore[reportArgumentType]
    for edits in ([], ["L0N5"]):
        with pytest.raises(InterventionError, match="at least one weight edit"):
            ml.instruments.join_edits(model, edits)
    with pytest.raises(OptionError, match="3 controls of a str"):
        control_edits(model, "L0N5", "direction")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="hows='zero': give a list"):
        search_edits(model, ragged(), tasks, CHOSEN, hows="zero")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="no others"):
        control_edits(model, edit_weights(model, ["L1 MLP"]), "components")
