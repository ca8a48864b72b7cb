"""Local intrinsic dimension: how many directions the references spread in, seen from a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt, PositiveInt

from memlens.errors import ResultError
from memlens.forward.capture import captured_at_targets
from memlens.forward.exclusive import computes
from memlens.forward.hooks import chosen_layers, hook_name
from memlens.forward.trunk import Trunk
from memlens.instruments.detect.groups import Groups, capture_batch
from memlens.instruments.detect.separation import area_of
from memlens.options import options_class
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_layer_lines
from memlens.results.plots.selection import Selection, takes
from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate, mean_estimate
from memlens.results.statistics.intervals import STATISTICS
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result

_NEAREST = 1e-8
"""What a largest distance of 0 becomes."""
_FEWEST = 3
"""References at least: of two, all but one are one neighbour, whose dimension is that of the space."""


@options_class
class DimensionOptions:
    """Options of `local_dimension`; the result records all of them.

    Example:
        >>> import memlens as ml
        >>> ml.detect.DimensionOptions(neighbours=5).neighbours
        5
    """

    layers: tuple[NonNegativeInt, ...] | None = None
    """Layers; all by default."""
    at: Literal["first_target", "last_target"] = "last_target"
    """Which target's predicting position is a sequence's point."""
    neighbours: PositiveInt | None = None
    """Nearest references that count; all but one by default."""
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the intervals of areas."""
    seed: int = 0
    """Seed of the halves."""


def intrinsic_dimension(
    points: Float[np.ndarray, "point width"],
    references: Float[np.ndarray, "reference width"],
    neighbours: int | None = None,
) -> Float[np.ndarray, "point"]:
    r"""Return the local intrinsic dimension at each point, among the references.

    .. math:: \text{LID} = - \Big( \frac{1}{k} \sum_{j=1}^{k} \log \frac{d_j}{d_k} \Big)^{-1}

    with the Euclidean distances :math:`d_1 \le \dots \le d_k` to the k nearest references. Where all k are
    equal it is infinite and becomes the width; :math:`d_k = 0` becomes 1e-8; a reference at the point itself
    (a distance of 0 among others) gives 0.

    Args:
        points: Activations.
        references: Those of the reference set, which does not contain the points.
        neighbours: k; all references but one by default.

    Raises:
        ResultError: There are fewer than two references, or fewer than k.

    Source: arXiv 2402.18048 (released code: distances, k, what infinity and 0 become).

    >>> references = np.array([[1.0], [2.0], [4.0]])
    >>> intrinsic_dimension(np.array([[0.0]]), references).round(4).tolist()
    [2.8854]
    """
    k = len(references) - 1 if neighbours is None else neighbours
    if not 1 <= k <= len(references):
        raise ResultError(
            f"{len(references)} references cannot give {max(k, 1)} neighbours: give more references."
        )
    a, b = (torch.as_tensor(np.asarray(part), dtype=torch.float64) for part in (points, references))
    exact = "donot_use_mm_for_euclid_dist"  # the fast form loses small distances
    nearest = torch.cdist(a, b, compute_mode=exact).sort(-1).values[:, :k].numpy()
    largest = nearest[:, -1:]
    largest = np.where(largest == 0, _NEAREST, largest)
    with np.errstate(divide="ignore"):
        mean = np.log(nearest / largest).mean(1)
        found = np.where(mean == 0, np.inf, -1 / mean)
    return np.where(np.isinf(found), float(points.shape[1]), np.abs(found))


@computes
def local_dimension(
    model: Any,
    recalled: SequenceSet,
    matched: SequenceSet,
    *,
    reference_model: Any = None,
    options: DimensionOptions | None = None,
    progress: bool = True,
) -> Result:
    """Measure the local intrinsic dimension of recalled and of matched sequences, layer by layer.

    A sequence's point in a layer is the residual after it where its last target is predicted. The matched
    sequences are halved: one half are the references, the other half, held out, the control; so neither group
    is among its own references. See `intrinsic_dimension`.

    Args:
        model: A TransformerLens model.
        recalled: Sequences that the model recalls.
        matched: Sequences that it does not recall, of the same lengths.
        reference_model: Another model, such as the clean twin, whose activations on the first half of
            `matched` are the references.
        options: See `DimensionOptions`.
        progress: Show a progress bar.

    Returns:
        Kind "local_dimension": `lid` `(sequence, layer)`, no unit, with the coordinate `group` ("recalled",
        or "matched" for the held-out half); `area` `(layer, statistic)`: the area under the ROC curve of -LID
        for recalled sequences, with its interval.

    Raises:
        EmptySetError: A group is empty.
        ResultError: There are fewer than three references, too few for the neighbours, or none is held out.
        SiteError: A layer that does not exist.

    Source: arXiv 2402.18048, there the last token of true and false answers; references, groups and positions
    are ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> copies = seqs.table["copies"].to_numpy()
        >>> found = ml.detect.local_dimension(model, seqs[copies == 256], seqs[copies == 0], progress=False)
        >>> found["lid"].dims, bool((found["lid"] > 0).all())
        (('sequence', 'layer'), True)
    """
    options = options or DimensionOptions()
    first, _ = Groups.of(recalled, matched).halves(options.seed)
    is_reference = np.zeros(len(recalled) + len(matched), bool)
    is_reference[first] = True
    references = matched[np.flatnonzero(is_reference[len(recalled) :])]
    held_out = matched[np.flatnonzero(~is_reference[len(recalled) :])]
    if not len(held_out) or (options.neighbours is None and len(references) < _FEWEST):
        raise ResultError(
            f"of {len(matched)} matched sequences {len(references)} would be references and {len(held_out)} "
            f"held out: the dimension takes {_FEWEST} references and a sequence beyond them. Give more."
        )
    groups = Groups.of(recalled, held_out)
    layers = chosen_layers(options.layers, Trunk(model).n_layers)
    points = _points(model, groups.sequences, layers, options.at, progress)
    others = _points(reference_model or model, references, layers, options.at, progress)
    lid = np.stack(
        [
            intrinsic_dimension(points[:, i], others[:, i], options.neighbours)
            for i in range(len(layers))
        ],
        axis=1,
    )  # fmt: skip
    area = np.array([area_of(-lid[:, i], groups.recalled, options.level) for i in range(len(layers))])
    words = {"long_name": "local intrinsic dimension", "units": ""}
    variables = {"lid": (("sequence", "layer"), lid, words), "area": (("layer", "statistic"), area)}
    coords = {"layer": layers, "statistic": list(STATISTICS)}
    twin = None if reference_model is None else str(getattr(reference_model.cfg, "model_name", "another"))
    settings = {**asdict(options), "n_references": len(references), "reference_model": twin}
    return make_result("local_dimension", model, groups.sequences, variables, coords, settings)


def _points(
    model: Any, seqs: SequenceSet, layers: Sequence[int], at: str, progress: bool
) -> Float[np.ndarray, "seq layer width"]:
    trunk = Trunk(model)
    names = [hook_name("resid_post", layer) for layer in layers]
    size, parts = capture_batch(trunk, seqs, trunk.d_model * len(layers)), []
    for item in captured_at_targets(trunk, seqs, names, batch_size=size, progress=progress, desc="points"):
        last = item.targets.mask.sum(-1) - 1 if at == "last_target" else torch.zeros(len(item.final)).long()
        rows = torch.arange(len(last))
        parts.append(
            torch.stack([item.acts[name][rows, last.cpu()] for name in names], 1).float().cpu().numpy()
        )
    return np.concatenate(parts)


@takes(of="value", group="group")
def plot_dimension(result: Result, s: Selection) -> Any:
    """Draw the mean dimension over layers, one line per group."""
    return plot_layer_lines(Result(result.data[["lid"]]), s)


def read_dimension(result: Result, metric: str | None) -> str:
    """Say at which layer the groups differ most, and by how much."""
    group, lid = result["group"].values, result["lid"]
    area = result["area"].sel(statistic="mean").values
    i = int(np.nanargmax(np.abs(area - 0.5)))
    at = lid.isel(layer=i)
    ours, theirs = (mean_estimate(at[group == name]) for name in ("recalled", "matched"))
    value, low, high = result["area"].values[i].tolist()
    return (
        f"After layer {lid['layer'].values[i]}, where the groups differ most, recalled sequences have a "
        f"local intrinsic dimension of {ours.text()}, n = {ours.n}, and held-out matched ones of "
        f"{theirs.text()}, n = {theirs.n}, among {result.settings['n_references']} references. "
        "A lower dimension marks recalled sequences "
        f"with an area of {Estimate(value, low, high, len(lid)).text()}."
    )


register_kind(
    "local_dimension",
    plot=plot_dimension,
    reading=read_dimension,
    cites=(("yin2024", "the local intrinsic dimension of activations"),),
)
