"""`extraction_curve`: how much context discoverable extraction needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from tqdm.auto import tqdm

from memlens.errors import OptionError
from memlens.forward.memory import check_batch_size
from memlens.forward.trunk import check_model
from memlens.models.provenance import describe
from memlens.recall.columns import LABELS
from memlens.recall.prompts.prompts import PROMPT_METRICS, Halves, score_prompts
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_strengths
from memlens.results.readings import read_strengths
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet


def extraction_curve(
    model: Any,
    sequences: SequenceSet,
    prefix_lengths: Sequence[int] | None = None,
    *,
    pinned: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Result:
    """Measure recall of each continuation after the last k tokens before it, for several k.

    A sequence is *discoverable* with k tokens of context where greedy decoding from them gives the whole
    continuation: `exact_match` is 1. The mean over sequences is the share that is extracted; `.plot()` draws
    it with its interval. Prompts are fed from position 0, as if nothing had stood before them.

    Args:
        model: A TransformerLens model. Hooks that are set on it act.
        sequences: The set, which may be ragged.
        prefix_lengths: The k, in tokens, each once; by default 8, 16, 32, 64, … up to the longest prefix, and
            the longest prefix itself.
        pinned: First tokens of each sequence that every prompt begins with and that do not count, such as 1
            for a beginning-of-text token.
        batch_size: Prompts a forward pass; chosen to a memory budget by default.
        progress: Show a progress bar.

    Returns:
        Kind "extraction_curve": `exact_match`, `matching_prefix`, `target_accuracy` and `target_logprob`,
        each `(sequence, prefix_len)`. NaN where a prefix has fewer than k tokens: such sequences do not count
        for this k. `.mean_ci()` gives the shares with intervals.

    Raises:
        EmptySetError: There are no sequences.
        OptionError: A k below 1, given twice, or longer than every prefix.
        SequenceError: A prefix is all pinned.

    Source: that more context extracts more is studied in arXiv 2202.07646; prompts that end where the
    continuation begins, and the lengths, are our choice here.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> curve = ml.recall.extraction_curve(model, ml.load_sequences("zoo", model)[:4], progress=False)
        >>> curve["exact_match"].dims, curve["prefix_len"].values.tolist()
        (('sequence', 'prefix_len'), [8, 16, 32])
    """
    check_model(model)
    check_sequences(sequences, model)
    check_batch_size(batch_size)
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
    data = xr.Dataset(arrays, {**sequence_coords(sequences), "prefix_len": lengths})
    settings = {"prefix_lengths": lengths, "pinned": pinned, "sequences": dict(sequences.attrs)}
    return Result.create(data, kind="extraction_curve", settings=settings, **describe(model))


def sequence_coords(seqs: SequenceSet) -> dict[str, Any]:
    """Return the ids, and the columns that serve as groups, as coordinates."""
    coords: dict[str, Any] = {"sequence": seqs.table["id"].to_numpy(dtype=object)}
    for name in ("domain", "copies", "source"):
        if name in seqs.table:
            values = seqs.table[name]
            numeric = pd.api.types.is_numeric_dtype(values)
            coords[name] = ("sequence", values.to_numpy() if numeric else values.astype(str).to_numpy(object))
    return coords


def _lengths(asked: Sequence[int] | None, longest: int) -> list[int]:
    if asked is None:
        powers = [8 * 2**i for i in range(longest.bit_length()) if 8 * 2**i < longest]
        return [*powers, longest]
    lengths = sorted(int(k) for k in asked)
    if not lengths or lengths[0] < 1 or len(set(lengths)) < len(lengths):
        raise OptionError(f"prefix_lengths={list(asked)}: give numbers of tokens from 1 on, each once")
    if lengths[-1] > longest:
        raise OptionError(
            f"prefix_lengths={list(asked)}: no prefix has {lengths[-1]} tokens, the longest has {longest}"
        )
    return lengths


register_kind("extraction_curve", plot=plot_strengths, reading=read_strengths)
