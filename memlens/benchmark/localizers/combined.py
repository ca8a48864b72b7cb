r"""Rank products: what several kinds of evidence agree on.

Each kind of evidence has faults of its own. An exact ablation also finds components that the model needs
for any text; a gradient vanishes where the metric is flat; an activation says nothing of its effect. With
:math:`r_e(c)` the rank of component c by evidence e (1 for the highest), the score is

.. math:: -\sum_e \log r_e(c)

the negative logarithm of the rank product (Breitling et al., 2004). What is combined was chosen on
organisms of seeds below 100 in `pythia-s`, `gpt-neo-s` and `olmo2-s`. Ablating random sets of heads
together, which also shows heads that stand in for one another, was tried there in place of single
ablations: it costs five times as much and found no more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata

from memlens.benchmark.localizer import LOCALIZERS, Scores, localizer
from memlens.benchmark.localizers.ablations import lost, single_neurons
from memlens.benchmark.scores import z_scored
from memlens.errors import SequenceError
from memlens.forward.components import COMPONENT_KINDS, ComponentKind
from memlens.forward.generate import greedy_continuations
from memlens.sequences.set import SequenceSet

SCREENED = 0.1
"""Share of the neurons that are ablated exactly …"""
MAX_SCREENED = 1000
"""… and their largest number."""

_CHEAP = ("gradient of the output weights", "gate gradient", "activation times norm")


@localizer(
    "rank product", components=COMPONENT_KINDS, specific=False, cites="breitling2004",
    cost="two gradients and exact passes for a tenth of the neurons; for others a gradient and an exact "
    "sweep, also of twice the other sequences",
)  # fmt: skip
def rank_product(
    model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
) -> Scores:
    """Rank product of gradients and exact effects.

    For neurons: the norm of the gradient of the output weights, the gate gradient, the activation times the
    norm of the output vector, and, for the tenth of the neurons that these put first (at most 1,000), the
    exact effect of zero ablation; all others rank behind them in the order of the first three.

    For heads and layers: the gradient of the output weights over its root mean square on other text, and the
    exact effect of zero ablation, z-scored on other text. Other text is `others`, and the model's own greedy
    continuations of their prefixes, which it predicts as surely as a memorized sequence.
    """
    if component == "neuron":
        return _neurons(model, sequences, others, seed)
    return _against_other_text(model, sequences, component, others, seed)


def _neurons(model: Any, sequences: SequenceSet, others: SequenceSet, seed: int) -> Scores:
    cheap = [
        LOCALIZERS[name](model, sequences, component="neuron", others=others, seed=seed) for name in _CHEAP
    ]
    total = np.sum([log_ranks(each) for each in cheap], axis=0)
    found = total - np.log(total[0].size)  # behind every neuron that is ablated
    share = min(SCREENED, MAX_SCREENED / total[0].size)
    for i, row in enumerate(total):
        chosen = np.argwhere(row >= np.quantile(row, 1 - share))
        cells = [(int(layer), int(neuron)) for layer, neuron in chosen]
        cuts = single_neurons(model, sequences[[i]], cells, mode="zero", seed=seed)
        effects = np.asarray(lost(model, sequences[[i]], cuts), dtype=np.float64).reshape(-1)
        at = tuple(chosen.T)
        found[i][at] = row[at] + log_ranks(effects[None])[0]
    return found


def _against_other_text(
    model: Any, sequences: SequenceSet, component: ComponentKind, others: SequenceSet, seed: int
) -> Scores:
    if others is sequences or len(others) < 2:
        raise SequenceError(
            f"the rank product for {component} needs at least two other sequences: give others=."
        )
    own = continued(model, others)
    every = sequences.concat(others, id_suffix="-other").concat(own, id_suffix="-own")
    n = len(sequences)
    gradients, effects = (
        LOCALIZERS[name](model, every, component=component, others=others, seed=seed)
        for name in ("gradient of the output weights", "zero ablation")
    )
    usual = np.sqrt(np.square(gradients[n:]).mean(0))
    ratio = gradients[:n] / (usual + np.quantile(usual, 0.1))
    return log_ranks(ratio) + log_ranks(z_scored(effects[:n], effects[n:]))


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
