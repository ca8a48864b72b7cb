"""`plan`: what a sweep will cost, before it runs."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any, cast

import torch

from memlens.errors import EmptySetError
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.capture import run_capturing
from memlens.forward.exclusive import computes
from memlens.forward.hooks import hook_name
from memlens.forward.memory import Budget, position_bytes
from memlens.forward.trunk import Trunk
from memlens.models.families import Shape
from memlens.sequences.set import SequenceSet
from memlens.sweeps.engine.entries import entry_of
from memlens.sweeps.engine.schedule import portions
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.shards import cut, part_limit


def shape_of(model: Any) -> Shape:
    """Return the shape of a loaded model.

    >>> import memlens as ml
    >>> shape_of(ml.load_model("zoo/pythia-s")).n_layers
    6
    """
    trunk, cfg = Trunk(model), model.cfg
    return Shape(
        n_layers=trunk.n_layers,
        d_model=trunk.d_model,
        n_heads=trunk.n_heads,
        n_kv_heads=trunk.n_kv_heads,
        d_mlp=getattr(cfg, "d_mlp", None) or 4 * trunk.d_model,
        d_vocab=trunk.d_vocab,
        gated_mlp=bool(getattr(cfg, "gated_mlp", False)),
        parallel=trunk.parallel,
        head_width=trunk.d_head,
        itemsize=trunk.dtype.itemsize,
    )


@dataclass(frozen=True)
class Plan:
    """The cost of a sweep.

    Attributes:
        n_sequences: The number of sequences.
        n_interventions: The number of interventions.
        block_forwards: Layers times sequences that the fast engine runs, including the baseline.
        reference_block_forwards: The same for the reference engine.
        block_positions: Layers times positions that the fast engine runs: a layer that runs on half of the
            positions counts half, and the last layer counts the positions that it is queried for.
        unembedded_positions: Target positions that are unembedded.
        block_flops: Floating-point operations of matrix products in layers.
        unembed_flops: The same of unembedding.
        bytes: Peak memory of activations, not counting the weights.
        expected_seconds: Time, from a short calibration run; None without one.
        n_parts: Number of parts, as a sweep with a folder is cut: most workers that can share it.
        part_flops: Operations of the largest part.
    """

    n_sequences: int
    n_interventions: int
    block_forwards: int
    reference_block_forwards: int
    block_positions: int
    unembedded_positions: int
    block_flops: float
    unembed_flops: float
    bytes: int
    expected_seconds: float | None
    n_parts: int
    part_flops: float

    def __str__(self) -> str:
        share = self.reference_block_forwards / max(1, self.block_forwards)
        seconds = "" if self.expected_seconds is None else f", about {self.expected_seconds:.1f} s"
        return (
            f"{self.n_interventions} interventions on {self.n_sequences} sequences: {self.block_forwards:,} "
            f"block-forwards ({share:.1f} times fewer than one full forward each), "
            f"{self.unembedded_positions:,} positions unembedded, "
            f"{(self.block_flops + self.unembed_flops) / 1e9:,.0f} GFLOP, "
            f"{self.bytes / 2**20:.0f} MiB{seconds}; {self.n_parts:,} parts of up to "
            f"{self.part_flops / 1e9:,.0f} GFLOP in a folder"
        )

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>"


@computes
def plan(
    model: Any,
    sequences: SequenceSet,
    interventions: Sequence[Intervention],
    *,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    calibrate: bool = True,
) -> Plan:
    """Estimate what `sweep` would cost, without running it.

    Args:
        model: A TransformerLens model.
        sequences: What it would run on.
        interventions: What it would run.
        memory_budget: Bytes for activations.
        batch_size: Sequences in a batch.
        calibrate: Time layers and unembedding on a few sequences to estimate the seconds.

    Returns:
        Block-forwards (one layer on one sequence), unembedded positions, operations, bytes and seconds.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:4]
        >>> edits = ml.edits.attention_bypasses(model)
        >>> cost = ml.plan(model, seqs, edits, calibrate=False)
        >>> cost.block_forwards, cost.reference_block_forwards
        (84, 168)
    """
    trunk = Trunk(model)
    found, count = _planned(
        trunk, sequences, interventions, memory_budget, batch_size, carries=lambda: _carries(trunk, sequences)
    )
    return replace(found, expected_seconds=_calibrated(trunk, sequences, count)) if calibrate else found


def plan_shape(
    shape: Shape,
    sequences: SequenceSet,
    interventions: Sequence[Intervention],
    *,
    memory_budget: int = 2**34,
    batch_size: int | None = None,
) -> Plan:
    """Estimate what `sweep` would cost on a GPU with a model of a given shape, which need not be available.

    Arguments and result are those of `plan`, without seconds. Only the lengths of the sequences count, and
    without interventions the cost is that of the baseline pass.
    """
    sizes = SimpleNamespace(
        **{f.name: getattr(shape, f.name) for f in fields(shape)},
        d_head=shape.d_head,
        model=SimpleNamespace(cfg=shape),
        device=torch.device("cuda"),
        dtype=SimpleNamespace(itemsize=shape.itemsize),
    )
    trunk = cast("Trunk", sizes)  # the counting reads sizes only
    return _planned(trunk, sequences, interventions, memory_budget, batch_size, carries=lambda: True)[0]


def _planned(
    trunk: Trunk,
    sequences: SequenceSet,
    interventions: Sequence[Intervention],
    memory_budget: int | None,
    batch_size: int | None,
    *,
    carries: Callable[[], bool],
) -> tuple[Plan, _Count]:
    if len(sequences) == 0:
        raise EmptySetError("there are no sequences to plan for: give at least one.")
    budget = Budget.of(trunk, sequences, memory_budget, batch_size)
    count = _Count(trunk, carries=carries())
    for first in range(0, len(sequences), budget.batch_size):
        count.batch(sequences[first : first + budget.batch_size], interventions, budget)
    costs = intervention_flops(trunk, sequences, interventions, fast=count.carries)
    shards = cut(len(sequences), costs, budget.batch_size, part_limit(trunk.device.type))
    found = Plan(
        n_sequences=len(sequences),
        n_interventions=len(interventions),
        block_forwards=count.blocks,
        reference_block_forwards=len(sequences) * trunk.n_layers * (1 + len(interventions)),
        block_positions=round(count.positions),
        unembedded_positions=count.targets,
        block_flops=count.flops,
        unembed_flops=2.0 * trunk.d_model * trunk.d_vocab * count.targets,
        bytes=count.kept + count.working,
        expected_seconds=None,
        n_parts=len(shards),
        part_flops=max(sum(costs[i] for i in shard.items) * len(shard.rows) for shard in shards),
    )
    return found, count


def intervention_flops(
    trunk: Trunk, seqs: SequenceSet, interventions: Sequence[Intervention], *, fast: bool
) -> list[float]:
    """Return what each intervention costs on a sequence of the set's mean length: FLOP of matrix products."""
    width, asked = (max(1, round(float(n.double().mean()))) for n in (seqs.lengths - 1, seqs.n_targets))
    unembed = 2.0 * trunk.d_model * trunk.d_vocab * asked
    count, costs = _Count(trunk, carries=fast), []
    for item in interventions:
        before = count.flops
        count.item(item, width, asked, whole=not fast)
        costs.append(count.flops - before + unembed)
    return costs


class _Count:
    """Adds up what the engine will do, by the same rules by which it does it."""

    def __init__(self, trunk: Trunk, *, carries: bool) -> None:
        cfg = trunk.model.cfg
        self.trunk, self.carries = trunk, carries
        d_mlp = getattr(cfg, "d_mlp", None) or 4 * trunk.d_model
        kv = 2 * trunk.n_kv_heads * trunk.d_head
        self.kv_weights = kv * trunk.d_model
        self.mlp_weights = (3 if getattr(cfg, "gated_mlp", False) else 2) * d_mlp * trunk.d_model
        self.weights = self.kv_weights + 2 * trunk.d_model * trunk.n_heads * trunk.d_head + self.mlp_weights
        self.blocks, self.targets = 0, 0
        self.positions, self.flops = 0.0, 0.0
        self.kept, self.working = 0, 0

    def batch(self, part: SequenceSet, interventions: Sequence[Intervention], budget: Budget) -> None:
        """Add one batch of sequences."""
        size, width = len(part), int(part.lengths.max())
        targets = part.target_positions[part.target_mask]
        stop, asked = int(targets.max()), size * part.max_targets
        n_layers = self.trunk.n_layers
        self._run(n_layers, size, size * width, width)
        self.targets += int(part.n_targets.sum()) * (1 + len(interventions))
        items = list(enumerate(interventions))
        carried = [x for x in items if self.carries and entry_of(x[1]) is not None]
        names = {i for i, _ in carried}
        load = 0
        for first, some in portions(carried, size, stop, budget.stack_tokens):
            load = max(load, len(some) * size * (stop - first))
            for _, item in some:
                self._carried(item, size, size * (stop - first), asked, stop)
        for i, item in items:
            if i not in names:
                self._stacked(item, size, size * width, asked, width)
                load = max(load, min(budget.stack_tokens, len(items) * size * width))
        self._memory(part, load, budget, interventions)

    def item(self, item: Intervention, width: int, asked: int, *, whole: bool) -> None:
        """Add one intervention on one sequence; `whole`: as the reference engine runs it."""
        if whole:
            self._run(self.trunk.n_layers, 1, width, width)
        elif entry_of(item) is None:
            self._stacked(item, 1, width, asked, width)
        else:
            self._carried(item, 1, max(asked, width - item.first_position), asked, width)

    def _carried(self, item: Intervention, size: int, positions: int, asked: int, keys: int) -> None:
        entry = entry_of(item)
        assert entry is not None
        if entry.runs_mlp(self.trunk.parallel):
            self.flops += 2.0 * positions * self.mlp_weights
            self.positions += positions * self.mlp_weights / self.weights
        self._downstream(entry.next_layer(), size, positions, asked, keys)

    def _stacked(self, item: Intervention, size: int, positions: int, asked: int, keys: int) -> None:
        n_layers = self.trunk.n_layers
        first, last = item.start_layer, item.last_layer
        if first is None or last is None or not self.carries:
            self._run(n_layers - (first or 0), size, positions, keys)
            return
        self._run(last + 1 - first, size, positions, keys)
        self._downstream(last + 1, size, positions, asked, keys)

    def _downstream(self, layer: int, size: int, positions: int, asked: int, keys: int) -> None:
        left = self.trunk.n_layers - layer
        if left <= 0:
            return
        self._run(left - 1, size, positions, keys)
        self._run(1, size, min(asked, positions), keys)
        more = positions - min(asked, positions)
        self.flops += 2.0 * more * self.kv_weights
        self.positions += more * self.kv_weights / self.weights

    def _run(self, blocks: int, size: int, positions: int, keys: int) -> None:
        """Add whole layers: their weights, and scores and mixing over the keys."""
        self.blocks += blocks * size
        self.positions += blocks * positions
        attention = 2 * keys * self.trunk.n_heads * self.trunk.d_head
        self.flops += 2.0 * blocks * positions * (self.weights + attention)

    def _memory(
        self, part: SequenceSet, load: int, budget: Budget, interventions: Sequence[Intervention]
    ) -> None:
        trunk, width = self.trunk, int(part.lengths.max())
        item = trunk.dtype.itemsize
        entries = [e for i in interventions if self.carries and (e := entry_of(i))]
        captured = {name for e in entries for name in e.captured(trunk.parallel)}
        first = min(
            (i.start_layer for i in interventions if i.start_layer is not None), default=trunk.n_layers
        )
        layers = len(captured | {hook_name("resid_pre", n) for n in range(first, trunk.n_layers)}) + 1
        self.kept = max(self.kept, item * len(part) * width * trunk.d_model * layers)
        reduced = max(budget.reduced_rows, part.max_targets)
        logits = max(item, 4) * trunk.d_vocab * min(budget.unembed_rows + 2 * reduced, load)
        self.working = max(self.working, load * position_bytes(trunk, width), logits)


@torch.no_grad()
def _carries(trunk: Trunk, seqs: SequenceSet) -> bool:
    """Whether functional blocks reproduce the model on a few tokens."""
    names = {hook_name("resid_pre", layer): layer for layer in range(trunk.n_layers)}
    final, store = run_capturing(trunk, seqs.tokens[:1, :8], list(names))
    resid = {layer: store[name] for name, layer in names.items()} | {trunk.n_layers: final}
    return FunctionalBlocks.of(trunk, resid) is not None


@torch.no_grad()
def _calibrated(trunk: Trunk, seqs: SequenceSet, count: _Count) -> float:
    rows = min(len(seqs), 16)
    part = seqs[:rows]
    resid = trunk.embed(part.tokens.to(trunk.device))
    block = _fastest(lambda: trunk.run(resid)) / (resid.shape[0] * resid.shape[1] * trunk.n_layers)
    few = resid[:, : min(resid.shape[1], 8)]
    unembed = _fastest(lambda: trunk.unembed(few).logsumexp(-1).sum().item()) / (rows * few.shape[1])
    return count.positions * block + count.targets * unembed


def _fastest(work: Callable[[], Any], repeats: int = 3) -> float:
    def timed() -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return min(timeit.repeat(timed, number=1, repeat=repeats))
