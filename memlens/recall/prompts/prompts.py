"""Many prompts for one continuation: which of them still give it.

Extraction curves and compression ask the same of thousands of shortened prompts: is the whole continuation
recalled? A teacher-forced pass answers, prompts of similar length together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from memlens.errors import OptionError, SequenceError
from memlens.forward.baseline import teacher_forced
from memlens.forward.metrics import METRICS
from memlens.sequences.set import SequenceSet

PROMPT_METRICS = ("exact_match", "matching_prefix", "target_accuracy", "target_logprob")
"""What is measured after each prompt (see `memlens.METRICS`)."""

_BLOCK = 4096
"""Prompts that are held at a time."""


@dataclass(frozen=True)
class Halves:
    """A set's prefixes and continuations as lists.

    Attributes:
        pinned: First tokens of each prefix that are in every prompt and are not counted.
        prefixes: What may be shortened.
        continuations: The targets.
    """

    pinned: list[list[int]]
    prefixes: list[list[int]]
    continuations: list[list[int]]

    @classmethod
    def of(cls, seqs: SequenceSet, pinned: int) -> Halves:
        """Cut a set up.

        Raises:
            OptionError: `pinned` is negative.
            SequenceError: A prefix has no token beside the pinned ones.
        """
        if pinned < 0:
            raise OptionError(f"pinned={pinned}: give how many first tokens every prompt has, 0 for none")
        shortest = int(seqs.prefix_len.min())
        if shortest <= pinned:
            row = int(seqs.prefix_len.argmin())
            raise SequenceError(
                f"row {row} (id {seqs.ids[row]!r}) has a prefix of {shortest} tokens, all of them pinned "
                f"(pinned={pinned}): nothing is left to shorten"
            )
        pairs = list(zip(seqs.rows(), seqs.prefix_len.tolist(), strict=True))
        return cls(
            [row[:pinned] for row, _ in pairs],
            [row[pinned:p] for row, p in pairs],
            [row[p:] for row, p in pairs],
        )

    def __len__(self) -> int:
        return len(self.prefixes)

    @property
    def longest(self) -> int:
        """The longest prefix, in tokens beside the pinned ones."""
        return max(map(len, self.prefixes))


Prompt = tuple[int, Sequence[int]]
"""A row of the set, and the prefix tokens it keeps."""


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
        prompts: Rows and what their prompts keep beside the pinned tokens; at least one token in all.
        batch_size: Prompts a forward pass; chosen to a memory budget by default.
        bar: A progress bar that is moved on by the number of prompts.
    """
    found = {name: np.zeros(len(prompts)) for name in PROMPT_METRICS}
    # Short prompts first, so that blocks (and batches in them) hold little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]) + len(_target(halves, prompts[i])))
    for index in _blocks(order):
        rows = [[*halves.pinned[prompts[i][0]], *prompts[i][1]] for i in index]
        tokens = [row + _target(halves, prompts[i]) for row, i in zip(rows, index, strict=True)]
        part = SequenceSet.from_tokens(tokens, [len(row) for row in rows])
        stats, _ = teacher_forced(model, part, {}, batch_size=batch_size, progress=False)
        for name in PROMPT_METRICS:
            found[name][index] = METRICS[name].of(stats).numpy()
        if bar is not None:
            bar.update(len(index))
    return found


def _target(halves: Halves, prompt: Prompt) -> list[int]:
    return halves.continuations[prompt[0]]


def _blocks(order: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(order), _BLOCK):
        yield order[start : start + _BLOCK]
