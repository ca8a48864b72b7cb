"""`measure`: the un-intervened numbers, by the same path as a sweep's baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from memlens.models.trunk import Trunk
from memlens.sequences import SequenceSet
from memlens.sequences.checks import check_sequences
from memlens.sweeps.batches import make_batches
from memlens.sweeps.budget import Budget
from memlens.sweeps.engine import Engine
from memlens.sweeps.metrics import MetricLike

__all__ = ["measure"]


@torch.no_grad()
def measure(
    model: Any,
    sequences: SequenceSet,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    *,
    memory_budget: int | None = None,
    batch_size: int | None = None,
) -> dict[str, np.ndarray]:
    """Return each metric of the model as it is, one number a sequence.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        metrics: As for `sweep`.
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
    engine = Engine.of(trunk, sequences, metrics, budget, per_token=False)
    parts = [
        engine.baseline(trunk, b, t).values
        for b, t in make_batches(sequences, budget.batch_size, trunk.device)
    ]
    return {name: torch.cat([p[name] for p in parts]).numpy() for name in parts[0]}
