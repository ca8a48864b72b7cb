"""Whether a model is still what it was: its content as a key, and weights that are copies of other weights.

A `TransformerBridge` around a model with fused projections (Pythia, Bloom, Falcon) computes with copies of
their parts, and a `HookedTransformer` with copies of everything. `refresh` notices an edit of the original,
however it was made: it carries the edit over to the parts of a fused projection, and refuses a model that is
a copy as a whole. It runs before each forward pass of such a model, and whenever memlens computes with one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
import xxhash
from torch import Tensor, nn

from memlens.errors import ModelLoadError

_SPLITS = {"split_qkv_matrix": ("q", "k", "v"), "split_gate_up_matrix": ("gate", "in")}
"""Attributes of the bridge's components that split a fused projection, and its parts in their order."""
_SHOWN = 64
"""How many numbers of a tensor are part of a model's key."""
_PLAIN = {bool, int, float, str, type(None), torch.dtype}
_NUMBERS = _PLAIN - {type(None)}
_PASSING = ("context_level",)
"""Attributes that memlens itself changes for the time of a call."""


def content_key(model: nn.Module) -> tuple[Any, ...]:
    """Return a key that changes with what a model computes: equal keys allow what was found out to be kept.

    It holds, module by module, its class with the functions of that class, a replaced ``forward``, its plain
    attributes and its tensors, and every configuration. Of a tensor it holds where it lies, its shape, its
    version and a sample of its numbers, so that a key costs far less than a forward pass. Hooks do not count.
    """
    classes: dict[type, tuple[Any, ...]] = {}
    configs: dict[int, Any] = {}
    found: list[Any] = []
    tensors: list[Tensor] = []
    for module in model.modules():
        kind, facts = type(module), vars(module)
        if kind not in classes:
            classes[kind] = _class_facts(kind)
        if not classes[kind]:  # a hook point, of which there are many
            found.append((id(module), facts.get("forward")))
            continue
        found += (id(module), kind)
        own = [(n, v) for n, v in facts.items() if type(v) in _NUMBERS or n == "forward"]
        found += [fact for fact in own if fact[0][0] != "_" and fact[0] not in _PASSING]
        tensors += [t for t in (*facts["_parameters"].values(), *facts["_buffers"].values()) if t is not None]
        for config in (facts.get("cfg"), facts.get("config")):
            if hasattr(config, "__dict__"):
                configs[id(config)] = config
    return (
        tuple(classes.items()),
        tuple(found),
        tuple((key, plain_facts(vars(config))) for key, config in configs.items()),
        tuple((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device, _version(t)) for t in tensors),
        sampled(tensors, _SHOWN),
    )


def _class_facts(kind: type) -> tuple[Any, ...]:
    """The functions and plain attributes of a module's class; none of a hook point's."""
    if kind.__name__ == "HookPoint":
        return ()
    bases = [cls for cls in kind.__mro__ if cls not in (nn.Module, object)]
    return tuple(
        (name, value)
        for cls in bases
        for name, value in vars(cls).items()
        if type(value) in _PLAIN or callable(value)
    )


def plain_facts(value: Any) -> str:
    """Return the plain values of a configuration, with those of its lists and dictionaries."""
    if type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, dict):
        return repr([(key, plain_facts(entry)) for key, entry in value.items()])
    return repr([plain_facts(entry) for entry in value]) if isinstance(value, (list, tuple)) else ""


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def sampled(tensors: Iterable[Tensor], shown: int) -> bytes:
    """Return some numbers of each tensor, evenly spread: writing to ``.data`` moves no version."""
    parts: dict[Any, list[Tensor]] = {}
    for t in tensors:
        n = t.numel()
        if n and not t.is_meta:
            flat = t if t.is_contiguous() else t.contiguous()
            step = max(1, n // shown)
            some = flat.as_strided((min(n, shown),), (step,))
            parts.setdefault((t.dtype, t.device), []).append(some)
    return b"".join(torch.cat(some).double().cpu().numpy().tobytes() for some in parts.values())


def _digest(tensors: Iterable[Tensor]) -> str:
    """A hash of tensors' bytes; of a tensor on an accelerator, of the sums of its rows and columns."""
    state = xxhash.xxh3_128()
    for tensor in tensors:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if raw.device.type != "cpu":
            square = nn.functional.pad(raw, (0, -raw.numel() % 4096)).view(torch.int32).reshape(-1, 1024)
            raw = torch.cat([square.sum(0), square.sum(1)]).cpu()
        state.update(raw.numpy().data)
    return state.hexdigest()


@dataclass
class _Fused:
    """A fused projection as it was when its parts were last compared with it.

    Attributes:
        whole: Digest of the projection.
        parts: Digest of the parts.
        equal: Whether the parts were those of the projection.
    """

    whole: str
    parts: str
    equal: bool


_RECORD = "_memlens_fused"
"""The attribute of a component that holds its `_Fused`, which a copy of the model takes with it."""
_COPIED: WeakKeyDictionary[nn.Module, list[tuple[Any, torch.dtype, str]]] = WeakKeyDictionary()
"""Models that are copies: the parameters that they were copied from, with their digests."""
_COMPONENTS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()
"""The components of a model that hold parts of a fused projection, as weak references."""


def inner_model(model: Any) -> Any:
    """Return the Hugging Face model in a bridge; other models themselves."""
    return getattr(model, "original_model", model)


def keep_fresh(model: Any, weights: Iterable[nn.Parameter] = ()) -> None:
    """Make a model `refresh` itself before each forward pass, also where other code runs it.

    Args:
        model: A TransformerLens model.
        weights: What its weights were made from. Those that it does not share are watched for as long as
            someone else keeps them.
    """
    inner = inner_model(model)
    shared = {p.data_ptr() for p in model.parameters()}
    copied = [(ref(p), p.dtype, _digest([p])) for p in weights if p.data_ptr() not in shared]
    _COPIED[inner] = copied or _COPIED.get(inner, [])
    _COMPONENTS.pop(inner, None)
    refresh(model)
    watched = bool(_COPIED[inner] or _components(inner))
    if watched and _before_forward not in inner._forward_pre_hooks.values():
        inner.register_forward_pre_hook(_before_forward)


_SETTLED: WeakSet[nn.Module] = WeakSet()


@contextmanager
def settled(model: Any) -> Iterator[None]:
    """Refresh a model once for all forward passes inside a `with` statement, in which nobody edits it."""
    inner = inner_model(model)
    refresh(model)
    _SETTLED.add(inner)
    try:
        yield
    finally:
        _SETTLED.discard(inner)


def _before_forward(module: nn.Module, _args: Any) -> None:
    if module not in _SETTLED:
        refresh(module)


def refresh(model: Any) -> None:
    """Carry edits of fused projections over to the copies of their parts that a bridge computes with.

    Raises:
        ModelLoadError: An edit cannot be carried over: the model is a copy as a whole, its weights were
            processed, or both the projection and its parts were edited.
    """
    inner = inner_model(model)
    for weight, dtype, digest in _COPIED.get(inner, ()):
        original = weight()
        if original is not None and original.dtype == dtype and _digest([original]) != digest:
            raise ModelLoadError(
                "the weights that this model was copied from were edited after it was loaded, and it still "
                "has the old ones: load the edited model again (to keep both, give load_model a "
                "copy.deepcopy of the Hugging Face model)."
            )
    for component in _components(inner):
        if (found := component()) is not None:
            _refresh_fused(found)


def _components(inner: nn.Module) -> list[Any]:
    if inner not in _COMPONENTS:
        _COMPONENTS[inner] = [ref(m) for m in inner.modules() if _SPLITS.keys() & vars(m).keys()]
    return _COMPONENTS[inner]


def _refresh_fused(component: Any) -> None:
    split, names = next((vars(component)[s], names) for s, names in _SPLITS.items() if s in vars(component))
    parts = [getattr(component, name).original_component for name in names]
    named = [
        {kind: p for kind in ("weight", "bias") if (p := getattr(part, kind, None)) is not None}
        for part in parts
    ]
    sizes = {sum(own[kind].numel() for own in named) for kind in named[0]}
    whole = [p for p in component.original_component.parameters() if p.numel() in sizes]
    before, now = vars(component).get(_RECORD), _digest(whole)
    if before is not None and before.whole == now:
        return
    with torch.no_grad():
        wanted = split(component.original_component)
    pairs = [
        (p, getattr(new, kind)) for own, new in zip(named, wanted, strict=True) for kind, p in own.items()
    ]
    equal = all(new is not None and torch.equal(own, new.to(own)) for own, new in pairs)
    state = _digest(own for own, _ in pairs)
    if before is not None and not equal:
        if not before.equal or state != before.parts:
            why = "its parts were edited too" if before.equal else "its parts were processed or edited before"
            raise ModelLoadError(
                f"the fused projection of {type(component.original_component).__name__} was edited after the "
                f"model was loaded, but {why}: edit the parts that it computes with "
                f"({', '.join(f'.{name}.weight' for name in names)}), or load the edited model again."
            )
        for own, new in pairs:
            own.data.copy_(new)
        equal, state = True, _digest(own for own, _ in pairs)
    vars(component)[_RECORD] = _Fused(now, state, equal)
