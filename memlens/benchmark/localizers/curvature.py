r"""Curvature: how much of a sequence goes through directions of the weights that other text does not use.

Merullo et al. (arXiv 2510.24256) decompose the matrices of MLPs by the curvature of the loss on general
text. With K-FAC the curvature of a matrix :math:`W` is :math:`G \otimes A`, with :math:`A = E[a a^\top]` of
its inputs and :math:`G = E[g g^\top]` of the loss gradients at its outputs. In their eigenbases
:math:`U_A, U_G`, with eigenvalues :math:`\lambda, \mu`, the entry :math:`i, j` of :math:`U_G^\top W U_A` has
curvature :math:`\mu_i \lambda_j`. The paper's edit keeps the entries of largest curvature that hold a given
share of its sum, and removes the rest, which removes recitation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from memlens.benchmark.localizer import Scores, localizer
from memlens.forward.batches import make_batches
from memlens.forward.components import ComponentKind
from memlens.forward.metrics import METRICS
from memlens.forward.read_weights import value_vectors
from memlens.forward.trunk import Trunk
from memlens.instruments.screen.backward import Spot, run_backward
from memlens.sequences.set import SequenceSet

KEPT = 0.8
"""Share of the curvature that the edit keeps: one of the paper's values."""
_BATCH = 8


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
    for a, g, _ in _runs(trunk, sequences):
        parts = [torch.einsum("btn,btd,dn->bn", *each) for each in zip(a, g, low, strict=True)]
        found.append(torch.stack(parts, 1).float().cpu().numpy())
    scores = np.concatenate(found)
    return scores if component == "neuron" else scores.sum(-1, keepdims=True)


def kfac_factors(trunk: Trunk, text: SequenceSet) -> tuple[list[Tensor], list[Tensor]]:
    r"""Return :math:`E[a a^\top]` and :math:`E[g g^\top]` of each layer's MLP output matrix, in float64.

    Means over all positions of the text but each last. :math:`g` is the gradient of the text's mean
    log-probability, so that :math:`G` has no absolute scale.
    """
    whole = SequenceSet.from_tokens(text.rows(), 1)
    inputs: list[Any] = [0] * trunk.n_layers
    outputs: list[Any] = [0] * trunk.n_layers
    n = int(whole.n_targets.sum())
    for a, g, used in _runs(trunk, whole):
        for layer in range(trunk.n_layers):
            rows, gradients = a[layer][used], g[layer][used]
            inputs[layer] = inputs[layer] + rows.T @ rows / n
            outputs[layer] = outputs[layer] + gradients.T @ gradients / n
    return inputs, outputs


def high_curvature(
    matrix: Float[Tensor, "out in"], a: Float[Tensor, "in in"], g: Float[Tensor, "out out"], kept: float
) -> Float[Tensor, "out in"]:
    """Return the part of a matrix whose entries in the curvature's eigenbasis hold a share of its sum."""
    along_in, u_in = torch.linalg.eigh(a)
    along_out, u_out = torch.linalg.eigh(g)
    curvature = along_out.clamp_min(0)[:, None] * along_in.clamp_min(0)
    order = curvature.flatten().argsort(descending=True)
    mass = curvature.flatten()[order].cumsum(0)
    n_kept = int((mass < kept * mass[-1]).sum()) + 1
    stays = torch.zeros_like(mass).index_fill_(0, order[:n_kept], 1).reshape(curvature.shape)
    return u_out @ (stays * (u_out.T @ matrix @ u_in)) @ u_in.T


def _runs(trunk: Trunk, seqs: SequenceSet) -> Iterator[tuple[list[Tensor], list[Tensor], Tensor]]:
    """Yield hidden activations and gradients at the MLPs' outputs by layer, and which positions predict.

    The gradient at the output follows from the one at the hidden units, :math:`V g`, by least squares; so it
    is the one before a norm that some models have between the MLP and the residual.
    """
    layers = range(trunk.n_layers)
    inverse = [torch.linalg.pinv(value_vectors(trunk.model, n).double()) for n in layers]
    spots = [Spot.of("mlp_post", n) for n in layers]
    for batch, targets in make_batches(seqs, _BATCH, trunk.device):
        with torch.no_grad():
            resid = trunk.embed(batch.tokens)
        back = run_backward(trunk, targets, resid, 0, METRICS["target_logprob"], spots)
        a = [back.activations[n].double() for n in layers]
        g = [back.gradients[n].double() @ inverse[n].T for n in layers]
        yield a, g, batch.predicts
