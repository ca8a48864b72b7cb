"""A model in a wider dtype for a while, and how far a sweep in half precision is from float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memlens.forward.batches import make_batches
from memlens.forward.memory import Budget
from memlens.forward.metrics import MetricLike
from memlens.forward.trunk import Trunk
from memlens.sequences.set import SequenceSet
from memlens.sweeps.engine.engine import Engine
from memlens.sweeps.interventions import Intervention

_SEQUENCES = 4
_INTERVENTIONS = 8


@contextmanager
def in_dtype(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let a model run in a wider dtype for the length of a `with` block.

    The weights are the same numbers, so what differs is rounding on the way. Afterwards the model has its
    own tensors again, not copies cast back. Needs memory for the wider weights beside them.
    """
    tensors = [*model.parameters(), *model.buffers()]
    narrow = [t for t in tensors if t.is_floating_point() and t.dtype.itemsize < dtype.itemsize]
    kept = [(t, t.data) for t in narrow]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "cfg", None)) is not None}.values()
    dtypes = [(c, c.dtype) for c in configs if isinstance(getattr(c, "dtype", None), torch.dtype)]
    try:
        for tensor, data in kept:
            tensor.data = data.to(dtype)
        for config, own in dtypes:
            config.dtype = dtype if own.itemsize < dtype.itemsize else own
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
        for config, own in dtypes:
            config.dtype = own


def in_float32(model: Any) -> AbstractContextManager[None]:
    """Let a model of 16-bit weights run in float32 for the length of a `with` block; see `in_dtype`."""
    return in_dtype(model, torch.float32)


@torch.no_grad()
def agreement_with_float32(
    trunk: Trunk,
    seqs: SequenceSet,
    interventions: Sequence[Intervention],
    metrics: Sequence[MetricLike],
    baseline: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
    *,
    per_token: bool,
) -> dict[str, Any]:
    """Compare some of a sweep's values with plain forwards in float32.

    Args:
        trunk: The model.
        seqs: The sequences of the sweep.
        interventions: Its interventions; up to eight, evenly spread, are run.
        metrics: Its metrics.
        baseline: Its un-intervened values.
        values: Its values, `[seq, intervention, …]`.
        per_token: Whether values have a `target` axis.

    Returns:
        `dtype`, how many `sequences` and `interventions` were compared, and by metric the largest absolute
        difference of values, and of effects (intervened minus baseline).
    """
    items = _spread(len(interventions), _INTERVENTIONS)
    rows = range(min(len(seqs), _SEQUENCES))
    found: dict[str, dict[str, float]] = {}
    with in_float32(trunk.model):
        wide = Trunk(trunk.model)
        budget = Budget.of(wide, seqs, None, len(rows))
        runner = Engine.of(wide, seqs, metrics, budget, per_token=per_token)
        ((batch, targets),) = make_batches(seqs, len(rows), wide.device, rows)
        plain = runner.reference(batch, targets, None)
        wanted = [runner.reference(batch, targets, interventions[i]) for i in items]
    for name, before in plain.items():
        found[name] = _differences(
            baseline[name][: len(rows)],
            values[name][: len(rows)][:, items],
            before,
            torch.stack([w[name] for w in wanted], 1),
        )
    return {
        "dtype": str(trunk.dtype).removeprefix("torch."),
        "sequences": len(rows),
        "interventions": len(items),
        "largest_difference": found,
    }


def _differences(base: np.ndarray, values: np.ndarray, plain: Tensor, wanted: Tensor) -> dict[str, float]:
    width = plain.shape[1:]
    if width:  # a `target` axis, padded to the widest of all sequences
        base, values = base[:, : width[0]], values[..., : width[0]]
    want, before = wanted.numpy().astype(float), plain.numpy().astype(float)
    off = np.abs(values - want)
    effects = np.abs((values - base[:, None]) - (want - before[:, None]))
    return {"value": float(np.nanmax(off)), "effect": float(np.nanmax(effects))}


def _spread(n: int, most: int) -> list[int]:
    """Up to `most` numbers below `n`, evenly spread, first and last among them."""
    return sorted({round(float(i)) for i in np.linspace(0, n - 1, min(n, most))})
