"""Fingerprints of everything that identifies a run, so that its parts are never taken for another run's.

Two things have the same fingerprint if their contents are equal: weights, token ids, a hook function's code
with everything it closes over and names, numbers; of a `SequenceSet` its ids, mask and prefix lengths. For an
object that keeps caches, ``__getstate__`` says what counts; a function that only watches another one names it
in its attribute ``stands_for``. What an installed package defines counts by its name and is not followed, but
for packages that extend memlens: their code changes while they are written.

The bytes of tensors are hashed by xxh3-128, which runs at the speed of memory (14 GB/s on one core, against
0.7 GB/s for BLAKE2b and 0.5 GB/s for a checksum in torch); everything else, and the combination, by BLAKE2b.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from memlens.errors import FingerprintError
from memlens.forward.trunk import Trunk
from memlens.models.provenance import describe
from memlens.registry import named_plugins
from memlens.sequences.set import SequenceSet

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_BY_REPR = (torch.dtype, torch.device, np.dtype, np.generic, np.ufunc, PurePath, range, slice, type(...))
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_FOLDERS = {"site-packages", "dist-packages"}
"""Where packages are installed: this environment's folders, and those that it shares with others."""
_ABOUT = ("architecture", "backend", "dtype", "processed_weights", "transformer_lens")
_CHUNK = 2**24
_CALLABLE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_FUNCTIONS = ("forward", "act_fn", "act", "activation_fn", "activation", "activation_func")
_PASSING = ("context_level",)
"""Attributes of modules that change while a model is used."""
_APART = {
    "device", "n_devices", "device_map", "seed", "init_mode", "init_weights", "initializer_range",
    "model_name", "n_params", "tokenizer_name", "trust_remote_code", "use_attn_result", "use_attn_in",
    "use_split_qkv_input", "use_hook_mlp_in", "use_hook_tokens", "output_attentions", "output_hidden_states",
    "return_dict", "use_cache", "transformers_version", "dtype", "torch_dtype",
}  # fmt: skip
"""Entries of a configuration on which no logit depends, or that `describe` gives in another form."""


def fingerprint(value: Any, model: Any = None) -> str:
    """Return a hexadecimal digest of anything that an intervention or a metric is made of.

    A function is identified by its code, defaults, what it closes over and the global values, functions and
    classes that it names, with the attributes of modules; an object by its class, with the attributes and
    methods of the class, and by its state, as `pickle` would read it; an `nn.Module` by what
    `model_fingerprint` reads of a model.

    Args:
        value: Tensors, arrays, functions, dataclasses, containers and plain values.
        model: The swept model, which is not followed: it has a fingerprint of its own (`model_fingerprint`).

    Raises:
        FingerprintError: Something in it cannot be read, such as a lock or a compiled module.

    Example:
        >>> def halve(z, hook, by=2):
        ...     return z / by
        >>> by_three = functools.partial(halve, by=3)
        >>> fingerprint(halve) == fingerprint(halve), fingerprint(halve) == fingerprint(by_three)
        (True, False)
    """
    return _Digest(model).whole(value)


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of a model: everything in it that its logits depend on.

    Covered are every parameter and buffer (rotary frequencies too) with its name, dtype and shape; the
    configuration; the class of each module with functions that were put into it, its numbers (such as a scale
    or an epsilon), its activation function, a replaced ``forward`` and its mode (training or not); and the
    hooks that the user set. The device, and switches that only say which activations can be read, do not
    count.

    The weights are read once. On an accelerator they cross the bus once: the digest of a tensor is kept until
    its version counter changes, or a checksum taken on the device (writing to ``.data`` moves no counter).

    Raises:
        FingerprintError: A hook or a replaced ``forward`` holds something that cannot be read.
    """
    return _Digest(model).whole(_model_facts(model))


def _model_facts(model: Any) -> list[Any]:
    facts = {name: fact for name, fact in describe(model).items() if name in _ABOUT}
    points: Mapping[str, Any] = model.hook_dict
    standing = {n: list(p._forward_hooks.values()) for n, p in points.items() if p.fwd_hooks}
    every = [*every_module._global_forward_hooks.values(), *every_module._global_forward_pre_hooks.values()]
    return [facts, _configs(model), *_contents_of(model), standing, _foreign(every)]


def _contents_of(model: nn.Module) -> list[Any]:
    """The tensors of a module, and what its parts compute with apart from them."""
    tensors = {**dict(nn.Module.named_parameters(model)), **dict(nn.Module.named_buffers(model))}
    return [tensors, {name: _module_facts(module) for name, module in nn.Module.named_modules(model)}]


def _module_facts(module: nn.Module) -> list[Any]:
    found = {name: value for name, value in vars(module).items() if name[0] != "_" and name not in _PASSING}
    return [
        type(module),
        {name: value for name, value in found.items() if type(value) in (bool, int, float)},
        {name: value for name in _FUNCTIONS if isinstance(value := found.get(name), _CALLABLE)},
        _foreign([*module._forward_hooks.values(), *module._forward_pre_hooks.values()]),
    ]


def _foreign(hooks: Iterable[Callable[..., Any]]) -> list[Callable[..., Any]]:
    """Those hooks that are not functions of a library, which sets them to watch a model."""
    functions = (types.FunctionType, types.MethodType)
    return [hook for hook in hooks if not (isinstance(hook, functions) and _is_installed(hook.__module__))]


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
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise _unreadable(tensor)
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

    def whole(self, value: Any) -> str:
        try:
            return self.of(value).hex()
        except RecursionError:
            raise FingerprintError(
                "a hook, metric or option holds or names values that are nested too deeply to be read: leave "
                "them out, or run without a folder (out=None)."
            ) from None

    def of(self, value: Any) -> bytes:
        while isinstance(value, types.FunctionType) and hasattr(value, "stands_for"):
            value = value.stands_for  # pyright: ignore[reportFunctionMemberAccess]
        if id(value) not in self.known:
            # an object that contains itself must not be followed forever
            self.known[id(value)] = value, b"itself"
            seed = hashlib.blake2b(digest_size=16)
            for part in self._parts(value):
                seed.update(len(part).to_bytes(8, "little") + part)
            self.known[id(value)] = value, seed.digest()
        return self.known[id(value)][1]

    def _parts(self, value: Any) -> Iterator[bytes]:
        kind, held = (
            type(value),
            value,
        )  # `held` keeps its type where `isinstance` would narrow that of `value`
        plain = isinstance(value, _PLAIN) and not _is_own(kind)
        yield _class_name(kind)
        if isinstance(value, Trunk):
            yield self.of(value.model)
        elif value is self.model and value is not None:
            yield b"the model"
        elif plain:
            yield value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogatepass")
        elif isinstance(value, Tensor):
            yield repr(_contents(value)).encode()
        elif kind in (np.ndarray, np.memmap):
            yield repr((held.dtype, held.shape)).encode()
            yield self.of(held.tolist()) if held.dtype.hasobject else np.ascontiguousarray(held).tobytes()
        elif isinstance(value, _BY_REPR):
            yield repr(value).encode()
        elif kind in (list, tuple):
            yield from map(self.of, held)
        elif kind in (set, frozenset):
            yield from sorted(map(self.of, held))
        elif kind in (dict, types.MappingProxyType):
            yield from (self.of(part) for item in held.items() for part in item)
        elif isinstance(value, SequenceSet):
            yield from map(self.of, (value.tokens, value.mask, value.prefix_len))
        else:
            yield from self._code(value)

    def _code(self, value: Any) -> Iterator[bytes]:
        """What can be called, and objects in general."""
        if isinstance(value, types.CodeType):
            n_args = value.co_argcount + value.co_kwonlyargcount
            signature = (
                value.co_varnames[:n_args],
                value.co_argcount,
                value.co_posonlyargcount,
                value.co_flags,
            )
            yield value.co_code + getattr(value, "co_exceptiontable", b"")
            yield from map(self.of, (signature, value.co_names, value.co_consts))
        elif isinstance(value, types.FunctionType):
            yield from map(self.of, (value.__code__, value.__defaults__, value.__kwdefaults__, vars(value)))
            yield self.of(_named_values(value))
        elif isinstance(value, types.MethodType):
            yield from map(self.of, (value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            yield from map(self.of, (value.func, value.args, value.keywords))
        elif isinstance(value, functools._lru_cache_wrapper):
            yield self.of(value.__wrapped__)
        elif isinstance(value, type):
            yield _class_name(value)
            yield self.of([_own_attributes(cls) for cls in value.__mro__])
        elif isinstance(value, (property, staticmethod, classmethod, functools.cached_property)):
            names = ("fget", "fset", "__func__", "func")
            yield from (self.of(getattr(value, name)) for name in names if hasattr(value, name))
        elif isinstance(value, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            raise _unreadable(value)
        elif isinstance(value, nn.Module):
            yield self.of(_model_facts(value) if hasattr(value, "hook_dict") else _contents_of(value))
        elif isinstance(value, torch.Generator):
            yield self.of(value.get_state())
        elif isinstance(value, (types.BuiltinFunctionType, types.ModuleType)):
            yield getattr(value, "__qualname__", value.__name__).encode()
            owner = getattr(value, "__self__", None)  # of a function its module: `math.sin` is no `cmath.sin`
            yield owner.__name__.encode() if isinstance(owner, types.ModuleType) else self.of(owner)
        else:
            yield from map(self.of, (type(value), _state(value)))


def _state(value: Any) -> Any:
    """What identifies an object besides its class: its own ``__getstate__``, or what `pickle` would read."""
    if isinstance(getattr(type(value), "__getstate__", None), types.FunctionType):
        return value.__getstate__()
    try:
        reduced = value.__reduce_ex__(4)
    except Exception as error:
        raise _unreadable(value) from error
    if isinstance(reduced, str):
        return reduced
    make, args, *rest = reduced
    make = None if make in (copyreg.__newobj__, copyreg.__newobj_ex__) else make  # pyright: ignore[reportAttributeAccessIssue]
    return [make, args, *(part if i == 0 or part is None else list(part) for i, part in enumerate(rest))]


def _unreadable(value: Any) -> FingerprintError:
    kind = type(value)
    return FingerprintError(
        f"a {kind.__module__}.{kind.__qualname__} cannot be read, so a change inside it would not be noticed "
        "when the run goes on: leave it out of what hooks, metrics and options hold or name, or run without "
        "a folder (out=None)."
    )


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


@functools.cache
def _is_installed(module: str) -> bool:
    """Whether a module, given by its name, is memlens', Python's or that of a package that is no plugin."""
    root = _root(module)
    if root in {"memlens", "builtins"} or root in sys.stdlib_module_names:
        return True
    place = getattr(sys.modules.get(root), "__file__", None)
    if place is None or root in _extending():
        return False
    return place.startswith(_INSTALLED) or not _FOLDERS.isdisjoint(PurePath(place).parts)


@functools.cache
def _extending() -> set[str]:
    """The packages that extend memlens."""
    return {_root(plugin.module) for plugin in named_plugins()}


def _is_own(cls: type) -> bool:
    """Whether a class is the user's."""
    return not _is_installed(cls.__module__)


def _own_attributes(cls: type) -> dict[str, Any]:
    """The attributes and methods of a user's class; of a library's, functions that a user put there."""
    if not _is_own(cls):
        own = {n: f for n, f in vars(cls).items() if isinstance(f, types.FunctionType)}
        return {n: f for n, f in own.items() if not _is_installed(f.__module__ or "")}
    skipped = (types.MemberDescriptorType, types.GetSetDescriptorType)
    return {
        name: value
        for name, value in vars(cls).items()
        if isinstance(value, types.FunctionType)
        or not (name.startswith("__") or name == "_abc_impl" or isinstance(value, skipped))
    }


def _class_name(cls: type) -> bytes:
    return f"{cls.__module__}.{cls.__qualname__}".encode()


def _named_values(fn: types.FunctionType) -> list[Any]:
    """What a function closes over, and the global values that it names, in nested functions too."""
    globals_, names = _names(fn.__code__)
    known = fn.__globals__
    if _is_installed(fn.__module__ or ""):
        found = {n: v for n in globals_ if isinstance(v := known.get(n), (types.FunctionType, *_PLAIN))}
    else:
        found = {n: known.get(n, sys.modules.get(n)) for n in globals_ if n in known or n in sys.modules}
    cells = [c.cell_contents for c in fn.__closure__ or () if _is_filled(c)]
    return [_attributes(value, names) for value in (*found.values(), *cells)] + [list(found)]


@functools.lru_cache(maxsize=10_000)
def _names(code: types.CodeType) -> tuple[list[str], frozenset[str]]:
    """The names that code looks up as global values or imports, sorted; and these with names of attributes.

    An attribute that is called like a global value does not count as one: a function that another process
    unpickled has only those global values that it uses.
    """
    looked_up = {i.argval for i in dis.get_instructions(code) if i.opname in _LOOKS_UP}
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            inside, more = _names(const)
            looked_up |= {*inside}
            names |= more
    return sorted(looked_up), frozenset(names)


_LOOKS_UP = ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME")


def _attributes(value: Any, names: Iterable[str]) -> Any:
    """A user's module as its attributes of these names; anything else as it is."""
    if not isinstance(value, types.ModuleType) or _is_installed(value.__name__):
        return value
    inside = vars(value)
    return [value.__name__, {n: _attributes(inside[n], names) for n in sorted(names) if n in inside}]


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
