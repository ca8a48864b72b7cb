r"""AtP*: attribution patching of heads with exact attention weights and with one layer dropped at a time.

Two ways in which the first-order estimate :math:`(a' - a) \cdot g` of a patch misses heads, and their
remedies (Kramár et al., arXiv 2403.00745):

- *Saturated attention*: where a head looks at one position only, the gradient at its queries and keys is
  almost 0, whatever a patch of them would do. Here the attention weights are computed again with the patched
  queries (or keys), exactly; only what follows the head's mixed values :math:`z` is estimated (the "QK fix").
- *Cancellation*: direct and indirect effects of a node may cancel in one gradient. So the backward pass runs
  once per layer, each time without what that layer adds to the residual, and the absolute estimates are
  averaged ("GradDrop").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from memlens.benchmark.localizer import Scores, localizer
from memlens.forward.batches import Batch, Targets, make_batches
from memlens.forward.capture import ActivationSource
from memlens.forward.components import ComponentKind
from memlens.forward.hooks import HookFn, attached, capturing, hook_name
from memlens.forward.metrics import METRICS
from memlens.forward.trunk import Trunk
from memlens.instruments.patch.patching import write_cell
from memlens.instruments.screen.backward import Spot, run_backward
from memlens.sequences.corrupt import corrupt
from memlens.sequences.set import SequenceSet

NODES = ("q", "k", "v")
"""The nodes of a head: what is patched, at all positions together."""
_BATCH = 8


@localizer(
    "AtP*", components=("head",), cites="kramar2024",
    cost="two forward passes, one forward and backward pass per layer, three runs of each layer",
)  # fmt: skip
def atp_star(
    model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
) -> Scores:
    r"""Attribution patching from a corrupted prefix, with QK fix and GradDrop.

    .. math::
        s_h = \frac{1}{L - 1} \sum_{\ell} \sum_{n \in \{q, k, v\}}
        \Bigl| \sum_t (z_{h,t}^{(n)} - z_{h,t}) \cdot g_{h,t}^{(-\ell)} \Bigr|

    :math:`z^{(n)}` are the head's mixed values when its queries, keys or values are those of the corrupted
    run, :math:`g^{(-\ell)}` is the gradient of the mean target log-probability at :math:`z` without layer
    :math:`\ell`'s additions (0 for the layer's own heads). The paper scores queries, keys and values of
    single positions; that a head's score is the sum over its three nodes, each patched at all positions
    together, is our reading. Heads that share keys and values are credited for their own part.
    """
    trunk = Trunk(model)
    layers = range(trunk.n_layers)
    source = ActivationSource(
        model, corrupt(sequences, seed=seed), [hook_name(node, n) for node in NODES for n in layers]
    )
    found = []
    for batch, targets in make_batches(sequences, _BATCH, trunk.device):
        with torch.no_grad():
            resid = trunk.embed(batch.tokens)
            changes = [_changes(trunk, source, batch, layer, at) for layer, at in _inputs(trunk, resid)]
        total = torch.zeros(len(batch.rows), trunk.n_layers, trunk.n_heads, device=trunk.device)
        for dropped in layers if trunk.n_layers > 1 else [None]:
            kept = [layer for layer in layers if layer != dropped]
            gradients = gradients_without(trunk, targets, resid, dropped, kept)
            for layer in kept:
                products = changes[layer] * gradients[layer].float()
                total[:, layer] += products.sum((-3, -1)).abs().sum(0)
        found.append((total / max(trunk.n_layers - 1, 1)).cpu().numpy())
    return np.concatenate(found)


def gradients_without(
    trunk: Trunk, targets: Targets, resid: Tensor, dropped: int | None, layers: Sequence[int]
) -> Mapping[int, Float[Tensor, "batch pos head d_head"]]:
    """Return the gradient of the target log-probability at `z` of some layers.

    It does not flow through what the layer `dropped` adds to the residual; the values stay what they are.
    """

    def stop(x: Tensor, hook: Any) -> Tensor:
        return x.detach()

    sites = () if dropped is None else ("attn_out", "mlp_out")
    hooks: list[tuple[str, HookFn]] = [(hook_name(s, dropped), stop) for s in sites if dropped is not None]
    spots = [Spot.of("z", layer) for layer in layers]
    with attached(trunk.model, hooks):
        return run_backward(trunk, targets, resid, 0, METRICS["target_logprob"], spots).gradients


def _inputs(trunk: Trunk, resid: Tensor) -> list[tuple[int, Tensor]]:
    """Return each layer with the residual at its input."""
    names = [hook_name("resid_pre", layer) for layer in range(trunk.n_layers)]
    with capturing(trunk.model, names) as store:
        trunk.run(resid.clone())
    return [(layer, store[name]) for layer, name in enumerate(names)]


def _changes(
    trunk: Trunk, source: ActivationSource, batch: Batch, layer: int, resid: Tensor
) -> Float[Tensor, "node batch pos head d_head"]:
    """Return how `z` changes with the queries, the keys or the values of the source, each alone."""
    name = hook_name("z", layer)
    found = []
    for node in (None, *NODES):
        hooks = []
        if node is not None:
            hooks = [(hook_name(node, layer), write_cell(source, node, {"layer": layer}).bind(batch))]
        with attached(trunk.model, hooks), capturing(trunk.model, [name]) as store:
            trunk.run(resid.clone(), layer, layer + 1)
        found.append(store[name].float())
    return torch.stack(found[1:]) - found[0]
