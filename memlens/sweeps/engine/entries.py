"""Where an intervention's change enters the residual, so that the layer it touches need not run.

A hook function depends on the activation at its own point, and the first point that an intervention
touches still has its baseline value. So an intervention that changes one point is evaluated on the captured
baseline, and its change is carried from there to the residual as the layer would carry it:

- `resid_pre`, `resid_post`: the residual itself;
- `mlp_out`, and `attn_out` in parallel blocks: the difference is added after the layer;
- `attn_out` in sequential blocks: the residual between attention and MLP, and the MLP runs;
- `z`: the output projection, then as `attn_out`.

The changed positions are found by comparison: nothing before the first of them is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.hooks import HookFn, hook_name, layer_of
from memlens.sweeps.interventions import Intervention, Reads

_ENTRY_SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z")
_ORDER = ("resid_pre", "v", "z", "attn_out", "mlp_out", "resid_post")
"""The points whose baseline may be read, in the order in which a layer computes them."""


@dataclass(frozen=True)
class Entry:
    """The one point that an intervention changes.

    Attributes:
        layer: Its layer.
        site: Its site.
        name: Its hook name.
        reads: The hook names that it only reads.
    """

    layer: int
    site: str
    name: str
    reads: tuple[str, ...]

    def captured(self, parallel: bool) -> set[str]:
        """Return the activations that the baseline has to keep for it."""
        beside = {hook_name("attn_out", self.layer)} if self.runs_mlp(parallel) else set()
        return {self.name, *self.reads, *beside}

    def next_layer(self) -> int:
        """Return the first layer that runs."""
        return self.layer if self.site == "resid_pre" else self.layer + 1

    def runs_mlp(self, parallel: bool) -> bool:
        """Return whether the touched layer's own MLP runs."""
        return not parallel and self.site in ("attn_out", "z")


@dataclass(frozen=True)
class Start:
    """Where the computation of an intervention begins.

    Attributes:
        layer: The first layer that runs.
        mid: Whether `resid` is the input of the previous layer's MLP.
        resid: The residual there at positions ``first ..``, or at `first` alone if nothing else changed.
        first: The first position that changed.
        alone: Whether it is the only one.
    """

    layer: int
    mid: bool
    resid: Float[Tensor, "batch pos d_model"]
    first: int
    alone: bool = False


def entry_of(intervention: Intervention) -> Entry | None:
    """Return the one point that an intervention changes, or None if its layers have to run."""
    edits = {name for name, fn in intervention.hooks if not isinstance(fn, Reads)}
    reads = tuple(name for name, fn in intervention.hooks if isinstance(fn, Reads))
    if len(edits) != 1:
        return None
    (name,) = edits
    layer, site = _place(name)
    if layer is None or site not in _ENTRY_SITES:
        return None
    here = (layer, _ORDER.index(site))
    for read in reads:
        other, read_site = _place(read)
        if other is None or read_site is None or (other, _ORDER.index(read_site)) >= here:
            return None
    return Entry(layer, site, name, reads)


@cache
def _place(name: str) -> tuple[int | None, str | None]:
    layer = layer_of(name)
    if layer is None:
        return None, None
    return layer, next((site for site in _ORDER if hook_name(site, layer) == name), None)


def edited(
    hooks: Sequence[tuple[str, Any, HookFn]], entry: Entry, acts: Mapping[str, Tensor]
) -> Float[Tensor, "batch pos ..."]:
    """Return the activation that the hooks make of the captured baseline."""
    for name, point, fn in hooks:
        if name != entry.name:
            fn(acts[name].clone(), point)
    value = acts[entry.name].clone()
    for name, point, fn in hooks:
        if name == entry.name:
            new = fn(value, point)
            value = value if new is None else new
    return value


def start_of(
    entry: Entry,
    new: Float[Tensor, "batch pos ..."],
    acts: Mapping[str, Tensor],
    resid: Mapping[int, Tensor],
    blocks: FunctionalBlocks,
    stop: int,
) -> Start | None:
    """Carry a changed activation to the residual; None if nothing changes before `stop`."""
    old = acts[entry.name]
    found = _changes(old[:, :stop], new[:, :stop])
    if found is None:
        return None
    first, last = found
    alone = first == last
    if not alone:
        first = _joined(first, stop)
    here = slice(first, first + 1 if alone else stop)
    layer, mid = entry.layer, entry.runs_mlp(blocks.blocks[entry.layer].parallel)
    new, old = new[:, here].to(old.dtype), old[:, here]
    if entry.site in ("resid_pre", "resid_post"):
        return Start(entry.next_layer(), False, new, first, alone)
    if entry.site == "z":
        change = blocks.head_output_change(layer, *_changed_heads(new, old))
        if change is None:
            change = blocks.attention_output(layer, new) - acts[hook_name("attn_out", layer)][:, here]
    else:
        change = new - old
    before = (
        resid[layer][:, here] + acts[hook_name("attn_out", layer)][:, here]
        if mid
        else resid[layer + 1][:, here]
    )
    return Start(layer + 1, mid, before + change, first, alone)


def changed_from(
    layer: int, old: Float[Tensor, "batch pos d_model"], new: Float[Tensor, "batch pos d_model"]
) -> Start | None:
    """Start at a layer from the residual at its input; None if that equals the baseline's."""
    found = _changes(old, new)
    if found is None:
        return None
    first = _joined(found[0], old.shape[1])
    return Start(layer, False, new[:, first:], first)


def _joined(first: int, stop: int) -> int:
    """Return 0 where computing the few unchanged positions again takes less than joining their keys."""
    return 0 if first <= stop // 32 else first


def _changes(old: Tensor, new: Tensor) -> tuple[int, int] | None:
    """Return the first and the last position that changed, if any."""
    places = torch.nonzero((new != old).flatten(2).any(-1).any(0))[:, 0].tolist()
    return (places[0], places[-1]) if places else None


def _changed_heads(new: Tensor, old: Tensor) -> tuple[Tensor, slice]:
    """Return the change of `z` from the first to the last changed head, and these heads."""
    changed = torch.nonzero((new != old).any(-1).flatten(0, 1).any(0))[:, 0]
    heads = slice(int(changed[0]), int(changed[-1]) + 1)
    return new[:, :, heads] - old[:, :, heads], heads
