"""Fingerprints of everything that identifies a run, so that its parts are never taken for another run's.

Two things have the same fingerprint if their contents are equal: weights, token ids, a hook function's code
with everything it closes over, names, numbers; of a `SequenceSet` its ids, mask and prefix lengths. For an
object that keeps caches, ``__getstate__`` says what counts; a function that only watches another one names it
in its attribute ``stands_for``.

The bytes of tensors are hashed by xxh3-128, which runs at the speed of memory (14 GB/s on one core, against
0.7 GB/s for BLAKE2b and 0.5 GB/s for a checksum in torch); everything else, and the combination, by BLAKE2b.
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
import xxhash
from torch import Tensor, nn

from memlens.forward.trunk import Trunk
from memlens.models.provenance import describe
from memlens.sequences.set import SequenceSet

_LOG = logging.getLogger(__name__)
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_BY_REPR = (torch.dtype, torch.device, np.dtype, np.generic, PurePath, range, slice, type(...))
_LIBRARIES = {
    "torch", "numpy", "pandas", "xarray", "transformers", "transformer_lens", "memlens", "scipy", "accelerate"
}  # fmt: skip
_ABOUT = ("architecture", "backend", "dtype", "processed_weights", "transformer_lens")
_CHUNK = 2**24
_CALLABLE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_FUNCTIONS = ("forward", "act_fn", "act", "activation_fn", "activation", "activation_func")
_APART = {
    "device", "n_devices", "device_map", "seed", "init_mode", "init_weights", "initializer_range",
    "model_name", "n_params", "tokenizer_name", "trust_remote_code", "use_attn_result", "use_attn_in",
    "use_split_qkv_input", "use_hook_mlp_in", "use_hook_tokens", "output_attentions", "output_hidden_states",
    "return_dict", "use_cache", "transformers_version", "dtype", "torch_dtype",
}  # fmt: skip
"""Entries of a configuration on which no logit depends, or that `describe` gives in another form."""


def fingerprint(value: Any, model: Any = None) -> str:
    """Return a hexadecimal digest of anything that an intervention or a metric is made of.

    A function is identified by its code, defaults, what it closes over and the global values and functions
    that it names; an object by its class and its state. An object without readable state (an open file, an
    extension's object) counts by its type alone, with a warning in the log.

    Args:
        value: Tensors, arrays, functions, dataclasses, containers and plain values.
        model: The swept model, which is not followed: it has a fingerprint of its own (`model_fingerprint`).

    Example:
        >>> def halve(z, hook, by=2):
        ...     return z / by
        >>> by_three = functools.partial(halve, by=3)
        >>> fingerprint(halve) == fingerprint(halve), fingerprint(halve) == fingerprint(by_three)
        (True, False)
    """
    return _Digest(model).of(value).hex()


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of a model: everything in it that its logits depend on.

    Covered are every parameter and buffer (rotary frequencies too) with its name, dtype and shape; the
    configuration; the class of each module, its numbers (such as a scale or an epsilon), its activation
    function and a replaced ``forward``; active dropout; and the hooks that the user set. The device, and
    switches that only say which activations can be read, do not count.

    The weights are read once. On an accelerator they cross the bus once: the digest of a tensor is kept until
    its version counter changes, or a checksum taken on the device (writing to ``.data`` moves no counter).
    """
    facts = {name: fact for name, fact in describe(model).items() if name in _ABOUT}
    tensors = {**dict(nn.Module.named_parameters(model)), **dict(nn.Module.named_buffers(model))}
    modules = {name: _module_facts(module) for name, module in nn.Module.named_modules(model)}
    points: Mapping[str, Any] = getattr(model, "hook_dict", {})
    standing = {n: list(p._forward_hooks.values()) for n, p in points.items() if p.fwd_hooks}
    return _Digest(model).of((facts, _configs(model), tensors, modules, standing)).hex()


def _module_facts(module: nn.Module) -> list[Any]:
    """What a module computes with, apart from its tensors."""
    found = vars(module)
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    active = module.training and getattr(module, "p", 0) if isinstance(module, nn.Dropout) else 0
    return [
        _class_name(type(module)),
        {name: value for name, value in found.items() if isinstance(value, float)},
        {name: value for name in _FUNCTIONS if isinstance(value := found.get(name), _CALLABLE)},
        [hook for hook in hooks if _root(getattr(hook, "__module__", "")) not in _LIBRARIES],
        active,
    ]


def _configs(model: Any) -> list[dict[str, Any]]:
    """The configurations of TransformerLens and of Hugging Face, without what changes no logit."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    found = [vars(model.cfg), {} if config is None else config.to_dict()]
    return [
        {name: value for name, value in facts.items() if name not in _APART and not name.startswith("_")}
        for facts in found
    ]


def _contents(tensor: Tensor) -> tuple[str, tuple[int, ...], str]:
    """Type, shape and digest of a tensor's bytes."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,))  # a single element may keep another stride
    raw = flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)
    if raw.device.type in _READ_EACH_TIME or tensor.is_inference():
        digest = _digest(raw)
    else:
        place = (tensor.data_ptr(), tensor.stride(), tensor.shape, tensor.dtype, tensor.device)
        state = tensor._version, _checksum(raw)
        if _KEPT.get(place, (None, ""))[0] != state:
            _KEPT[place] = state, _digest(raw)
        digest = _KEPT[place][1]
    return str(tensor.dtype), tuple(tensor.shape), digest


_READ_EACH_TIME = {"cpu"}
"""Devices whose memory is hashed at the speed at which it is read."""
_KEPT: dict[tuple[Any, ...], tuple[tuple[int, int], str]] = {}


def _digest(raw: Tensor) -> str:
    state = xxhash.xxh3_128()
    for start in range(0, raw.numel(), _CHUNK):
        state.update(raw[start : start + _CHUNK].cpu().numpy().data)
    return state.hexdigest()


def _checksum(raw: Tensor) -> int:
    """A sum modulo 2^64 of eight bytes at a time, mixed with their place: it only shows a change of a tensor.

    Without the mixing, what cancels in a sum would not be seen, such as two changed signs.
    """
    total = 0
    for start in range(0, raw.numel(), _CHUNK):
        part = raw[start : start + _CHUNK]
        part = nn.functional.pad(part, (0, -part.numel() % 8)).clone().view(torch.int64)
        part += torch.arange(start, start + len(part), device=part.device) * 0x9E3779B97F4A7C1
        for shift, factor in ((32, 0x2545F4914F6CDD1D), (29, 0x369DEA0F31A53F85), (32, 0x2545F4914F6CDD1D)):
            part *= factor
            part ^= (part >> shift) & (2 ** (64 - shift) - 1)
        total = (total + int(part.sum())) % 2**64
    return total


class _Digest:
    """Hashes by content; an object that was hashed before is not followed again."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.known: dict[int, tuple[Any, bytes]] = {}

    def of(self, value: Any) -> bytes:
        while isinstance(value, types.FunctionType) and hasattr(value, "stands_for"):
            value = value.stands_for  # pyright: ignore[reportFunctionMemberAccess]
        if id(value) not in self.known:
            self.known[id(value)] = (
                value,
                b"itself",
            )  # an object that contains itself must not be followed forever
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
            yield repr(_contents(value)).encode()
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
            if _root(value.__module__) not in _LIBRARIES | sys.stdlib_module_names:
                yield self.of({n: f for n, f in vars(value).items() if isinstance(f, types.FunctionType)})
        elif isinstance(value, nn.Module):
            yield self.of({**dict(value.named_parameters()), **dict(value.named_buffers())})
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


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


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
