"""The columns that scoring adds beyond the built-in metrics, in groups that can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from memlens.forward.metrics import BUILT_IN, METRICS, Direction


@dataclass(frozen=True)
class Column:
    """A column of the recall table.

    Attributes:
        group: Which of `METRIC_GROUPS` it comes with; empty if it is always there.
        unit: Its unit.
        meaning: One line that says what it is.
        better: Whether a higher or a lower value means better recall; None if neither does.
        summarized: Whether a mean over sequences is meaningful.
        proportion: Whether it is 0 or 1, so that its mean is a share of sequences.
        cites: Pairs of a reference's key and what it is cited for.
    """

    group: str
    unit: str
    meaning: str
    better: Direction | None = None
    summarized: bool = True
    proportion: bool = False
    cites: tuple[tuple[str, str], ...] = ()


COLUMNS: Mapping[str, Column] = MappingProxyType(
    {
        "near_tie": Column(
            "", "0 or 1", "whether the margin is too small to decide the exact match", proportion=True
        ),
        "memorization_score": Column(
            "",
            "share of tokens",
            "share of positions at which the greedy continuation equals the true one",
            "higher",
            cites=(("chen2026", "memorization score M"),),
        ),
        "nll": Column("likelihood", "nats", "negative log-probability of the whole continuation", "lower"),
        "perplexity": Column("likelihood", "1", "exp of the mean negative log-probability", "lower"),
        "min_k": Column(
            "likelihood",
            "nats",
            "mean log-probability of the least likely targets",
            "higher",
            cites=(("shi2024", "Min-K %"),),
        ),
        "min_k_plus_plus": Column(
            "likelihood",
            "1",
            "mean of the lowest log-probabilities, standardized over the vocabulary",
            "higher",
            cites=(("zhang2024", "Min-K %++"),),
        ),
        "zlib_ratio": Column(
            "likelihood",
            "nats per byte",
            "NLL over the text's size after zlib",
            "lower",
            cites=(("carlini2021", "ratio to the size compressed by zlib"),),
        ),
        "sample_logprob": Column(
            "sampling", "nats", "log-probability that one sample is the whole continuation", "higher"
        ),
        "samples_needed": Column(
            "sampling",
            "samples",
            "fewest samples that contain it with probability p",
            "lower",
            summarized=False,
        ),
        "np_discoverable": Column(
            "sampling",
            "0 or 1",
            "whether n samples contain it with probability p",
            "higher",
            proportion=True,
            cites=(("hayes2025", "(n, p)-discoverable extraction"),),
        ),
        "edit_distance": Column(
            "near_verbatim", "tokens", "Levenshtein distance between generated and true continuation", "lower"
        ),
        "edit_similarity": Column(
            "near_verbatim", "share", "1 - edit distance over the longer length", "higher"
        ),
        "longest_run": Column("near_verbatim", "tokens", "longest run of tokens in both", "higher"),
        "longest_run_at": Column(
            "near_verbatim", "position", "where it begins in the true continuation", summarized=False
        ),
        "longest_run_generated_at": Column(
            "near_verbatim", "position", "where it begins in the generated tokens", summarized=False
        ),
        "copied_share": Column("trivial", "share", "longest run of the continuation found in the prefix"),
        "type_token_ratio": Column("trivial", "share", "distinct tokens over tokens of the continuation"),
        "repeated_share": Column("trivial", "share", "tokens that repeat with the best period"),
        "step_share": Column("trivial", "share", "tokens or words that continue in constant steps"),
        "trivial": Column(
            "trivial", "0 or 1", "one of the four rules explains the continuation", proportion=True
        ),
    }
)
"""By name, in the order of the table."""

METRIC_GROUPS = ("likelihood", "sampling", "near_verbatim", "trivial")

SCORE_COLUMNS = (*BUILT_IN, *COLUMNS, "generated", "generated_text")
"""The columns that scoring adds to a set's table."""

LABELS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        **{name: METRICS[name].attrs for name in BUILT_IN},
        **{
            name: {"units": c.unit, "long_name": c.meaning, **({"better": c.better} if c.better else {})}
            for name, c in COLUMNS.items()
        },
    }
)
"""Unit, meaning and direction of each number, as attributes of an array."""
