"""`plan`: what a sweep will cost, before it runs."""

from __future__ import annotations

import timeit
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any, cast

import torch

from memlens.errors import EmptySetError
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.capture import run_capturing
from memlens.forward.exclusive import computes
from memlens.forward.hooks import hook_name
from memlens.forward.memory import Budget, budget_of_free, default_budget, position_bytes
from memlens.forward.trunk import Trunk
from memlens.models.families import Shape
from memlens.sequences.set import SequenceSet
from memlens.sweeps.engine.cone import has_shortcut
from memlens.sweeps.engine.entries import Entry, entry_of
from memlens.sweeps.engine.schedule import first_of, portions
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.operators import Operators
from memlens.sweeps.roofline import Device, Roofline, device_for
from memlens.sweeps.shards import cut, part_limit

_BUDGET = 2**34
"""Bytes for activations on a device whose memory is not known."""


def shape_of(model: Any) -> Shape:
    """Return the shape of a loaded model.

    >>> import memlens as ml
    >>> shape_of(ml.load_model("zoo/pythia-s")).n_layers
    6
    """
    return _shape(Trunk(model))


def _shape(trunk: Trunk) -> Shape:
    cfg = trunk.model.cfg
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
        roofline: The least time on another device, and whether it fits there; None unless `on` was given.
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
    roofline: Roofline | None = None

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
            f"{'' if self.roofline is None else f'; {self.roofline}'}"
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
    on: Device | str | None = None,
) -> Plan:
    """Estimate what `sweep` would cost, without running it.

    Args:
        model: A TransformerLens model.
        sequences: What it would run on.
        interventions: What it would run.
        memory_budget: Bytes for activations.
        batch_size: Sequences in a batch.
        calibrate: Time layers and unembedding on a few sequences to estimate the seconds.
        on: Plan for another device, in the model's data type: a name such as "h100-sxm"
            (`memlens.sweeps.roofline.DEVICES`), "here" (this machine's device is measured), or a `Device` of
            your own figures. Everything is counted as the sweep would run there, `roofline` has the least
            time by the roofline, and nothing is calibrated.

    Returns:
        Block-forwards (one layer on one sequence), unembedded positions, operations, bytes and seconds.

    Raises:
        EmptySetError: No sequences.
        OptionError: `on` is not a known device, or the device has no figure for the model's data type.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:4]
        >>> edits = ml.edits.attention_bypasses(model)
        >>> cost = ml.plan(model, seqs, edits, calibrate=False)
        >>> cost.block_forwards, cost.reference_block_forwards
        (84, 168)
        >>> away = ml.plan(model, seqs, edits, on="h100-sxm")
        >>> away.roofline.bound, away.roofline.fits
        ('memory', True)
    """
    trunk = Trunk(model)
    shape, device = _shape(trunk), trunk.device
    if on is not None:
        there = device_for(on, device, trunk.dtype)
        weights = sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())
        return _planned_on(
            there, shape, weights, sequences, interventions, memory_budget, batch_size,
            carries=lambda: _carries(trunk, sequences),
        )  # fmt: skip
    found, count = _planned(
        shape, device, sequences, interventions, memory_budget, batch_size,
        carries=lambda: _carries(trunk, sequences),
    )  # fmt: skip
    return replace(found, expected_seconds=_calibrated(trunk, sequences, count)) if calibrate else found


def plan_shape(
    shape: Shape,
    sequences: SequenceSet,
    interventions: Sequence[Intervention],
    *,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    on: Device | str | None = None,
) -> Plan:
    """Estimate what `sweep` would cost on a GPU with a model of a given shape, which need not be available.

    Arguments and result are those of `plan`, without calibrated seconds. Only the lengths of the sequences
    count, and without interventions the cost is that of the baseline pass. The memory budget is 16 GiB by
    default, or with `on` 40 % of what the device's memory leaves beside the weights (`Shape.n_params`).

    Example:
        >>> import memlens as ml, torch
        >>> from memlens.models.families import find_model
        >>> family, entry = find_model("pythia-6.9b")
        >>> seqs = ml.SequenceSet.from_tokens(torch.zeros((1, 8), dtype=torch.long), 4)
        >>> print(plan_shape(entry.shape, seqs, [], on="h100-sxm").roofline.bound)
        memory
    """
    if on is None:
        there, budget = torch.device("cuda"), budget_on(None) if memory_budget is None else memory_budget
        return _planned(
            shape, there, sequences, interventions, budget, batch_size, carries=lambda: True
        )[0]  # fmt: skip
    return _planned_on(
        device_for_shape(on, shape), shape, shape.n_params * shape.itemsize, sequences, interventions,
        memory_budget, batch_size, carries=lambda: True,
    )  # fmt: skip


def device_for_shape(on: Device | str, shape: Shape) -> Device:
    """Return a device as `memlens.sweeps.roofline.device_for` does, for models of this shape's data type."""
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {2: torch.bfloat16, 4: torch.float32}.get(shape.itemsize, torch.float64)
    return device_for(on, here, dtype)


def budget_on(device: Device | None, weights: int = 0) -> int:
    """Return the bytes that activations may take on a device: 40 % of what the weights leave free on a GPU.

    Of a GPU whose memory is not known, 16 GiB; of a CPU, 1 GiB.
    """
    if device is not None and device.kind == "cpu":
        return default_budget(torch.device("cpu"))
    if device is None or device.memory is None:
        return _BUDGET
    return budget_of_free(device.memory - weights)


def _planned_on(
    device: Device,
    shape: Shape,
    weights: int,
    sequences: SequenceSet,
    interventions: Sequence[Intervention],
    memory_budget: int | None,
    batch_size: int | None,
    *,
    carries: Callable[[], bool],
) -> Plan:
    """Plan for a device by the roofline."""
    device.rate(shape.itemsize)  # refuse before the counting
    budget = budget_on(device, weights) if memory_budget is None else memory_budget
    found, count = _planned(
        shape, torch.device(device.kind), sequences, interventions, budget, batch_size, carries=carries
    )
    joined = shape.itemsize * shape.d_model * (shape.n_heads + 2 * shape.n_kv_heads) * shape.d_head
    line = Roofline.of(count.operators, device, weights=weights, activations=found.bytes + joined)
    return replace(found, roofline=line)


def _planned(
    shape: Shape,
    device: torch.device,
    sequences: SequenceSet,
    interventions: Sequence[Intervention],
    memory_budget: int | None,
    batch_size: int | None,
    *,
    carries: Callable[[], bool],
) -> tuple[Plan, _Count]:
    if len(sequences) == 0:
        raise EmptySetError("there are no sequences to plan for: give at least one.")
    sizes = SimpleNamespace(
        **{f.name: getattr(shape, f.name) for f in fields(shape)},
        d_head=shape.d_head,
        model=SimpleNamespace(cfg=shape),
        device=device,
        dtype=SimpleNamespace(itemsize=shape.itemsize),
    )
    trunk = cast("Trunk", sizes)  # the counting reads sizes only
    budget = Budget.of(trunk, sequences, memory_budget, batch_size)
    count = _Count(shape, carries=carries())
    parts = (sequences[i : i + budget.batch_size] for i in range(0, len(sequences), budget.batch_size))
    for batch, times in Counter(map(_BatchSizes.of, parts)).items():
        one = _Count(shape, carries=count.carries)
        one.batch(batch, interventions, budget)
        one.memory(trunk, batch, budget, interventions)
        count.add(one, times)
    costs = _costs(count, sequences, interventions)
    shards = cut(len(sequences), costs, budget.batch_size, part_limit(device.type))
    unembed = 2 * shape.d_model * shape.d_vocab * count.targets
    found = Plan(
        n_sequences=len(sequences),
        n_interventions=len(interventions),
        block_forwards=count.blocks,
        reference_block_forwards=len(sequences) * shape.n_layers * (1 + len(interventions)),
        block_positions=round(count.positions),
        unembedded_positions=count.targets,
        block_flops=float(count.operators.flops - unembed),
        unembed_flops=float(unembed),
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
    return _costs(_Count(_shape(trunk), carries=fast), seqs, interventions)


def _costs(like: _Count, seqs: SequenceSet, interventions: Sequence[Intervention]) -> list[float]:
    width, asked = (max(1, round(float(n.double().mean()))) for n in (seqs.lengths - 1, seqs.n_targets))
    unembed = 2 * like.shape.d_model * like.shape.d_vocab * asked
    known: dict[Any, float] = {}

    def cost(item: Intervention) -> float:
        entry = entry_of(item) if like.carries else None
        site = entry and (entry.layer, entry.site)
        key = (site, item.start_layer, item.last_layer, item.first_position, _is_alone(item))
        if key not in known:
            count = _Count(like.shape, carries=like.carries)
            count.item(item, width, asked)
            known[key] = float(count.operators.flops + unembed)
        return known[key]

    return [cost(item) for item in interventions]


@dataclass(frozen=True)
class _BatchSizes:
    """What the cost of a batch depends on.

    Attributes:
        size: Sequences.
        width: Tokens of the longest.
        stop: Positions up to this one are computed.
        max_targets: The largest number of targets of a sequence.
        targets: Targets of all sequences.
    """

    size: int
    width: int
    stop: int
    max_targets: int
    targets: int

    @staticmethod
    def of(part: SequenceSet) -> _BatchSizes:
        stop = int(part.target_positions[part.target_mask].max())
        return _BatchSizes(
            len(part), int(part.lengths.max()), stop, part.max_targets, int(part.n_targets.sum())
        )


class _Count:
    """Adds up what the engine will do, by the same rules by which it does it."""

    def __init__(self, shape: Shape, *, carries: bool) -> None:
        self.shape, self.carries = shape, carries
        self.kv_weights = 2 * shape.n_kv_heads * shape.d_head * shape.d_model
        self.mlp_weights = (3 if shape.gated_mlp else 2) * shape.d_mlp * shape.d_model
        self.weights = (
            self.kv_weights + 2 * shape.d_model * shape.n_heads * shape.d_head + self.mlp_weights
        )  # fmt: skip
        self.operators = Operators(shape)
        self.blocks, self.targets = 0, 0
        self.positions = 0.0
        self.load, self.kept, self.working = 0, 0, 0

    def add(self, other: _Count, times: int) -> None:
        """Add another count, so many times."""
        self.operators.add(other.operators, times)
        self.blocks += times * other.blocks
        self.targets += times * other.targets
        self.positions += times * other.positions
        self.kept, self.working = max(self.kept, other.kept), max(self.working, other.working)

    def batch(self, batch: _BatchSizes, interventions: Sequence[Intervention], budget: Budget) -> None:
        """Add one batch of sequences."""
        size, width, stop = batch.size, batch.width, batch.stop
        self._run(self.shape.n_layers, size, size * width, width, own=not self.carries)
        self.targets += batch.targets * (1 + len(interventions))
        for positions in (batch.targets, batch.targets * len(interventions)):
            self.operators.unembed(positions, budget.unembed_rows)
        items = list(enumerate(interventions))
        carried = [x for x in items if self.carries and entry_of(x[1]) is not None]
        names = {i for i, _ in carried}
        for some in portions(carried, size, stop, budget.stack_tokens):
            entering: Counter[tuple[Entry, _Rows]] = Counter()
            for _, item in some:
                entry, first = entry_of(item), first_of(item, stop)
                assert entry is not None
                here = size * (stop - first)
                rows = _Rows(size, here, size * batch.max_targets, stop, first, _is_alone(item))
                entering[entry, rows] += 1
            self.load = max(self.load, sum(n * each.positions for (_, each), n in entering.items()))
            self._carried(entering)
        shortcuts = {e.next_layer() for _, item in carried if _is_alone(item) and (e := entry_of(item))}
        once = sum(has_shortcut(layer, self.shape.n_layers) for layer in shortcuts)
        self.operators.attention(size, size * stop, stop, once)
        self.positions += once * size * stop * (1 - self.mlp_weights / self.weights)
        groups = Counter((item.start_layer, item.last_layer) for i, item in items if i not in names)
        whole = _Rows(size, size * width, size * batch.max_targets, width, 0)
        most = max(1, budget.stack_tokens // (size * width))
        for (first, last), n in groups.items():
            self.load = max(self.load, min(budget.stack_tokens, len(items) * size * width))
            step = 1 if first is None else most
            for copies, times in ((step, n // step), (n % step, 1)):
                if copies and times:
                    one = _Count(self.shape, carries=self.carries)
                    one._stacked(first, last, copies, whole)
                    self.add(one, times)

    def item(self, item: Intervention, width: int, asked: int) -> None:
        """Add one intervention on one sequence; as the reference engine runs it if nothing is carried."""
        entry = entry_of(item)
        if not self.carries:
            self._run(self.shape.n_layers, 1, width, width)
        elif entry is None:
            self._stacked(item.start_layer, item.last_layer, 1, _Rows(1, width, asked, width, 0))
        else:
            positions = max(asked, width - item.first_position)
            self._carried({(entry, _Rows(1, positions, asked, width, 0, _is_alone(item))): 1})

    def _carried(self, entries: Mapping[tuple[Entry, _Rows], int]) -> None:
        """Add a portion of interventions that are carried to the residual."""
        entering: dict[int, Counter[_Rows]] = {}
        mid: Counter[tuple[int, _Rows]] = Counter()
        for (entry, each), n in entries.items():
            entering.setdefault(entry.next_layer(), Counter())[each] += n
            if entry.runs_mlp(self.shape.parallel):
                mid[entry.layer, each] += n
            # the activation is copied and compared, and its change added to the residual
            whole = each.rows * each.keys
            self.operators.copied((4 * whole + 3 * each.changed) * self.shape.d_model, n)
        for (_, each), n in mid.items():
            self.operators.mlp(n * each.changed)
            self.positions += n * each.changed * self.mlp_weights / self.weights
        self._downstream(entering)

    def _stacked(self, first: int | None, last: int | None, copies: int, each: _Rows) -> None:
        """Add interventions with one first and last layer, through which the model's own blocks run."""
        n_layers = self.shape.n_layers
        through = first is None or last is None or not self.carries
        stop = n_layers if through or last is None else last + 1
        self.operators.copied(2 * copies * each.positions * self.shape.d_model)
        self._run(stop - (first or 0), copies * each.rows, copies * each.positions, each.keys)
        if not through:
            self._downstream({stop: Counter({each: copies})})

    def _downstream(self, entering: Mapping[int, Counter[_Rows]]) -> None:
        """Add the layers after some starts: stacks that grow as they pass the layers where others enter."""
        shape = self.shape
        stacks: Counter[_Rows] = Counter()

        def join(some: Mapping[_Rows, int]) -> None:
            for each, new in some.items():
                whole = replace(each, alone=False)
                joined = stacks[whole] + new if stacks[whole] else 0
                self.operators.copied(2 * (new + joined) * each.positions * shape.d_model)
                stacks[whole] += new

        for layer in range(min(entering), shape.n_layers + 1):
            shortcut = has_shortcut(layer, shape.n_layers)
            here = entering.get(layer, Counter())
            changed = Counter({each: n for each, n in here.items() if each.alone and shortcut})
            join(here - changed)
            if layer < shape.n_layers and stacks:
                self._layer(stacks, last=layer == shape.n_layers - 1)
            if changed:
                self._changed(changed)
                join(changed)

    def _changed(self, stacks: Counter[_Rows]) -> None:
        """Add a layer for starts that change one position alone."""
        shape = self.shape
        found = [(n * each.rows, n * each.positions, each.keys) for each, n in stacks.items()]
        self.operators.changed(found, parallel=shape.parallel)
        rows, positions = (sum(stack[i] for stack in found) for i in (0, 1))
        self.blocks += rows
        output = shape.d_model * shape.n_heads * shape.d_head
        everywhere = output + (0 if shape.parallel else self.mlp_weights)
        self.positions += (everywhere * positions + (self.weights - everywhere) * rows) / self.weights

    def _layer(self, stacks: Counter[_Rows], *, last: bool) -> None:
        """Add a layer that runs on stacks together, queried in the last layer where it is asked."""
        found: list[tuple[int, int, int, int | None]] = []
        for each, n in stacks.items():
            asked = min(each.asked, each.positions) if last else each.positions
            self.blocks += n * each.rows
            more = each.positions - asked
            self.positions += n * (asked + more * self.kv_weights / self.weights)
            found.append((n * each.rows, n * each.positions, each.keys, n * asked if last else None))
            if each.first:  # keys and values of the unchanged prefix are repeated, those of the rest appended
                width = 2 * self.shape.n_kv_heads * self.shape.d_head
                repeated = each.first if each.rows > 1 else 0
                self.operators.copied(n * each.rows * width * (repeated + 2 * each.keys))
        self.operators.layer_of(found)

    def _run(self, blocks: int, rows: int, positions: int, keys: int, *, own: bool = True) -> None:
        """Add whole layers: the model's own, or blocks as functions."""
        self.blocks += blocks * rows
        self.positions += blocks * positions
        if blocks:
            self.operators.layer(rows, positions, keys, own=own, times=blocks)

    def memory(
        self, trunk: Trunk, batch: _BatchSizes, budget: Budget, interventions: Sequence[Intervention]
    ) -> None:
        """Find the bytes that a batch keeps and works with, once it was added."""
        item, width = trunk.dtype.itemsize, batch.width
        entries = [e for i in interventions if self.carries and (e := entry_of(i))]
        captured = {name for e in entries for name in e.captured(trunk.parallel)}
        first = min(
            (i.start_layer for i in interventions if i.start_layer is not None), default=trunk.n_layers
        )
        layers = len(captured | {hook_name("resid_pre", n) for n in range(first, trunk.n_layers)}) + 1
        self.kept = max(self.kept, item * batch.size * width * trunk.d_model * layers)
        reduced = max(budget.reduced_rows, batch.max_targets)
        logits = max(item, 4) * trunk.d_vocab * min(budget.unembed_rows + 2 * reduced, self.load)
        self.working = max(self.working, self.load * position_bytes(trunk, width), logits)


def _is_alone(item: Intervention) -> bool:
    """Whether an intervention says that it changes one position: the engine looks at what it does."""
    return item.coords.get("position") == item.first_position


@dataclass(frozen=True)
class _Rows:
    """One copy of a batch under an intervention.

    Attributes:
        rows: Its sequences.
        positions: Positions of all of them that are computed.
        asked: Positions of all of them that are queried in the last layer.
        keys: Keys of a sequence.
        first: Positions of a sequence before the first that is computed.
        alone: Whether the first that is computed is the only one that the intervention changes.
    """

    rows: int
    positions: int
    asked: int
    keys: int
    first: int
    alone: bool = False

    @property
    def changed(self) -> int:
        """Positions of all of them that the intervention may change."""
        return self.rows if self.alone else self.positions


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
