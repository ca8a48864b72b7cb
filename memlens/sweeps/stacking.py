"""Many interventions in one forward: each hook function sees and changes only its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from memlens.models.hooks import HookFn

__all__ = ["NotStackableError", "stacked_hooks"]


class NotStackableError(Exception):
    """A hooked activation does not have the batch as its first axis."""


def stacked_hooks(bound: Sequence[Sequence[tuple[Any, HookFn]]], size: int) -> list[tuple[Any, HookFn]]:
    """Return one hook a point for interventions that stand one after the other along the batch.

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
