"""Extraction curves and compression against one plain greedy decoding for each prompt."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from statsmodels.stats.proportion import proportion_confint

import memlens as ml
from memlens.errors import EmptySetError, OptionError, SequenceError
from memlens.recall import extraction as prompts_module
from memlens.recall.compression import COMPRESSIONS, prompt_compression
from memlens.recall.extraction import extraction_curve
from memlens.sequences.set import SequenceSet
from tests.recall.sets import graded, plain_greedy
from tests.small import CASES

Models = Callable[..., Any]


def decodes(model: Any, prompt: list[int], continuation: list[int]) -> bool:
    """Decode from this prompt, token by token without a cache, up to the first token that differs."""
    tokens = list(prompt)
    for wanted in continuation:
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        if tokens[-1] != wanted:
            return False
    return True


def halves(seqs: SequenceSet) -> list[tuple[list[int], list[int]]]:
    return [(row[:p], row[p:]) for row, p in zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)]


def short_targets(model: Any, n: int = 6, seed: int = 0) -> SequenceSet:
    """Prefixes of 4 to 9 tokens with the one or two tokens that follow: often recalled from less."""
    base = graded(model, seed=seed, n=3 * n)[::3]
    rows = [[*prefix[:9], *target[: 1 + i % 2]] for i, (prefix, target) in enumerate(halves(base))]
    fresh = SequenceSet.from_tokens(rows, [len(row) - 1 - i % 2 for i, row in enumerate(rows)])
    made = plain_greedy(model, fresh)
    rows = [[*prefix, *target] for (prefix, _), target in zip(halves(fresh), made, strict=True)]
    return SequenceSet.from_tokens(rows, fresh.prefix_len)


@pytest.mark.parametrize(("family", "backend"), CASES[::4])
def test_the_curve_equals_decoding_from_each_shortened_prompt(
    tiny_model: Models, family: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, backend)
    seqs = graded(model, n=5)
    monkeypatch.setattr(prompts_module, "_BLOCK", 7)
    curve = extraction_curve(model, seqs, [1, 3, 5, 8], progress=False)
    for i, (prefix, continuation) in enumerate(halves(seqs)):
        for k in (1, 3, 5, 8):
            found = float(curve["exact_match"][i].sel(prefix_len=k))
            if k > len(prefix):
                assert np.isnan(found)
            else:
                assert found == decodes(model, prefix[-k:], continuation)
                with torch.no_grad():
                    logp = model(torch.tensor([[*prefix[-k:], *continuation]]))[0, k - 1 : -1].log_softmax(-1)
                expected = logp[range(len(continuation)), continuation].mean()
                assert float(curve["target_logprob"][i].sel(prefix_len=k)) == pytest.approx(
                    float(expected), abs=1e-4
                )


def test_on_the_zoo_more_context_extracts_more_and_intervals_are_wilson_s() -> None:
    model = ml.load_model("zoo/pythia-s")
    seqs = ml.load_sequences("zoo", model)
    seqs = seqs[(seqs.table["copies"] >= 64).to_numpy()][::3]
    curve = extraction_curve(model, seqs, [1, 4, 16, 32], progress=False)
    shares = curve["exact_match"].mean("sequence").values
    assert shares[0] < 0.2 < 0.9 < shares[-1]
    assert (np.diff(shares) >= 0).all()
    found = curve.mean_ci(metric="exact_match")["exact_match"].sel(prefix_len=4)
    hits = int(curve["exact_match"].sel(prefix_len=4).sum())
    np.testing.assert_allclose(found[1:], proportion_confint(hits, len(seqs), method="wilson"))
    full = ml.score_recall(model, seqs, progress=False).table["exact_match"]
    assert curve["exact_match"].sel(prefix_len=32).values.tolist() == full.tolist()
    figure = curve.plot("exact_match")
    assert isinstance(figure, go.Figure)
    assert figure.layout.xaxis.title.text == "prefix tokens given"
    lines = [t for t in figure.data if t.y is not None and len(t.y) == 4]
    assert any(np.allclose(np.asarray(t.y, float), shares) for t in lines)


def test_default_lengths_are_powers_of_two_and_the_longest_prefix(tiny_model: Models) -> None:
    model = tiny_model("llama", "bridge")
    for prefix_len, lengths in ((20, [8, 16, 20]), (16, [8, 16]), (5, [5])):
        seqs = SequenceSet.from_tokens([list(range(prefix_len + 2))], prefix_len)
        assert extraction_curve(model, seqs, progress=False)["prefix_len"].values.tolist() == lengths


@pytest.mark.parametrize("method", ["keep_last", "keep_first"])
@pytest.mark.parametrize("backend", ["bridge", "hooked"])
def test_both_definitions_of_compression_by_decoding_every_length(
    tiny_model: Models, method: str, backend: str
) -> None:
    model = tiny_model("gpt_neox", backend)
    seqs = short_targets(model, 10)
    found = prompt_compression(model, seqs, method, progress=False)
    not_monotone = 0
    for i, (prefix, continuation) in enumerate(halves(seqs)):
        lengths = range(1, len(prefix) + 1)
        works = {c: decodes(model, prefix[-c:] if method == "keep_last" else prefix[:c], continuation)
                 for c in lengths}  # fmt: skip
        assert works[len(prefix)]
        fewest = min(c for c in lengths if works[c])
        stable = min(c for c in lengths if all(works[d] for d in lengths if d >= c))
        assert (found["fewest_tokens"][i], found["stable_tokens"][i]) == (fewest, stable)
        assert float(found["compression_ratio"][i]) == pytest.approx(fewest / len(prefix))
        assert float(found["stable_compression_ratio"][i]) == pytest.approx(stable / len(prefix))
        tried = found["works"][i].dropna("prompt_tokens")
        assert dict(zip(tried["prompt_tokens"].values, tried.values, strict=True)) == works
        not_monotone += fewest < stable
    assert not_monotone, "the test needs a prompt that works where a longer one fails"


def greedy_by_hand(model: Any, prefix: list[int], continuation: list[int]) -> list[int]:
    left = list(range(len(prefix)))
    while len(left) > 1:
        best: tuple[float, list[int]] | None = None
        for j in range(len(left)):
            fewer = left[:j] + left[j + 1 :]
            prompt = [prefix[p] for p in fewer]
            if decodes(model, prompt, continuation):
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *continuation]]))[0, len(prompt) - 1 : -1]
                score = float(logits.log_softmax(-1)[range(len(continuation)), continuation].mean())
                if best is None or score > best[0]:
                    best = (score, fewer)
        if best is None:
            break
        left = best[1]
    return left


@pytest.mark.parametrize(("family", "backend"), [("gpt_neox", "hooked"), ("llama_gqa", "bridge")])
def test_greedy_deletion_equals_the_search_by_hand(tiny_model: Models, family: str, backend: str) -> None:
    model = tiny_model(family, backend)
    seqs = short_targets(model)
    found = prompt_compression(model, seqs, "greedy_deletion", progress=False)
    assert found["complete"].values.tolist() == [1] * len(seqs)
    shorter_than_any_end = 0
    ends = [prompt_compression(model, seqs, m, progress=False)["fewest_tokens"] for m in COMPRESSIONS[:2]]
    for i, (prefix, continuation) in enumerate(halves(seqs)):
        left = greedy_by_hand(model, prefix, continuation)
        mask = found["kept"][i].dropna("tokens_back").values
        assert sorted(len(prefix) - 1 - np.flatnonzero(mask)) == left
        assert found["fewest_tokens"][i] == len(left)
        assert decodes(model, [prefix[p] for p in left], continuation)
        if len(left) > 1:
            for fewer in combinations(left, len(left) - 1):
                assert not decodes(model, [prefix[p] for p in fewer], continuation)
        shorter_than_any_end += len(left) < min(float(end[i]) for end in ends)
    assert shorter_than_any_end, "the test needs a prefix whose middle can go"


def test_a_budget_limits_the_prompts_of_each_sequence(tiny_model: Models) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = short_targets(model)
    full = prompt_compression(model, seqs, progress=False)
    few = prompt_compression(model, seqs, budget=3, progress=False)
    tried = few["works"].notnull()
    assert (tried.sum("prompt_tokens") == np.minimum(3, seqs.prefix_len.numpy())).all()
    assert bool((few["works"] == full["works"]).where(tried, True).all())
    assert bool((few["fewest_tokens"] >= full["fewest_tokens"]).all())
    one = prompt_compression(model, seqs, budget=1, progress=False)
    assert one["compression_ratio"].values.tolist() == [1.0] * len(seqs)
    stopped = prompt_compression(model, seqs, "greedy_deletion", budget=4, progress=False)
    assert 0 in stopped["complete"].values
    left = prompt_compression(model, seqs, "greedy_deletion", progress=False)["fewest_tokens"]
    assert bool((stopped["fewest_tokens"] >= left).all())
    assert stopped.settings["budget"] == 4


def test_only_recalled_sequences_are_compressed(tiny_model: Models) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model)
    recalled = ml.score_recall(model, seqs, progress=False).table["exact_match"].to_numpy()
    for method in COMPRESSIONS:
        found = prompt_compression(model, seqs, method, progress=False)
        assert found["recalled"].values.tolist() == recalled.tolist()
        assert found["fewest_tokens"].notnull().values.tolist() == (recalled == 1).tolist()
    with pytest.raises(EmptySetError, match="no sequence is recalled"):
        prompt_compression(model, seqs[np.flatnonzero(recalled == 0)], progress=False)


def test_pinned_tokens_are_in_every_prompt_and_do_not_count(tiny_model: Models) -> None:
    model = tiny_model("llama", "bridge")
    seqs = short_targets(model)
    curve = extraction_curve(model, seqs, [1, 2], pinned=1, progress=False)
    found = prompt_compression(model, seqs, pinned=1, progress=False)
    for i, (prefix, continuation) in enumerate(halves(seqs)):
        for k in (1, 2):
            works = decodes(model, [prefix[0], *prefix[1:][-k:]], continuation)
            assert float(curve["exact_match"][i].sel(prefix_len=k)) == works
            assert float(found["works"][i].sel(prompt_tokens=k)) == works
        assert found["works"][i].notnull().sum() == len(prefix) - 1
    with pytest.raises(SequenceError, match=r"prefix of 3 tokens, all of them pinned \(pinned=3\)"):
        extraction_curve(model, SequenceSet.from_tokens([[1, 2, 3, 4]], 3), pinned=3)


@pytest.mark.parametrize("method", COMPRESSIONS)
def test_compression_is_drawn_and_saved(tiny_model: Models, method: str, tmp_path: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    found = prompt_compression(model, short_targets(model), method, progress=False)
    assert isinstance(found.plot(), go.Figure)
    again = ml.load_result(found.save(tmp_path / "c.nc"))
    assert again.settings == found.settings
    assert again["fewest_tokens"].values.tolist() == found["fewest_tokens"].values.tolist()


UNITS = {
    **dict.fromkeys(("works", "recalled", "kept", "complete", "exact_match"), "0 or 1"),
    **dict.fromkeys(("fewest_tokens", "stable_tokens", "matching_prefix"), "tokens"),
    **dict.fromkeys(("compression_ratio", "stable_compression_ratio"), "share"),
    "target_accuracy": "share of tokens",
    "target_logprob": "nats",
}


def test_every_array_says_its_unit(tiny_model: Models) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = short_targets(model, 3)
    found = [prompt_compression(model, seqs, method, progress=False) for method in COMPRESSIONS]
    found.append(extraction_curve(model, seqs, progress=False))
    seen: dict[str, str] = {}
    for result in found:
        seen |= {str(name): array.attrs["units"] for name, array in result.data.data_vars.items()}
    assert seen == UNITS
    assert found[0]["works"].attrs["long_name"] == "whole continuation recalled"
    assert found[2]["kept"].attrs["long_name"] == "prefix token is needed"


def test_bad_options_are_refused_before_any_forward_pass(tiny_model: Models) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = SequenceSet.from_tokens([[1, 2, 3, 4], [4, 3, 2, 1]], [2, 3])
    ran: list[bool] = []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda act, hook: ran.append(True))]):
        for lengths, words in (
            ([4], "no prefix has 4"),
            ([0], "from 1 on"),
            ([2, 2], "each once"),
            ([], "from 1 on"),
        ):
            with pytest.raises(OptionError, match=words):
                extraction_curve(model, seqs, lengths)
        for options, words in (
            ({"method": "keep_frist"}, "'keep_first'"),
            ({"budget": 0}, "budget=0"),
            ({"pinned": -1}, "pinned=-1"),
            ({"batch_size": 0}, "batch_size=0"),
        ):
            with pytest.raises(OptionError, match=words):
                prompt_compression(model, seqs, **options)
    assert not ran
