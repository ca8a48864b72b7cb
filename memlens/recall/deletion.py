"""Greedy deletion of prefix tokens: all sequences take a round together, so that passes are full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from memlens.recall.prompts import Halves, Prompt, score_prompts

__all__ = ["delete_greedily"]


@dataclass
class _Search:
    """One sequence's search: the places that are left, and the prompts it may still try."""

    row: int
    left: list[int]
    budget: float
    done: bool = False
    complete: bool = False

    def candidates(self) -> list[list[int]]:
        """Return what is left after each single deletion, farthest from the continuation first."""
        if len(self.left) == 1:
            self.done = self.complete = True
        if self.budget < 1:
            self.done = True
        if self.done:
            return []
        found = [self.left[:j] + self.left[j + 1 :] for j in range(len(self.left))]
        return found[: int(min(self.budget, len(found)))]

    def choose(self, candidates: list[list[int]], works: np.ndarray, logprob: np.ndarray) -> None:
        """Go on with the best candidate that works; stop where there is none."""
        self.budget -= len(candidates)
        if works.any():
            self.left = candidates[int(np.where(works, logprob, -np.inf).argmax())]
        else:
            self.done, self.complete = True, len(candidates) == len(self.left)


def delete_greedily(
    model: Any, halves: Halves, rows: list[int], budget: int | None, options: dict[str, Any]
) -> list[tuple[list[int], bool]]:
    """Return for each row which places of its prefix are left, and whether no single one more can go.

    Args:
        model: A TransformerLens model.
        halves: The set.
        rows: Rows that are recalled from their whole prefix.
        budget: Most prompts that are tried for a row.
        options: For `score_prompts`: the batch size and the progress bar.
    """
    allowed = np.inf if budget is None else budget
    searches = [_Search(row, list(range(len(halves.prefixes[row]))), allowed) for row in rows]
    while active := [search for search in searches if not search.done]:
        tried = [search.candidates() for search in active]
        prompts: list[Prompt] = [
            (search.row, [halves.prefixes[search.row][place] for place in left])
            for search, candidates in zip(active, tried, strict=True)
            for left in candidates
        ]
        if not prompts:
            break
        options["bar"].total += len(prompts)
        found = score_prompts(model, halves, prompts, **options)
        ends = np.cumsum([len(candidates) for candidates in tried])[:-1]
        works, logprob = (np.split(found[name], ends) for name in ("exact_match", "target_logprob"))
        for search, candidates, w, p in zip(active, tried, works, logprob, strict=True):
            if candidates:
                search.choose(candidates, w == 1, p)
    return [(search.left, search.complete) for search in searches]
