"""Hook names, and hooks that are always removed.

Names are TransformerLens' own (`blocks.3.attn.hook_z`). A *site* is a short name for one kind of hook
(`"z"`), the same for every architecture and both backends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from memlens.errors import SiteError, check_option, near_matches
from memlens.forward.exclusive import exclusively, known_of

HookFn = Callable[..., Any]
"""A TransformerLens hook function: ``fn(activation, hook) -> activation or None``."""


@dataclass(frozen=True)
class Site:
    """One kind of hook.

    Attributes:
        name: The short name.
        template: The hook name with `{layer}` in it.
        shape: The activation's axes.
        meaning: A one-line description.
    """

    name: str
    template: str
    shape: str
    meaning: str


_AT = "blocks.{layer}."
_RESIDUAL, _HEADS, _KV_HEADS = "batch pos d_model", "batch pos head d_head", "batch pos kv_head d_head"
_SITES = (
    Site("resid_pre", _AT + "hook_resid_pre", _RESIDUAL, "residual at a layer's input"),
    Site(
        "resid_mid", _AT + "hook_resid_mid", _RESIDUAL, "residual between attention and MLP (if sequential)"
    ),
    Site("resid_post", _AT + "hook_resid_post", _RESIDUAL, "residual at a layer's output"),
    Site(
        "attn_out",
        _AT + "hook_attn_out",
        _RESIDUAL,
        "what attention adds to the residual, after any post-norm",
    ),
    Site(
        "mlp_out", _AT + "hook_mlp_out", _RESIDUAL, "what the MLP adds to the residual, after any post-norm"
    ),
    Site("q", _AT + "attn.hook_q", _HEADS, "queries"),
    Site("k", _AT + "attn.hook_k", _KV_HEADS, "keys"),
    Site("v", _AT + "attn.hook_v", _KV_HEADS, "values"),
    Site("z", _AT + "attn.hook_z", _HEADS, "each head's mixed values"),
    Site("pattern", _AT + "attn.hook_pattern", "batch head query key", "attention weights"),
    Site("mlp_post", _AT + "mlp.hook_post", "batch pos d_mlp", "the MLP's hidden activations"),
)
SITES: Mapping[str, Site] = MappingProxyType({site.name: site for site in _SITES})
"""The sites by name."""


def hook_name(site: str, layer: int) -> str:
    """Return the TransformerLens name of a site in a layer.

    >>> hook_name("z", 3)
    'blocks.3.attn.hook_z'
    """
    check_option("site", site, list(SITES))
    return SITES[site].template.format(layer=layer)


@cache
def layer_of(name: str) -> int | None:
    """Return the layer that a hook name belongs to, or None.

    >>> layer_of("blocks.3.attn.hook_z"), layer_of("hook_embed")
    (3, None)
    """
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def check_layer(layer: int, n_layers: int) -> None:
    """Raise `SiteError` unless the model has this layer."""
    if not 0 <= layer < n_layers:
        raise SiteError(f"layer {layer} does not exist: the model has layers 0 to {n_layers - 1}.")


def chosen_layers(layers: Sequence[int] | None, n_layers: int) -> list[int]:
    """Return the requested layers; all of them by default.

    Raises:
        SiteError: The model does not have such a layer, or `layers` is not a list.
    """
    if isinstance(layers, (int, str)):
        raise SiteError(f"layers={layers!r}: give a list of layer numbers, such as [0, 3].")
    chosen = list(range(n_layers) if layers is None else layers)
    for layer in chosen:
        check_layer(layer, n_layers)
    return chosen


def check_head(head: int, n_heads: int) -> None:
    """Raise `SiteError` unless a layer has this head."""
    if not 0 <= head < n_heads:
        raise SiteError(f"head {head} does not exist: each layer has heads 0 to {n_heads - 1}.")


def hook_points(model: Any) -> Mapping[str, Any]:
    """Return the model's `hook_dict`, which a bridge makes anew at each access: within a computation once."""
    known = known_of(model)
    if _POINTS not in known:
        known[_POINTS] = model.hook_dict
    return known[_POINTS]


_POINTS = "hook points"
_MISNAMED: WeakKeyDictionary[Any, frozenset[str]] = WeakKeyDictionary()


def refuse_sites(model: Any, sites: Iterable[str]) -> None:
    """Make `resolve_hook` refuse these sites of a model, which do not do what their names claim."""
    _MISNAMED[model] = frozenset(sites)


def resolve_hook(model: Any, name: str) -> Any:
    """Return the model's `HookPoint` of this name.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        name: A hook name.

    Raises:
        SiteError: The model has no hook of this name (the message suggests similar names), or it is misnamed.
    """
    points = hook_points(model)
    layer = layer_of(name)
    for site in _MISNAMED.get(model, ()):
        if layer is not None and name == hook_name(site, layer):
            raise SiteError(
                f"{name!r} does not do what its name claims on this model (see memlens.check_model): what is "
                "written to it would change something else."
            )
    if name not in points:
        raise SiteError(f"the model has no hook named {name!r}.{near_matches(name, points)}")
    return points[name]


def has_site(model: Any, site: str, layer: int = 0) -> bool:
    """Whether the model has this site, and it is what its name says (parallel blocks have no `resid_mid`)."""
    return hook_name(site, layer) in hook_points(model) and site not in _MISNAMED.get(model, ())


def at_place(fn: HookFn, place: torch.device | None) -> HookFn:
    """Return a hook function that receives its activation on a device, wherever its layer is.

    What it returns, or changed in place, is carried back to the layer.

    Args:
        fn: The function.
        place: The device; None: that of the layer, for which `fn` itself is returned.
    """
    if place is None:
        return fn

    def call(activation: Tensor, hook: Any) -> Any:
        if activation.device == place:
            return fn(activation, hook=hook)
        there = activation.to(place)
        new = fn(there, hook=hook)
        if new is None:
            activation.copy_(there)
        return None if new is None else new.to(activation.device)

    return call


@contextmanager
def attached(model: Any, hooks: Iterable[tuple[Any, HookFn]], *, prepend: bool = False) -> Iterator[None]:
    """Attach hooks inside a `with` statement; exactly these are removed, also after an exception.

    Other threads wait with the model until then.

    Unlike with ``model.hooks``, a name that the model does not have is an error, and points that are already
    resolved (`resolve_hook`) need no look-up.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        hooks: Pairs of a hook name or `HookPoint` and a hook function.
        prepend: Run before the hooks that the model already has instead of after them.

    Raises:
        SiteError: The model has no hook of a given name.
    """
    hooks = list(hooks)
    resolved = [(resolve_hook(model, p) if isinstance(p, str) else p, fn) for p, fn in hooks]
    with exclusively(model):
        level = model.context_level + 1
        try:
            model.context_level = level
            for point, fn in resolved:
                point.add_hook(fn, level=level, prepend=prepend)
            yield
        finally:
            for point, _ in resolved:
                point.remove_hooks(level=level)
            model.context_level = level - 1


@contextmanager
def capturing(model: Any, names: Sequence[str], *, before_hooks: bool = False) -> Iterator[dict[str, Tensor]]:
    """Collect the activations at `names` from whatever runs inside the `with` statement.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        names: Hook names.
        before_hooks: Collect activations before the user's hooks on the model change them.

    Yields:
        A dictionary from hook name to activation, filled as the model runs. Activations are cloned, so that
        later in-place changes do not affect them.
    """
    store: dict[str, Tensor] = {}

    def keep(name: str) -> HookFn:
        def fn(activation: Tensor, hook: Any) -> None:
            store[name] = activation.detach().clone()

        return fn

    with attached(model, [(name, keep(name)) for name in names], prepend=before_hooks):
        yield store
