"""The three prompts before one continuation: its prefix alone, after the same text, after a wrong version."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt
from torch import Tensor

from memlens.choices import AblationMode
from memlens.errors import EmptySetError, SequenceError
from memlens.options import options_class
from memlens.sequences.checks import check_is_set
from memlens.sequences.corrupt import derangement
from memlens.sequences.set import SequenceSet, some
from memlens.sequences.tokenizing import encode, need_tokenizer

CONDITIONS = ("alone", "repeated", "conflict")


@options_class
class ContextOptions:
    """Options of `context_or_weights`; the result records all of them.

    Example:
        >>> import memlens as ml
        >>> ml.detect.ContextOptions(steps=4).steps
        4
    """

    separator: str | tuple[NonNegativeInt, ...] = "\n"
    """What stands between the earlier text and the prefix: text, or token ids; may be empty."""
    wrong: Literal["other_sequence", "shuffle"] = "other_sequence"
    """The wrong continuation: that of another sequence of the set with as many tokens, each used once; or the
    own tokens in another order."""
    too_long: Literal["raise", "drop"] = "raise"
    """What happens to sequences whose text, separator and text exceed the context: an error, or left out with
    a warning."""
    effects: Literal["ablation", "gradients"] = "ablation"
    """How the effects of heads are found: exactly, by `ablate_heads`, or estimated by
    `attribute_ablation`."""
    mode: AblationMode = "mean_of_other_heads"
    """What replaces a head's output; see `ablate_heads`."""
    steps: Annotated[int, Field(ge=1)] = 8
    """Points on the path of the integrated gradients, for "gradients"."""
    layers: tuple[NonNegativeInt, ...] | None = None
    """Layers; all by default."""
    seed: int = 0
    """Seed of the wrong continuations and of "resample"."""


@dataclass(frozen=True, eq=False)
class ContextSets:
    """The same continuations after three prompts; rows, ids and tables are those of one set.

    Attributes:
        alone: The prefix. This is the set that was given, without sequences that are too long.
        repeated: The text (prefix and continuation), a separator, the prefix.
        conflict: The prefix with the wrong continuation, a separator, the prefix. Targets are still the
            memorized continuation.
        wrong: The wrong continuations, as long as the memorized ones.
        lag: Tokens from each target back to the same place in the earlier text, `[seq]`.
    """

    alone: SequenceSet
    repeated: SequenceSet
    conflict: SequenceSet
    wrong: list[list[int]]
    lag: np.ndarray

    def __iter__(self) -> Any:
        return iter((self.alone, self.repeated, self.conflict))

    def with_wrong_targets(self) -> list[SequenceSet]:
        """Return the three sets with the wrong continuation as the target."""
        return [replaced(s, s.halves()[0], self.wrong) for s in (self.alone, self.repeated, self.conflict)]


def replaced(seqs: SequenceSet, prompts: list[list[int]], continuations: list[list[int]]) -> SequenceSet:
    """Return a set with other tokens; what its table says stays, except for the text."""
    rows = [[*a, *b] for a, b in zip(prompts, continuations, strict=True)]
    table = seqs.table.drop(columns="text", errors="ignore")
    return SequenceSet.from_tokens(rows, [len(p) for p in prompts], table=table, attrs=seqs.attrs)


def context_sets(model: Any, sequences: SequenceSet, *, options: ContextOptions | None = None) -> ContextSets:
    """Build the three sets of `context_or_weights`.

    A beginning-of-text token that memlens prepended stays at the beginning of the prompt, once.

    Args:
        model: A TransformerLens model, for its context length and tokenizer.
        sequences: The sequences.
        options: See `ContextOptions`.

    Raises:
        EmptySetError: No sequences, or none that fits the context.
        SequenceError: A sequence does not fit the context, has no other to take a wrong continuation from,
            or cannot be shuffled; or a separator is text and the model has no tokenizer.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[:2].first_targets(4)
        >>> built = ml.detect.context_sets(model, seqs)
        >>> built.alone.lengths.tolist(), built.repeated.lengths.tolist(), built.lag.tolist()
        ([36, 36], [73, 73], [37, 37])
    """
    options = options or ContextOptions()
    check_is_set(sequences)
    between = _separator(model, options)
    first = 1 if sequences.attrs.get("prepend_bos") else 0
    alone = _fitting(sequences, 2 * sequences.lengths + len(between) - first, model.cfg.n_ctx, options)
    wrong = _wrong_continuations(alone, options)
    prefixes, continuations = alone.halves()
    repeated, conflict = (
        [[*a, *b, *between, *a[first:]] for a, b in zip(prefixes, earlier, strict=True)]
        for earlier in (continuations, wrong)
    )
    lag = alone.lengths.numpy() + len(between) - first
    after = [replaced(alone, prompts, continuations) for prompts in (repeated, conflict)]
    return ContextSets(alone, after[0], after[1], wrong, lag)


def longest_targets(model: Any, sequences: SequenceSet, *, options: ContextOptions | None = None) -> int:
    """Return how many targets after the longest prefix leave room for the text twice; at least 1.

    Args:
        model: A TransformerLens model.
        sequences: The sequences.
        options: Those of the prompts.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")  # a context of 128 tokens, prefixes of 32
        >>> ml.detect.longest_targets(model, ml.load_sequences("zoo", model))
        31
    """
    between = _separator(model, options or ContextOptions())
    return max(1, (int(model.cfg.n_ctx) - len(between)) // 2 - int(sequences.prefix_len.max()))


def _separator(model: Any, options: ContextOptions) -> Sequence[int]:
    given = options.separator
    if not isinstance(given, str):
        return given
    return encode(need_tokenizer(model.tokenizer), [given])[0] if given else ()


def _fitting(seqs: SequenceSet, lengths: Tensor, n_ctx: int, options: ContextOptions) -> SequenceSet:
    if not len(seqs):
        raise EmptySetError("no sequences: give at least one.")
    long = (lengths > n_ctx).numpy()
    if not long.any():
        return seqs
    row = int(np.flatnonzero(long)[0])
    said = (
        f"{int(long.sum())} of {len(seqs)} sequences are too long to stand in the prompt twice: row {row} "
        f"takes {int(lengths[row])} tokens, but the model's context holds {n_ctx}"
    )
    if options.too_long == "raise":
        raise SequenceError(f"{said}: keep fewer targets (first_targets) or leave them out (too_long='drop')")
    if long.all():
        raise EmptySetError(f"{said}: none is left.")
    warnings.warn(f"{said}; they are left out.", stacklevel=4)
    return seqs[~long]


def _wrong_continuations(seqs: SequenceSet, options: ContextOptions) -> list[list[int]]:
    rng = np.random.default_rng(options.seed % 2**64)
    own = seqs.halves()[1]
    if options.wrong == "shuffle":
        return [_shuffled(row, rng, i) for i, row in enumerate(own)]
    wrong = list(own)
    lengths = np.array([len(row) for row in own])
    for n in np.unique(lengths):
        rows = np.flatnonzero(lengths == n)
        givers = derangement(np.array([own[i] for i in rows]), rng)
        if givers is None:
            raise SequenceError(
                f"rows {some(rows.tolist())} have a continuation of {n} tokens, and too few differ to "
                "exchange them: add sequences with as many targets, or take wrong='shuffle'"
            )
        for i, giver in zip(rows, rows[givers], strict=True):
            wrong[i] = own[giver]
    return wrong


def _shuffled(row: list[int], rng: np.random.Generator, number: int) -> list[int]:
    if len(set(row)) < 2:
        raise SequenceError(f"the continuation of row {number} repeats a single token: it cannot be shuffled")
    while True:
        found = [int(token) for token in rng.permutation(row)]
        if found != row:
            return found
