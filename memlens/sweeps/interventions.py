"""`Intervention`: a named list of TransformerLens hooks.

Ablation, bypass, patching, knock-outs and a user's own hooks all take this form, and one engine
(`memlens.sweep`) runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor

from memlens.errors import InterventionError
from memlens.forward.batches import Batch
from memlens.forward.hooks import HookFn, at_place, layer_of


@runtime_checkable
class BatchHook(Protocol):
    """A hook that must know which sequences it sees, as patching does.

    Example:
        >>> import torch, memlens as ml
        >>> class AtTargets:
        ...     def bind(self, batch):
        ...         return lambda z, hook: torch.where(batch.predicts[:, :, None, None], 0.0, z)
        >>> isinstance(AtTargets(), ml.BatchHook)
        True
    """

    def bind(self, batch: Batch) -> HookFn:
        """Return the hook function for one batch."""
        ...


@dataclass(frozen=True)
class Reads:
    """A hook function that only reads its activation, as bypass reads the values that it will write.

    It tells the engine that this hook changes nothing, so that the layers around it need not run.
    """

    look: HookFn

    def __call__(self, activation: Tensor, hook: Any) -> None:
        """Pass the activation to the function."""
        self.look(activation, hook)


@dataclass(frozen=True)
class Intervention:
    """A named change of a forward pass.

    Attributes:
        name: What it is called in results and errors.
        hooks: Pairs of a TransformerLens hook name and a function ``fn(activation, hook)`` that returns
            the new activation, or None if it left it unchanged or changed it in place. The engine stacks
            many interventions along the batch; each function sees only its own slice, as if it ran alone.
            Where the change differs by sequence, give a `BatchHook` instead of a function.
        coords: Labels of this intervention along the result's dimensions, such as ``{"layer": 3}``.
        first_position: The first position it changes, if known: the engine then runs interventions at
            similar positions together. It affects the speed, never the result.
        observed: Returns further numbers by name, `[batch]` each, after the hooks have run on a batch: what
            reading hooks have seen. They join the metrics in the result; all interventions of a sweep must
            give the same names.
        checks: Functions of a model that raise an `InterventionError` where the intervention was not made for
            it, as a weight edit is for the weights that it replaces. `sweep` and `applied` call them.

    Example:
        >>> import memlens as ml
        >>> def halve(z, hook):
        ...     return z / 2
        >>> edit = ml.Intervention("halve z of layer 3", hooks=[("blocks.3.attn.hook_z", halve)])
        >>> edit.start_layer
        3
    """

    name: str
    hooks: Sequence[tuple[str, HookFn | BatchHook]]
    coords: Mapping[str, Hashable] = field(default_factory=dict)
    first_position: int = 0
    observed: Callable[[Batch], Mapping[str, Tensor]] | None = None
    checks: Sequence[Callable[[Any], None]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.hooks, str) or not isinstance(self.hooks, Iterable):
            self._refuse(self.hooks)
        object.__setattr__(self, "hooks", tuple(self.hooks))
        for pair in self.hooks:
            match pair:
                case (str(), fn) if callable(fn) or isinstance(fn, BatchHook):
                    pass
                case _:
                    self._refuse(pair)

    def _refuse(self, hook: object) -> NoReturn:
        raise InterventionError(
            f"intervention {self.name!r} holds {hook!r}: hooks are a list of pairs of a hook name and a "
            "function, such as [('blocks.0.hook_mlp_out', fn)]."
        )

    def __repr__(self) -> str:
        places = ", ".join(dict.fromkeys(name for name, _ in self.hooks))
        return f"Intervention({self.name!r}, {len(self.hooks)} hooks: {places})"

    @property
    def start_layer(self) -> int | None:
        """The first layer it touches; None if a hook lies outside the layers."""
        layers = [layer_of(name) for name, _ in self.hooks]
        known = [layer for layer in layers if layer is not None]
        return min(known) if known and len(known) == len(layers) else None

    @property
    def last_layer(self) -> int | None:
        """The last layer it touches; None if a hook lies outside the layers."""
        layers = [layer_of(name) for name, _ in self.hooks]
        return None if self.start_layer is None else max(layer for layer in layers if layer is not None)

    def bound(self, batch: Batch | None) -> list[tuple[str, HookFn]]:
        """Return plain hooks for one batch, whose errors name this intervention.

        Each function receives its activation on the batch's device, wherever its layer is.

        Raises:
            InterventionError: A hook needs to know its sequences and `batch` is None.
        """
        place = None if batch is None else batch.tokens.device
        return [
            (name, self._named(name, at_place(self._plain(name, fn, batch), place)))
            for name, fn in self.hooks
        ]

    def __add__(self, other: Intervention) -> Intervention:
        """Both interventions together, with this one's hooks first."""
        return Intervention(
            f"{self.name} + {other.name}", (*self.hooks, *other.hooks), {**self.coords, **other.coords},
            min(self.first_position, other.first_position), _both(self.observed, other.observed),
            (*self.checks, *other.checks),
        )  # fmt: skip

    def _plain(self, name: str, fn: Any, batch: Batch | None) -> HookFn:
        if not hasattr(fn, "bind"):  # isinstance of a Protocol takes longer than a small hook
            return fn
        if batch is None:
            raise InterventionError(
                f"the hook on {name!r} of intervention {self.name!r} differs by sequence: "
                "run it with memlens.sweep."
            )
        return fn.bind(batch)

    def _named(self, name: str, fn: HookFn) -> HookFn:
        def call(activation: Tensor, hook: Any) -> Any:
            try:
                new = fn(activation, hook=hook)
            except (InterventionError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise InterventionError(
                    f"the hook on {name!r} of intervention {self.name!r} raised "
                    f"{type(error).__name__}: {error}"
                ) from error
            if new is None or (isinstance(new, Tensor) and new.shape == activation.shape):
                return new
            shape = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise InterventionError(
                f"the hook on {name!r} of intervention {self.name!r} returned {shape}: it must return "
                f"a tensor of the activation's shape {tuple(activation.shape)}, or None."
            )

        return call


def _both(
    first: Callable[[Batch], Mapping[str, Tensor]] | None,
    second: Callable[[Batch], Mapping[str, Tensor]] | None,
) -> Callable[[Batch], Mapping[str, Tensor]] | None:
    if first is None or second is None:
        return first or second
    return lambda batch: {**first(batch), **second(batch)}


@dataclass(frozen=True)
class ByBatch:
    """A `BatchHook` from a function that makes the hook function of a batch."""

    make: Callable[[Batch], HookFn]

    def bind(self, batch: Batch) -> HookFn:
        """Return the hook function for one batch."""
        return self.make(batch)


def as_interventions(given: Any) -> list[Intervention]:
    """Return an intervention, or several, as a list.

    Raises:
        InterventionError: There is none, or something is not an intervention.
    """
    some: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    for one in some:
        if not isinstance(one, Intervention):
            raise InterventionError(
                f"{type(one).__name__} is not an edit: give an intervention, as of memlens.edits, or a list "
                "of them."
            )
    if not some:
        raise InterventionError("there is no edit: give at least one.")
    return some
