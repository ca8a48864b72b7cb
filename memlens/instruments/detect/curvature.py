r"""K-FAC curvature: what is left of a model when the directions of little curvature leave its MLPs.

Merullo et al. (arXiv 2510.24256) decompose the matrices of MLPs by the curvature of the loss on general
text. With K-FAC the curvature of a matrix :math:`W` is :math:`G \otimes A`, with :math:`A = E[a a^\top]` of
its inputs and :math:`G = E[g g^\top]` of the loss gradients at its outputs. In their eigenbases
:math:`U_A, U_G`, with eigenvalues :math:`\lambda, \mu`, the entry :math:`i, j` of :math:`U_G^\top W U_A` has
curvature :math:`\mu_i \lambda_j`. The paper's edit keeps the entries of largest curvature that hold a given
share of its sum, and removes the rest, which removes recitation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memlens.errors import OptionError
from memlens.forward.batches import make_batches
from memlens.forward.exclusive import computes
from memlens.forward.hooks import chosen_layers
from memlens.forward.metrics import METRICS
from memlens.forward.read_weights import value_vectors
from memlens.forward.trunk import Trunk
from memlens.instruments.edit.weight_edit import EditMaker, WeightChange, WeightEdit
from memlens.instruments.screen.backward import Spot, run_backward
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet

_BATCH = 8


@computes
def curvature_edits(
    model: Any,
    text: SequenceSet,
    kept: Sequence[float] = (0.99, 0.9, 0.8, 0.6),
    *,
    layers: Sequence[int] | None = None,
    n_random: int = 1,
    seed: int = 0,
) -> list[WeightEdit]:
    r"""Return edits that keep only the directions of large curvature in the MLPs' output matrices.

    For each share, every layer's matrix becomes the sum of its entries of largest curvature that hold this
    share of the curvature of the layer; with 1 nothing changes. The controls ("random 0", …) keep as many
    entries of the same bases, drawn at random.

    The edits are unsupervised: they know no sequence. What recall and other skills lose:
    ``ml.sweep(model, sequences, edits)`` and ``ml.evaluate_tasks(model, tasks, edits)``, along `kept` and
    `entries`; `ml.instruments.export_edited` writes one of them as a checkpoint.

    Args:
        model: A TransformerLens model with unprocessed weights.
        text: General text, from which the curvature is computed, without the sequences that are tested.
        kept: Shares of the curvature, above 0 and at most 1.
        layers: All by default.
        n_random: Controls for each share.
        seed: Of the controls.

    Returns:
        One edit for each share and choice of entries, with the coordinates `kept` and `entries` ("curvature",
        "random 0", …); `about["share_of_entries"]` says how many entries stay.

    Raises:
        OptionError: A share is out of range.
        SiteError: A layer that does not exist.
        EmptySetError: There is no text.
        SequenceError, VocabularyError: It is too long for the model, or has ids that the model has not.
        UnsupportedModelError: An MLP without one output matrix.

    Source: arXiv 2510.24256, there for all projections of the MLP; that it is the output matrix alone, and
    the controls, are ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> text = ml.load_sequences("zoo:heldout", model)[:8]
        >>> edits = ml.detect.curvature_edits(model, text, [0.9])
        >>> [edit.coords["entries"] for edit in edits]
        ['curvature', 'random 0']
    """
    for share in kept:
        if not 0 < share <= 1:
            raise OptionError(f"kept={share} is not in (0, 1]: give a share of the curvature, such as 0.8.")
    check_sequences(text, model, on_eos="keep")
    maker = EditMaker(model)
    layers = chosen_layers(layers, maker.trunk.n_layers)
    inputs, outputs = kfac_factors(maker.trunk, text)
    bases = {layer: Eigenbasis.of(inputs[layer], outputs[layer]) for layer in layers}
    matrices = {layer: value_vectors(model, layer).T.double() for layer in layers}
    edits = []
    for share in kept:
        stays = {layer: basis.largest(share) for layer, basis in bases.items()}
        size = float(torch.stack([each.double().mean() for each in stays.values()]).mean())
        for draw in (None, *range(n_random)):
            entries = "curvature" if draw is None else f"random {draw}"
            changes = []
            for layer, basis in bases.items():
                own = stays[layer] if draw is None else _shuffled(stays[layer], [seed, draw, layer])
                changed = matrices[layer] if own.all() else basis.part(matrices[layer], own)
                places = torch.arange(changed.shape[1], device=changed.device)
                changes.append(WeightChange(layer, "out", changed, places))
            about = {"kept": share, "entries": entries, "share_of_entries": size}
            name = (
                f"keep {share:g} of the curvature" if draw is None else f"keep as many entries, draw {draw}"
            )
            coords = {"kept": float(share), "entries": entries}
            edits.append(maker.edit(name, changes, coords=coords, about=about))
    return edits


def _shuffled(stays: Bool[Tensor, "out in"], seed: Sequence[int]) -> Bool[Tensor, "out in"]:
    order = np.random.default_rng([part % 2**64 for part in seed]).permutation(stays.numel())
    return stays.flatten()[torch.from_numpy(order).to(stays.device)].reshape(stays.shape)


def kfac_factors(trunk: Trunk, text: SequenceSet) -> tuple[list[Tensor], list[Tensor]]:
    r"""Return :math:`E[a a^\top]` and :math:`E[g g^\top]` of each layer's MLP output matrix, in float64.

    Means over all positions of the text but each last. :math:`g` is the gradient of the text's mean
    log-probability, so that :math:`G` has no absolute scale.
    """
    whole = SequenceSet.from_tokens(text.rows(), 1)
    inputs: list[Any] = [0] * trunk.n_layers
    outputs: list[Any] = [0] * trunk.n_layers
    n = int(whole.n_targets.sum())
    for a, g, used in curvature_runs(trunk, whole):
        for layer in range(trunk.n_layers):
            rows, gradients = a[layer][used], g[layer][used]
            inputs[layer] = inputs[layer] + rows.T @ rows / n
            outputs[layer] = outputs[layer] + gradients.T @ gradients / n
    return inputs, outputs


def high_curvature(
    matrix: Float[Tensor, "out in"], a: Float[Tensor, "in in"], g: Float[Tensor, "out out"], kept: float
) -> Float[Tensor, "out in"]:
    """Return the part of a matrix whose entries in the curvature's eigenbasis hold a share of its sum."""
    basis = Eigenbasis.of(a, g)
    return basis.part(matrix, basis.largest(kept))


@dataclass(frozen=True, eq=False)
class Eigenbasis:
    """The eigenbases of both factors of a matrix' curvature.

    Attributes:
        along_in: Eigenvectors of the inputs' factor, as columns.
        along_out: Those of the gradients' factor.
        curvature: The product of their eigenvalues for each entry.
    """

    along_in: Float[Tensor, "in in"]
    along_out: Float[Tensor, "out out"]
    curvature: Float[Tensor, "out in"]

    @classmethod
    def of(cls, a: Float[Tensor, "in in"], g: Float[Tensor, "out out"]) -> Eigenbasis:
        """Decompose both factors."""
        lambda_, u_in = torch.linalg.eigh(a)
        mu, u_out = torch.linalg.eigh(g)
        return cls(u_in, u_out, mu.clamp_min(0)[:, None] * lambda_.clamp_min(0))

    def largest(self, share: float) -> Bool[Tensor, "out in"]:
        """Return the entries of largest curvature that hold a share of its sum."""
        order = self.curvature.flatten().argsort(descending=True)
        mass = self.curvature.flatten()[order].cumsum(0)
        n_kept = len(mass) if share >= 1 else int((mass < share * mass[-1]).sum()) + 1
        stays = torch.zeros(len(mass), dtype=torch.bool, device=mass.device)
        return stays.index_fill_(0, order[:n_kept], True).reshape(self.curvature.shape)

    def part(self, matrix: Float[Tensor, "out in"], stays: Bool[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return the matrix with only some of its entries in these bases."""
        inside = self.along_out.T @ matrix @ self.along_in
        return self.along_out @ (stays * inside) @ self.along_in.T


def curvature_runs(trunk: Trunk, seqs: SequenceSet) -> Iterator[tuple[list[Tensor], list[Tensor], Tensor]]:
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
