"""Hooks that draw random numbers: found at their first call, and made reproducible by a seed.

Only functions that do not belong to memlens are looked at. With a seed, the global generators of torch, numpy
and Python start each call of such a hook from (seed, intervention, hook, first row of the batch), whatever
ran before, and go on afterwards as if it had not been called.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memlens.forward.batches import Batch
from memlens.forward.hooks import HookFn
from memlens.sweeps.interventions import BatchHook, ByBatch, Intervention, Reads


def with_watched_draws(interventions: Sequence[Intervention], seed: int | None) -> list[Intervention]:
    """Return the interventions with hooks that are seeded, and warned of if they are random.

    A function is checked at its first call, once for all interventions that share its code: did the global
    generators move, and if they did not, does it give another value for the same activation? The latter costs
    one more call of the function, and only where it changed something.

    Args:
        interventions: Any; those whose functions are all of memlens are returned as they are.
        seed: The seed, or None to leave the generators alone.
    """
    checked: set[Hashable] = set()
    return [_watched(item, number, seed, checked) for number, item in enumerate(interventions)]


def _watched(item: Intervention, number: int, seed: int | None, checked: set[Hashable]) -> Intervention:
    if not any(_is_foreign(fn) for _, fn in item.hooks):
        return item
    hooks = []
    for place, (name, fn) in enumerate(item.hooks):
        watch = partial(_bound, fn=fn, item=item, name=name, key=(number, place), seed=seed, checked=checked)
        hooks.append((name, ByBatch(watch) if _is_foreign(fn) else fn))
    return replace(item, hooks=hooks)


def _bound(
    batch: Batch,
    *,
    fn: HookFn | BatchHook,
    item: Intervention,
    name: str,
    key: tuple[int, int],
    seed: int | None,
    checked: set[Hashable],
) -> HookFn:
    """Return a hook's function for a batch, seeded, and checked at the first call of its code."""
    start = None if seed is None else (seed, *key, int(batch.rows[0]))
    with _started_from(start, batch.tokens.device):
        plain = fn.bind(batch) if isinstance(fn, BatchHook) else fn
    code = _code_of(fn)
    if start is None and code in checked:
        return plain

    def call(activation: Tensor, hook: Any) -> Tensor | None:
        with _started_from(start, activation.device):
            if code in checked:
                return plain(activation, hook=hook)
            checked.add(code)
            before, states = activation.clone(), _states(activation.device)
            returned = plain(activation, hook=hook)
            moved = not _equal(states, _states(activation.device))
        new = activation if returned is None else returned
        if moved and start is None:
            _warn(item, name, "draws random numbers: give sweep a seed=, and its values can be repeated.")
        elif isinstance(new, Tensor) and not _same(before, new):  # the engine refuses anything else
            new = new.clone()
            with _started_from(start, activation.device):
                again = before if (second := plain(before, hook=hook)) is None else second
            if not _same(new, again):
                reached = "" if start is None else ", which seed= does not reach"
                _warn(
                    item, name,
                    "gives two values for one activation: it keeps a state or a generator of its own"
                    f"{reached}. Let it draw from torch's global generator.",
                )  # fmt: skip
        return returned

    return call


def _is_foreign(fn: Any) -> bool:
    """Whether a hook is a function or class that does not belong to memlens; hooks that only read do."""
    while isinstance(fn, partial):
        fn = fn.func
    if isinstance(fn, Reads):
        return False
    if isinstance(fn, ByBatch):
        fn = fn.make
    owner = fn if hasattr(fn, "__code__") or hasattr(fn, "__func__") else type(fn)
    return str(getattr(owner, "__module__", "")).partition(".")[0] != "memlens"


def _code_of(fn: Any) -> Hashable:
    """Return what functions that were made by one definition share."""
    while isinstance(fn, partial):
        fn = fn.func
    if isinstance(fn, ByBatch):
        fn = fn.make
    return getattr(fn, "__code__", None) or type(fn)


@contextmanager
def _started_from(start: tuple[int, ...] | None, device: torch.device) -> Iterator[None]:
    """Seed the global generators inside the `with` statement, and put them back."""
    if start is None:
        yield
        return
    state = np.random.SeedSequence([value % 2**32 for value in start]).generate_state(1, np.uint64)
    number = int(state[0] >> np.uint64(1))
    before, python = np.random.get_state(), random.getstate()  # noqa: NPY002  # the user's hooks may use them
    kind = "cuda" if device.type == "cpu" else device.type
    devices = [] if device.type == "cpu" else [torch.device(device.type, device.index or 0)]
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.manual_seed(number)
        np.random.seed(number % 2**32)  # noqa: NPY002
        random.seed(number)
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002
            random.setstate(python)


def _states(device: torch.device) -> tuple[Any, ...]:
    """Return the states of the global generators."""
    numbers: Any = np.random.get_state()  # noqa: NPY002
    own = () if device.type == "cpu" else (getattr(torch, device.type).get_rng_state(),)
    table = torch.from_numpy(numbers[1].astype(np.int64))
    return (torch.get_rng_state(), *own, table, numbers[2], random.getstate())


def _equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two activations are equal but for what an accelerator's order of summation changes."""
    if a.shape != b.shape:
        return False
    scale = float(a.float().abs().nan_to_num().max()) if a.numel() else 0.0
    return torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-6 * scale, equal_nan=True)


def _warn(item: Intervention, name: str, said: str) -> None:
    warnings.warn(f"the hook on {name!r} of intervention {item.name!r} {said}", UserWarning, stacklevel=2)
