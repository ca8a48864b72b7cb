"""The two engines: the plain one, and the fast one that must equal it.

*Reference*: one full `run_with_hooks` forward for each intervention, full logits.

*Fast*: one baseline pass keeps the residual at each block's input; an intervention that first touches
layer ``l`` starts there; interventions of one start layer are stacked along the batch; only positions
that predict a target are unembedded, and reduced at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memlens.errors import NonFiniteError
from memlens.models.hooks import HookFn, attached, capturing, hook_name, resolve_hook
from memlens.models.trunk import Trunk
from memlens.sequences import SequenceSet
from memlens.sweeps.interventions import Batch, Intervention
from memlens.sweeps.silent import EditWatch

__all__ = ["Engine", "Reduce", "Targets"]

Reduce = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""From logits `[seq, target, vocab]`, ids and mask `[seq, target]` to one tensor a metric, `[seq, …]`."""


@dataclass(frozen=True)
class Targets:
    """Where the targets of a batch are predicted, and which they are.

    Attributes:
        positions: Positions of the predicting logits, `[batch, target]`; 0 outside the mask.
        ids: Target ids; 0 outside the mask.
        mask: True where a target stands.
    """

    positions: Tensor
    ids: Tensor
    mask: Tensor


def make_batches(seqs: SequenceSet, size: int, device: torch.device) -> Iterator[tuple[Batch, Targets]]:
    """Cut a set into batches, each padded only to its own longest sequence."""
    for first in range(0, len(seqs), size):
        rows = torch.arange(first, min(first + size, len(seqs)))
        part = seqs[rows]
        width = int(part.lengths.max())
        mask = part.target_mask
        positions = torch.where(mask, part.target_positions - 1, 0)
        predicts = torch.zeros(len(part), width, dtype=torch.bool)
        predicts[torch.arange(len(part))[:, None].expand_as(mask)[mask], positions[mask]] = True
        batch = Batch(
            rows, part.tokens[:, :width].to(device), part.mask[:, :width].to(device), predicts.to(device)
        )
        ids = torch.where(mask, part.target_ids, 0)
        yield batch, Targets(positions.to(device), ids.to(device), mask.to(device))


class Engine:
    """Runs interventions over one batch after another; see the module's docstring.

    Args:
        model: A TransformerLens model.
        reduce: What to make of the logits at target positions.
        stack_rows: Greatest number of rows in one stacked forward.
        unembed_rows: Greatest number of target positions unembedded at a time.
        probe_tokens: A few token ids for the check that hooks are heard.
    """

    def __init__(
        self, model: Any, reduce: Reduce, *, stack_rows: int, unembed_rows: int, probe_tokens: Tensor
    ) -> None:
        self.model, self.reduce = model, reduce
        self.stack_rows, self.unembed_rows = stack_rows, unembed_rows
        self.watch = EditWatch(model, probe_tokens)
        self._points: dict[str, Any] = {}

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
        self, trunk: Trunk, batch: Batch, targets: Targets, layers: Sequence[int]
    ) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """The un-intervened metrics, and the residual at the input of each of `layers`."""
        names = {hook_name("resid_pre", layer): layer for layer in layers}
        with capturing(self.model, list(names), before_hooks=True) as store:
            final = trunk.run(trunk.embed(batch.tokens))
        if not bool(torch.isfinite(final[batch.mask]).all()):
            raise NonFiniteError(_where_not_finite(trunk, batch))
        resid = {layer: store[name] for name, layer in names.items()}
        return self._reduce_final(trunk, final, targets, copies=1), resid

    def stacked(
        self,
        trunk: Trunk,
        batch: Batch,
        targets: Targets,
        resid: Float[Tensor, "batch pos d_model"],
        interventions: Sequence[Intervention],
    ) -> list[dict[str, Tensor]]:
        """Interventions that all start at the layer of `resid`, in one forward along the batch."""
        start = interventions[0].start_layer
        assert start is not None
        bound = [i.bound(batch) for i in interventions]
        try:
            final = self._run_stacked(trunk, start, resid, bound)
        except _NotStackableError:
            return [self.stacked(trunk, batch, targets, resid, [i])[0] for i in interventions]
        self.watch.settle(name for hooks in bound for name, _ in hooks)
        values = self._reduce_final(trunk, final, targets, copies=len(interventions))
        size = len(batch.rows)
        return [
            {m: v[i * size : (i + 1) * size] for m, v in values.items()} for i in range(len(interventions))
        ]

    def _run_stacked(
        self, trunk: Trunk, start: int, resid: Tensor, bound: Sequence[Sequence[tuple[str, HookFn]]]
    ) -> Tensor:
        if len(bound) == 1:
            with attached(self.model, self._watched(bound[0])):
                return trunk.run(resid.clone(), start)
        size = len(resid)
        chains: dict[Any, dict[int, list[HookFn]]] = {}
        for i, hooks in enumerate(bound):
            for point, fn in self._watched(hooks):
                chains.setdefault(point, {}).setdefault(i, []).append(fn)
        hooks = [
            (
                point,
                _on_slices(
                    [(slice(i * size, (i + 1) * size), _chain(fns)) for i, fns in parts.items()],
                    len(bound) * size,
                ),
            )
            for point, parts in chains.items()
        ]
        with attached(self.model, hooks):
            return trunk.run(resid.repeat(len(bound), 1, 1), start)

    def _reduce_final(
        self, trunk: Trunk, final: Tensor, targets: Targets, *, copies: int
    ) -> dict[str, Tensor]:
        """Unembed the target positions of final residuals in portions and reduce them at once."""
        positions, ids, mask = (t.repeat(copies, 1) for t in (targets.positions, targets.ids, targets.mask))
        rows = torch.arange(len(final), device=final.device)[:, None]
        chosen = final[rows, positions]
        step = max(1, self.unembed_rows // max(1, positions.shape[1]))
        parts = [
            self.reduce(trunk.unembed(chosen[i : i + step]), ids[i : i + step], mask[i : i + step])
            for i in range(0, len(chosen), step)
        ]
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def _point(self, name: str) -> Any:
        if name not in self._points:
            self._points[name] = resolve_hook(self.model, name)
        return self._points[name]

    def _watched(self, hooks: Sequence[tuple[str, HookFn]]) -> list[tuple[Any, HookFn]]:
        return [(self._point(name), self.watch.wrap(name, fn)) for name, fn in hooks]


class _NotStackableError(Exception):
    """A hooked activation does not have the batch as its first axis."""


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
            raise _NotStackableError
        new = [(part, fn(activation[part], hook)) for part, fn in parts]
        returned = [(part, value) for part, value in new if value is not None]
        if not returned:
            return None
        out = activation.clone()
        for part, value in returned:
            out[part] = value
        return out

    return call


def _where_not_finite(trunk: Trunk, batch: Batch) -> str:
    resid = trunk.embed(batch.tokens)
    for layer in range(trunk.n_layers):
        if not bool(torch.isfinite(resid[batch.mask]).all()):
            break
        resid = trunk.run(resid, layer, layer + 1)
    else:
        layer = trunk.n_layers
    place = "the embedding" if layer == 0 else f"layer {layer - 1}"
    return f"the residual is NaN or infinite from {place} on: check the weights, or use a wider dtype."
