"""The order and the portions in which a sweep's interventions run on its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memlens.errors import InterventionError
from memlens.forward.batches import Batch, make_batches
from memlens.forward.memory import Budget
from memlens.sequences.set import SequenceSet
from memlens.sweeps.engine.engine import Baseline, Engine
from memlens.sweeps.engine.entries import entry_of
from memlens.sweeps.interventions import Intervention

Values = dict[str, Tensor]


def run_batches(
    runner: Engine,
    seqs: SequenceSet,
    costed: Sequence[tuple[float, Intervention]],
    engine: str,
    budget: Budget,
    bar: Any,
    rows: range,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Run all batches; return the baseline `[seq, …]` and values `[seq, intervention, …]` of each metric."""
    base: list[Values] = []
    out: list[list[Values]] = []
    costs, interventions = [cost for cost, _ in costed], [item for _, item in costed]
    for batch, targets in make_batches(seqs, budget.batch_size, runner.trunk.device, rows):
        done: dict[int, Values] = {}
        if engine == "reference":
            base.append(runner.reference(batch, targets, None))
            plain = list(enumerate(interventions))
        else:
            kept = runner.baseline(batch, targets, interventions)
            base.append(kept.values)
            plain = [(i, item) for i, item in enumerate(interventions) if item.start_layer is None]
            finals = _fast(runner, kept, list(enumerate(interventions)), budget)
            for part, final in _gathered(finals, targets.mask.numel(), budget.unembed_rows):
                done |= dict(zip(part, runner.reduced(targets, final), strict=True))
                bar.update(sum(costs[i] for i in part) * len(batch.rows))
        for i, item in plain:
            # without a hook nothing changes, to the last bit
            done[i] = runner.reference(batch, targets, item) if item.hooks else base[-1]
            bar.update(costs[i] * len(batch.rows))
        out.append([done[i] | _observed(item, batch, done[i]) for i, item in enumerate(interventions)])
    _check_names(out, interventions)
    return (
        {n: joined([b[n].numpy() for b in base]) for n in base[0]},
        {n: joined([np.stack([v[n].numpy() for v in row], axis=1) for row in out]) for n in out[0][0]},
    )


def _observed(item: Intervention, batch: Batch, metrics: Values) -> Values:
    """Return what an intervention's reading hooks have seen of a batch."""
    found = {} if item.observed is None else item.observed(batch)
    if not isinstance(found, Mapping):
        raise InterventionError(
            f"intervention {item.name!r} observed {type(found).__name__}: it must be a dictionary of "
            "tensors by name."
        )
    for name, value in found.items():
        if name in metrics:
            raise InterventionError(
                f"intervention {item.name!r} observed {name!r}, which is a metric of the sweep: rename one."
            )
        if not isinstance(value, Tensor) or value.shape != batch.rows.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InterventionError(
                f"intervention {item.name!r} observed {name!r} of shape {shape}: "
                f"it must be ({len(batch.rows)},), one number per sequence."
            )
    return {name: value.detach().float().cpu() for name, value in found.items()}


def _check_names(out: list[list[Values]], interventions: Sequence[Intervention]) -> None:
    for row in out:
        for item, values in zip(interventions, row, strict=True):
            if values.keys() != row[0].keys():
                raise InterventionError(
                    f"interventions {interventions[0].name!r} and {item.name!r} observe different things: "
                    "run them in separate sweeps."
                )


def _fast(
    runner: Engine, base: Baseline, items: Numbered, budget: Budget
) -> Iterator[tuple[Numbered, Tensor]]:
    """Yield portions of interventions with their final residuals; those outside the layers are left out."""
    size = len(base.batch.rows)
    carried = [x for x in items if base.cone is not None and entry_of(x[1]) is not None]
    own = {i for i, _ in carried}
    stacked = [x for x in items if x[0] not in own and x[1].start_layer is not None]
    if base.cone is not None:
        for part in portions(carried, size, base.cone.stop, budget.stack_tokens):
            yield part, _halving(lambda some: _from_starts(runner, base, some), part)
    groups: dict[Any, Numbered] = {}
    for x in stacked:
        groups.setdefault((x[1].start_layer, x[1].last_layer), []).append(x)
    step = max(1, budget.stack_tokens // base.batch.tokens.numel())
    for group in groups.values():
        for i in range(0, len(group), step):
            part = group[i : i + step]
            yield part, _halving(lambda some: runner.stacked(base, [x for _, x in some]), part)


def _from_starts(runner: Engine, base: Baseline, items: Numbered) -> Tensor:
    starts = []
    for _, item in items:
        entry = entry_of(item)
        assert entry is not None
        starts.append(runner.start(base, item, entry))
    return runner.downstream(base, starts)


def _gathered(
    rows: Iterable[tuple[Numbered, Tensor]], each: int, wanted: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Join portions until they fill an unembedding, which reads a large matrix however few the positions."""
    numbers: list[int] = []
    parts: list[Tensor] = []
    for part, final in rows:
        numbers += [i for i, _ in part]
        parts.append(final)
        if len(numbers) * each >= wanted:
            yield numbers, torch.cat(parts)
            numbers, parts = [], []
    if parts:
        yield numbers, torch.cat(parts)


def _halving(run: Callable[[Numbered], Tensor], items: Numbered) -> Tensor:
    """Run a portion; if the device runs out of memory, run its halves."""
    try:
        return run(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(items) // 2
    return torch.cat([_halving(run, items[:half]), _halving(run, items[half:])])


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """Join batches along the sequences; a `target` axis is padded with NaN to the widest."""
    width = max(p.shape[-1] for p in parts)
    if any(p.shape[1:] != parts[0].shape[1:] for p in parts):
        pads = [[(0, 0)] * (p.ndim - 1) + [(0, width - p.shape[-1])] for p in parts]
        parts = [np.pad(p, pad, constant_values=np.nan) for p, pad in zip(parts, pads, strict=True)]
    return np.concatenate(parts)


Numbered = list[tuple[int, Intervention]]
"""Interventions with their place in the user's list."""


def portions(items: Numbered, size: int, stop: int, tokens: int) -> Iterator[Numbered]:
    """Divide interventions, by the layers that they enter, into portions of at most `tokens` positions.

    Args:
        items: Numbered interventions that each change one point.
        size: Sequences in the batch.
        stop: Positions up to this one are computed.
        tokens: The largest number of positions in a portion, over all its rows.
    """
    part: Numbered = []
    load = 0
    for x in sorted(items, key=lambda x: (x[1].start_layer or 0, x[1].first_position)):
        here = size * (stop - first_of(x[1], stop))
        if part and load + here > tokens:
            yield part
            part, load = [], 0
        part.append(x)
        load += here
    if part:
        yield part


def first_of(item: Intervention, stop: int) -> int:
    """Return the first position that an intervention changes, as far as it is known before it runs."""
    return min(item.first_position, stop - 1)
