"""The two engines: the plain one, and the fast one that must equal it.

*Reference*: one full `run_with_hooks` forward for each intervention, full logits.

*Fast*: one baseline pass keeps the residual at each block's input; an intervention that first touches
layer ``l`` starts there, or after ``l`` where its edit can be carried through the block by itself
(`memlens.sweeps.engine.entries`); interventions are stacked along the batch; blocks that no hook touches run
only where something changed (`memlens.sweeps.engine.cone`); only positions that predict a target are
unembedded, and reduced at once. Where the model's blocks have a form that is not known, or a user's own
hooks listen, every block from ``l`` on is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memlens.forward.batches import Batch, Targets, at_targets, logits_at
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.hooks import HookFn, attached, capturing, hook_name, resolve_hook
from memlens.forward.memory import Budget
from memlens.forward.metrics import MetricLike, make_reduce
from memlens.forward.trunk import Trunk
from memlens.models.checks import nonfinite_error
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
    return [
        (
            point,
            _on_slices(
                [(slice(i * size, (i + 1) * size), _chain(fns)) for i, fns in parts.items()],
                len(bound) * size,
            ),
        )
        for point, parts in chains.items()
    ]


def _chain(fns: Sequence[HookFn]) -> HookFn:
    """Several functions of one intervention on one hook, each seeing what the one before gave."""

    def call(activation: Tensor, hook: Any) -> Tensor | None:
        value, changed = activation, False
        for fn in fns:
            new = fn(value, hook)
            value, changed = (value, changed) if new is None else (new, True)
        return value if changed else None

    return call


def _on_slices(parts: Sequence[tuple[slice, HookFn]], rows: int) -> HookFn:
    """One hook that lets each function see and change only its own rows.

    A function that edits in place reaches whatever else reads the activation, as it does when it runs
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


Reduce = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""From logits `[seq, target, vocab]`, ids and mask `[seq, target]` to one tensor a metric, `[seq, …]`."""


@dataclass(frozen=True)
class Baseline:
    """One batch as it is.

    Attributes:
        batch: The sequences.
        targets: Their targets.
        values: The un-intervened metrics.
        resid: The residual at the input of blocks (`n_layers`: after the last).
        acts: The activations that interventions edit or read.
        cone: The unhooked blocks on what changes; None where the model's own must run.
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
        model: A TransformerLens model.
        reduce: What to make of the logits at target positions.
        chunk_tokens: Greatest number of positions that run through a block at a time.
        unembed_rows: Greatest number of target positions unembedded at a time.
        reduced_rows: Greatest number of target positions reduced at a time.
        probe_tokens: A few token ids for the check that hooks are heard.
    """

    model: Any
    reduce: Reduce
    chunk_tokens: int
    unembed_rows: int
    reduced_rows: int
    watch: EditWatch

    def __init__(
        self,
        model: Any,
        reduce: Reduce,
        *,
        chunk_tokens: int,
        unembed_rows: int,
        reduced_rows: int,
        probe_tokens: Tensor,
    ) -> None:
        self.model, self.reduce, self.chunk_tokens = model, reduce, chunk_tokens
        self.unembed_rows, self.reduced_rows = unembed_rows, reduced_rows
        self.watch = EditWatch(model, probe_tokens)
        self._points: dict[str, Any] = {}
        self._blocks: FunctionalBlocks | None = None
        self._width, self._first = 0, 0  # what the blocks cover

    @staticmethod
    def of(
        trunk: Trunk, seqs: SequenceSet, metrics: Sequence[MetricLike], budget: Budget, *, per_token: bool
    ) -> Engine:
        """An engine that measures these metrics within a budget."""
        return Engine(
            trunk.model, make_reduce(metrics, per_token=per_token), chunk_tokens=budget.chunk_tokens,
            unembed_rows=budget.unembed_rows, reduced_rows=budget.reduced_rows,
            probe_tokens=seqs.tokens[:1, :4].to(trunk.device),
        )  # fmt: skip

    def reference(
        self, batch: Batch, targets: Targets, intervention: Intervention | None
    ) -> dict[str, Tensor]:
        """One plain forward with one intervention's hooks (None: without any)."""
        hooks = [] if intervention is None else intervention.bound(batch)
        with attached(self.model, self._watched(hooks)):
            logits = self.model(batch.tokens)
        self.watch.settle(name for name, _ in hooks)
        rows = torch.arange(len(batch.rows), device=logits.device)[:, None]
        return self.reduce(logits[rows, targets.positions], targets.ids, targets.mask)

    def baseline(
        self, trunk: Trunk, batch: Batch, targets: Targets, interventions: Sequence[Intervention] = ()
    ) -> Baseline:
        """Run a batch as it is, and keep what the interventions need of it."""
        starts = [i.start_layer for i in interventions if i.start_layer is not None]
        layers = range(min(starts, default=trunk.n_layers), trunk.n_layers)
        wanted = {n for i in interventions if (e := entry_of(i)) for n in e.captured(trunk.parallel)}
        names = {hook_name("resid_pre", layer): layer for layer in layers}
        with capturing(self.model, sorted({*names, *wanted}), before_hooks=True) as store:
            final = trunk.run(trunk.embed(batch.tokens))
        if not bool(torch.isfinite(final[batch.mask]).all()):
            raise nonfinite_error(self.model, batch.tokens)
        resid = {layer: store[name] for name, layer in names.items()} | {trunk.n_layers: final}
        cone = self._cone(trunk, resid, batch, targets)
        values = self.reduced(trunk, targets, at_targets(final, targets))[0]
        return Baseline(batch, targets, values, resid, {name: store[name] for name in wanted}, cone)

    def _cone(self, trunk: Trunk, resid: dict[int, Tensor], batch: Batch, targets: Targets) -> Cone | None:
        width, first = resid[trunk.n_layers].shape[1], min(resid)
        if width > self._width or first < self._first:
            self._blocks = FunctionalBlocks.of(trunk, {n: r[:1] for n, r in resid.items()})
            self._width, self._first = width, first
        if self._blocks is None:
            return None
        stop = int(torch.nonzero(batch.predicts.any(0)).max()) + 1
        return Cone(self._blocks, resid, targets.positions, stop, self.chunk_tokens)

    def start(self, base: Baseline, intervention: Intervention, entry: Entry) -> Start | None:
        """Evaluate an intervention that edits one point on the baseline; None where it changes nothing.

        Raises:
            NotCarriedError: The edit has another shape than the activation.
        """
        assert base.cone is not None
        hooks = [
            (name, self._point(name), self.watch.wrap(name, fn))
            for name, fn in intervention.bound(base.batch)
        ]
        new = edited(hooks, entry, base.acts)
        self.watch.settle(name for name, _, _ in hooks)
        if new.shape != base.acts[entry.name].shape:
            raise NotCarriedError
        return start_of(entry, new, base.acts, base.resid, base.cone.blocks, base.cone.stop)

    def downstream(self, base: Baseline, starts: Sequence[Start | None]) -> Tensor:
        """The final residuals that follow from some starts, `[start * batch, target, d_model]`.

        Where a start is None they are the baseline's.
        """
        assert base.cone is not None
        changed = [s for s in starts if s is not None]
        if len(changed) == len(starts):
            return base.cone.final(changed)
        each = iter(base.cone.final(changed).chunk(len(changed)) if changed else ())
        own = at_targets(base.resid[base.cone.n_layers], base.targets)
        return torch.cat([own if s is None else next(each) for s in starts])

    def stacked(self, trunk: Trunk, base: Baseline, interventions: Sequence[Intervention]) -> Tensor:
        """The same for interventions of one first and last layer, in one forward along the batch."""
        first, last = interventions[0].start_layer, interventions[0].last_layer
        assert first is not None
        assert last is not None
        bound = [i.bound(base.batch) for i in interventions]
        stop = trunk.n_layers if base.cone is None else last + 1
        try:
            out = self._run_stacked(trunk, first, stop, base.resid[first], bound)
        except NotStackableError:
            return torch.cat([self.stacked(trunk, base, [i]) for i in interventions])
        self.watch.settle(name for hooks in bound for name, _ in hooks)
        if base.cone is None or stop == trunk.n_layers:
            return at_targets(out, base.targets)
        old = base.resid[stop][:, : base.cone.stop]
        parts = out[:, : base.cone.stop].chunk(len(bound))
        return self.downstream(base, [changed_from(stop, old, part) for part in parts])

    def _run_stacked(
        self,
        trunk: Trunk,
        start: int,
        stop: int,
        resid: Tensor,
        bound: Sequence[Sequence[tuple[str, HookFn]]],
    ) -> Tensor:
        if len(bound) == 1:
            with attached(self.model, self._watched(bound[0])):
                return trunk.run(resid.clone(), start, stop)
        hooks = stacked_hooks([self._watched(hooks) for hooks in bound], len(resid))
        with attached(self.model, hooks):
            return trunk.run(resid.repeat(len(bound), 1, 1), start, stop)

    def reduced(
        self, trunk: Trunk, targets: Targets, rows: Float[Tensor, "row target d_model"]
    ) -> list[dict[str, Tensor]]:
        """Unembed final residuals in portions and reduce them at once; one dictionary a batch of rows."""
        copies = len(rows) // len(targets.ids)
        ids, mask = (t.repeat(copies, 1) for t in (targets.ids, targets.mask))
        step, few = (max(1, n // max(1, ids.shape[1])) for n in (self.unembed_rows, self.reduced_rows))
        unembed = trunk.unembed if self._blocks is None else self._blocks.unembed
        parts = []
        for some in torch.arange(len(rows)).split(step):
            logits = logits_at(unembed, rows[some], mask[some])
            each = zip(logits.split(few), ids[some].split(few), mask[some].split(few), strict=True)
            parts += [self.reduce(*part) for part in each]
        values = {name: torch.cat([p[name] for p in parts]).chunk(copies) for name in parts[0]}
        return [{name: value[i] for name, value in values.items()} for i in range(copies)]

    def _point(self, name: str) -> Any:
        if name not in self._points:
            self._points[name] = resolve_hook(self.model, name)
        return self._points[name]

    def _watched(self, hooks: Sequence[tuple[str, HookFn]]) -> list[tuple[Any, HookFn]]:
        return [(self._point(name), self.watch.wrap(name, fn)) for name, fn in hooks]


class NotCarriedError(Exception):
    """An edit cannot be carried to the residual by itself: its block has to run."""
