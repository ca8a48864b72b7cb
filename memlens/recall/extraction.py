"""`extraction_curve`: how much context discoverable extraction needs.

Extraction curves and compression ask of thousands of shortened prompts whether the whole continuation is
recalled. Teacher-forced passes over prompts of similar length answer this (`score_prompts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from tqdm.auto import tqdm

from memlens.errors import OptionError, SequenceError
from memlens.forward.baseline import teacher_forced
from memlens.forward.exclusive import computes
from memlens.forward.memory import check_batch_size
from memlens.forward.metrics import METRICS
from memlens.forward.trunk import require_model
from memlens.models.provenance import describe
from memlens.recall.columns import LABELS, sequence_coords
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_strengths
from memlens.results.readings import read_strengths
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet

PROMPT_METRICS = ("exact_match", "matching_prefix", "target_accuracy", "target_logprob")
"""What is measured after each prompt (see `memlens.METRICS`)."""

_BLOCK = 4096
"""Prompts per teacher-forced pass."""


@dataclass(frozen=True)
class Halves:
    """A set's prefixes and continuations as lists.

    Attributes:
        pinned: First tokens of each prefix, which are in every prompt and are not counted.
        prefixes: The rest of each prefix, which may be shortened.
        continuations: The targets.
    """

    pinned: list[list[int]]
    prefixes: list[list[int]]
    continuations: list[list[int]]

    @classmethod
    def of(cls, seqs: SequenceSet, pinned: int) -> Halves:
        """Split a set.

        Raises:
            OptionError: `pinned` is negative.
            SequenceError: A prefix has no token besides the pinned ones.
        """
        if pinned < 0:
            raise OptionError(f"pinned={pinned}: give the number of first tokens in every prompt, or 0")
        shortest = int(seqs.prefix_len.min())
        if shortest <= pinned:
            row = int(seqs.prefix_len.argmin())
            raise SequenceError(
                f"row {row} (id {seqs.ids[row]!r}) has a prefix of {shortest} tokens, all of them pinned "
                f"(pinned={pinned}): nothing is left to shorten"
            )
        prefixes, continuations = seqs.halves()
        return cls([row[:pinned] for row in prefixes], [row[pinned:] for row in prefixes], continuations)

    def __len__(self) -> int:
        return len(self.prefixes)

    @property
    def longest(self) -> int:
        """Length of the longest prefix, in tokens besides the pinned ones."""
        return max(map(len, self.prefixes))


Prompt = tuple[int, Sequence[int]]
"""A row of the set, and the prefix tokens it keeps."""


@computes
def score_prompts(
    model: Any,
    halves: Halves,
    prompts: Sequence[Prompt],
    *,
    batch_size: int | None = None,
    bar: tqdm[Any] | None = None,
) -> dict[str, Float[np.ndarray, "prompt"]]:
    """Return `PROMPT_METRICS` of the continuation after each prompt.

    Args:
        model: A TransformerLens model.
        halves: The set.
        prompts: Rows and what their prompts keep besides the pinned tokens; at least one token in all.
        batch_size: Prompts per forward pass; by default as many as the memory budget allows.
        bar: A progress bar to update with the number of prompts.
    """
    found = {name: np.zeros(len(prompts)) for name in PROMPT_METRICS}
    # Short prompts first, so that blocks and their batches have little padding.
    targets = [halves.continuations[row] for row, _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]) + len(targets[i]))
    for index in (order[start : start + _BLOCK] for start in range(0, len(order), _BLOCK)):
        rows = [[*halves.pinned[prompts[i][0]], *prompts[i][1]] for i in index]
        tokens = [row + targets[i] for row, i in zip(rows, index, strict=True)]
        part = SequenceSet.from_tokens(tokens, [len(row) for row in rows])
        stats, _ = teacher_forced(model, part, {}, batch_size=batch_size, progress=False)
        for name in PROMPT_METRICS:
            found[name][index] = METRICS[name].of(stats).numpy()
        if bar is not None:
            bar.update(len(index))
    return found


def first_tokens(seqs: SequenceSet) -> int:
    """Return how many first tokens a shortened prompt keeps: 1 if a beginning-of-text token was put there."""
    return int(bool(seqs.attrs.get("prepend_bos")) and int(seqs.prefix_len.min()) > 1)


@computes
def extraction_curve(
    model: Any,
    sequences: SequenceSet,
    prefix_lengths: Sequence[int] | None = None,
    *,
    pinned: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Result:
    """Measure recall of each continuation after the last k tokens before it, for several k.

    A sequence is *discoverable* with k tokens of context if greedy decoding from them gives the whole
    continuation: `exact_match` is 1. The mean over sequences is the share that is extracted; `.plot()` draws
    it with its interval. Prompts start at position 0.

    Args:
        model: A TransformerLens model. Hooks set on it act.
        sequences: The set, which may be ragged.
        prefix_lengths: The k, in tokens, each once; by default 8, 16, 32, 64, … up to the longest prefix, and
            the longest prefix itself.
        pinned: Number of first tokens that every prompt begins with and that do not count. By default 1, the
            beginning-of-text token, where the set was read with one in front (`prepend_bos`), else 0.
        batch_size: Prompts per forward pass; by default as many as the memory budget allows.
        progress: Show a progress bar.

    Returns:
        Kind "extraction_curve": `exact_match`, `matching_prefix`, `target_accuracy` and `target_logprob`,
        each `(sequence, prefix_len)`. NaN if a prefix has fewer than k tokens: such sequences do not count
        for this k. `.mean_ci()` gives the shares with intervals.

    Raises:
        EmptySetError: There are no sequences.
        OptionError: A k below 1, given twice, or longer than every prefix.
        SequenceError: A prefix is all pinned.

    Source: arXiv 2202.07646 studies how more context extracts more; prompts that end where the continuation
    begins, and the lengths, are ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> curve = ml.recall.extraction_curve(model, ml.load_sequences("zoo", model)[:4], progress=False)
        >>> curve["exact_match"].dims, curve["prefix_len"].values.tolist()
        (('sequence', 'prefix_len'), [8, 16, 32])
    """
    require_model(model)
    check_sequences(sequences, model)
    check_batch_size(batch_size)
    pinned = first_tokens(sequences) if pinned is None else pinned
    halves = Halves.of(sequences, pinned)
    lengths = _lengths(prefix_lengths, halves.longest)
    cells = [
        (i, j) for i in range(len(halves)) for j, k in enumerate(lengths) if k <= len(halves.prefixes[i])
    ]
    prompts = [(i, halves.prefixes[i][-lengths[j] :]) for i, j in cells]
    with tqdm(total=len(prompts), desc="shortening", unit="prompt", disable=not progress) as bar:
        found = score_prompts(model, halves, prompts, batch_size=batch_size, bar=bar)
    place = tuple(np.array(cells).T)
    arrays = {}
    for name in PROMPT_METRICS:
        array = np.full((len(halves), len(lengths)), np.nan)
        array[place] = found[name]
        arrays[name] = (("sequence", "prefix_len"), array, LABELS[name])
    data = xr.Dataset(arrays, {**sequence_coords(sequences.table), "prefix_len": lengths})
    settings = {"prefix_lengths": lengths, "pinned": pinned, "sequences": dict(sequences.attrs)}
    return Result.create(data, kind="extraction_curve", settings=settings, **describe(model))


def _lengths(given: Sequence[int] | None, longest: int) -> list[int]:
    if given is None:
        powers = [8 * 2**i for i in range(longest.bit_length()) if 8 * 2**i < longest]
        return [*powers, longest]
    lengths = sorted(int(k) for k in given)
    if not lengths or lengths[0] < 1 or len(set(lengths)) < len(lengths):
        raise OptionError(f"prefix_lengths={list(given)}: give numbers of tokens from 1 on, each once")
    if lengths[-1] > longest:
        raise OptionError(
            f"prefix_lengths={list(given)}: no prefix has {lengths[-1]} tokens, the longest has {longest}"
        )
    return lengths


register_kind("extraction_curve", plot=plot_strengths, reading=read_strengths)
