"""Attention statistics: plain loops over the pattern, made-up patterns, and the comparison of two groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import EmptySetError, ResultError
from memlens.results.kinds import reading
from tests.instruments.detect.test_separation import random_set
from tests.small import CASES, ragged

NAMES = ("attention_entropy", "first_share", "mean_distance", "prefix_share")


def by_loop(pattern: torch.Tensor, prefix: int, length: int, window: int | None) -> list[float]:
    """The four statistics of one head, `[query, key]`, as sums over single weights."""
    found = []
    for q in range(prefix - 1, length - 1):
        weights = pattern[q].tolist()
        seen = q + 1 if window is None else min(q + 1, window)
        entropy = -sum(a * math.log(a) for a in weights if a > 0) / math.log(seen)
        distance = sum(a * (q - k) for k, a in enumerate(weights))
        found.append((entropy, weights[0], distance, sum(weights[:prefix])))
    return np.mean(found, axis=0).tolist()


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_statistics_are_those_of_plain_loops(
    tiny_model: Callable[..., Any], family: str, backend: str
) -> None:
    """Local layers (GPT-Neo, OLMo 3) see a window of 8."""
    model, seqs = tiny_model(family, backend), ragged()
    found = ml.detect.attention_statistics(model, seqs, progress=False)
    local = {"gpt_neo": (1, 3), "olmo3": (0, 1, 2)}.get(family, ())
    for i, (row, prefix) in enumerate(zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)):
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in (0, 1)]
        _, cache = model.run_with_cache(torch.tensor([row]), names_filter=names)
        for layer, name in enumerate(names):
            window = 8 if layer in local else None
            wanted = by_loop(cache[name][0, 2].detach(), prefix, len(row), window)
            got = [float(found[n][i, layer, 2]) for n in NAMES]
            np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("even", [1.0, np.mean([1 / 6, 1 / 7, 1 / 8]), 3.0, np.mean([1, 6 / 7, 6 / 8])]),
        ("first", [0.0, 1.0, 6.0, 1.0]),
        ("self", [0.0, 0.0, 0.0, 1 / 3]),
    ],
)
def test_known_patterns(tiny_model: Callable[..., Any], kind: str, wanted: list[float]) -> None:
    """Three targets, predicted at positions 5, 6 and 7 after a prefix of 6 tokens."""
    model = tiny_model("gpt_neox", "bridge")

    def write(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        n = pattern.shape[-1]
        even = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
        first = torch.zeros(n, n).index_fill(1, torch.tensor([0]), 1.0)
        made = {"even": even, "first": first, "self": torch.eye(n)}[kind]
        return made.expand_as(pattern).clone()

    # A layer's other head keeps its pattern, so that every visible position has weight somewhere.
    def write_one(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([write(pattern, hook)[:, :1], pattern[:, 1:]], 1)

    seqs = ml.SequenceSet.from_tokens([list(range(9))], 6)
    with ml.applied(model, ml.Intervention(kind, [("blocks.1.attn.hook_pattern", write_one)])):
        found = ml.detect.attention_statistics(model, seqs, layers=[1], progress=False)
    np.testing.assert_allclose([float(found[n][0, 0, 0]) for n in NAMES], wanted, atol=1e-5)


def test_groups_are_compared_by_pairs_and_by_copies(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "bridge")
    recalled = random_set(6, 0, 100, "a", 0, copies=[1, 1, 1, 9, 9, 9])
    matched = random_set(6, 0, 100, "b", 1, matched_to=[f"a{i}" for i in range(6)])
    found = ml.detect.attention_difference(model, recalled, matched, "first_share", progress=False)
    own, other = (
        ml.detect.attention_statistics(model, s, progress=False)["first_share"] for s in (recalled, matched)
    )
    np.testing.assert_allclose(found["difference"], (own.values - other.values).mean(0), atol=1e-6)
    assert found.attrs["paired"]
    assert (found["p_corrected"] >= found["p"]).all()
    same = ml.detect.attention_difference(
        model,
        recalled,
        recalled.with_table(recalled.table.assign(matched_to=recalled.table["id"])),
        progress=False,
    )
    assert float(np.abs(same["difference"]).max()) == 0.0
    result = ml.detect.attention_statistics(model, recalled, progress=False)
    assert "1 copies" in reading(result)
    assert result.plot("prefix_share").data
    assert result.mean_ci(metric="prefix_share", group="copies")["prefix_share"].sizes["copies"] == 2
    with pytest.raises(EmptySetError, match="matched"):
        ml.detect.attention_difference(model, recalled, matched[:0])


def test_no_sequences_are_refused(tiny_model: Callable[..., Any]) -> None:
    empty = random_set(2, 0, 10, "a", 0)[:0]
    with pytest.raises(EmptySetError):
        ml.detect.attention_statistics(tiny_model("gpt_neox", "bridge"), empty)


class Scores:
    """What `attention_by_class` uses of recall scores."""

    def __init__(self, sequences: Any, guessed: list[int], recollected: list[int]) -> None:
        self.sequences = sequences
        self.table = sequences.table.assign(guessed=guessed, recollected=recollected)


def by_class(model: Any, copies: list[int]) -> Any:
    """Eight random sequences: four not memorized, two guesses, two recalled."""
    seqs = random_set(8, 0, 90, "a", 0, copies=copies)
    scores: Any = Scores(seqs, [0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1])
    return seqs, ml.detect.attention_by_class(model, scores, progress=False)


def test_classes_have_the_statistics_of_their_sequences(
    tiny_model: Callable[..., Any], tmp_path: Any
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    seqs, found = by_class(model, [1, 2, 1, 2, 1, 2, 1, 2])
    plain = ml.detect.attention_statistics(model, seqs, progress=False)
    for name in NAMES:
        np.testing.assert_array_equal(found[name], plain[name])
    assert found["recall_class"].values.tolist() == ["not memorized"] * 4 + ["guess"] * 2 + ["recall"] * 2
    means = found.mean_ci(("sequence", "layer", "head"), metric="prefix_share", group="recall_class")
    wanted = plain["prefix_share"][4:6].mean()
    got = means["prefix_share"].sel(recall_class="guess", statistic="mean")
    assert float(got) == pytest.approx(float(wanted), abs=1e-6)
    figure: Any = found.plot("mean_distance")
    lines = {trace.name: np.asarray(trace.y, float) for trace in figure.data if trace.name}
    np.testing.assert_allclose(
        lines["recall"], plain["mean_distance"][6:].mean(["sequence", "head"]), atol=1e-5
    )
    assert "guess" in reading(found)
    assert ml.load_result(found.save(tmp_path / "classes.nc")).kind == "attention_classes"


def test_classes_are_compared_in_all_and_among_equal_copies(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("gpt_neox", "bridge")
    _, found = by_class(model, [1, 2, 1, 2, 3, 2, 3, 2])
    quick: Any = {"n_resamples": 50, "n_permutations": 99}
    table = ml.detect.class_differences(found, **quick).set_index(["statistic", "a", "b"])
    assert len(table) == 4 * 3
    row = table.loc["prefix_share", "not memorized", "recall"]
    mean = found["prefix_share"].mean(["layer", "head"]).values
    assert row["difference"] == pytest.approx(mean[:4].mean() - mean[6:].mean(), abs=1e-6)
    # With two copies there are rows 1 and 3, and 7; with 1 and 3 copies there is one class only.
    assert (row["within_n_a"], row["within_n_b"]) == (2, 1)
    assert row["within_difference"] == pytest.approx((mean[1] + mean[3]) / 2 - mean[7], abs=1e-6)
    assert np.isnan(row["within_low"])
    assert (row["n_a"], row["n_b"], row["of"]) == (4, 2, found["prefix_share"][0].size)
    assert table.loc["prefix_share", "guess", "recall"]["within_n_a"] == 2
    alone = ml.detect.class_differences(found, within=(), **quick)
    assert alone["within_difference"].isna().all()
    with pytest.raises(ResultError, match="not memorized: 4"):
        ml.detect.class_differences(ml.Result(found.data.isel(sequence=slice(4))))
