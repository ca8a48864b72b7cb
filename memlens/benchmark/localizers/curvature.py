"""Curvature: how much of a sequence goes through directions of the weights that other text does not use.

The decomposition is that of Merullo et al. (arXiv 2510.24256); see `memlens.instruments.detect.curvature`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from memlens.benchmark.localizer import Scores, localizer
from memlens.forward.components import ComponentKind
from memlens.forward.read_weights import value_vectors
from memlens.forward.trunk import Trunk
from memlens.instruments.detect.curvature import curvature_runs, high_curvature, kfac_factors
from memlens.sequences.set import SequenceSet

KEPT = 0.8
"""Share of the curvature that the edit keeps: one of the paper's values."""


@localizer(
    "K-FAC curvature", components=("neuron", "layer_mlp"), cites="merullo2025",
    cost="one forward and backward pass, one over the other sequences, and two eigenbases per layer",
)  # fmt: skip
def kfac_curvature(
    model: Any, sequences: SequenceSet, *, component: ComponentKind, others: SequenceSet, seed: int
) -> Scores:
    r"""First-order estimate of what the paper's edit, of one neuron's value vector, takes from the sequence.

    .. math:: s_n = \sum_t a_{n,t}\; g_t \cdot (W - W_\text{kept})_{:,n}

    with :math:`a` the MLP's hidden activations and :math:`g` the gradient of the mean target log-probability
    at its output; :math:`W_\text{kept}` is the edited output matrix, whose factors come from all tokens of
    `others`. The sum over a layer's neurons, its score, estimates the edit of the whole matrix. The paper
    scores no neurons: that they are ranked by their part of the edit's effect is our reading, and so is the
    restriction to the output matrix.
    """
    trunk = Trunk(model)
    low = []
    for layer, (a, g) in enumerate(zip(*kfac_factors(trunk, others), strict=True)):
        matrix = value_vectors(model, layer).T.to(a)
        low.append(matrix - high_curvature(matrix, a, g, KEPT))
    found = []
    for a, g, _ in curvature_runs(trunk, sequences):
        parts = [torch.einsum("btn,btd,dn->bn", *each) for each in zip(a, g, low, strict=True)]
        found.append(torch.stack(parts, 1).float().cpu().numpy())
    scores = np.concatenate(found)
    return scores if component == "neuron" else scores.sum(-1, keepdims=True)
