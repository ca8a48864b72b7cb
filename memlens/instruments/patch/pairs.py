"""Pairs of runs, clean and corrupt: the checks before them and the comparison after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from memlens.errors import SequenceError, SiteError
from memlens.results.result import Result
from memlens.sequences.checks import check_is_set
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import token_labels

DIRECTIONS = ("denoising", "noising")


def checked_positions(seqs: SequenceSet, positions: Sequence[int] | None) -> list[int]:
    """Return positions that the set has; by default all that can reach a target.

    Raises:
        SiteError: A position does not exist.
    """
    last = int(seqs.lengths.max()) - 1  # the last token predicts nothing
    if positions is None:
        return list(range(last))
    for p in positions:
        if not 0 <= p <= last:
            raise SiteError(f"position {p} does not exist: the sequences have positions 0 to {last}.")
    return list(positions)


def check_pairs(clean: SequenceSet, corrupt: SequenceSet) -> None:
    """Raise `SequenceError` unless rows are pairs of one length, one prefix length and the same targets."""
    check_is_set(clean)
    check_is_set(corrupt)
    if len(clean) != len(corrupt):
        raise SequenceError(
            f"{len(clean)} clean and {len(corrupt)} corrupt sequences: they must be pairs, row by row."
        )
    same = (clean.lengths == corrupt.lengths) & (clean.prefix_len == corrupt.prefix_len)
    if not bool(same.all()):
        row = int(torch.nonzero(~same)[0])
        raise SequenceError(
            f"pair {row} differs in length or prefix length: clean and corrupt must have one shape."
        )
    if not torch.equal(clean.target_ids, corrupt.target_ids):
        row = int(torch.nonzero((clean.target_ids != corrupt.target_ids).any(-1))[0])
        raise SequenceError(
            f"pair {row} has different continuations: corrupt the prefix only (memlens.corrupt)."
        )


def compare_runs(
    result: Result,
    model: Any,
    source: Mapping[str, np.ndarray],
    names: Sequence[str],
    direction: str,
    clean: SequenceSet,
) -> Result:
    """Name the two runs, add the normalized effect of the first metric, and the clean tokens as text."""
    data = result.data
    of_source, of_base = ("clean", "corrupt") if direction == "denoising" else ("corrupt", "clean")
    for name in names:
        dims = ("sequence", "target")[: source[name].ndim]
        data = data.assign({f"{name}_{of_source}": (dims, source[name])})
        data = data.assign({f"{name}_{of_base}": data[f"{name}_baseline"]})
    first = names[0]
    low, high = data[f"{first}_corrupt"], data[f"{first}_clean"]
    span = high - low
    effect = ((data[first] - low) / span.where(span != 0)).rename("normalized_effect")
    data = data.assign(normalized_effect=effect)
    if "position" in data.dims:
        in_sequence = data["position"] < xr.DataArray(clean.lengths.numpy() - 1, dims="sequence")
        data = data.assign({n: data[n].where(in_sequence) for n in (*names, "normalized_effect")})
        labels = token_labels(model, clean.tokens, clean.mask)
        if labels is not None:
            data = data.assign(token=(("sequence", "position"), labels[:, data["position"].values]))
    return Result(data)
