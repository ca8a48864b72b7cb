"""Which neurons of an MLP matter for a sequence, and which others serve as controls.

An MLP's output is a sum of *sub-updates*, one per neuron: its coefficient (the activation that enters the
output matrix) times its value vector (its row of that matrix), plus a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlens.choices import NeuronSelection
from memlens.errors import OptionError, check_option
from memlens.forward.capture import AtTargets, captured_at_targets
from memlens.forward.exclusive import computes
from memlens.forward.hooks import chosen_layers, hook_name
from memlens.forward.read_weights import value_vectors
from memlens.forward.trunk import Trunk
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result

SELECTIONS: tuple[str, ...] = get_args(NeuronSelection)
MEASURED_AT = ("last_prompt", "targets")
AVERAGED = ("size", "coefficient")

_CAPTURE_BYTES = 2**28


@computes
def dominant_neurons(
    model: Any,
    sequences: SequenceSet,
    top_k: int = 10,
    *,
    layers: Sequence[int] | None = None,
    measured_at: str = "last_prompt",
    averaged: str = "size",
    progress: bool = True,
) -> Result:
    r"""Return each sequence's most dominant neurons, layer by layer.

    The dominance of neuron :math:`i` is :math:`|m_i| \cdot \lVert v_i \rVert_2`, where :math:`m_i` is its
    coefficient, the activation that enters the MLP's output matrix (in a gated MLP the product of gate and
    up), and :math:`v_i` its value vector, its row of that matrix (as in the released code of arXiv
    2210.03588). In OLMo 2 and 3 both are taken before the norm that follows the MLP.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        top_k: How many neurons per layer.
        layers: All by default.
        measured_at: "last_prompt", the position that predicts the first target, or "targets", the mean over
            all predicting positions.
        averaged: What the mean over positions is of: "size", :math:`|m_i|`; or "coefficient", :math:`m_i`
            itself, whose size is then taken (as in MemPi), so that a neuron that is now positive, now
            negative counts little.
        progress: Show a bar.

    Returns:
        Kind "dominant_neurons", `(sequence, layer, rank)`: `dominance`, `coefficient`, `value_norm`, and as a
        coordinate the neuron's number, `neuron`. ``result.to_frame()`` is the table.

    Raises:
        OptionError: `top_k` is below 1 or above the number of neurons, or an unknown `measured_at`.
        SiteError: A layer that does not exist.
        UnsupportedModelError: An MLP without one output matrix.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> found = ml.instruments.dominant_neurons(model, seqs, 3, layers=[0, 1], progress=False)
        >>> found["neuron"].dims, bool((found["dominance"].diff("rank") <= 0).all())
        (('sequence', 'layer', 'rank'), True)
    """
    check_option("measured_at", measured_at, MEASURED_AT)
    check_option("averaged", averaged, AVERAGED)
    trunk = Trunk(model)
    layers = chosen_layers(layers, trunk.n_layers)
    norms = value_norms(model, layers)
    check_top_k([top_k], norms.shape[1], least=1)
    seqs = sequences.first_targets() if measured_at == "last_prompt" else sequences
    one = int(seqs.lengths.max()) * norms.numel() * trunk.dtype.itemsize
    names = [hook_name("mlp_post", layer) for layer in layers]
    items = captured_at_targets(
        trunk, seqs, names, batch_size=min(16, max(1, _CAPTURE_BYTES // one)), progress=progress,
        desc="dominant neurons",
    )  # fmt: skip
    parts = [_most_dominant(item, names, norms, top_k, averaged) for item in items]
    neurons, coefficient, dominance = (np.concatenate(p) for p in zip(*parts, strict=True))
    value_norm = np.take_along_axis(norms.cpu().numpy()[None], neurons, axis=2)
    dims = ("sequence", "layer", "rank")
    arrays = {"dominance": dominance, "coefficient": coefficient, "value_norm": value_norm}
    variables = {name: (dims, values) for name, values in arrays.items()}
    coords = {"layer": layers, "rank": list(range(top_k)), "neuron": (dims, neurons)}
    settings = {
        "top_k": top_k,
        "measured_at": measured_at,
        "averaged": averaged,
        "value_norm": "L2, before any norm after the MLP",
    }
    return make_result("dominant_neurons", model, sequences, variables, coords, settings)


@computes
def value_norms(model: Any, layers: Sequence[int]) -> Float[Tensor, "layer neuron"]:
    """Return the L2 norm of every value vector."""
    return torch.stack([value_vectors(model, layer).float().norm(dim=-1) for layer in layers])


def check_top_k(ks: Sequence[int], width: int, *, least: int = 0) -> None:
    """Raise `OptionError` unless every k is between `least` and the number of neurons of a layer."""
    for k in ks:
        if not least <= k <= width:
            raise OptionError(
                f"top_k={k}: each layer has {width} neurons, so give a number from {least} to {width}."
            )


def check_controls(k: int, width: int, selection: str) -> None:
    """Raise `OptionError` where a layer has too few neurons for controls that are not among the top k."""
    if selection == "norm_matched" and 2 * k > width:
        raise OptionError(
            f"top_k={k} with norm-matched controls needs twice as many neurons and each layer has {width}: "
            f"give at most {width // 2}."
        )


def _most_dominant(
    item: AtTargets, names: Sequence[str], norms: Tensor, top_k: int, averaged: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    acts = torch.stack([item.acts[n] for n in names], 1).float()  # [batch, layer, target, neuron]
    share = (item.targets.mask / item.targets.mask.sum(-1, keepdim=True))[:, None, :, None]
    coefficient = (acts * share).sum(2)
    size = coefficient.abs() if averaged == "coefficient" else (acts.abs() * share).sum(2)
    dominance, order = (size * norms).sort(dim=-1, descending=True, stable=True)
    order = order[..., :top_k]
    coefficient = coefficient.gather(-1, order)
    return order.int().cpu().numpy(), coefficient.cpu().numpy(), dominance[..., :top_k].cpu().numpy()


def chosen_neurons(
    dominant: Int[np.ndarray, "seq layer rank"],
    norms: Float[np.ndarray, "layer neuron"],
    layers: Sequence[int],
    k: int,
    selection: str = "dominant",
    *,
    draw: int = 0,
    seed: int = 0,
) -> Int[np.ndarray, "seq layer k"]:
    """Return `k` neurons of each sequence and layer, given the most dominant ones and the value norms.

    The `selection` is "dominant"; "random", any `k` of the layer, uniformly; or "norm_matched": for each of
    the `k` dominant neurons another that is not dominant and whose value vector has the nearest norm, each
    used once (in a random order where two match the same). A sequence's neurons depend only on the seed, its
    row, the layer and the draw. Raises what `check_controls` raises.
    """
    top, width = dominant[..., :k], norms.shape[1]
    check_controls(k, width, selection)
    if selection == "dominant":
        return top
    out = np.empty_like(top)
    for row, own in enumerate(top):
        for i, layer in enumerate(layers):
            rng = np.random.default_rng([seed % 2**64, row, layer, draw])
            random = selection == "random"
            out[row, i] = rng.permutation(width)[:k] if random else _matched(own[i], norms[i], rng)
    return out


def _matched(
    chosen: Int[np.ndarray, "k"], norms: Float[np.ndarray, "neuron"], rng: np.random.Generator
) -> Int[np.ndarray, "k"]:
    """Give each chosen neuron, in random order, the nearest free one; conflicts go to the next round."""
    order = np.argsort(norms, kind="stable")
    free, waiting = order[~np.isin(order, chosen)], rng.permutation(len(chosen))
    out = np.empty_like(chosen)
    while len(waiting):
        wanted, known = norms[chosen[waiting]], norms[free]
        right = np.searchsorted(known, wanted).clip(max=len(free) - 1)
        left = (right - 1).clip(min=0)
        nearest = np.where(np.abs(known[left] - wanted) <= np.abs(known[right] - wanted), left, right)
        _, winners = np.unique(nearest, return_index=True)
        out[waiting[winners]] = free[nearest[winners]]
        free, waiting = np.delete(free, nearest[winners]), np.delete(waiting, winners)
    return out
