"""Exposure: ranks by brute force, the mean by chance, and what sampling and fitting say of the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, SequenceError
from memlens.results.kinds import reading
from memlens.sequences.set import SequenceSet

SLOTS = [[1, 2, 3, 4, 5], [11, 12, 13], [21, 22, 23, 24], [31, 32]]


def canaries(n: int = 8, seed: int = 0) -> SequenceSet:
    rng = np.random.default_rng(seed)
    rows = [[*rng.integers(40, 90, 5), *(int(rng.choice(slot)) for slot in SLOTS)] for _ in range(n)]
    table = pd.DataFrame({"copies": [0, 9] * (n // 2)})
    return SequenceSet.from_tokens([[int(t) for t in row] for row in rows], 5, table=table)


def brute_force(model: Any, seqs: SequenceSet) -> list[int]:
    """The rank of every canary, by the log-probability of every candidate."""
    ranks = []
    for prefix, target in zip(*seqs.halves(), strict=True):
        every = [list(c) for c in itertools.product(*SLOTS)]
        rows = torch.tensor([prefix + c for c in every])
        logprob = model(rows).detach().double().log_softmax(-1)[:, len(prefix) - 1 : -1]
        total = logprob.gather(-1, rows[:, len(prefix) :, None])[..., 0].sum(-1)
        ranks.append(1 + int((total > total[every.index(target)] + 1e-9).sum()))
    return ranks


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_ranks_are_those_of_brute_force(tiny_model: Callable[..., Any], backend: str) -> None:
    model, seqs = tiny_model("gpt_neox", backend), canaries()
    found = ml.detect.exposure(model, seqs, SLOTS, progress=False)
    wanted = brute_force(model, seqs)
    assert found["rank"].values.tolist() == wanted
    assert len(set(wanted)) > 4
    assert set(found["method"].values.tolist()) == {"exact"}
    np.testing.assert_allclose(found["exposure"], math.log2(120) - np.log2(wanted))


def test_the_likeliest_candidate_is_fully_exposed(tiny_model: Callable[..., Any]) -> None:
    model, prefix = tiny_model("gpt_neox", "bridge"), [50, 60, 70]
    every = [list(c) for c in itertools.product(*SLOTS)]
    seqs = SequenceSet.from_tokens([prefix + c for c in every], 3)
    options = ml.detect.ExposureOptions(method="exact")
    found = ml.detect.exposure(model, seqs, SLOTS, options=options, progress=False)
    assert sorted(found["rank"].values.tolist()) == list(range(1, 121))
    assert float(found["exposure"].max()) == pytest.approx(math.log2(120))
    assert float(found["exposure"].min()) == 0.0
    # By chance: the mean over all ranks, which for many candidates is 1 / log 2 = 1.44 bits.
    assert float(found["exposure"].mean()) == pytest.approx(1.44, abs=0.1)


def test_sampled_and_fitted_agree_with_exact(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), canaries(12)
    exact = ml.detect.exposure(model, seqs, SLOTS, progress=False)["exposure"].values
    for method, near in (("sampled", 0.4), ("fitted", 0.8)):
        options = ml.detect.ExposureOptions(method=method, n_samples=2000)
        found = ml.detect.exposure(model, seqs, SLOTS, options=options, progress=False)
        assert np.abs(found["exposure"].values - exact).mean() < near
        assert np.isnan(found["rank"]).all()
        again = ml.detect.exposure(model, seqs, SLOTS, options=options, progress=False)
        np.testing.assert_array_equal(found["exposure"], again["exposure"])
    few = ml.detect.ExposureOptions(method="sampled", n_samples=15)
    assert float(ml.detect.exposure(model, seqs, SLOTS, options=few, progress=False)["exposure"].max()) <= 4.0


def test_enumeration_that_takes_too_long_gives_way(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), canaries()
    options = ml.detect.ExposureOptions(most_nodes=6, n_samples=100)
    found = ml.detect.exposure(model, seqs, SLOTS, options=options, progress=False)
    assert set(found["method"].values.tolist()) >= {"fitted"}
    whole = ml.detect.ExposureOptions(most_nodes=6, method="exact")
    exact = ml.detect.exposure(model, seqs, SLOTS, options=whole, progress=False)
    assert exact["rank"].values.tolist() == brute_force(model, seqs)
    text = reading(exact)
    assert "never seen has 1.44" in text
    assert "with 9" in text
    assert exact.plot().data
    assert exact.plot(group=None).data


def test_what_is_not_of_the_format_is_refused(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), canaries(2)
    with pytest.raises(SequenceError, match="not one of the format's candidates"):
        ml.detect.exposure(model, seqs, SLOTS[:3])
    with pytest.raises(SequenceError, match="'0'"):
        ml.detect.exposure(model, seqs, [[99], *SLOTS[1:]])
    with pytest.raises(OptionError, match="slots"):
        ml.detect.exposure(model, seqs, [])
    with pytest.raises(SequenceError, match="a digit"):
        ml.detect.digit_slots(type("Model", (), {"tokenizer": staticmethod(two_tokens)}), 2)


def two_tokens(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
    return {"input_ids": [[0, 1] for _ in texts]}
