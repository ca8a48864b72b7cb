"""Recall against the number of prefix tokens that were replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from memlens.errors import OptionError, check_option
from memlens.forward.metrics import MetricLike, metric_names
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_strengths
from memlens.results.readings import read_strengths
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.corrupt import corrupt
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result
from memlens.sweeps.measure import measure

STRATEGIES = ("random", "first", "last")

_COUNTS = (0, 1, 2, 4, 8)


def perturb_prefix(
    model: Any,
    sequences: SequenceSet,
    *,
    counts: Sequence[int] | None = None,
    strategy: str = "random",
    n_draws: int = 1,
    seed: int = 0,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match", "matching_prefix"),
    batch_size: int | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Result:
    """Replace more and more tokens of each prefix and measure recall of the unchanged continuation.

    Replacing tokens are drawn from the set's own unigram distribution and differ from those they replace, as
    in `corrupt`. Within a draw, what is replaced for a smaller count stays replaced by the same token for a
    greater one. A beginning-of-text token put in front by memlens stays (ours; it complements the noise of
    `perturb_residual`, which is in no token).

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        counts: How many tokens are replaced, each number once; by default 0, 1, 2, 4 and 8, as far as every
            prefix is that long.
        strategy: Which: "random" positions of the prefix, from its "first" on, or from its "last" back.
        n_draws: Draws; more than one adds a dimension `draw`.
        seed: The same seed gives the same replacements, whatever the batches.
        metrics: As for `sweep`.
        batch_size: Sequences in a batch; chosen from the budget by default.
        memory_budget: Bytes that activations may take at a time.
        progress: Show one bar.

    Returns:
        Kind "prefix_perturbation": each metric `(sequence, replaced)`, and its baseline `(sequence)`.

    Raises:
        OptionError: Unknown strategy, no counts, one given twice or below 0, or `n_draws` below 1.
        SequenceError: A prefix is shorter than a count (names the row).

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:4]
        >>> result = ml.instruments.perturb_prefix(model, seqs, counts=[0, 4], progress=False)
        >>> result["exact_match"].dims
        ('sequence', 'replaced')
    """
    check_sequences(sequences, model, on_eos="keep")
    names = metric_names(metrics)
    counts = _checked(sequences, counts, strategy, n_draws)
    variants = list(replaced_prefixes(sequences, counts, strategy=strategy, n_draws=n_draws, seed=seed))
    limits: dict[str, Any] = {"batch_size": batch_size, "memory_budget": memory_budget}
    found = {name: np.full((len(sequences), len(counts), n_draws), np.nan) for name in names}
    with tqdm(
        total=(len(variants) + 1) * len(sequences),
        disable=not progress,
        desc="prefix perturbation",
        unit="run",
    ) as bar:
        baseline = measure(model, sequences, metrics, **limits)
        bar.update(len(sequences))
        for i, draw, changed in variants:
            values = baseline if changed is None else measure(model, changed, metrics, **limits)
            for name in names:
                found[name][:, i, draw] = values[name]
            bar.update(len(sequences))
    several = n_draws > 1
    dims = ("sequence", "replaced", "draw") if several else ("sequence", "replaced")
    variables: dict[str, Any] = {n: (dims, found[n] if several else found[n][..., 0]) for n in names}
    variables |= {f"{n}_baseline": ("sequence", baseline[n]) for n in names}
    coords = {"replaced": counts} | ({"draw": list(range(n_draws))} if several else {})
    settings = {
        "counts": counts, "strategy": strategy, "n_draws": n_draws, "seed": seed, "metrics": names,
        "nested": True,
    }  # fmt: skip
    return make_result("prefix_perturbation", model, sequences, variables, coords, settings)


def replaced_prefixes(
    sequences: SequenceSet,
    counts: Sequence[int],
    *,
    strategy: str = "random",
    n_draws: int = 1,
    seed: int = 0,
) -> Iterator[tuple[int, int, SequenceSet | None]]:
    """Yield for each count and draw their numbers and the changed set; None in its place for 0 tokens."""
    most = max(counts)
    first = 1 if sequences.attrs.get("prepend_bos") else 0
    for draw in range(n_draws):
        own = int(np.random.SeedSequence([seed % 2**64, draw]).generate_state(1)[0])
        where = {"first": range(first, first + most), "last": range(-most, 0)}.get(strategy)
        full = corrupt(sequences, seed=own, n_tokens=most, positions=where) if most else sequences
        order = _order(full, sequences, strategy, own)
        for i, count in enumerate(counts):
            yield i, draw, _partly(sequences, full, order < count, count) if count else None


def _order(full: SequenceSet, clean: SequenceSet, strategy: str, seed: int) -> np.ndarray:
    """At each replaced position when it is replaced, 0 for the first; a large number elsewhere."""
    order = np.full(clean.tokens.shape, clean.tokens.numel() + 1)
    rng = np.random.default_rng(seed)
    for row, changed in enumerate((full.tokens != clean.tokens).numpy()):
        places = np.flatnonzero(changed)
        when = np.arange(len(places))
        if strategy == "last":
            when = when[::-1]
        elif strategy == "random":
            when = rng.permutation(when)
        order[row, places] = when
    return order


def _partly(clean: SequenceSet, full: SequenceSet, replaced: np.ndarray, count: int) -> SequenceSet:
    tokens = torch.where(torch.from_numpy(replaced), full.tokens, clean.tokens)
    attrs = {**clean.attrs, "corruption": "replace_token", "replaced": count}
    return SequenceSet(
        tokens, clean.mask, clean.prefix_len, clean.table.drop(columns="text", errors="ignore"), attrs
    )


def _checked(sequences: SequenceSet, counts: Sequence[int] | None, strategy: str, n_draws: int) -> list[int]:
    check_option("strategy", strategy, STRATEGIES)
    if n_draws < 1:
        raise OptionError(f"n_draws={n_draws}: draw at least once.")
    if counts is None:
        first = 1 if sequences.attrs.get("prepend_bos") else 0
        shortest = int(sequences.prefix_len.min()) - first if len(sequences) else 0
        return [n for n in _COUNTS if n <= shortest]
    if not counts or len(set(counts)) < len(counts) or min(counts) < 0:
        raise OptionError(f"counts={list(counts)}: give at least one number, 0 or above, each only once.")
    return list(counts)


register_kind("prefix_perturbation", plot=plot_strengths, reading=read_strengths)
