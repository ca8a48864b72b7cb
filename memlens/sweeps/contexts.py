"""Apply interventions, or another dtype, inside a `with` statement."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from memlens.errors import SilentInterventionError, UnsupportedModelError
from memlens.forward.exclusive import computation, computes, exclusively, kept_of, known_of
from memlens.forward.hooks import HookFn, attached, layer_of
from memlens.forward.trunk import Trunk, has_own_forward
from memlens.sweeps.interventions import Intervention


class EditWatch:
    """Records which hooks ran and which changed their activation, until a hook is known to work."""

    heard: set[str]

    def __init__(self, model: Any, probe_tokens: Tensor) -> None:
        self.model = model
        self.probe_tokens = probe_tokens
        self.heard = known_of(model).setdefault("hooks that are heard", set())
        self._quiet: Tensor | None = None
        self._trunk: Trunk | None = None
        self._points: Mapping[str, Any] = {}
        self.edited: set[str] = set()
        self.fired: set[str] = set()

    def wrap(self, name: str, fn: HookFn) -> HookFn:
        """Return `fn`, watched unless the hook is known to work."""
        if name in self.heard:
            return fn

        def watched(activation: Tensor, hook: Any) -> Any:
            self.fired.add(name)
            before = activation.clone()
            result = fn(activation, hook)
            after = activation if result is None else result
            if not (before.shape == after.shape and torch.equal(before, after)):
                self.edited.add(name)
            return result

        watched.stands_for = fn  # pyright: ignore[reportFunctionMemberAccess]  # see store.fingerprint
        return watched

    def settle(self, names: Iterable[str]) -> None:
        """Check once each hook of `names` that changed its activation.

        Raises:
            SilentInterventionError: A hook never ran, or the model ignores what is written to it.
        """
        for name in names:
            if name in self.heard:
                continue
            if name not in self.fired:
                raise SilentInterventionError(
                    f"the hook {name!r} never ran: this model computes its forward pass without it."
                )
            if name in self.edited:
                if not self._changes_its_layer(name):
                    if self._quiet is None:
                        with torch.no_grad():
                            self._quiet = self.model(self.probe_tokens)
                    check_hook_is_heard(self.model, name, self.probe_tokens, self._quiet)
                self.heard.add(name)

    @torch.no_grad()
    def _changes_its_layer(self, name: str) -> bool:
        """Whether noise written to a hook changes its layer's output; False where only the model can tell."""
        layer = layer_of(name)
        if layer is None or has_own_forward(self.model):
            return False
        if self._trunk is None:
            try:
                self._trunk, self._points = Trunk(self.model), self.model.hook_dict
            except UnsupportedModelError:
                return False
        shape = (1, self.probe_tokens.shape[1], self._trunk.d_model)
        resid = torch.linspace(-1, 1, shape[1] * shape[2], device=self._trunk.device).reshape(shape)
        resid = resid.to(self._trunk.dtype)
        before = self._trunk.run(resid.clone(), layer, layer + 1)
        with attached(self.model, [(self._points[name], _disturb)]):
            after = self._trunk.run(resid.clone(), layer, layer + 1)
        return not torch.equal(before, after)


def _disturb(activation: Tensor, hook: Any) -> Tensor:
    if not activation.is_floating_point():
        return activation
    noise = torch.linspace(0.5, 1.5, activation.numel(), device=activation.device)
    return activation + noise.reshape(activation.shape).to(activation.dtype)


@computes
@torch.no_grad()
def check_hook_is_heard(model: Any, name: str, tokens: Tensor, quiet: Tensor | None = None) -> None:
    """Raise unless noise written to a hook changes at least one bit of the logits.

    Raises:
        SilentInterventionError: Every logit stayed bit-identical.
    """
    before: Tensor = model(tokens) if quiet is None else quiet
    with attached(model, [(name, _disturb)]):
        loud = model(tokens)
    if torch.equal(before, loud):
        raise SilentInterventionError(
            f"writing to the hook {name!r} changes no logit of this model: the intervention would be "
            "ignored, so use another site."
        )


@contextmanager
def applied(model: Any, *interventions: Intervention) -> Iterator[Any]:
    """Apply interventions to a model inside a `with` statement: forward, generation, evaluation.

    Hooks are gone afterwards, also after an exception; another thread that wants to compute with the model
    waits until then. On the bridge they also act inside
    ``model.original_model(...)`` and its ``generate``.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        interventions: What to change, in this order. A hook that differs by sequence (a `BatchHook`) needs
            `sweep`.

    Yields:
        The model.

    Raises:
        SiteError: A hook name that the model does not have.
        InterventionError: An intervention was made for another model.
        SilentInterventionError: On leaving, if the model ignored what a hook wrote.

    Example:
        >>> import memlens as ml, torch
        >>> model = ml.load_model("zoo/pythia-s")
        >>> edit = ml.Intervention("no MLP in 0", [("blocks.0.hook_mlp_out", lambda x, hook: 0 * x)])
        >>> tokens = torch.tensor([[5, 6, 7]])
        >>> plain = model(tokens)
        >>> with ml.applied(model, edit):
        ...     changed = model(tokens)
        >>> bool((changed == plain).all()), bool((model(tokens) == plain).all())
        (False, True)
    """
    hooks = [hook for i in interventions for hook in i.bound(None)]
    device = next(model.parameters()).device
    with computation(model):
        for check in (check for i in interventions for check in i.checks):
            check(model)
        watch = EditWatch(model, torch.arange(4, device=device)[None] % model.cfg.d_vocab)
    with attached(model, [(name, watch.wrap(name, fn)) for name, fn in hooks]):
        yield model
    watch.settle(sorted(watch.fired))


@contextmanager
def in_dtype(model: Any, dtype: torch.dtype, *, narrow: bool = False) -> Iterator[None]:
    """Let a model run in a wider dtype inside a `with` statement, or in a narrower one.

    In a wider dtype the weights keep their values, so only the rounding of activations differs. Afterwards
    the model has its own tensors again, not copies cast back. Both sets of weights are in memory at once.

    Args:
        model: A TransformerLens model.
        dtype: The data type.
        narrow: Round wider weights to `dtype`, and buffers beside them (such as a bias that is none), but
            not other buffers (such as rotations), instead of widening narrower ones.
    """
    with exclusively(model):
        yield from _cast(model, dtype, operator.gt if narrow else operator.lt, alone=not narrow)


def _cast(model: Any, dtype: torch.dtype, off: Callable[[int, int], bool], *, alone: bool) -> Iterator[None]:
    owners = [m for m in model.modules() if alone or next(m.parameters(recurse=False), None) is not None]
    tensors = [*model.parameters(), *{b for owner in owners for b in owner.buffers(recurse=False)}]
    other = [t for t in tensors if t.is_floating_point() and off(t.dtype.itemsize, dtype.itemsize)]
    kept = [(t, t.data) for t in other]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "cfg", None)) is not None}.values()
    dtypes = [(c, c.dtype) for c in configs if isinstance(getattr(c, "dtype", None), torch.dtype)]
    try:
        for tensor, data in kept:
            tensor.data = data.to(dtype)
        for config, own in dtypes:
            config.dtype = dtype if off(own.itemsize, dtype.itemsize) else own
        yield
    finally:
        kept_of(model).clear()  # what was read of the cast weights
        for tensor, data in kept:
            tensor.data = data
        for config, own in dtypes:
            config.dtype = own
