r"""K-FAC curvature: what is left of a model when the directions of little curvature leave its matrices.

Merullo et al. (arXiv 2510.24256) decompose the matrices of MLPs by the curvature of the loss on general
text. With K-FAC the curvature of a matrix :math:`W` is :math:`G \otimes A`, with :math:`A = E[a a^\top]` of
its inputs and :math:`G = E[g g^\top]` of the loss gradients at its outputs. In their eigenbases
:math:`U_A, U_G`, with eigenvalues :math:`\lambda, \mu`, the entry :math:`i, j` of :math:`U_G^\top W U_A` has
curvature :math:`\mu_i \lambda_j`. The paper's edit keeps the entries of largest curvature that hold a given
share of its sum, and removes the rest, which removes recitation. Inputs are those after the norm, and
gradients those before rotary embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from memlens.choices import CurvatureMatrix
from memlens.errors import OptionError, check_option
from memlens.forward.batches import Batch, Targets, make_batches
from memlens.forward.capture import run_capturing
from memlens.forward.components import PARTS
from memlens.forward.exclusive import computes
from memlens.forward.hooks import chosen_layers, hook_name
from memlens.forward.metrics import METRICS
from memlens.forward.read_blocks import LayerParts, read_parts
from memlens.forward.read_weights import value_vectors
from memlens.forward.trunk import Trunk
from memlens.instruments.edit.weight_edit import EditMaker, WeightChange, WeightEdit
from memlens.instruments.screen.backward import Pass, Spot, run_backward
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet

_BATCH = 8

MATRICES: tuple[CurvatureMatrix, ...] = get_args(CurvatureMatrix)


@computes
def curvature_edits(
    model: Any,
    text: SequenceSet,
    kept: Sequence[float] = (0.99, 0.9, 0.8, 0.6),
    *,
    matrices: Sequence[CurvatureMatrix] = ("out",),
    layers: Sequence[int] | None = None,
    n_random: int = 1,
    seed: int = 0,
) -> list[WeightEdit]:
    r"""Return edits that keep only the directions of large curvature in some matrices of every layer.

    For each share, every matrix becomes the sum of its entries of largest curvature that hold this share of
    its curvature; with 1 nothing changes. The controls ("random 0", …) keep as many entries of each matrix,
    in the same bases, drawn at random. Biases stay as they are.

    The edits are unsupervised: they know no sequence. What recall and other skills lose:
    ``ml.sweep(model, sequences, edits)`` and ``ml.evaluate_tasks(model, tasks, edits)``, along `kept` and
    `entries`; `ml.instruments.export_edited` writes one of them as a checkpoint.

    Args:
        model: A TransformerLens model with unprocessed weights.
        text: General text, from which the curvature is computed, without the sequences that are tested.
        kept: Shares of the curvature, above 0 and at most 1.
        matrices: Which: the MLPs' output matrices by default. ("in", "out"), with "gate" where the MLPs have
            one, are all projections of the MLPs; "q", "k" and "v" are attention's, before rotary embedding
            and norms of queries and keys.
        layers: All by default.
        n_random: Controls for each share.
        seed: Of the controls.

    Returns:
        One edit for each share and choice of entries, with the coordinates `kept` and `entries` ("curvature",
        "random 0", …); `about["share_of_entries"]` says how many entries stay.

    Raises:
        OptionError: A share is out of range; no matrices, unknown ones, or a gate that the MLPs do not have.
        SiteError: A layer that does not exist.
        EmptySetError: There is no text.
        SequenceError, VocabularyError: It is too long for the model, or has ids that the model has not.
        UnsupportedModelError: A layer has an unknown form, such as a mixture of experts.

    Source: arXiv 2510.24256, there for the projections of the MLP; that it is the output matrix alone by
    default, queries, keys and values, and the controls are ours.

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
    if not len(matrices):
        raise OptionError(f"no matrices: name some of {', '.join(MATRICES)}.")
    chosen: list[CurvatureMatrix] = []
    for matrix in matrices:
        check_option("matrix", matrix, MATRICES)
        if matrix not in chosen:
            chosen.append(matrix)
    check_sequences(text, model, on_eos="keep")
    maker = EditMaker(model)
    layers = chosen_layers(layers, maker.trunk.n_layers)
    places: list[tuple[int, CurvatureMatrix]] = [(layer, matrix) for matrix in chosen for layer in layers]
    for layer, matrix in places:
        if matrix not in maker.parts(layer).maps:
            raise OptionError(f"the MLP of layer {layer} has no {matrix!r}: leave it out of matrices.")
    factors = {matrix: kfac_factors(maker.trunk, text, matrix) for matrix in chosen}
    bases = {(n, m): Eigenbasis.of(factors[m][0][n], factors[m][1][n]) for n, m in places}
    weights = {(layer, matrix): maker.parts(layer).maps[matrix].weight.double() for layer, matrix in places}
    edits = []
    for share in kept:
        stays = {place: basis.largest(share) for place, basis in bases.items()}
        size = float(torch.cat([each.flatten() for each in stays.values()]).double().mean())
        for draw in (None, *range(n_random)):
            entries = "curvature" if draw is None else f"random {draw}"
            changes = []
            for layer, matrix in places:
                own, weight = stays[layer, matrix], weights[layer, matrix]
                if draw is not None:
                    more = [] if matrix == "out" else [PARTS.index(matrix)]
                    own = _shuffled(own, [seed, draw, layer, *more])
                changed = weight if own.all() else bases[layer, matrix].part(weight, own)
                index = torch.arange(changed.shape[1 if matrix == "out" else 0], device=changed.device)
                changes.append(WeightChange(layer, matrix, changed, index))
            about = {
                "kept": share, "entries": entries, "share_of_entries": size,
                "matrices": chosen,
            }  # fmt: skip
            name = (
                f"keep {share:g} of the curvature" if draw is None else f"keep as many entries, draw {draw}"
            )
            coords = {"kept": float(share), "entries": entries}
            edits.append(maker.edit(name, changes, coords=coords, about=about))
    return edits


def _shuffled(stays: Bool[Tensor, "out in"], seed: Sequence[int]) -> Bool[Tensor, "out in"]:
    order = np.random.default_rng([part % 2**64 for part in seed]).permutation(stays.numel())
    return stays.flatten()[torch.from_numpy(order).to(stays.device)].reshape(stays.shape)


def kfac_factors(
    trunk: Trunk, text: SequenceSet, matrix: CurvatureMatrix = "out"
) -> tuple[list[Tensor], list[Tensor]]:
    r"""Return :math:`E[a a^\top]` and :math:`E[g g^\top]` of a matrix in each layer, in float64.

    Means over all positions of the text but each last. :math:`g` is the gradient of the text's mean
    log-probability, so that :math:`G` has no absolute scale.
    """
    whole = SequenceSet.from_tokens(text.rows(), 1)
    inputs: list[Any] = [0] * trunk.n_layers
    outputs: list[Any] = [0] * trunk.n_layers
    n = int(whole.n_targets.sum())
    for a, g, used in curvature_runs(trunk, whole, matrix):
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


Run = tuple[list[Float[Tensor, "batch pos d"]], list[Float[Tensor, "batch pos d"]]]
"""Inputs and gradients at the outputs, by layer, in float64."""


def curvature_runs(
    trunk: Trunk, seqs: SequenceSet, matrix: CurvatureMatrix = "out"
) -> Iterator[tuple[list[Tensor], list[Tensor], Tensor]]:
    """Yield a matrix' inputs and the gradients at its outputs by layer, and which positions predict."""
    run = _OutputRun(trunk) if matrix == "out" else _InputRun(trunk, matrix)
    for batch, targets in make_batches(seqs, _BATCH, trunk.device):
        yield *run(trunk, batch, targets), batch.predicts


def _gradients(trunk: Trunk, batch: Batch, targets: Targets, site: str) -> Pass:
    with torch.no_grad():
        resid = trunk.embed(batch.tokens)
    spots = [Spot.of(site, layer) for layer in range(trunk.n_layers)]
    return run_backward(trunk, targets, resid, 0, METRICS["target_logprob"], spots)


class _OutputRun:
    """Runs that give hidden activations, and the gradients at the MLPs' outputs.

    The gradient at the output follows from the one at the hidden units, :math:`V g`, by least squares; so it
    is the one before a norm that some models have between the MLP and the residual.
    """

    def __init__(self, trunk: Trunk) -> None:
        values = [value_vectors(trunk.model, layer).double() for layer in range(trunk.n_layers)]
        self.inverse = [torch.linalg.pinv(value) for value in values]

    def __call__(self, trunk: Trunk, batch: Batch, targets: Targets) -> Run:
        back = _gradients(trunk, batch, targets, "mlp_post")
        a = [back.activations[layer].double() for layer in range(trunk.n_layers)]
        return a, [back.gradients[n].double() @ inverse.T for n, inverse in enumerate(self.inverse)]


class _InputRun:
    """Runs that give the inputs of `in`, `gate`, `q`, `k` or `v`, after the norm, and the gradients there."""

    def __init__(self, trunk: Trunk, matrix: CurvatureMatrix) -> None:
        self.matrix: CurvatureMatrix = matrix
        self.parts = [
            read_parts(trunk.model, layer, parallel=trunk.parallel) for layer in range(trunk.n_layers)
        ]
        self.of_mlp = matrix in ("in", "gate")
        site = "resid_mid" if self.of_mlp and not trunk.parallel else "resid_pre"
        self.read = [hook_name(site, layer) for layer in range(trunk.n_layers)]

    def __call__(self, trunk: Trunk, batch: Batch, targets: Targets) -> Run:
        back = _gradients(trunk, batch, targets, "mlp_post" if self.of_mlp else self.matrix)
        with torch.no_grad():
            _, seen = run_capturing(trunk, batch.tokens, self.read)
        inputs, gradients = [], []
        for layer, (part, name) in enumerate(zip(self.parts, self.read, strict=True)):
            norm, x = part.norms.get("mlp_norm" if self.of_mlp else "attn_norm"), seen[name]
            x = x if norm is None else norm(x)
            g = back.gradients[layer]
            inputs.append(x.double())
            gradients.append((self._at_matrix(part, x, g) if self.of_mlp else g.flatten(2)).double())
        return inputs, gradients

    def _at_matrix(self, part: LayerParts, x: Tensor, g: Tensor) -> Tensor:
        """Return the gradient at the output of `in` or `gate`, from the one at the hidden units."""
        outputs = {name: part.maps[name](x).detach() for name in ("in", "gate") if name in part.maps}
        own = outputs[self.matrix].requires_grad_()
        with torch.enable_grad():
            first, *up = (outputs[name] for name in ("gate", "in") if name in outputs)
            hidden = part.act(first) if not up else part.act(first) * up[0]
            return torch.autograd.grad(hidden, own, g)[0]
