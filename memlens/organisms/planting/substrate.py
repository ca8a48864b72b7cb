"""What else a planted memory rests on, measured on activations: shared substrate and sufficiency."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from memlens.forward.capture import run_capturing
from memlens.forward.components import Component, ComponentKind, ComponentWeights
from memlens.forward.hooks import HookFn, attached, hook_name
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.replacing import Replacement
from memlens.instruments.screen.gradients import attribute_ablation
from memlens.models.load import load_model
from memlens.models.quiet import quiet
from memlens.organisms.planting.plant import Organism, recalled
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.run import sweep

_SITES = {"head": "z", "neuron": "mlp_post", "layer_mlp": "mlp_out", "layer_attention": "attn_out"}
_LOST = {"recall_lost": "target_accuracy", "logprob_lost": "target_logprob"}

LOSS_COLUMNS: tuple[str, ...] = ("kind", "layer", "index", *_LOST)
"""Columns of `ablate_others`."""


def hooked(organism: Organism) -> Any:
    """Return the organism as a TransformerLens model of its own, which later changes do not reach."""
    with quiet():
        return load_model(deepcopy(organism.model), check_weights=False)


def as_asked(organism: Organism) -> SequenceSet:
    """Return the planted sequences with all planted tokens as targets."""
    seqs = organism.sequences
    return seqs if organism.options.planted == "continuation" else SequenceSet.from_tokens(seqs.rows(), 1)


def ablate_others(
    organism: Organism, others: SequenceSet, *, screened: int = 50, draws: int = 3
) -> pd.DataFrame:
    """Resample-ablate components that do not carry, one at a time, and measure what recall loses.

    For the kinds of component that the carrier has, all heads, MLPs and attentions outside the carrier are
    ablated; of neurons, those for which the gradient estimates the largest loss of log-probability when they
    are set to their mean over `others`.

    Args:
        organism: The organism.
        others: Sequences that were not planted, from which the activations are drawn.
        screened: Number of neurons to ablate.
        draws: Number of draws of an activation, over which the losses are averaged.

    Returns:
        One row per ablated component: `kind`, `layer`, `index`, and the means over sequences and draws of
        `recall_lost` (share of planted tokens) and `logprob_lost` (nats per token).
    """
    if not organism.components:
        return pd.DataFrame(columns=LOSS_COLUMNS)
    model, seqs = hooked(organism), as_asked(organism)
    weights = ComponentWeights(organism.model)
    tables = []
    for kind in organism.carrier.component_kinds:
        chosen = [c for c in weights.components(kind) if c not in organism.components]
        if kind == "neuron":
            chosen = _strongest(model, seqs, others, chosen, screened)
        if not chosen:
            continue
        lost = {name: np.zeros(len(chosen)) for name in _LOST}
        for seed in range(draws):
            made = _resampled(model, seqs, others, kind, chosen, seed)
            result = sweep(model, seqs, made, tuple(_LOST.values()), progress=False)
            for name, metric in _LOST.items():
                lost[name] -= result.effect(metric).values.mean(0) / draws
        cells = {"kind": kind, "layer": [c.layer for c in chosen], "index": [c.index for c in chosen]}
        tables.append(pd.DataFrame({**cells, **lost}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=LOSS_COLUMNS)


def _strongest(
    model: Any, seqs: SequenceSet, others: SequenceSet, neurons: Sequence[Component], n: int
) -> list[Component]:
    found = attribute_ablation(
        model, seqs, site="mlp_post", mode="mean", method="attribution_patching", reference=others,
        progress=False,
    )  # fmt: skip
    effect = found.effect("target_logprob").values.mean(0)
    return sorted(neurons, key=lambda c: effect[c.layer, c.index])[:n]


def _resampled(
    model: Any,
    seqs: SequenceSet,
    others: SequenceSet,
    kind: ComponentKind,
    components: Sequence[Component],
    seed: int,
) -> list[Intervention]:
    replacement = Replacement("resample", reference=others, seed=seed)
    whole = kind.startswith("layer")
    cells = [(str(c), {c.layer: None if whole else c.index}, {}) for c in components]
    return replacement.interventions(model, seqs, _SITES[kind], cells)


@torch.no_grad()
def sufficiency(organism: Organism) -> float:
    r"""Return the share of the planted log-probability that the carrier brings back on its own.

    .. math:: \frac{\ell(\text{carrier alone}) - \ell(\text{base})}{\ell(\text{organism}) - \ell(\text{base})}

    with :math:`\ell` the mean log-probability of the planted tokens (nats). For the carrier alone, the
    organism runs with every head's output z and every neuron's activation outside the carrier set to what it
    is in the base model on the same tokens: only the carrier's components respond to what the carrier wrote,
    and what they write reaches the output directly. The value is 1 if no other component takes part, and
    lower, even negative, if later components amplify what the carrier writes. NaN without components.
    """
    if not organism.components:
        return float("nan")
    seqs, planted = organism.sequences, organism.options.planted
    model = hooked(organism)
    with organism.restored():
        base = Trunk(hooked(organism))
        without = recalled(organism.model, seqs, planted).nll
    names = [hook_name(site, layer) for site in ("z", "mlp_post") for layer in range(base.n_layers)]
    _, store = run_capturing(base, seqs.tokens.to(base.device), names)
    own = {name: torch.zeros(store[name].shape[2], dtype=torch.bool) for name in names}
    for c in organism.components:
        name = hook_name("z" if c.kind in ("head", "layer_attention") else "mlp_post", c.layer)
        own[name][slice(None) if c.kind.startswith("layer") else c.index] = True
    with attached(model, [(name, _frozen(store[name], own[name])) for name in names]):
        alone = recalled(model.original_model, seqs, planted).nll
    gained = without - recalled(organism.model, seqs, planted).nll
    return float((without - alone).mean() / gained.mean())


def _frozen(values: Tensor, free: Tensor) -> HookFn:
    """The hook that sets all heads or neurons but some to given values."""

    def fn(x: Tensor, hook: Any) -> Tensor:
        at = free.to(x.device).reshape(-1, *[1] * (x.ndim - 3))
        return torch.where(at, x, values.to(x))

    return fn
