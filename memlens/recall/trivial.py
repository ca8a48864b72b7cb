"""Continuations that need no memory: copied from the prefix, repetitive, or counting on.

A model that continues "line 3, line 4, line 5," need not have seen it. Such sequences are recalled by rule
and must be told from memories; the columns here say how far each rule goes, the flag says that one goes far
enough. All definitions and thresholds are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from memlens.errors import OptionError
from memlens.recall.columns import longest_common_runs
from memlens.sequences.set import SequenceSet

_UNITS = re.compile(r"\d+|[^\W\d]+|[^\s\w]")
_LONGEST_NUMBER = 15  # digits; longer ones are compared as text


@dataclass(frozen=True)
class TrivialRules:
    """When a continuation counts as trivial: where any of the four shares passes its threshold.

    Attributes:
        copied: `copied_share` of at least this, if the run has `min_tokens`, or the whole continuation
            occurs in the prefix.
        distinct: `type_token_ratio` of at most this.
        repeated: `repeated_share` of at least this.
        step: `step_share` of at least this.
        min_tokens: The last three rules apply to continuations of at least this many tokens.
        max_period: Longest period that `repeated_share` and `step_share` look for.

    Raises:
        OptionError: A share outside [0, 1], or a number below 1.
    """

    copied: float = 0.5
    distinct: float = 0.2
    repeated: float = 0.75
    step: float = 0.75
    min_tokens: int = 4
    max_period: int = 16

    def __post_init__(self) -> None:
        for name in ("copied", "distinct", "repeated", "step"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(f"{name}={getattr(self, name)} is not a share in [0, 1]")
        for name in ("min_tokens", "max_period"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)} is below 1")

    def settings(self) -> dict[str, float | int]:
        """Return the thresholds under the names that a result records them by."""
        return {f"trivial_{name}": value for name, value in asdict(self).items()}


def trivial_continuations(
    sequences: SequenceSet, *, tokenizer: Any = None, rules: TrivialRules | None = None
) -> pd.DataFrame:
    """Return how far each continuation follows from its prefix by rule, without any model.

    - `copied_share`: the longest run of the continuation that occurs in the prefix, over its length.
    - `type_token_ratio`: distinct tokens of the continuation over its length.
    - `repeated_share`: with the best period P of 1 to `max_period`, the share of the continuation's tokens
      that equal the token P before (which may be in the prefix).
    - `step_share`: with the best P, the share that goes on in constant steps,
      ``t[j] - t[j-P] == t[j-P] - t[j-2P]``, where at least one of these steps is not 0. It is taken of token
      ids, and of the text, cut into numbers, words and other signs (where only numbers may step, the rest
      must stay equal, and the share is of characters without white space); the greater of the two counts.
      So "row 1, row 2, row 3" is explained whole.
    - `trivial`: one of them passes its threshold.

    Args:
        sequences: The set.
        tokenizer: Turns tokens into text (a model's `tokenizer`); without it steps are sought in ids only.
        rules: The thresholds.

    Returns:
        One row per sequence: `id` and the five columns; `attrs` holds the thresholds.

    Example:
        >>> seqs = SequenceSet.from_tokens([[1, 2, 3, 4, 5, 6, 7, 8], [5, 6, 7, 8, 5, 6, 7, 8]], 4)
        >>> table = trivial_continuations(seqs)
        >>> table["step_share"].tolist(), table["copied_share"].tolist(), table["trivial"].tolist()
        ([1.0, 0.5], [0.0, 1.0], [True, True])
    """
    rules = rules or TrivialRules()
    table = pd.DataFrame({"id": sequences.ids, **trivial_columns(sequences, tokenizer, rules)})
    table.attrs.update(rules.settings())
    return table


def trivial_columns(seqs: SequenceSet, tokenizer: Any, rules: TrivialRules) -> dict[str, np.ndarray]:
    """Return the columns of `trivial_continuations`."""
    n = seqs.n_targets.numpy()
    pairs = zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True)
    prefixes, truth = zip(*((row[:p], row[p:]) for row, p in pairs), strict=True)
    run = longest_common_runs(truth, prefixes)[0]
    start, end = seqs.prefix_len.numpy(), seqs.lengths.numpy()
    tokens, numeric = seqs.tokens.numpy(), seqs.mask.numpy()
    ones = np.ones_like(tokens)
    repeated, step = _patterns(tokens, numeric, ones, start, end, rules.max_period)
    if tokenizer is not None:
        step = np.maximum(step, _text_steps(prefixes, seqs.rows(), tokenizer, rules.max_period))
    columns = {
        "copied_share": run / n,
        "type_token_ratio": np.array([len(set(row)) for row in truth]) / n,
        "repeated_share": repeated,
        "step_share": step,
    }
    return {**columns, "trivial": _flag(columns, run, n, rules)}


def _flag(columns: dict[str, np.ndarray], run: np.ndarray, n: np.ndarray, rules: TrivialRules) -> np.ndarray:
    copied = (columns["copied_share"] >= rules.copied) & (run >= rules.min_tokens) | (run == n)
    patterned = (
        (columns["type_token_ratio"] <= rules.distinct)
        | (columns["repeated_share"] >= rules.repeated)
        | (columns["step_share"] >= rules.step)
    )
    return copied | patterned & (n >= rules.min_tokens)


def _patterns(
    values: Int[np.ndarray, "seq pos"],
    numeric: Bool[np.ndarray, "seq pos"],
    weight: Int[np.ndarray, "seq pos"],
    start: Int[np.ndarray, "seq"],
    end: Int[np.ndarray, "seq"],
    max_period: int,
) -> tuple[Float[np.ndarray, "seq"], Float[np.ndarray, "seq"]]:
    """Return the best shares, by weight, of the places from `start` to `end` that repeat, and that step.

    Only where `numeric` holds at all three places may a step differ from 0.
    """
    place = np.arange(values.shape[1])
    weight = weight * ((place >= start[:, None]) & (place < end[:, None]))
    size = np.maximum(weight.sum(1), 1)
    repeated, stepping = np.zeros(len(values)), np.zeros(len(values))
    for period in range(1, min(max_period, values.shape[1] - 1) + 1):
        same = values[:, period:] == values[:, :-period]
        repeated = np.maximum(repeated, (same * weight[:, period:]).sum(1) / size)
        if 2 * period >= values.shape[1]:
            continue
        steps = values[:, period:] - values[:, :-period]
        numbers = numeric[:, 2 * period :] & numeric[:, period:-period] & numeric[:, : -2 * period]
        constant = (steps[:, period:] == steps[:, :-period]) & (numbers | (steps[:, period:] == 0))
        explained = constant * weight[:, 2 * period :]
        moves = (explained * (steps[:, period:] != 0)).any(1)
        stepping = np.maximum(stepping, np.where(moves, explained.sum(1) / size, 0))
    return repeated, stepping


def _text_steps(
    prefixes: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], tokenizer: Any, max_period: int
) -> Float[np.ndarray, "seq"]:
    """Return `step_share` of the texts, cut into numbers, words and signs."""
    cuts = [len(text) for text in tokenizer.batch_decode(list(prefixes))]
    cut_up = [list(_UNITS.finditer(text)) for text in tokenizer.batch_decode(list(rows))]
    width = max(map(len, cut_up), default=0)
    values, weight = (np.zeros((len(rows), width), np.int64) for _ in range(2))
    numeric = np.zeros((len(rows), width), bool)
    start, end = (np.zeros(len(rows), np.int64) for _ in range(2))
    known: dict[str, int] = {}
    for i, (units, cut) in enumerate(zip(cut_up, cuts, strict=True)):
        for j, unit in enumerate(units):
            word = unit.group()
            weight[i, j] = len(word)
            numeric[i, j] = word.isascii() and word.isdigit() and len(word) <= _LONGEST_NUMBER
            # Words get negative numbers, so that none equals a number.
            values[i, j] = int(word) if numeric[i, j] else known.setdefault(word, -1 - len(known))
        # A unit that the cut goes through belongs to the continuation.
        start[i] = next((j for j, unit in enumerate(units) if unit.end() > cut), len(units))
        end[i] = len(units)
    return _patterns(values, numeric, weight, start, end, max_period)[1]
