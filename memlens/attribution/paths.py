"""What a receiver is given when one head's output changes and no other attention head answers.

The frozen run of path patching: the base run with every attention head held at its base output, but for one
sender, whose `z` is another run's. MLPs answer ("recomputed") or are held too ("frozen").

Three facts keep it cheap, all of them exact. Nothing before the sender's layer differs from the base run,
so the frozen run starts there. Holding all of a block's heads is holding what its attention adds to the
residual. And with MLPs held, a later residual is the base's plus the change of what the sender's attention
adds: then only the sender's and the receiver's block run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from memlens.attribution.sources import ActivationSource
from memlens.models.hooks import HookFn, attached, capturing, hook_name
from memlens.models.trunk import Trunk
from memlens.sequences import SequenceSet
from memlens.sweeps import Batch

__all__ = ["FrozenRuns", "Head"]

Head = tuple[int, int]
"""A layer and a head of it."""


class FrozenRuns:
    """Activations of frozen runs, made when a batch needs them; only the last one is kept.

    Args:
        model: A TransformerLens model.
        base: The run that is patched.
        source: Where the sender's output comes from, row by row.
        layers: The senders' layers.
        mlps: "recomputed" or "frozen".
    """

    trunk: Trunk
    mlps: str
    base: ActivationSource
    source: ActivationSource

    def __init__(
        self, model: Any, base: SequenceSet, source: SequenceSet, layers: Sequence[int], mlps: str
    ) -> None:
        self.trunk, self.mlps = Trunk(model), mlps
        every = range(min(layers), self.trunk.n_layers)
        kept = [hook_name(site, layer) for site in ("resid_pre", "attn_out") for layer in every]
        self.base = ActivationSource(model, base, [*kept, hook_name("resid_post", every[-1])])
        self.source = ActivationSource(model, source, [hook_name("z", layer) for layer in layers])
        self._key: tuple[Any, ...] | None = None
        self._kept: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What it is, without what it happens to hold."""
        return {**self.__dict__, "_key": None, "_kept": None}

    def at(self, batch: Batch, sender: Head, site: str, layer: int) -> Float[Tensor, "batch pos ..."]:
        """Return what a site of a block holds in the frozen run.

        Args:
            batch: The sequences.
            sender: The head that changes.
            site: A site, such as "q", "mlp_out" or "resid_post".
            layer: The block, not before the sender's.
        """
        key = (self.trunk.dtype, tuple(batch.rows.tolist()), sender, site, layer)
        if key != self._key or self._kept is None:
            self._key, self._kept = key, self._run(batch, sender, site, layer)
        return self._kept

    @torch.no_grad()
    def _run(self, batch: Batch, sender: Head, site: str, layer: int) -> Tensor:
        base, frozen = self.base.of(batch), self.mlps == "frozen"
        if frozen and site == "resid_post":
            return base[hook_name(site, layer)] + self._change(batch, sender)
        if frozen and layer > sender[0]:
            start, resid = layer, base[hook_name("resid_pre", layer)] + self._change(batch, sender)
            hooks: list[tuple[str, HookFn]] = []
        else:
            start, resid = sender[0], base[hook_name("resid_pre", sender[0])].clone()
            hooks = [self._sending(batch, sender)]
        held = [hook_name("attn_out", n) for n in range(max(start, sender[0] + 1), layer + 1)]
        hooks += [(name, _holding(base[name])) for name in held]
        wanted = hook_name(site, layer)
        with attached(self.trunk.model, hooks), capturing(self.trunk.model, [wanted]) as store:
            self.trunk.run(resid, start, layer + 1)
        return store[wanted]

    def _change(self, batch: Batch, sender: Head) -> Tensor:
        """By how much the sender changes what its block's attention adds to the residual."""
        layer, base = sender[0], self.base.of(batch)
        name = hook_name("attn_out", layer)
        with (
            attached(self.trunk.model, [self._sending(batch, sender)]),
            capturing(self.trunk.model, [name]) as store,
        ):
            self.trunk.run(base[hook_name("resid_pre", layer)].clone(), layer, layer + 1)
        return store[name] - base[name]

    def _sending(self, batch: Batch, sender: Head) -> tuple[str, HookFn]:
        layer, head = sender
        name = hook_name("z", layer)
        new = self.source.of(batch)[name]

        def fn(z: Tensor, hook: Any) -> Tensor:
            out = z.clone()
            out[:, :, head] = new[:, :, head].to(z.dtype)
            return out

        return name, fn


def _holding(value: Tensor) -> Callable[..., Tensor]:
    return lambda x, hook: value
