"""The two engines: the plain one, and the fast one that must equal it.

*Reference*: one full `run_with_hooks` forward per intervention, with full logits.

*Fast*: one teacher-forced pass, the baseline, keeps the residual at each layer's input. An intervention
that first touches layer ``l`` starts there, or after ``l`` if its change can be carried through the layer by
itself (`memlens.sweeps.engine.entries`). Interventions are stacked along the batch. Layers that no hook
touches run only where something changed (`memlens.sweeps.engine.cone`), and only positions that predict a
target are unembedded. If the model's blocks have an unknown form, or the user has set hooks, the model's own
blocks run from ``l`` on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memlens.forward.baseline import TeacherForced
from memlens.forward.batches import Batch, Targets, at_targets
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.capture import FunctionalPass
from memlens.forward.hooks import HookFn, attached, hook_name, resolve_hook
from memlens.forward.memory import Budget
from memlens.forward.metrics import MetricLike, make_reduce
from memlens.forward.trunk import Trunk
from memlens.sequences.set import SequenceSet
from memlens.sweeps.contexts import EditWatch
from memlens.sweeps.engine.cone import Cone
from memlens.sweeps.engine.entries import Entry, Start, changed_from, edited, entry_of, start_of
from memlens.sweeps.interventions import Intervention


class NotStackableError(Exception):
    """A hooked activation does not have the batch as its first axis."""


def stacked_hooks(bound: Sequence[Sequence[tuple[Any, HookFn]]], size: int) -> list[tuple[Any, HookFn]]:
    """Return one hook per point for interventions that are stacked along the batch.

    Args:
        bound: Each intervention's points and functions, in order.
        size: Rows of one intervention.
    """
    chains: dict[Any, dict[int, list[HookFn]]] = {}
    for i, hooks in enumerate(bound):
        for point, fn in hooks:
            chains.setdefault(point, {}).setdefault(i, []).append(fn)
    stacked = []
    for point, parts in chains.items():
        slices = [(slice(i * size, (i + 1) * size), _chain(fns)) for i, fns in parts.items()]
        stacked.append((point, _on_slices(slices, len(bound) * size)))
    return stacked


def _chain(fns: Sequence[HookFn]) -> HookFn:
    """Chain the functions of one intervention on one hook: each receives what the one before returned."""

    def call(activation: Tensor, hook: Any) -> Tensor | None:
        value, changed = activation, False
        for fn in fns:
            new = fn(value, hook)
            value, changed = (value, changed) if new is None else (new, True)
        return value if changed else None

    return call


def _on_slices(parts: Sequence[tuple[slice, HookFn]], rows: int) -> HookFn:
    """Return one hook in which each function sees and changes only its own rows.

    A function that changes its activation in place affects whatever else reads it, as it does when it runs
    alone; a function that returns a new activation does not.
    """

    def call(activation: Tensor, hook: Any) -> Tensor | None:
        if activation.shape[0] != rows:
            raise NotStackableError
        new = [(part, fn(activation[part], hook)) for part, fn in parts]
        returned = [(part, value) for part, value in new if value is not None]
        if not returned:
            return None
        out = activation.clone()
        for part, value in returned:
            out[part] = value
        return out

    return call


@dataclass(frozen=True)
class Baseline:
    """A batch without interventions.

    Attributes:
        batch: The sequences.
        targets: Their targets.
        values: The metrics.
        resid: The residual at the input of layers (`n_layers`: after the last).
        acts: The activations that interventions change or read.
        cone: Runs functional blocks on what changes; None if the model's own blocks must run.
    """

    batch: Batch
    targets: Targets
    values: dict[str, Tensor]
    resid: dict[int, Tensor]
    acts: dict[str, Tensor]
    cone: Cone | None


class Engine:
    """Runs interventions over one batch after another; see the module's docstring.

    Args:
        forward: The teacher-forced pass, and the metrics.
        trunk: The model by layers.
        probe_tokens: A few token ids for the check that hooks are heard.
    """

    forward: TeacherForced
    trunk: Trunk
    model: Any
    watch: EditWatch

    def __init__(self, forward: TeacherForced, trunk: Trunk, *, probe_tokens: Tensor) -> None:
        self.forward, self.trunk, self.model = forward, trunk, trunk.model
        self.watch = EditWatch(trunk.model, probe_tokens)
        self._points: dict[str, Any] = {}
        self._blocks: FunctionalBlocks | None = None
        self._pass: FunctionalPass | None = None
        self._width, self._first = 0, 0  # what the blocks cover

    @staticmethod
    def of(
        trunk: Trunk, seqs: SequenceSet, metrics: Sequence[MetricLike], budget: Budget, *, per_token: bool
    ) -> Engine:
        """Return an engine that measures these metrics within a budget."""
        forward = TeacherForced.of(trunk, make_reduce(metrics, per_token=per_token), budget)
        tokens = seqs.tokens[:1, :4].to(trunk.device)
        return Engine(forward, trunk, probe_tokens=tokens)

    def reference(
        self, batch: Batch, targets: Targets, intervention: Intervention | None
    ) -> dict[str, Tensor]:
        """Return the metrics of one plain forward with one intervention's hooks, or without any."""
        hooks = [] if intervention is None else intervention.bound(batch)
        with attached(self.model, self._watched(hooks)):
            logits = self.model(batch.tokens)
        self.watch.settle(name for name, _ in hooks)
        return self.forward.reduce(at_targets(logits, targets), targets.ids, targets.mask)

    def baseline(
        self, batch: Batch, targets: Targets, interventions: Sequence[Intervention] = ()
    ) -> Baseline:
        """Run a batch unchanged, and keep the activations that the interventions need."""
        trunk = self.trunk
        starts = [i.start_layer for i in interventions if i.start_layer is not None]
        layers = range(min(starts, default=trunk.n_layers), trunk.n_layers)
        wanted = {n for i in interventions if (e := entry_of(i)) for n in e.captured(trunk.parallel)}
        names = {hook_name("resid_pre", layer): layer for layer in layers}
        if all(i.start_layer is None or entry_of(i) for i in interventions):
            batch = replace(batch, by=self._functional(batch, sorted(wanted)))
        final, acts = self.forward.run(batch, sorted({*names, *wanted}), by=batch.by)
        resid = {layer: acts[name] for name, layer in names.items()} | {trunk.n_layers: final}
        cone = self._cone(resid, batch, targets)
        values = self.reduced(targets, at_targets(final, targets))[0]
        return Baseline(batch, targets, values, resid, {name: acts[name] for name in wanted}, cone)

    def _functional(self, batch: Batch, names: Sequence[str]) -> FunctionalPass | None:
        """Return the pass by functions for a batch whose interventions all enter at one point."""
        had, self._pass = self._pass, None
        make = FunctionalPass.of if had is None else had.of_model
        self._pass = make(self.trunk, batch.tokens, names)
        if self._pass is not None:
            self._blocks, self._width, self._first = self._pass.blocks, self._pass.width, 0
        return self._pass

    def _cone(self, resid: dict[int, Tensor], batch: Batch, targets: Targets) -> Cone | None:
        width, first = resid[self.trunk.n_layers].shape[1], min(resid)
        if width > self._width or first < self._first:
            self._blocks = FunctionalBlocks.of(self.trunk, {n: r[:1] for n, r in resid.items()})
            self._width, self._first = width, first
        if self._blocks is None:
            return None
        stop = int(torch.nonzero(batch.predicts.any(0)).max()) + 1
        return Cone(self._blocks, resid, targets.positions, stop)

    def start(self, base: Baseline, intervention: Intervention, entry: Entry) -> Start | None:
        """Evaluate an intervention at one point on the baseline; None if it changes nothing."""
        assert base.cone is not None
        hooks = [
            (name, self._point(name), self.watch.wrap(name, fn))
            for name, fn in intervention.bound(base.batch)
        ]
        new = edited(hooks, entry, base.acts)
        self.watch.settle(name for name, _, _ in hooks)
        return start_of(entry, new, base.acts, base.resid, base.cone.blocks, base.cone.stop)

    def downstream(self, base: Baseline, starts: Sequence[Start | None]) -> Tensor:
        """Return the final residuals that follow from some starts, `[start * batch, target, d_model]`.

        For a start of None they are the baseline's.
        """
        assert base.cone is not None
        changed = [s for s in starts if s is not None]
        if len(changed) == len(starts):
            return base.cone.final(changed)
        each = iter(base.cone.final(changed).chunk(len(changed)) if changed else ())
        own = at_targets(base.resid[base.cone.n_layers], base.targets)
        return torch.cat([own if s is None else next(each) for s in starts])

    def stacked(self, base: Baseline, interventions: Sequence[Intervention]) -> Tensor:
        """Return the same for interventions with one first and last layer, stacked along the batch."""
        first, last = interventions[0].start_layer, interventions[0].last_layer
        assert first is not None
        assert last is not None
        bound = [i.bound(base.batch) for i in interventions]
        stop = self.trunk.n_layers if base.cone is None else last + 1
        try:
            out = self._run_stacked(first, stop, base.resid[first], bound)
        except NotStackableError:
            return torch.cat([self.stacked(base, [i]) for i in interventions])
        self.watch.settle(name for hooks in bound for name, _ in hooks)
        if base.cone is None or stop == self.trunk.n_layers:
            return at_targets(out, base.targets)
        old = base.resid[stop][:, : base.cone.stop]
        parts = out[:, : base.cone.stop].chunk(len(bound))
        return self.downstream(base, [changed_from(stop, old, part) for part in parts])

    def _run_stacked(
        self, start: int, stop: int, resid: Tensor, bound: Sequence[Sequence[tuple[str, HookFn]]]
    ) -> Tensor:
        if len(bound) == 1:
            with attached(self.model, self._watched(bound[0])):
                return self.trunk.run(resid.clone(), start, stop)
        hooks = stacked_hooks([self._watched(hooks) for hooks in bound], len(resid))
        with attached(self.model, hooks):
            return self.trunk.run(resid.repeat(len(bound), 1, 1), start, stop)

    def reduced(self, targets: Targets, rows: Float[Tensor, "row target d_model"]) -> list[dict[str, Tensor]]:
        """Return the metrics of final residuals, one dictionary per copy of the batch."""
        return self.forward.reduced(targets, rows, self._blocks and self._blocks.unembed)

    def _point(self, name: str) -> Any:
        if name not in self._points:
            self._points[name] = resolve_hook(self.model, name)
        return self._points[name]

    def _watched(self, hooks: Sequence[tuple[str, HookFn]]) -> list[tuple[Any, HookFn]]:
        return [(self._point(name), self.watch.wrap(name, fn)) for name, fn in hooks]
