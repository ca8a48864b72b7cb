r"""Rank products: what several kinds of evidence agree on.

Each kind of evidence has faults of its own. An exact ablation also finds components that the model needs for any
text; a gradient vanishes where the metric is flat; an activation says nothing of its effect. With :math:`r_e(c)`
the rank of component c by evidence e (1 for the highest), the score is

.. math:: -\sum_e \log r_e(c)

the negative logarithm of the rank product (Breitling et al., 2004). What is combined was chosen on organisms of
seeds below 100 in `pythia-s`, `gpt-neo-s` and `olmo2-s`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata

from memlens.benchmark.localizer import LOCALIZERS, Scores, component_shape, localizer, reshaped
from memlens.benchmark.localizers.ablations import lost
from memlens.forward.generate import greedy_continuations
from memlens.instruments.ablate.heads import head_set_ablations
from memlens.instruments.ablate.neurons import neuron_knock_outs
from memlens.organisms.planting.carriers import ComponentKind
from memlens.sequences.set import SequenceSet

SCREENED = 0.1
"""Share of the neurons that are ablated exactly."""
N_SUBSETS = 96
"""Random sets of heads that are ablated together."""
P_ABLATED = 0.1
"""Share of the heads in each of them."""

_CHEAP = ("gradient of the output weights", "gate gradient", "activation times norm")


@localizer(
    "rank product", components=("head", "neuron"), specific=False, cites="breitling2004",
    cost="gradients, then exact passes for a tenth of the neurons or for 96 sets of heads",
)  # fmt: skip
def rank_product(
    model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
) -> Scores:
    """Rank product of gradients and exact effects.

    For neurons: the norm of the gradient of the output weights, the gate gradient, the activation times the norm
    of the output vector, and, for the tenth of the neurons that these put first, the exact effect of zero
    ablation; all others rank behind them in the order of the first three.

    For heads: the gradient of the output weights over its root mean square on other text, and the effect of a
    head within random sets of heads that are ablated together (the slope of a ridge regression of the lost
    log-probability on which heads were ablated: it also finds heads that stand in for one another, which single
    ablations miss), z-scored on other text. Other text is `others` and the model's own greedy continuations of
    their prefixes, which it predicts as surely as a memorized sequence.
    """
    if component == "neuron":
        return _neurons(model, sequences, others, seed)
    return _heads(model, sequences, others, seed)


def _neurons(model: Any, sequences: SequenceSet, others: SequenceSet, seed: int) -> Scores:
    cheap = [
        LOCALIZERS[name](model, sequences, component="neuron", others=others, seed=seed) for name in _CHEAP
    ]
    total = np.sum([log_ranks(each) for each in cheap], axis=0)
    found = total - np.log(total[0].size)  # behind every neuron that is ablated
    for i, row in enumerate(total):
        chosen = np.argwhere(row >= np.quantile(row, 1 - SCREENED))
        sets = {f"L{layer}N{n}": {int(layer): [int(n)]} for layer, n in chosen}
        cuts = neuron_knock_outs(model, sequences[[i]], sets, mode="zero", seed=seed)
        effects = np.asarray(lost(model, sequences[[i]], cuts), dtype=np.float64).reshape(-1)
        at = tuple(chosen.T)
        found[i][at] = row[at] + log_ranks(effects[None])[0]
    return found


def _heads(model: Any, sequences: SequenceSet, others: SequenceSet, seed: int) -> Scores:
    own = continued(model, others)
    every = sequences.concat(others, id_suffix="-other").concat(own, id_suffix="-own")
    n = len(sequences)
    gradients = LOCALIZERS["gradient of the output weights"](
        model, every, component="head", others=others, seed=seed
    )
    usual = np.sqrt(np.square(gradients[n:]).mean(0))
    ratio = gradients[:n] / (usual + np.quantile(usual, 0.1))
    effects = effects_in_sets(model, every, seed)
    mean, spread = effects[n:].mean(0), effects[n:].std(0, ddof=1)
    z = (effects[:n] - mean) / np.maximum(spread, 1e-6 + 1e-3 * spread.mean())
    return log_ranks(ratio) + log_ranks(z)


def log_ranks(scores: Float[np.ndarray, "sequence ..."]) -> Float[np.ndarray, "sequence ..."]:
    """Return minus the logarithm of each component's rank within its sequence: 0 for the first."""
    return np.stack([-np.log(rankdata(-row.ravel())).reshape(row.shape) for row in scores])


def continued(model: Any, sequences: SequenceSet) -> SequenceSet:
    """Return sequences whose targets are the model's own greedy continuations of their prefixes."""
    decoded = greedy_continuations(model, sequences)
    tokens = sequences.tokens.clone()
    mask = sequences.target_mask
    positions = sequences.target_positions[mask]
    rows = torch.arange(len(sequences))[:, None].expand_as(mask)[mask]
    tokens[rows, positions] = decoded.to(tokens.device, tokens.dtype)[mask]
    return SequenceSet.from_tokens(tokens, sequences.prefix_len, mask=sequences.mask)


def effects_in_sets(model: Any, sequences: SequenceSet, seed: int) -> Scores:
    r"""Return the mean effect of each head within random sets of heads, zeroed together.

    With :math:`x_{sh}` whether set s holds head h and :math:`y_s` the lost log-probability, in nats, the scores
    are the slopes of the ridge regression of y on x (with an intercept, penalty 1).
    """
    shape = component_shape(model, "head")
    masks = np.random.default_rng([seed, 11]).random((N_SUBSETS, *shape)) < P_ABLATED
    sets = {str(s): _heads_of(mask) for s, mask in enumerate(masks)}
    taken = lost(model, sequences, head_set_ablations(model, sequences, sets, mode="zero", seed=seed))
    x = masks.reshape(N_SUBSETS, -1).astype(np.float64)
    x -= x.mean(0)
    y = np.asarray(taken, dtype=np.float64).reshape(len(sequences), N_SUBSETS)
    slopes = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (y - y.mean(1, keepdims=True)).T)
    return reshaped(slopes.T, model, "head")


def _heads_of(mask: np.ndarray) -> Sequence[tuple[int, int]]:
    return [(int(layer), int(head)) for layer, head in np.argwhere(mask)]
