"""`plan`: what a sweep will cost, before it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memlens.errors import EmptySetError
from memlens.models.trunk import Trunk
from memlens.sequences import SequenceSet
from memlens.sweeps.interventions import Intervention

__all__ = ["Budget", "Plan", "plan"]

_DEFAULT_CPU_BYTES = 2**30
_FREE_SHARE = 0.4
_WELL_FILLED = 4096
"""On a processor a larger stack gains nothing and leaves its caches."""


@dataclass(frozen=True)
class Budget:
    """How much is run at a time.

    Attributes:
        bytes: What the activations of one stacked forward may take.
        batch_size: Sequences in a batch.
        stack_tokens: Positions (of all sequences and interventions) in one stacked forward.
        chunk_tokens: Positions that run through a block at a time.
        unembed_rows: Target positions unembedded at a time.
    """

    bytes: int
    batch_size: int
    stack_tokens: int
    chunk_tokens: int
    unembed_rows: int

    @staticmethod
    def of(trunk: Trunk, seqs: SequenceSet, memory_budget: int | None, batch_size: int | None) -> Budget:
        """Cut a memory budget (bytes) into sizes; by default 1 GiB, or 40 % of a GPU's free memory."""
        total = memory_budget or _default_bytes(trunk.device)
        width = int(seqs.lengths.max())
        item = trunk.dtype.itemsize
        d_mlp = getattr(trunk.model.cfg, "d_mlp", None) or 4 * trunk.d_model
        position = item * (20 * trunk.d_model + 2 * d_mlp + 2 * trunk.n_heads * width)
        kept = item * width * trunk.d_model * 4 * trunk.n_layers
        logits = 5 * max(item, 4) * trunk.d_vocab
        tokens = max(
            1, min(int(total * 0.6) // position, _WELL_FILLED if trunk.device.type == "cpu" else 2**31)
        )
        rows = max(1, tokens // width)
        size = batch_size or max(1, min(len(seqs), 64, rows, int(total * 0.25) // kept))
        return Budget(total, size, max(tokens, size * width), tokens, max(1, int(total * 0.15) // logits))


def _default_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _FREE_SHARE)
    return _DEFAULT_CPU_BYTES


@dataclass(frozen=True)
class Plan:
    """The cost of a sweep.

    Attributes:
        n_sequences: Sequences.
        n_interventions: Interventions.
        block_forwards: Blocks times sequences that the fast engine runs (the baseline included).
        reference_block_forwards: The same for the reference engine.
        unembedded_positions: Target positions that are unembedded.
        bytes: Memory budget for activations.
        expected_seconds: Time, from a short calibration run; None without one.
    """

    n_sequences: int
    n_interventions: int
    block_forwards: int
    reference_block_forwards: int
    unembedded_positions: int
    bytes: int
    expected_seconds: float | None

    def __str__(self) -> str:
        share = self.reference_block_forwards / max(1, self.block_forwards)
        seconds = "" if self.expected_seconds is None else f", about {self.expected_seconds:.1f} s"
        return (
            f"{self.n_interventions} interventions on {self.n_sequences} sequences: {self.block_forwards:,} "
            f"block-forwards ({share:.1f} times fewer than one full forward each), "
            f"{self.unembedded_positions:,} positions unembedded, {self.bytes / 2**20:.0f} MiB{seconds}"
        )


def plan(
    model: Any,
    sequences: SequenceSet,
    interventions: Sequence[Intervention],
    *,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    calibrate: bool = True,
) -> Plan:
    """Say what `sweep` would cost, without running it.

    Args:
        model: A TransformerLens model.
        sequences: What it would run on.
        interventions: What it would run.
        memory_budget: Bytes for activations.
        batch_size: Sequences in a batch.
        calibrate: Time one block and one unembedding on a few sequences to estimate the seconds.

    Returns:
        Block-forwards (one block on one sequence), unembedded positions, bytes and expected seconds.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:4]
        >>> edits = [ml.bypass_intervention(model, [layer]) for layer in range(6)]
        >>> cost = ml.plan(model, seqs, edits, calibrate=False)
        >>> cost.block_forwards, cost.reference_block_forwards
        (108, 168)
    """
    if len(sequences) == 0:
        raise EmptySetError("there are no sequences to plan for: give at least one.")
    trunk = Trunk(model)
    n, layers = len(sequences), trunk.n_layers
    budget = Budget.of(trunk, sequences, memory_budget, batch_size)
    blocks = n * (layers + sum(layers - (i.start_layer or 0) for i in interventions))
    targets = int(sequences.n_targets.sum()) * (1 + len(interventions))
    seconds = _calibrated(trunk, sequences, budget, blocks, targets) if calibrate else None
    return Plan(
        n, len(interventions), blocks, n * layers * (1 + len(interventions)), targets, budget.bytes, seconds
    )


@torch.no_grad()
def _calibrated(trunk: Trunk, seqs: SequenceSet, budget: Budget, blocks: int, targets: int) -> float:
    rows = min(len(seqs), 16)
    part = seqs[:rows]
    resid = trunk.embed(part.tokens.to(trunk.device))
    block = _fastest(lambda: trunk.run(resid)) / (rows * trunk.n_layers)
    few = resid[:, : min(resid.shape[1], 8)]
    unembed = _fastest(lambda: trunk.unembed(few).logsumexp(-1).sum().item()) / (rows * few.shape[1])
    return blocks * block + targets * unembed


def _fastest(work: Any, repeats: int = 3) -> float:
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
