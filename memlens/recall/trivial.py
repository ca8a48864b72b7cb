"""Continuations that need no memory: copied from the prefix, repetitive, or counting.

A model that continues "line 3, line 4, line 5," need not have seen it. Such sequences follow by rule and must
be distinguished from memories; the columns measure how much of a continuation each rule explains, and the
flag marks continuations that one rule explains well enough. All definitions and thresholds are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveInt

from memlens.options import options_class
from memlens.recall.columns import longest_common_runs
from memlens.sequences.set import SequenceSet

_UNITS = re.compile(r"\d+|[^\W\d]+|[^\s\w]")
_NUMBER = re.compile(r"[0-9]+")
_LONGEST_NUMBER = 15  # digits; longer ones are compared as text


Share = Annotated[float, Field(ge=0, le=1)]


@options_class
class TrivialRules:
    """When a continuation counts as trivial: if any of the four shares passes its threshold.

    Raises:
        OptionError: A share outside [0, 1], or a number below 1.

    Example:
        >>> import memlens as ml
        >>> ml.recall.TrivialRules(min_tokens=8).min_tokens
        8
    """

    copied: Share = 0.5
    """Least `copied_share`, if the run has `min_tokens` or the whole continuation occurs in the prefix."""
    distinct: Share = 0.2
    """Largest `type_token_ratio`."""
    repeated: Share = 0.75
    """Least `repeated_share`."""
    step: Share = 0.75
    """Least `step_share`."""
    min_tokens: PositiveInt = 4
    """The last three rules apply to continuations of at least this many tokens."""
    max_period: PositiveInt = 16
    """Longest period that `repeated_share` and `step_share` look for."""

    def settings(self) -> dict[str, float | int]:
        """Return the thresholds under the names that results record."""
        return {f"trivial_{name}": value for name, value in asdict(self).items()}


def trivial_continuations(
    sequences: SequenceSet, *, tokenizer: Any = None, rules: TrivialRules | None = None
) -> pd.DataFrame:
    """Return how much of each continuation follows from its prefix by rule, without any model.

    - `copied_share`: the longest run of the continuation that occurs in the prefix, over its length.
    - `type_token_ratio`: distinct tokens of the continuation over its length.
    - `repeated_share`: for the best period P of 1 to `max_period`, the share of the continuation's tokens
      that equal the token P before (which may be in the prefix).
    - `step_share`: for the best P, the share that continues in constant steps,
      ``t[j] - t[j-P] == t[j-P] - t[j-2P]``, if at least one of these steps is not 0. It is computed on token
      ids, and on the text, cut into numbers, words and other signs (only numbers may step, the rest must stay
      equal, and the share is of characters other than white space); the larger of the two counts. So "row 1,
      row 2, row 3" is explained completely.
    - `trivial`: one of them passes its threshold.

    Args:
        sequences: The set.
        tokenizer: Decodes the tokens (a model's `tokenizer`); without it steps are sought in ids only.
        rules: The thresholds.

    Returns:
        One row per sequence: `id` and the five columns; `attrs` has the thresholds.

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
    prefixes, truth = seqs.halves()
    run = longest_common_runs(truth, prefixes)[0]
    tokens, place = seqs.tokens.numpy(), np.arange(seqs.tokens.shape[1])
    targets = ((place >= seqs.prefix_len.numpy()[:, None]) & seqs.mask.numpy()).astype(np.int64)
    repeated, step = _patterns(tokens, seqs.mask.numpy(), targets, rules.max_period)
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
    max_period: int,
) -> tuple[Float[np.ndarray, "seq"], Float[np.ndarray, "seq"]]:
    """Return the largest shares, by weight, of the places that repeat, and that step.

    A step may differ from 0 only if all three places are `numeric`.
    """
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
    """Return `step_share` of the texts, cut into numbers, words and other signs."""
    texts = tokenizer.batch_decode(list(rows))
    share = np.zeros(len(rows))
    # A step takes three numbers; few texts have them, and only those are cut up.
    counting = [i for i, text in enumerate(texts) if len(_NUMBER.findall(text)) >= 3]
    if not counting:  # of no rows, tokenizers decode one empty text
        return share
    cuts = [len(text) for text in tokenizer.batch_decode([prefixes[i] for i in counting])]
    cut_up = [list(_UNITS.finditer(texts[i])) for i in counting]
    width = max(map(len, cut_up))
    values, weight = (np.zeros((len(counting), width), np.int64) for _ in range(2))
    numeric = np.zeros((len(counting), width), bool)
    known: dict[str, int] = {}
    for i, (units, cut) in enumerate(zip(cut_up, cuts, strict=True)):
        for j, unit in enumerate(units):
            word = unit.group()
            # A unit that spans the cut belongs to the continuation.
            weight[i, j] = len(word) * (unit.end() > cut)
            numeric[i, j] = word.isascii() and word.isdigit() and len(word) <= _LONGEST_NUMBER
            # Words get negative values, so that none equals a number.
            values[i, j] = int(word) if numeric[i, j] else known.setdefault(word, -1 - len(known))
    share[counting] = _patterns(values, numeric, weight, max_period)[1]
    return share
