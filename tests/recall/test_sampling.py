"""(n, p)-discoverable extraction against hand computation, transformers' warpers, and real sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from transformers import AutoModelForCausalLM

from memlens.errors import OptionError
from memlens.recall.sampling import Sampling, samples_needed
from memlens.recall.score import score_recall
from memlens.sequences.set import SequenceSet
from tests.recall.sets import graded
from tests.small import CASES
from tests.tiny import random_tokens

Models = Callable[..., Any]
SCHEME = Sampling(temperature=0.7, top_k=12, top_p=0.9)


def by_hand(logits: list[float], scheme: Sampling) -> list[float]:
    """The probabilities that are sampled from, with sorted lists and loops."""
    scaled = [logit / scheme.temperature for logit in logits]
    kept = set(range(len(logits)))
    if scheme.top_k is not None:
        kth = sorted(scaled, reverse=True)[min(scheme.top_k, len(scaled)) - 1]
        kept = {v for v in kept if scaled[v] >= kth}
    total = sum(math.exp(scaled[v]) for v in kept)
    mass, nucleus = 0.0, set()
    for v in sorted(kept, key=lambda v: -scaled[v]):
        if nucleus and mass >= scheme.top_p:
            break
        nucleus.add(v)
        mass += math.exp(scaled[v]) / total
    total = sum(math.exp(scaled[v]) for v in nucleus)
    return [math.exp(scaled[v]) / total if v in nucleus else 0.0 for v in range(len(logits))]


def test_truncation_by_hand() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    every = torch.arange(4)

    def of(**scheme: Any) -> list[float]:
        return Sampling(**scheme).logprob(logits.expand(4, 4), every).exp().tolist()

    assert of() == pytest.approx([0.5, 0.25, 0.125, 0.125])
    assert of(temperature=0.5) == pytest.approx([16 / 22, 4 / 22, 1 / 22, 1 / 22])
    assert of(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert of(top_k=3) == pytest.approx([0.5, 0.25, 0.125, 0.125])  # the fourth ties with the third
    assert of(top_p=0.7) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert of(top_p=0.01) == pytest.approx([1, 0, 0, 0])
    # Temperature comes first: at 0.5 the first token alone has 0.727 of the mass.
    assert of(temperature=0.5, top_p=0.7) == pytest.approx([1, 0, 0, 0])
    # Top-k comes before top-p: of what is left the first has 2/3, so 0.6 keeps it alone.
    assert of(top_k=2, top_p=0.6) == pytest.approx([1, 0, 0, 0])
    assert of(top_p=0.6) == pytest.approx([2 / 3, 1 / 3, 0, 0])


@pytest.mark.parametrize(
    "scheme", [SCHEME, Sampling(1.3), Sampling(top_k=1), Sampling(top_k=999), Sampling(0.5, None, 0.3)]
)
def test_probabilities_equal_those_by_hand_and_add_up_to_1(scheme: Sampling) -> None:
    logits = 3 * torch.randn(6, 40)
    for row in logits:
        found = scheme.logprob(row.expand(40, 40), torch.arange(40)).exp()
        np.testing.assert_allclose(found, by_hand(row.tolist(), scheme), atol=1e-6)
        assert float(found.sum()) == pytest.approx(1)


@pytest.mark.parametrize(("family", "backend"), CASES[::3])
def test_the_column_is_the_product_over_the_continuation(
    tiny_model: Models, family: str, backend: str
) -> None:
    model = tiny_model(family, backend)
    seqs = graded(model)
    recall = score_recall(
        model,
        seqs,
        sampling=SCHEME,
        n_samples=3,
        probability=0.9,
        batch_size=4,
        generate=False,
        progress=False,
    )
    for i, (row, prefix_len) in enumerate(zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)):
        with torch.no_grad():
            logits = model(seqs[i].tokens)[0, prefix_len - 1 : -1]
        factors = [by_hand(at.tolist(), SCHEME)[t] for at, t in zip(logits, row[prefix_len:], strict=True)]
        found = recall.table["sample_logprob"][i]
        assert math.exp(found) == pytest.approx(math.prod(factors), rel=1e-3, abs=1e-12)
        n = recall.table["samples_needed"][i]
        if found > -12:  # the first success of repeated samples is geometrically distributed
            assert n == scipy_stats.geom.ppf(0.9, math.exp(found))
        else:
            assert n == pytest.approx(-math.log(0.1) * math.exp(min(-found, 700)), rel=1e-4) or n == np.inf
        assert recall.table["np_discoverable"][i] == (n <= 3)
    assert np.isinf(recall.table["sample_logprob"]).any()
    settings = {k: recall.attrs[k] for k in ("temperature", "top_k", "top_p", "n_samples", "probability")}
    assert settings == {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "n_samples": 3, "probability": 0.9}


def test_plain_sampling_is_the_likelihood_and_greedy_recall_is_top_1(tiny_model: Models) -> None:
    model = tiny_model("llama", "bridge")
    seqs = graded(model)
    plain = score_recall(model, seqs, progress=False).table
    np.testing.assert_allclose(plain["sample_logprob"], -plain["nll"])
    greedy = score_recall(model, seqs, sampling=Sampling(top_k=1), n_samples=1, progress=False).table
    assert greedy["np_discoverable"].tolist() == greedy["exact_match"].tolist()
    assert set(greedy["sample_logprob"]) == {0, -np.inf}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_the_number_of_samples_is_the_first_that_suffices(p: float) -> None:
    chances = np.array([0.9999, 0.5, 0.3, 0.1, 1e-3])
    for chance, n in zip(chances, samples_needed(np.log(chances), p), strict=True):
        assert n == scipy_stats.geom.ppf(p - 1e-12, chance)
    tiny = samples_needed(np.array([-40.0, -600.0, -5000.0]), p)
    assert tiny[:2] == pytest.approx(-math.log1p(-p) * np.exp([40.0, 600.0]))
    assert tiny[2] == np.inf
    assert samples_needed(np.log([0.5, 0.75]), 0.75).tolist() == [2, 1]
    narrow = np.log(chances).astype(np.float32)  # as a model gives it: only its value is rounded
    assert samples_needed(narrow, p).tolist() == samples_needed(narrow.astype(np.float64), p).tolist()
    few = np.array([-1e-7, -12.0, -20.0], np.float32)
    np.testing.assert_array_equal(samples_needed(few, p), samples_needed(few.astype(np.float64), p))


def test_schemes_out_of_range_are_refused() -> None:
    for options, words in (
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.1}, "top_p=1.1"),
    ):
        with pytest.raises(OptionError, match=words):
            Sampling(**options)
    with pytest.raises(OptionError, match="probability=0"):
        samples_needed(np.zeros(1), 0)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [Sampling(0.8, 5, 0.8), Sampling(0.5)])
def test_real_sampling_gives_the_predicted_shares(
    tiny_folder: Callable[[str], Path], tiny_model: Models, scheme: Sampling
) -> None:
    """20,000 samples of `transformers`' own generate: each continuation comes as often as foretold."""
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder("gpt_neox"), dtype=torch.float32).eval()
    hf.generation_config.eos_token_id = None
    prompt, n = random_tokens(1, 6, seed=5), 20_000
    options = {"temperature": scheme.temperature, "top_k": scheme.top_k or 0, "top_p": scheme.top_p}
    with torch.no_grad():
        drawn = hf.generate(
            prompt.expand(n, 6), attention_mask=torch.ones(n, 6, dtype=torch.long), do_sample=True,
            max_new_tokens=2, pad_token_id=0, **options,
        )  # fmt: skip
    kinds, counts = drawn.unique(dim=0, return_counts=True)
    common = counts.argsort(descending=True)[:12]
    seqs = SequenceSet.from_tokens(kinds[common], 6)
    table = score_recall(tiny_model("gpt_neox", "bridge"), seqs, sampling=scheme, progress=False).table
    chance = np.exp(table["sample_logprob"].to_numpy())
    error = np.sqrt(chance * (1 - chance) / n)
    np.testing.assert_array_less(np.abs(counts[common].numpy() / n - chance), 4.5 * error + 1e-9)
    every = score_recall(
        tiny_model("gpt_neox", "bridge"), SequenceSet.from_tokens(kinds, 6), sampling=scheme,
        metrics=["sampling"], generate=False, progress=False,
    )  # fmt: skip
    assert np.isfinite(every.table["sample_logprob"]).all()  # nothing was sampled that has no chance
    assert 0.8 < np.exp(every.table["sample_logprob"]).sum() <= 1 + 1e-5


def test_each_parameter_alone_leaves_the_plain_distribution() -> None:
    assert Sampling().plain
    assert Sampling().settings() == {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    for other in (Sampling(temperature=2.0), Sampling(top_k=3), Sampling(top_p=0.9)):
        assert not other.plain
    assert SCHEME.settings() == {"temperature": 0.7, "top_k": 12, "top_p": 0.9}


@pytest.mark.parametrize("scheme", [Sampling(), Sampling(temperature=0.7), Sampling(top_k=7)])
def test_logits_are_used_as_precisely_as_they_are_given(scheme: Sampling) -> None:
    logits = torch.randn(6, 40, dtype=torch.float64)
    ids, kept = logits.argmax(-1), scheme.warp(logits)
    assert kept.dtype == torch.float64
    exact = kept.log_softmax(-1)[torch.arange(6), ids]
    np.testing.assert_allclose(scheme.logprob(logits, ids), exact, rtol=1e-13)
    half = logits.to(torch.bfloat16)
    found = scheme.logprob(half, ids)
    assert found.dtype == torch.float64
    assert found.tolist() == scheme.logprob(half.float(), ids).tolist()
    assert found.tolist() != scheme.logprob(logits, ids).tolist()


def test_half_a_chance_is_the_default_and_rounding_above_certainty_is_one_sample() -> None:
    chances = np.log([0.5, 0.1, 0.01, 1.0])
    assert samples_needed(chances).tolist() == samples_needed(chances, 0.5).tolist() == [1, 7, 69, 1]
    assert samples_needed(np.array([1e-9, -1e-16])).tolist() == [1, 1]
    for p in (0, 1, -0.1, 1.5):
        with pytest.raises(OptionError, match=f"probability={p}"):
            samples_needed(chances, p)
