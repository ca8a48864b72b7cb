"""One teacher-forced pass over a set: what the model predicts at each target token.

Only target positions are unembedded, in chunks that fit the memory budget, and reduced immediately: no tensor
`[sequence, position, vocabulary]` is ever created. Sequences of similar length are batched together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from memlens.errors import UnsupportedModelError
from memlens.forward.memory import check_batch_size, default_budget, fitting, logits_bytes, rows_per_batch
from memlens.forward.metrics import TargetStats, target_stats
from memlens.forward.trunk import Trunk
from memlens.models.checks import nonfinite_error
from memlens.sequences.set import SequenceSet

Reducer = Callable[[Float[Tensor, "target vocab"], Int[Tensor, "target"]], Tensor]
"""From the logits that predict targets, and the targets, to one number per target."""


def teacher_forced_stats(
    model: Any,
    seqs: SequenceSet,
    *,
    batch_size: int | None = None,
    banned: int | None = None,
    progress: bool = True,
) -> TargetStats:
    """Return the statistics of every target token, `[seq, target]`, in the set's order.

    Args:
        model: A TransformerLens model.
        seqs: The set, which has been checked.
        batch_size: Sequences per forward pass; chosen by the memory budget by default.
        banned: A token that decoding may not emit: its logit is taken to be minus infinity everywhere.
        progress: Show a progress bar.

    Raises:
        NonFiniteError: A logit is NaN or infinite; names the first layer and the sequence.
    """
    return teacher_forced(model, seqs, {}, batch_size=batch_size, banned=banned, progress=progress)[0]


def teacher_forced(
    model: Any,
    seqs: SequenceSet,
    extras: Mapping[str, Reducer],
    *,
    batch_size: int | None = None,
    banned: int | None = None,
    progress: bool = True,
) -> tuple[TargetStats, dict[str, Tensor]]:
    """Return the result of `teacher_forced_stats`, and further numbers per target from the same pass.

    Args:
        model: A TransformerLens model.
        seqs: The set, which has been checked.
        extras: By name, functions of a chunk of logits; they may return infinities.
        batch_size: Sequences per forward pass; chosen by the memory budget by default.
        banned: A token that decoding may not emit: its logit is taken to be minus infinity everywhere.
        progress: Show a progress bar.

    Returns:
        The statistics, and each extra as `[seq, target]` with 0 where there is no target.

    Raises:
        NonFiniteError: A logit is NaN or infinite; names the first layer and the sequence.
    """
    check_batch_size(batch_size)
    gather = _target_logits(model)
    device = next(model.parameters()).device
    size = batch_size or rows_per_batch(model.cfg, int(seqs.lengths.max()), device)
    chunk = fitting(logits_bytes(model.cfg.d_vocab), default_budget(device))
    arrays: dict[str, Tensor] = {}
    bar = tqdm(total=len(seqs), desc="scoring", unit="seq", disable=not progress)
    with torch.no_grad(), bar:
        for rows in seqs.lengths.argsort(stable=True).split(size):
            flat = _batch_values(gather, seqs[rows], chunk, banned, extras)
            _check_finite(model, seqs, rows, flat)
            _scatter(flat, seqs, rows, arrays)
            bar.update(len(rows))
    stats = TargetStats(**{f.name: arrays[f.name] for f in fields(TargetStats)})
    return stats, {name: arrays[name] for name in extras}


Gather = Callable[[Int[Tensor, "seq pos"]], Callable[[Tensor, Tensor], Float[Tensor, "target vocab"]]]
"""From tokens to a function from (row, position) pairs to their logits."""


def _target_logits(model: Any) -> Gather:
    try:
        trunk = Trunk(model)
    except UnsupportedModelError:
        return _whole_logits(model)

    def gather(tokens: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        resid = trunk.run(trunk.embed(tokens), 0)
        return lambda row, position: trunk.unembed(resid[row.to(resid.device), position.to(resid.device)])

    return gather


def _whole_logits(model: Any) -> Gather:
    """The same for models that cannot be run layer by layer: the plain forward pass."""

    def gather(tokens: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        logits = model(tokens.to(next(model.parameters()).device))
        return lambda row, position: logits[row.to(logits.device), position.to(logits.device)]

    return gather


def _batch_values(
    gather: Gather, batch: SequenceSet, chunk: int, banned: int | None, extras: Mapping[str, Reducer]
) -> dict[str, Tensor]:
    """Return each number for all targets of the batch, flattened to `[target]`."""
    logits_at = gather(batch.tokens)
    row, column = batch.target_mask.nonzero(as_tuple=True)
    position = batch.target_positions[row, column] - 1
    ids = batch.target_ids[row, column]
    parts = []
    for some_rows, some_positions, some_ids in zip(
        row.split(chunk), position.split(chunk), ids.split(chunk), strict=True
    ):
        logits = logits_at(some_rows, some_positions)
        if banned is not None:
            logits = logits.index_fill(-1, torch.tensor([banned], device=logits.device), float("-inf"))
        every = torch.ones(len(some_ids), 1, dtype=torch.bool)
        stats = target_stats(logits[:, None], some_ids[:, None], every)
        values = {f.name: getattr(stats, f.name)[:, 0] for f in fields(TargetStats)}
        parts.append(values | {name: reduce(logits, some_ids).cpu() for name, reduce in extras.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _check_finite(model: Any, seqs: SequenceSet, rows: Tensor, flat: Mapping[str, Tensor]) -> None:
    finite = torch.isfinite(flat["logprob"]) & torch.isfinite(flat["entropy"])
    if not finite.all():
        place = int((~finite).nonzero()[0])
        owners = rows.repeat_interleave(seqs.n_targets[rows])
        worst = seqs[int(owners[place])]
        raise nonfinite_error(model, worst.tokens)


def _scatter(flat: Mapping[str, Tensor], seqs: SequenceSet, rows: Tensor, into: dict[str, Tensor]) -> None:
    """Write a batch's flattened targets to their places in `[seq, target]` arrays."""
    row, column = seqs.target_mask[rows].nonzero(as_tuple=True)
    for name, values in flat.items():
        if name not in into:
            into[name] = torch.zeros(len(seqs), seqs.max_targets, dtype=values.dtype)
        into[name][rows[row], column] = values
