"""What a zero written at each named site must do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memlens.forward.check.comparison import SAME, size_of, wide
from memlens.forward.check.table import Check
from memlens.forward.hooks import SITES, HookFn, attached, hook_name
from memlens.forward.trunk import Trunk

_DISPENSABLE = ("q", "k", "pattern", "mlp_post")
"""Sites that a model can do without: only the site is refused, such as `mlp_post` of a mixture of experts."""


@dataclass(frozen=True)
class LayerRun:
    """One layer, run from the model's own residual for all sites at once.

    Attributes:
        layer: Its number.
        out: Its output without a change, from the model's own residual and what was joined to it.
        names: The hook of each site that the model has.
        rows: The rows of the batch in which a site was zeroed; the first rows are without a change.
        store: The activations at each hook, all rows.
    """

    layer: int
    out: Float[Tensor, "seq pos d_model"]
    names: dict[str, str]
    rows: dict[str, slice]
    store: dict[str, Tensor]


def layer_runs(trunk: Trunk, resid: dict[str, Tensor], layers: Sequence[int]) -> list[LayerRun]:
    """Run each layer once: rows of the batch are copies of its residual, one with a zero at each site.

    What a zero must do is seen by comparing rows: a single one is joined by itself from end to beginning.
    """
    points, found = trunk.model.hook_dict, []
    for layer in layers:
        names = {site: hook_name(site, layer) for site in SITES}
        names = {site: name for site, name in names.items() if name in points}
        own = resid[hook_name("resid_pre", layer)]
        start = own if len(own) > 1 else torch.cat([own, own.flip(1)])
        n = len(start)
        rows = {site: slice((i + 1) * n, (i + 2) * n) for i, site in enumerate(names)}
        store: dict[str, Tensor] = {}
        n_rows = (len(rows) + 1) * n
        hooks = [(points[name], _zeroed(rows[site], n_rows, name, store)) for site, name in names.items()]
        with attached(trunk.model, hooks):
            out = trunk.run(start.repeat(len(rows) + 1, 1, 1), layer, layer + 1)
        found.append(LayerRun(layer, out[:n], names, rows, store))
    return found


Claim = Callable[[dict[str, Tensor]], "tuple[Tensor, Tensor]"]
"""From the activations of a run with a zeroed site to two tensors that must be equal."""


def _claims(trunk: Trunk, layer: int, plain: dict[str, Tensor]) -> Iterator[tuple[str, Claim]]:
    """Yield what a zero at each site of a layer must do."""

    def at(site: str) -> str:
        return hook_name(site, layer)

    def constant(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x[:1, :1].expand_as(x)

    def without_attention(run: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if trunk.parallel:
            return run[at("resid_post")] - plain[at("mlp_out")], plain[at("resid_pre")]
        return run[at("resid_mid")], plain[at("resid_pre")]

    def without_mlp(run: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        before = plain[at("resid_pre")] + plain[at("attn_out")] if trunk.parallel else plain[at("resid_mid")]
        return run[at("resid_post")], before

    def by_place(run: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Attention no longer depends on the tokens: it is uniform apart from a bias by distance."""
        pattern = run[at("pattern")]
        return pattern, pattern[:1].expand_as(pattern)

    yield "resid_pre", lambda run: constant(run[at("attn_out")] + run[at("mlp_out")])
    yield "resid_mid", lambda run: constant(run[at("mlp_out")])
    yield "attn_out", without_attention
    yield "mlp_out", without_mlp
    yield "q", by_place
    yield "k", by_place
    yield "v", lambda run: (run[at("z")], torch.zeros_like(run[at("z")]))
    yield "pattern", lambda run: (run[at("z")], torch.zeros_like(run[at("z")]))
    yield "z", lambda run: constant(run[at("attn_out")])
    yield "mlp_post", lambda run: constant(run[at("mlp_out")])


def check_sites(trunk: Trunk, runs: Sequence[LayerRun]) -> list[Check]:
    """Check every site in every layer that was run; one entry per site, with the first layer that fails."""
    worst: dict[str, Check] = {}
    for one in runs:
        n, n_rows = len(one.out), (len(one.rows) + 1) * len(one.out)
        plain = {name: value[:n] for name, value in one.store.items()}
        for site, claim in _claims(trunk, one.layer, plain):
            if site in one.names and len(one.store[one.names[site]]) != n_rows:
                found = Check(f"site {site}", "absent", note="does not have one row per sequence")
            elif site in one.names:
                run = {name: value[one.rows[site]] for name, value in one.store.items()}
                found = _site(site, one.layer, plain, run, claim)
            else:
                found = Check(f"site {site}", "absent", note="the model does not have this hook")
            if site not in worst or _BADNESS[found.status] > _BADNESS[worst[site].status]:
                worst[site] = found
    return list(worst.values())


_BADNESS = {"absent": 0, "ok": 1, "ignored": 2, "refused": 3, "failed": 4}


def _zeroed(rows: slice, n_rows: int, name: str, store: dict[str, Tensor]) -> HookFn:
    """Return a hook that writes zeros into some rows and keeps the activation."""

    def fn(activation: Tensor, hook: Any) -> Tensor:
        new = activation.clone()
        if len(new) == n_rows:  # in a mixture of experts the first axis is not the batch
            new[rows] = 0
        store[name] = new
        return new

    return fn


def _site(site: str, layer: int, plain: dict[str, Tensor], run: dict[str, Tensor], claim: Claim) -> Check:
    out = hook_name("resid_post", layer)
    if torch.equal(run[out], plain[out]) and bool(plain[hook_name(site, layer)].any()):
        return Check(f"site {site}", "ignored", layer=layer, note="what is written here has no effect")
    try:
        got, wanted = claim(run)
    except KeyError as error:
        return Check(f"site {site}", "absent", note=f"cannot be checked without {error}")
    allowed = SAME.get(got.dtype, SAME[torch.float32])
    size = size_of(wanted)
    if site not in ("q", "k"):  # attention weights have a scale of their own
        size = max(size, 0.1 * size_of(plain[out]))
    difference = size_of(wide(got) - wide(wanted)) / max(size, 1e-6)
    if difference <= allowed:
        return Check(f"site {site}", "ok", difference, allowed)
    note = "a zero written here does not do what the name claims"
    if site in _DISPENSABLE:
        return Check(f"site {site}", "refused", difference, allowed, layer, f"{note}: hooks here are errors")
    return Check(f"site {site}", "failed", difference, allowed, layer, note)
