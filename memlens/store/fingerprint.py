"""A short name for what a sweep was run on, so that a saved part is never taken for another sweep's.

Two things have one fingerprint where their contents are equal: weights, token ids, a hook function's code
with everything it closes over, names, numbers. Where an object keeps caches, its ``__getstate__`` says
what counts.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
import types
from collections.abc import Iterator, Mapping, Set
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memlens.forward.trunk import Trunk
from memlens.models.provenance import describe
from memlens.sequences.set import SequenceSet

_LOG = logging.getLogger(__name__)
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_BY_REPR = (torch.dtype, torch.device, np.dtype, np.generic, PurePath, range, slice, type(...))
_LIBRARIES = {"torch", "numpy", "pandas", "xarray", "transformers", "transformer_lens", "memlens", "scipy"}
_ABOUT = ("architecture", "backend", "dtype", "processed_weights", "transformer_lens")
_CHUNK = 2**22


def fingerprint(value: Any, model: Any = None) -> str:
    """Return a hexadecimal name of anything that an intervention or a metric is made of.

    A function's name is made of its code, defaults, what it closes over and the global values and functions
    that it names; an object's of its class and its state. What has no readable state (an open file, an
    extension's object) counts by its type alone, with a warning in the log.

    Args:
        value: Tensors, arrays, functions, dataclasses, containers and plain values.
        model: The swept model: it is named for itself (`model_fingerprint`) and not gone into.

    Example:
        >>> def halve(z, hook, by=2):
        ...     return z / by
        >>> by_three = functools.partial(halve, by=3)
        >>> fingerprint(halve) == fingerprint(halve), fingerprint(halve) == fingerprint(by_three)
        (True, False)
    """
    return _Digest(model).of(value).hex()


def sequences_fingerprint(seqs: SequenceSet) -> str:
    """Return the name of a set: its ids, which of them are real, and where continuations begin."""
    return _Digest(None).of(seqs).hex()


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """Return the name of a model: every weight, its architecture, and the hooks that stand on it.

    Weights are read where they are, at the speed of memory: a sum of their bits, weighted by place, modulo
    :math:`2^{64}`, which any change of a single number changes.
    """
    facts = {name: fact for name, fact in describe(model).items() if name in _ABOUT}
    weights = {name: _bits(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    points: Mapping[str, Any] = getattr(model, "hook_dict", {})
    standing = {n: list(p._forward_hooks.values()) for n, p in points.items() if p.fwd_hooks}
    return _Digest(model).of((facts, weights, standing)).hex()


def _bits(tensor: Tensor) -> tuple[str, tuple[int, ...], int]:
    """Type, shape and weighted sum of a tensor's bits."""
    flat = tensor.detach().contiguous().reshape(-1)
    raw = flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)
    total = 0
    for i in range(0, raw.numel(), _CHUNK):
        part = raw[i : i + _CHUNK]
        part = nn.functional.pad(part, (0, -part.numel() % 8)).clone().view(torch.int64)
        weights = torch.arange(1, 2 * part.numel(), 2, device=part.device) * 0x9E3779B97F4A7C1 + 2 * i
        total = (total * 31 + int((part * weights).sum())) % 2**64
    return str(tensor.dtype), tuple(tensor.shape), total


class _Digest:
    """Hashes by content; what it has seen once it does not go into again."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.known: dict[int, tuple[Any, bytes]] = {}

    def of(self, value: Any) -> bytes:
        if id(value) not in self.known:
            self.known[id(value)] = value, b"itself"  # what holds itself is not followed for ever
            seed = hashlib.blake2b(digest_size=16)
            for part in self._parts(value):
                seed.update(len(part).to_bytes(8, "little") + part)
            self.known[id(value)] = value, seed.digest()
        return self.known[id(value)][1]

    def _parts(self, value: Any) -> Iterator[bytes]:
        yield _class_name(type(value))
        if isinstance(value, Trunk) or (value is self.model and value is not None):
            yield b"the model"
        elif isinstance(value, _PLAIN):
            yield value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
        elif isinstance(value, Tensor):
            yield repr(_bits(value)).encode()
        elif isinstance(value, np.ndarray):
            yield repr((value.dtype.str, value.shape)).encode()
            yield self.of(value.tolist()) if value.dtype.hasobject else np.ascontiguousarray(value).tobytes()
        elif isinstance(value, _BY_REPR):
            yield repr(value).encode()
        elif isinstance(value, (list, tuple)):
            yield from map(self.of, value)
        elif isinstance(value, Set):
            yield from sorted(map(self.of, value))
        elif isinstance(value, Mapping):
            yield from (self.of(part) for item in value.items() for part in item)
        elif isinstance(value, SequenceSet):
            yield from map(self.of, (value.tokens, value.mask, value.prefix_len))
        else:
            yield from self._code(value)

    def _code(self, value: Any) -> Iterator[bytes]:
        """What can be called, and objects in general."""
        if isinstance(value, types.CodeType):
            yield value.co_code
            yield from map(self.of, (value.co_names, value.co_consts))
        elif isinstance(value, types.FunctionType):
            cells = [c.cell_contents for c in value.__closure__ or () if _is_filled(c)]
            yield from map(self.of, (value.__code__, value.__defaults__, value.__kwdefaults__, cells))
            yield self.of(_globals_of(value))
        elif isinstance(value, types.MethodType):
            yield from map(self.of, (value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            yield from map(self.of, (value.func, value.args, value.keywords))
        elif isinstance(value, type):
            yield _class_name(value)
            if value.__module__.partition(".")[0] not in _LIBRARIES | sys.stdlib_module_names:
                yield self.of({n: f for n, f in vars(value).items() if isinstance(f, types.FunctionType)})
        elif isinstance(value, nn.Module):
            yield self.of(dict(value.state_dict()))
        elif isinstance(value, torch.Generator):
            yield self.of(value.get_state())
        elif isinstance(value, (types.BuiltinFunctionType, types.ModuleType)):
            yield getattr(value, "__qualname__", value.__name__).encode()
        else:
            yield self.of(type(value))
            yield self.of(self._state(value))

    def _state(self, value: Any) -> Any:
        try:
            state = value.__getstate__()
        except TypeError:
            state = None
        if state is None and not hasattr(value, "__dict__"):
            _LOG.warning("%s has no readable state: changes inside it are not noticed", type(value).__name__)
        return state


def _class_name(cls: type) -> bytes:
    return f"{cls.__module__}.{cls.__qualname__}".encode()


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _globals_of(fn: types.FunctionType) -> dict[str, Any]:
    """The global values that a function names, in nested functions too; modules and classes by name only."""
    names: set[str] = set()
    codes = [fn.__code__]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    known = fn.__globals__
    found = {n: known[n] for n in sorted(names) if n in known}
    return {n: _class_name(v) if isinstance(v, type) else v for n, v in found.items()}
