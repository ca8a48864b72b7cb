"""What the explorer shows, against plain computations on every family and backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, SequenceError, SiteError, VocabularyError
from memlens.explorer.data import Edits, strongest_heads
from memlens.explorer.measuring import ExploreOptions, edit_interventions, explore_sequences
from memlens.sequences.set import SequenceSet
from tests.small import CASES, ragged

Hooks = list[tuple[str, Callable[..., Any]]]


def mean_of_others(head: int) -> Callable[..., Any]:
    def fn(z: torch.Tensor, hook: Any) -> torch.Tensor:
        out = z.clone()
        out[:, :, head] = z[:, :, [h for h in range(z.shape[2]) if h != head]].mean(2)
        return out

    return fn


def bypass(model: Any, layer: int) -> Hooks:
    seen: dict[str, torch.Tensor] = {}

    def read(v: torch.Tensor, hook: Any) -> None:
        seen["v"] = v

    def write(z: torch.Tensor, hook: Any) -> torch.Tensor:
        v = seen["v"]
        return v.repeat_interleave(z.shape[2] // v.shape[2], dim=2)

    return [(f"blocks.{layer}.attn.hook_v", read), (f"blocks.{layer}.attn.hook_z", write)]


@torch.no_grad()
def greedy(model: Any, prefix: list[int], n: int, hooks: Hooks) -> list[int]:
    """Greedy decoding in the plainest form: the whole sequence anew for every token, no cache."""
    tokens = list(prefix)
    for _ in range(n):
        logits = model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=hooks)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prefix) :]


def words(ids: list[int]) -> list[str]:
    return [f"w{i}" if i < 100 else "<|endoftext|>" for i in ids]


@pytest.mark.parametrize(("family", "backend"), CASES[::4])
def test_numbers_and_text_under_edits_are_those_of_plain_forwards(
    family: str, backend: str, tiny_model: Callable[..., Any]
) -> None:
    model, seqs = tiny_model(family, backend), ragged(2).first_targets(5)
    options = ExploreOptions(top_heads=2, bypass_layers=[1])
    found = explore_sequences(model, seqs, options, progress=False)
    assert found.ids == seqs.ids
    heads = ml.ablate_heads(model, seqs, engine="reference", progress=False)
    lens = ml.decode_residual(model, seqs, progress=False)
    for row, view in enumerate(found.views):
        ids, p = seqs.rows()[row], int(seqs.prefix_len[row])
        n = len(ids) - p
        assert list(view.tokens) == words(ids)
        effect = heads.effect("target_logprob").values[row]
        assert np.abs(view.head_effects - effect).max() < 1e-4
        assert np.allclose(view.lens_probability, lens["probability"].values[row, :, :n])
        with torch.no_grad():
            logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
        plain = view.continuation
        assert np.allclose(
            plain.probability, [float(logprobs[p + i - 1, ids[p + i]].exp()) for i in range(n)], atol=1e-5
        )
        assert list(plain.greedy) == words(logprobs[p - 1 : -1].argmax(-1).tolist())
        assert list(plain.tokens) == words(greedy(model, ids[:p], n, []))
        assert [c.edits.bypassed for c in view.edited] == [(1,), (), (), ()]
        assert list(view.edited[0].tokens) == words(greedy(model, ids[:p], n, bypass(model, 1)))
        one, two = (c.edits.ablated[0] for c in view.edited[1:3])
        hooks = [(f"blocks.{layer}.attn.hook_z", mean_of_others(head)) for layer, head in (one, two)]
        assert list(view.edited[1].tokens) == words(greedy(model, ids[:p], n, hooks[:1]))
        if one[0] != two[0]:  # in one layer both are left out of the mean
            assert list(view.edited[3].tokens) == words(greedy(model, ids[:p], n, hooks))
        assert view.edited[3].edits.ablated == tuple(sorted((one, two)))
        for c in (plain, *view.edited):
            assert c.same.tolist() == [a == b for a, b in zip(c.tokens, view.targets, strict=True)]
        assert sorted(view.attention) == [(a, b) for a in range(len(view.head_effects)) for b in range(4)]


def test_effects_of_mlps_and_bypasses_are_those_of_plain_forwards(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("llama", "bridge"), ragged(2).first_targets(5)
    found = explore_sequences(model, seqs, ExploreOptions(top_heads=1), progress=False)
    for ids, p, view in zip(seqs.rows(), seqs.prefix_len.tolist(), found.views, strict=True):

        def mean_logprob(hooks: Hooks, ids: list[int] = ids, p: int = p) -> float:
            with torch.no_grad():
                logprobs = model.run_with_hooks(torch.tensor([ids]), fwd_hooks=hooks)[0].log_softmax(-1)
            return float(logprobs[range(p - 1, len(ids) - 1), ids[p:]].mean())

        layers = range(len(view.mlp_effects))
        off = [[(f"blocks.{layer}.hook_mlp_out", lambda x, hook: 0 * x)] for layer in layers]
        mlps = [mean_logprob(hooks) - mean_logprob([]) for hooks in off]
        bypasses = [mean_logprob(bypass(model, layer)) - mean_logprob([]) for layer in layers]
        assert np.allclose(view.mlp_effects, mlps, atol=1e-4)
        assert np.allclose(view.bypass_effects, bypasses, atol=1e-4)
        assert not np.allclose(mlps, bypasses, atol=0.01)


def test_edits_act_together_and_leave_nothing_behind(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("llama_gqa", "bridge"), ragged(2)
    before = model(seqs.tokens)
    edits = Edits().toggled(2).toggled(0, 3).toggled(0, 1)
    with ml.applied(model, *edit_interventions(model, edits, seqs, ablation="zero")):
        found = model(seqs.tokens)

    def silent(z: torch.Tensor, hook: Any) -> torch.Tensor:
        return z * torch.tensor([1.0, 0.0, 1.0, 0.0])[:, None]

    expected = model.run_with_hooks(
        seqs.tokens, fwd_hooks=[*bypass(model, 2), ("blocks.0.attn.hook_z", silent)]
    )
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-2)
    assert torch.equal(model(seqs.tokens), before)


def test_a_bypassed_layers_ablated_head_is_ablated_after_the_bypass(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(1)
    with ml.applied(model, *edit_interventions(model, Edits((1,), ((1, 2),)), seqs)):
        found = model(seqs.tokens)
    hooks = [*bypass(model, 1), ("blocks.1.attn.hook_z", mean_of_others(2))]
    assert torch.allclose(found, model.run_with_hooks(seqs.tokens, fwd_hooks=hooks), atol=1e-5)


def test_ablation_by_mean_takes_the_reference_set(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(4)
    options = ExploreOptions(ablation="mean", top_heads=1, bypass_layers=[])
    one = explore_sequences(model, seqs[[1]], options, reference=seqs, progress=False).views[0]
    expected = ml.ablate_heads(model, seqs, mode="mean", progress=False).effect("target_logprob")
    assert np.allclose(one.head_effects, expected.values[1], atol=1e-5)
    layer, head = one.edited[0].edits.ablated[0]
    with torch.no_grad():
        _, cache = model.run_with_cache(seqs.tokens, names_filter=f"blocks.{layer}.attn.hook_z")
    mean = cache[f"blocks.{layer}.attn.hook_z"][seqs.mask].mean(0)[head]

    def put(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z[:, :, head] = mean
        return z

    ids, p = seqs.rows()[1], int(seqs.prefix_len[1])
    wanted = greedy(model, ids[:p], len(ids) - p, [(f"blocks.{layer}.attn.hook_z", put)])
    assert list(one.edited[0].tokens) == words(wanted)


def test_attention_is_kept_within_memory_strongest_first(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(2)
    room = 2 * 3 * 20 * 20  # three maps of 20 tokens for each of two sequences
    found = explore_sequences(
        model, seqs, ExploreOptions(attention_bytes=room), try_edits=False, progress=False
    )
    for view, kept in zip(found.views, (3, 3 * 400 // 17**2), strict=True):
        assert list(view.attention) == strongest_heads(view.head_effects)[:kept]


def test_the_heads_offered_are_those_that_harm_recall_most() -> None:
    model = ml.load_model("zoo/pythia-s")
    seqs = ml.load_sequences("zoo", model)
    seqs = seqs[np.flatnonzero(np.isin(seqs.table["copies"].to_numpy(), [1, 256]))][[0, 1, -2, -1]]
    options = ExploreOptions(top_heads=2, bypass_layers=[])
    found = explore_sequences(model, seqs, options, keep_attention=False, progress=False)
    recalled = [view.continuation.recalled for view in found.views]
    assert recalled == [False, False, True, True]
    mean = np.mean([view.head_effects for view in found.views[2:]], axis=0)
    offered = [c.edits.ablated[0] for c in found.views[0].edited[:2]]
    assert [mean[head] for head in offered] == sorted(mean.ravel())[:2]
    assert found.views[2].facts["copies"] == "256"
    assert found.settings["ablation"] == "mean_of_other_heads"
    assert found.settings["model"] == "zoo/pythia-s"
    assert found["text-001-00"] is found.views[0]
    with pytest.raises(SiteError, match=r"'text-001-0' among these 4: .*\. Did you mean"):
        found["text-001-0"]


def test_a_metric_of_which_less_is_better_turns_the_order() -> None:
    effects = np.array([[3.0, -2.0], [np.nan, 1.0]])
    assert strongest_heads(effects, -1) == [(0, 0), (1, 1), (0, 1), (1, 0)]
    assert strongest_heads(effects, 1) == [(0, 1), (1, 1), (0, 0), (1, 0)]
    assert strongest_heads(effects) == [(0, 0), (0, 1), (1, 1), (1, 0)]


def test_a_model_without_a_tokenizer_shows_ids(tiny_model: Callable[..., Any], monkeypatch: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    monkeypatch.setattr(model, "tokenizer", None)
    view = explore_sequences(model, ragged(1), try_edits=False, progress=False).views[0]
    assert list(view.tokens) == [f"#{i}" for i in ragged(1).rows()[0]]
    assert view.target_text == " ".join(view.targets)


def test_wrong_choices_are_refused_before_anything_runs(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "bridge")
    with pytest.raises(OptionError, match="ablation='resample'"):
        ExploreOptions(ablation="resample")
    with pytest.raises(OptionError, match="metric='logprob'"):
        ExploreOptions(metric="logprob")
    with pytest.raises(OptionError, match="top_heads=-1"):
        ExploreOptions(top_heads=-1)
    with pytest.raises(SiteError, match="layer 9"):
        explore_sequences(model, ragged(1), ExploreOptions(bypass_layers=[9]))
    with pytest.raises(VocabularyError, match="5000"):
        explore_sequences(model, SequenceSet.from_tokens([[1, 2, 5000]], 1))
    with pytest.raises(SequenceError, match="SequenceSet"):
        ml.explore(model, ["a text"])  # type: ignore[arg-type]
