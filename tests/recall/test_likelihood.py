"""NLL, perplexity, Min-K % and zlib against plain logits, and against the definitions written out by hand."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from memlens.errors import OptionError
from memlens.forward import baseline as forward_module
from memlens.forward.metrics import TargetStats, target_stats
from memlens.recall.columns import min_k, min_k_plus_plus, nll, perplexity
from memlens.recall.score import score_recall
from tests.recall.sets import graded
from tests.small import CASES
from tests.tiny import D_VOCAB, END_OF_TEXT

Models = Callable[..., Any]


def by_hand(logits: torch.Tensor, ids: list[int], share: float) -> dict[str, float]:
    """One sequence, token by token, in double precision, from the definitions."""
    scores, standardized = [], []
    for row, target in zip(logits.double(), ids, strict=True):
        p = row.softmax(-1)
        mu = sum(float(q) * math.log(float(q)) for q in p)
        variance = sum(float(q) * (math.log(float(q)) - mu) ** 2 for q in p)
        scores.append(math.log(float(p[target])))
        standardized.append((scores[-1] - mu) / math.sqrt(variance))
    k = max(1, int(share * len(ids)))
    return {
        "nll": -sum(scores),
        "perplexity": math.exp(-sum(scores) / len(ids)),
        "min_k": sum(sorted(scores)[:k]) / k,
        "min_k_plus_plus": sum(sorted(standardized)[:k]) / k,
    }


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_columns_equal_the_definitions_on_plain_logits(
    tiny_model: Models, family: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, backend)
    seqs = graded(model)
    monkeypatch.setattr(forward_module, "unembedding_rows", lambda *sizes: (5, 3))
    table = score_recall(model, seqs, min_k=0.4, batch_size=4, generate=False, progress=False).table
    for i, (row, prefix_len) in enumerate(zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)):
        with torch.no_grad():
            logits = model(seqs[i].tokens)[0, prefix_len - 1 : -1]
        truth = row[prefix_len:]
        for name, value in by_hand(logits, truth, 0.4).items():
            assert table[name][i] == pytest.approx(value, rel=1e-4, abs=1e-4), name
        text = " ".join(END_OF_TEXT if t == D_VOCAB - 1 else f"w{t}" for t in truth)
        own = len(zlib.compress(text.encode()))
        assert table["nll_per_zlib_byte"][i] == pytest.approx(table["nll"][i] / own)
        whole = " ".join(END_OF_TEXT if t == D_VOCAB - 1 else f"w{t}" for t in row)
        mean = table["nll"][i] / len(truth)
        assert table["zlib_ratio"][i] == pytest.approx(mean / len(zlib.compress(whole.encode())))
    np.testing.assert_allclose(table["nll"], -table["target_logprob"] * seqs.n_targets.numpy(), atol=1e-6)


def stats_of(logits: torch.Tensor, ids: torch.Tensor) -> TargetStats:
    return target_stats(logits, ids, torch.ones_like(ids, dtype=torch.bool))


def test_spread_is_the_standard_deviation_that_numpy_finds() -> None:
    logits = 3 * torch.randn(1, 4, 50)
    found = stats_of(logits, torch.zeros(1, 4, dtype=torch.long)).spread[0]
    logp = logits[0].double().log_softmax(-1).numpy()
    for row, value in zip(logp, found, strict=True):
        # Each log-probability as often as its probability says.
        assert float(value) == pytest.approx(math.sqrt(np.cov(row, aweights=np.exp(row), ddof=0)), rel=1e-5)


def test_a_uniform_distribution_has_perplexity_of_the_vocabulary_and_no_spread() -> None:
    stats = stats_of(torch.zeros(2, 6, 37), torch.randint(0, 37, (2, 6)))
    np.testing.assert_allclose(perplexity(stats), 37)
    np.testing.assert_allclose(nll(stats), 6 * math.log(37))
    assert min_k_plus_plus(stats).tolist() == [0, 0]


def test_tokens_drawn_from_the_model_have_standardized_log_probabilities_of_mean_0_and_variance_1() -> None:
    logits = 2 * torch.randn(1, 20_000, 30)
    ids = torch.distributions.Categorical(logits=logits).sample()
    stats = stats_of(logits, ids)
    z = (stats.logprob + stats.entropy) / stats.spread
    assert abs(float(z.mean())) < 0.03
    assert float(z.var()) == pytest.approx(1, abs=0.05)
    assert float(min_k_plus_plus(stats, 1.0)) == pytest.approx(float(z.mean()))


def test_min_k_of_everything_is_the_mean_and_of_little_the_lowest() -> None:
    stats = stats_of(torch.randn(3, 10, 20), torch.randint(0, 20, (3, 10)))
    np.testing.assert_allclose(min_k(stats, 1.0), stats.logprob.mean(1))
    np.testing.assert_allclose(min_k(stats, 0.001), stats.logprob.min(1).values)
    np.testing.assert_allclose(min_k(stats, 0.3), stats.logprob.sort(1).values[:, :3].mean(1))
    for share in (0, 1.2):
        with pytest.raises(OptionError, match=f"min_k={share}"):
            min_k(stats, share)


def test_a_banned_token_leaves_every_number_finite() -> None:
    logits = torch.randn(1, 3, 20)
    logits[..., 7] = -torch.inf
    stats = stats_of(logits, torch.tensor([[1, 2, 3]]))
    rest = torch.cat([logits[..., :7], logits[..., 8:]], -1)
    expected = by_hand(rest[0], [1, 2, 3], 0.2)
    assert float(min_k_plus_plus(stats)) == pytest.approx(expected["min_k_plus_plus"], rel=1e-5)


def test_groups_are_chosen_and_checked_before_any_pass(tiny_model: Models) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs = graded(model)
    bare = score_recall(model, seqs, metrics=(), progress=False)
    assert not {"nll", "sample_logprob", "edit_distance", "trivial"} & set(bare.table)
    some = score_recall(model, seqs, metrics=["likelihood"], progress=False, min_k=0.5)
    assert set(some.table) - set(bare.table) == {
        "nll", "perplexity", "min_k", "min_k_plus_plus", "zlib_ratio", "nll_per_zlib_byte"
    }  # fmt: skip
    assert (some.attrs["metrics"], some.attrs["min_k_share"]) == ("likelihood", 0.5)
    ran: list[bool] = []
    for options, words in (
        ({"metrics": ["likelyhood"]}, "'likelihood'"),
        ({"metrics": "likelihood"}, "metrics='likelihood'"),
        ({"min_k": 2}, "min_k=2"),
        ({"probability": 1}, "probability=1"),
        ({"n_samples": 0}, "n_samples=0"),
    ):
        with (
            model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda act, hook: ran.append(True))]),
            pytest.raises(OptionError, match=words),
        ):
            score_recall(model, seqs, progress=False, **options)
    assert not ran
