"""`prompt_compression`: the fewest prefix tokens that still give the whole continuation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import xarray as xr
from tqdm.auto import tqdm

from memlens.choices import Compression
from memlens.errors import EmptySetError, OptionError, check_option
from memlens.forward.exclusive import computes
from memlens.forward.memory import check_batch_size
from memlens.forward.trunk import require_model
from memlens.models.provenance import describe
from memlens.recall.columns import sequence_coords
from memlens.recall.extraction import Halves, Prompt, first_tokens, score_prompts
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_strengths
from memlens.results.readings import read_compression
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet


@dataclass
class _Search:
    """One sequence's search: the remaining places, and the number of prompts it may still try."""

    row: int
    left: list[int]
    budget: float
    done: bool = False
    complete: bool = False

    def candidates(self) -> list[list[int]]:
        """Return what remains after each single deletion, farthest from the continuation first."""
        if len(self.left) == 1:
            self.done = self.complete = True
        if self.budget < 1:
            self.done = True
        if self.done:
            return []
        found = [self.left[:j] + self.left[j + 1 :] for j in range(len(self.left))]
        return found[: int(min(self.budget, len(found)))]

    def choose(self, candidates: list[list[int]], works: np.ndarray, logprob: np.ndarray) -> None:
        """Continue with the best candidate that works; stop if there is none."""
        self.budget -= len(candidates)
        if works.any():
            self.left = candidates[int(np.where(works, logprob, -np.inf).argmax())]
        else:
            self.done, self.complete = True, len(candidates) == len(self.left)


def delete_greedily(
    model: Any, halves: Halves, rows: list[int], budget: int | None, options: dict[str, Any]
) -> list[tuple[list[int], bool]]:
    """Return for each row which places of its prefix remain, and whether no other can be deleted.

    Args:
        model: A TransformerLens model.
        halves: The set.
        rows: Rows that are recalled from their whole prefix.
        budget: Largest number of prompts tried per row.
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


COMPRESSIONS: tuple[str, ...] = get_args(Compression)


@computes
def prompt_compression(
    model: Any,
    sequences: SequenceSet,
    method: str = "keep_last",
    *,
    budget: int | None = None,
    pinned: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Result:
    r"""Find the fewest prefix tokens from which greedy decoding still gives the whole continuation.

    With :math:`w(c) = 1` where the prompt of c tokens works, and P tokens in the whole prefix:

    .. math:: c_\text{fewest} = \min \{c : w(c) = 1\}, \qquad
        c_\text{stable} = \min \{c : w(c') = 1 \text{ for all } c' \ge c\}, \qquad
        \text{ratio} = c / P

    w need not be monotone: a longer prompt may fail where a shorter one works, so there is no bisection, and
    both numbers are returned. The continuation stays whole. Values are NaN for sequences that are not
    recalled from the whole prefix.

    Methods: "keep_last" keeps the last c tokens (next to the continuation), "keep_first" the first c.
    "greedy_deletion" removes tokens from anywhere: each round leaves out every remaining token in turn, and
    of the prompts that work, the one with the highest log-probability of the continuation is used for the
    next round, until none works. No single token can be removed from the result; a smaller set may still
    exist.

    Args:
        model: A TransformerLens model. Hooks set on it act.
        sequences: The set, which may be ragged.
        method: One of `COMPRESSIONS`.
        budget: Largest number of prompts tried per sequence. With "keep_last" and "keep_first" their lengths
            are spread evenly from 1 to P tokens, and the definitions apply to those tried; a deletion stops
            early (`complete` is 0). By default all: P prompts, or up to P (P + 1) / 2 for the deletion.
        pinned: Number of first tokens that every prompt begins with and that do not count. By default 1, the
            beginning-of-text token, where the set was read with one in front (`prepend_bos`), else 0.
        batch_size: Prompts per forward pass; by default as many as the memory budget allows.
        progress: Show a progress bar.

    Returns:
        Kind "prompt_compression", all `(sequence)`: `recalled` (0 or 1: from the whole prefix),
        `fewest_tokens` and `compression_ratio`. When one end is kept also `stable_tokens`,
        `stable_compression_ratio`, and `works` `(sequence, prompt_tokens)`: 0 or 1, NaN if not tried. After a
        deletion `kept` `(sequence, tokens_back)`: 1 if the token this many places before the continuation
        remains, 0 if it was deleted; and `complete` (0 or 1).

    Raises:
        EmptySetError: There are no sequences, or none is recalled from its whole prefix.
        OptionError: An unknown method, or a budget below 1.
        SequenceError: A prefix is all pinned.

    Source: the ratio of fewest context tokens to context length, for fully memorized sequences, is in arXiv
    2603.21658 (section 4.2) by second-hand knowledge; which tokens are kept, the second definition, and the
    greedy deletion are ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> often = seqs[(seqs.table["copies"] == 256).to_numpy()][:2]
        >>> result = ml.recall.prompt_compression(model, often, progress=False)
        >>> bool((result["fewest_tokens"] <= result["stable_tokens"]).all())
        True
    """
    require_model(model)
    check_sequences(sequences, model)
    check_batch_size(batch_size)
    check_option("method", method, COMPRESSIONS)
    if budget is not None and budget < 1:
        raise OptionError(f"budget={budget}: allow at least one prompt per sequence, or None for all")
    pinned = first_tokens(sequences) if pinned is None else pinned
    halves = Halves.of(sequences, pinned)
    whole: list[Prompt] = [(i, prefix) for i, prefix in enumerate(halves.prefixes)]
    with tqdm(total=len(whole), desc="compressing", unit="prompt", disable=not progress) as bar:
        options: dict[str, Any] = {"batch_size": batch_size, "bar": bar}
        recalled = score_prompts(model, halves, whole, **options)["exact_match"] == 1
        if not recalled.any():
            raise EmptySetError("no sequence is recalled from its whole prefix: nothing can be compressed")
        rows = np.flatnonzero(recalled).tolist()
        if method == "greedy_deletion":
            arrays, coords = _deletion(model, halves, rows, budget, options)
        else:
            arrays, coords = _one_end(model, halves, rows, method == "keep_last", budget, options)
    n_prefix = np.array([len(prefix) for prefix in halves.prefixes])
    for name, ratio in (("fewest", "compression_ratio"), ("stable", "stable_compression_ratio")):
        if f"{name}_tokens" in arrays:
            arrays[ratio] = ("sequence", arrays[f"{name}_tokens"][1] / n_prefix, {"units": "share"})
    arrays["recalled"] = ("sequence", recalled.astype(float), {"units": "0 or 1"})
    data = xr.Dataset(arrays, {**sequence_coords(sequences.table), **coords})
    settings = {"method": method, "budget": budget, "pinned": pinned, "sequences": dict(sequences.attrs)}
    return Result.create(data, kind="prompt_compression", settings=settings, **describe(model))


Arrays = tuple[dict[str, tuple[Any, ...]], dict[str, list[int]]]
"""Variables with dimensions and attributes, and coordinates."""


def _one_end(
    model: Any, halves: Halves, rows: list[int], last: bool, budget: int | None, options: dict[str, Any]
) -> Arrays:
    works = np.full((len(halves), halves.longest), np.nan)
    works[rows, [len(halves.prefixes[i]) - 1 for i in rows]] = 1
    cells = [(i, c) for i in rows for c in _tried(len(halves.prefixes[i]), budget)]
    prompts: list[Prompt] = [
        (i, halves.prefixes[i][-c:] if last else halves.prefixes[i][:c]) for i, c in cells
    ]
    options["bar"].total += len(prompts)
    if prompts:
        i, c = np.array(cells).T
        works[i, c - 1] = score_prompts(model, halves, prompts, **options)["exact_match"]
    fewest, stable = (np.full(len(halves), np.nan) for _ in range(2))
    for i in rows:
        good, bad = (1 + np.flatnonzero(works[i] == value) for value in (1, 0))
        fewest[i], stable[i] = good[0], good[good > bad.max(initial=0)][0]
    labels = {"units": "0 or 1", "long_name": "whole continuation recalled"}
    arrays = {
        "works": (("sequence", "prompt_tokens"), works, labels),
        "fewest_tokens": ("sequence", fewest, {"units": "tokens"}),
        "stable_tokens": ("sequence", stable, {"units": "tokens"}),
    }
    return arrays, {"prompt_tokens": list(range(1, halves.longest + 1))}


def _tried(n: int, budget: int | None) -> list[int]:
    """Return the lengths to try below `n`, which is known to work: all, or `budget` including `n`."""
    if budget is None or budget >= n:
        return list(range(1, n))
    if budget == 1:
        return []
    return [c for c in np.unique(np.linspace(1, n, budget).round().astype(int)).tolist() if c < n]


def _deletion(
    model: Any, halves: Halves, rows: list[int], budget: int | None, options: dict[str, Any]
) -> Arrays:
    kept = np.full((len(halves), halves.longest), np.nan)
    fewest, complete = (np.full(len(halves), np.nan) for _ in range(2))
    for i, (left, done) in zip(rows, delete_greedily(model, halves, rows, budget, options), strict=True):
        n = len(halves.prefixes[i])
        kept[i, :n] = 0
        kept[i, [n - 1 - place for place in left]] = 1
        fewest[i], complete[i] = len(left), done
    arrays = {
        "kept": (
            ("sequence", "tokens_back"), kept, {"units": "0 or 1", "long_name": "prefix token is needed"}
        ),
        "fewest_tokens": ("sequence", fewest, {"units": "tokens"}),
        "complete": ("sequence", complete, {"units": "0 or 1"}),
    }  # fmt: skip
    return arrays, {"tokens_back": list(range(1, halves.longest + 1))}


register_kind("prompt_compression", plot=plot_strengths, reading=read_compression)
