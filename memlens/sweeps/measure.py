"""`measure`: the un-intervened numbers, by the same path as a sweep's baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memlens.forward.batches import make_batches
from memlens.forward.memory import Budget
from memlens.forward.metrics import MetricLike
from memlens.forward.trunk import Trunk
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sweeps.engine.engine import Engine
from memlens.sweeps.engine.schedule import joined


@torch.no_grad()
def measure(
    model: Any,
    sequences: SequenceSet,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    *,
    per_token: bool = False,
    memory_budget: int | None = None,
    batch_size: int | None = None,
) -> dict[str, np.ndarray]:
    """Return each metric of the unchanged model, one number per sequence (or `[seq, target]`).

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        metrics: As for `sweep`.
        per_token: Keep a `target` axis, NaN after a sequence's last target (built-in metrics only).
        memory_budget: Bytes for activations.
        batch_size: Sequences in a batch.

    Raises:
        EmptySetError: No sequences.
        SequenceError, VocabularyError: A sequence does not fit the model.
        NonFiniteError: The model gives NaN or infinity.
    """
    check_sequences(sequences, model, on_eos="keep")
    trunk = Trunk(model)
    budget = Budget.of(trunk, sequences, memory_budget, batch_size)
    engine = Engine.of(trunk, sequences, metrics, budget, per_token=per_token)
    parts = [
        engine.baseline(trunk, b, t).values
        for b, t in make_batches(sequences, budget.batch_size, trunk.device)
    ]
    return {name: joined([p[name].numpy() for p in parts]) for name in parts[0]}
