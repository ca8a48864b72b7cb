"""The table of columns as its readers know it, and the parts of the columns that no model is needed for."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from memlens.forward.metrics import BUILT_IN, METRICS, TargetStats, target_stats
from memlens.recall import columns as module
from memlens.recall.columns import COLUMNS, LABELS, METRIC_GROUPS, SCORE_COLUMNS, sequence_coords
from memlens.recall.scores import RecallScores
from memlens.recall.taxonomy import prefix_overlap
from memlens.sequences.set import SequenceSet

HIGH, LOW, NO = "higher", "lower", None

# Group, unit, which direction means better recall, and words that its meaning must contain.
EXPECTED: dict[str, tuple[str, str, str | None, str]] = {
    "near_tie": ("", "0 or 1", NO, "margin is too small"),
    "memorization_score": ("", "share of tokens", HIGH, "positions .* greedy continuation equals"),
    "nll": ("likelihood", "nats", LOW, "negative log-probability of the whole"),
    "perplexity": ("likelihood", "1", LOW, "exp of the mean negative"),
    "min_k": ("likelihood", "nats", HIGH, "mean log-probability of the least likely"),
    "min_k_plus_plus": ("likelihood", "1", HIGH, "lowest log-probabilities, standardized"),
    "zlib_ratio": ("likelihood", "nats per byte", LOW, "mean NLL .* zlib size of the whole"),
    "nll_per_zlib_byte": ("likelihood", "nats per byte", LOW, "NLL of .* over the zlib size of its"),
    "truth_ratio": ("likelihood", "1", LOW, "wrong continuations over that of the true"),
    "sample_logprob": ("sampling", "nats", HIGH, "one sample is the whole"),
    "samples_needed": ("sampling", "samples", LOW, "fewest samples"),
    "np_discoverable": ("sampling", "0 or 1", HIGH, "n samples .* probability p"),
    "extraction_strength": ("near_verbatim", "share", HIGH, "1 - share .* must be given"),
    "rouge_l": ("near_verbatim", "share", HIGH, "words of the true .* in order"),
    "edit_distance": ("near_verbatim", "tokens", LOW, "Levenshtein"),
    "edit_similarity": ("near_verbatim", "share", HIGH, "1 - edit distance over the longer"),
    "edit_distance_characters": ("near_verbatim", "characters", LOW, "same distance between both texts"),
    "edit_similarity_characters": ("near_verbatim", "share", HIGH, "1 - that distance over the longer text"),
    "longest_run": ("near_verbatim", "tokens", HIGH, "longest run of tokens in both"),
    "longest_run_at": ("near_verbatim", "position", NO, "begins in the true"),
    "longest_run_generated_at": ("near_verbatim", "position", NO, "begins in the generated"),
    "copied_share": ("trivial", "share", NO, "longest run .* found in the prefix"),
    "type_token_ratio": ("trivial", "share", NO, "distinct tokens over tokens"),
    "repeated_share": ("trivial", "share", NO, "repeat with the best period"),
    "step_share": ("trivial", "share", NO, "constant steps"),
    "trivial": ("trivial", "0 or 1", NO, "one of the four rules"),
    "prefix_rouge_l": ("taxonomy", "share", NO, "tokens .* in order, in the prefix"),
    "prefix_rouge_3": ("taxonomy", "share", NO, "runs of three .* in the prefix"),
    "guessed": ("taxonomy", "0 or 1", NO, "and a rule explains"),
    "recollected": ("taxonomy", "0 or 1", NO, "and no rule explains"),
}  # fmt: skip
CITED = {
    "memorization_score": {"chen2026": "memorization score M"},
    "min_k": {"shi2024": "Min-K %"},
    "min_k_plus_plus": {"zhang2024": "Min-K %++"},
    "zlib_ratio": {"carlini2021": "ratio to the size compressed by zlib"},
    "np_discoverable": {"hayes2025": "(n, p)-discoverable extraction"},
    "guessed": {"dentan2025": "guess or recall"},
    "recollected": {"dentan2025": "guess or recall"},
}
NOT_SUMMARIZED = ("samples_needed", "longest_run_at", "longest_run_generated_at")
"""Places have no meaningful mean, nor have counts that are infinite for what is never sampled."""


def test_each_column_has_its_group_unit_direction_and_source() -> None:
    assert list(COLUMNS) == list(EXPECTED)
    for name, (group, unit, better, words) in EXPECTED.items():
        column = COLUMNS[name]
        assert (column.group, column.unit, column.better) == (group, unit, better), name
        assert re.search(words, column.meaning), name
        # a phrase that goes on after the name: no capital but in an abbreviation, no full stop
        assert re.fullmatch(r"([a-z]|1 - |NLL |Levenshtein ).*[a-z]", column.meaning), name
        assert column.proportion == (unit == "0 or 1"), name
        assert column.summarized == (name not in NOT_SUMMARIZED), name
        assert dict(column.cites) == CITED.get(name, {}), name
    assert METRIC_GROUPS == ("likelihood", "sampling", "near_verbatim", "trivial", "taxonomy")
    assert {column.group for column in COLUMNS.values()} == {"", *METRIC_GROUPS}
    assert (*BUILT_IN, *EXPECTED, "generated", "generated_text") == SCORE_COLUMNS


def test_labels_carry_unit_meaning_and_direction() -> None:
    assert list(LABELS) == [*BUILT_IN, *EXPECTED]
    for name in BUILT_IN:
        assert LABELS[name] == METRICS[name].attrs
    for name, (_, unit, better, _) in EXPECTED.items():
        attrs = {"units": unit, "long_name": COLUMNS[name].meaning}
        assert LABELS[name] == (attrs if better is None else {**attrs, "better": better}), name


def test_summaries_leave_out_what_has_no_mean_and_treat_flags_as_shares() -> None:
    rng, n = np.random.default_rng(0), 30
    seqs = SequenceSet.from_tokens([[1, 2, 3]] * n, 1)
    flags = [name for name, (_, unit, _, _) in EXPECTED.items() if unit == "0 or 1"]
    values = {name: rng.normal(size=n) for name in (*BUILT_IN, *EXPECTED)}
    values |= {name: rng.integers(0, 2, n) for name in (*flags, "exact_match", "rouge_l")}
    summary = RecallScores(seqs.table.assign(**values), seqs).summary(n_resamples=50).set_index("metric")
    assert list(summary.index) == [name for name in values if name not in NOT_SUMMARIZED]
    assert set(summary.index[summary["method"] == "wilson"]) == {*flags, "exact_match"}
    for name in summary.index:
        assert summary.loc[name, "mean"] == pytest.approx(np.mean(values[name])), name
    assert (summary["n"] == n).all()


def test_the_columns_used_for_grouping_become_coordinates() -> None:
    table = pd.DataFrame(
        {
            "id": ["a", "b"],
            "domain": ["code", "text"],
            "copies": [1, 4],
            "source": [7, "x"],
            "text": ["s", "t"],
        }
    )
    coords = sequence_coords(table)
    assert set(coords) == {"sequence", "domain", "copies", "source"}
    assert coords["sequence"].tolist() == ["a", "b"]
    assert {name: coords[name][0] for name in ("domain", "copies", "source")} == dict.fromkeys(
        ("domain", "copies", "source"), "sequence"
    )
    assert (coords["copies"][1].dtype.kind, coords["copies"][1].tolist()) == ("i", [1, 4])
    assert coords["domain"][1].tolist() == ["code", "text"]
    assert coords["source"][1].tolist() == ["7", "x"]  # a file holds texts or numbers, not both
    assert {coords[name].dtype for name in ("sequence",)} == {np.dtype(object)}
    assert {coords[name][1].dtype for name in ("domain", "source")} == {np.dtype(object)}
    assert set(sequence_coords(table[["id", "text"]])) == {"sequence"}


PAIRED: dict[str, tuple[Callable[..., Any], Any]] = {
    "rouge_l": (module.rouge_l, "a b"),
    "near_verbatim_texts": (module.near_verbatim_texts, "a b"),
    "near_verbatim_columns": (module.near_verbatim_columns, [1, 2]),
    "longest_common_runs": (module.longest_common_runs, [1, 2]),
    "prefix_overlap": (prefix_overlap, [1, 2]),
}


@pytest.mark.parametrize("name", PAIRED)
def test_what_is_compared_comes_in_pairs(name: str) -> None:
    function, item = PAIRED[name]
    function([item] * 2, [item] * 2)
    for sizes in ((2, 1), (1, 2)):
        with pytest.raises(ValueError, match=r"zip\(\) argument 2 is (shorter|longer)"):
            function(*([item] * size for size in sizes))


def test_counts_are_whole_numbers_also_of_nothing() -> None:
    for pairs in (([], []), ([[1, 2]], [[2]])):
        found = module.near_verbatim_columns(*pairs)
        for name in ("edit_distance", "longest_run", "longest_run_at", "longest_run_generated_at"):
            assert found[name].dtype == np.int64, name
    for texts in ([], ["a"]):
        assert module.near_verbatim_texts(texts, texts)["edit_distance_characters"].dtype == np.int64


def test_long_runs_of_frequent_tokens_are_found_too() -> None:
    """Difflib's own heuristic would drop tokens that are over 1 % of 200 or more."""
    tokens = [1, 2] * 150
    assert [int(part[0]) for part in module.longest_common_runs([tokens], [[9, *tokens]])] == [300, 0, 1]


def test_sizes_are_those_of_zlib_s_sixth_level_in_utf_8() -> None:
    letters = random.Random(0).choices("abc ", weights=[8, 4, 2, 1], k=6000)
    text = "".join(letters) + " é 中"
    sizes = {level: len(zlib.compress(text.encode("utf-8"), level)) for level in (5, 6, 7)}
    assert len(set(sizes.values())) == 3
    found = module.zlib_bytes([text, "\ud800"])
    assert found.tolist() == [sizes[6], len(zlib.compress(b"?"))]  # half a letter counts as a question mark
    assert found.dtype == torch.float64


def likely(n: int, seed: int = 0) -> TargetStats:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 9, (1, n), generator=generator)
    return target_stats(
        torch.randn(1, n, 9, generator=generator), ids, torch.ones_like(ids, dtype=torch.bool)
    )


@pytest.mark.parametrize(
    ("n", "share", "count"),
    [(100, 0.29, 29), (10, 0.3, 3), (9, 0.34, 3), (9, 0.33, 2), (4, 0.1, 1), (50, 1.0, 50)],
)
def test_the_share_of_the_lowest_is_rounded_down_to_one_or_more(n: int, share: float, count: int) -> None:
    stats = likely(n)
    lowest = stats.logprob[0].double().sort().values[:count]
    assert float(module.min_k(stats, share)) == pytest.approx(float(lowest.mean()), rel=1e-6)
    z = ((stats.logprob + stats.entropy) / stats.spread)[0].double().sort().values[:count]
    assert float(module.min_k_plus_plus(stats, share)) == pytest.approx(float(z.mean()), rel=1e-5)


def test_a_fifth_of_the_targets_is_the_default() -> None:
    stats = likely(20)
    for function in (module.min_k, module.min_k_plus_plus):
        assert float(function(stats)) == float(function(stats, 0.2)) != float(function(stats, 0.25))
