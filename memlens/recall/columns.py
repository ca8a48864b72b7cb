"""The columns that scoring adds beyond `METRICS`, in groups that can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from memlens.forward.metrics import METRICS


@dataclass(frozen=True)
class Column:
    """What a column of the recall table holds.

    Attributes:
        group: Which of `METRIC_GROUPS` it comes with.
        unit: Its unit.
        meaning: One line that says what it is.
        summarized: Whether a mean over sequences says something.
    """

    group: str
    unit: str
    meaning: str
    summarized: bool = True


COLUMNS: Mapping[str, Column] = MappingProxyType(
    {
        "nll": Column("likelihood", "nats", "minus the log-probability of the whole continuation"),
        "perplexity": Column("likelihood", "1", "exp of the mean negative log-probability"),
        "min_k": Column("likelihood", "nats", "mean log-probability of the least likely targets"),
        "min_k_plus_plus": Column(
            "likelihood", "1", "mean of the lowest log-probabilities, standardized over the vocabulary"
        ),
        "zlib_ratio": Column("likelihood", "nats a byte", "NLL over the text's size after zlib"),
        "sample_logprob": Column(
            "sampling", "nats", "log-probability that one sample is the whole continuation"
        ),
        "samples_needed": Column(
            "sampling", "samples", "fewest samples that hold it with probability p", summarized=False
        ),
        "np_discoverable": Column("sampling", "0 or 1", "whether n samples hold it with probability p"),
        "edit_distance": Column("near_verbatim", "tokens", "Levenshtein distance of generated and truth"),
        "edit_similarity": Column("near_verbatim", "share", "1 - edit distance over the longer length"),
        "longest_run": Column("near_verbatim", "tokens", "longest run that stands in both"),
        "longest_run_at": Column(
            "near_verbatim", "position", "where it begins in the truth", summarized=False
        ),
        "longest_run_generated_at": Column(
            "near_verbatim", "position", "where it begins in the generated tokens", summarized=False
        ),
        "copied_share": Column("trivial", "share", "longest run of the continuation found in the prefix"),
        "type_token_ratio": Column("trivial", "share", "distinct tokens over tokens of the continuation"),
        "repeated_share": Column("trivial", "share", "tokens that repeat with the best period"),
        "step_share": Column("trivial", "share", "tokens or words that go on in constant steps"),
        "trivial": Column("trivial", "0 or 1", "one of the four rules explains the continuation"),
    }
)
"""By name, in the order of the table."""

METRIC_GROUPS = ("likelihood", "sampling", "near_verbatim", "trivial")

SCORE_COLUMNS = (*METRICS, "near_tie", "memorization_score", *COLUMNS, "generated", "generated_text")
"""The columns that scoring adds to a set's table."""

LABELS: Mapping[str, dict[str, str]] = MappingProxyType(
    {
        **{name: {"units": m.unit, "long_name": m.meaning} for name, m in METRICS.items()},
        **{name: {"units": c.unit, "long_name": c.meaning} for name, c in COLUMNS.items()},
    }
)
"""Unit and meaning of each number, as attributes of an array."""
