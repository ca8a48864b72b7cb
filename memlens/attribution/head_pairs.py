"""Pairs of heads: what losing both does beyond the sum of each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr

from memlens.attribution.head_sets import Head, head_label, head_set_ablations
from memlens.attribution.replacing import replacement_settings
from memlens.errors import OptionError, SiteError
from memlens.results import Result
from memlens.sequences import SequenceSet
from memlens.sweeps import sweep
from memlens.sweeps.metrics import MetricLike, metric_names
from memlens.sweeps.run import kept

__all__ = ["ablate_head_pairs"]


def ablate_head_pairs(
    model: Any,
    sequences: SequenceSet,
    heads: Sequence[Head],
    *,
    mode: str = "mean_of_other_heads",
    positions: str = "all",
    reference: SequenceSet | None = None,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    seed: int = 0,
    **options: Any,
) -> Result:
    r"""Ablate every pair of some heads, and each of them alone.

    The interaction of heads a and b in a metric :math:`m` is

    .. math:: m_{ab} - m_a - m_b + m_0

    0 where their effects add up; negative where losing both hurts more than the sum (each stands in for the
    other), positive where it hurts less (they work in one chain).

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        heads: The heads `(layer, head)`; the pairs of n heads are n (n - 1) / 2.
        mode: See `ablate_heads` and `head_set_ablations`.
        positions: See `ablate_heads`.
        reference: The set for "mean" and "resample"; `sequences` itself by default.
        metrics: As for `sweep`.
        seed: For "resample".
        options: Further options of `sweep`.

    Returns:
        Kind "head_pair_ablation": each metric `(sequence, head_a, head_b)`, symmetric, single heads on the
        diagonal; `interaction` of the first metric, NaN on the diagonal; heads are labelled `L3H2`.

    Raises:
        OptionError: Fewer than two heads.
        SiteError: A head that does not exist, or stands in `heads` twice.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> pairs = ml.ablate_head_pairs(model, seqs, [(0, 1), (2, 0), (2, 3)], progress=False)
        >>> pairs["interaction"].dims, pairs["interaction"]["head_a"].values.tolist()
        (('sequence', 'head_a', 'head_b'), ['L0H1', 'L2H0', 'L2H3'])
    """
    heads = [(int(layer), int(head)) for layer, head in heads]
    if len(heads) < 2:
        raise OptionError(f"heads={heads} makes no pair: give at least two heads as (layer, head).")
    if len(set(heads)) < len(heads):
        raise SiteError(f"heads={heads} holds a head twice: give each once.")
    labels = [head_label(h) for h in heads]
    cells = [(i, i) for i in range(len(heads))] + list(combinations(range(len(heads)), 2))
    sets = {
        " + ".join(labels[i] for i in sorted(set(cell))): [heads[i] for i in sorted(set(cell))]
        for cell in cells
    }
    edits = head_set_ablations(
        model, sequences, sets, mode=mode, positions=positions, reference=reference, seed=seed
    )
    result = sweep(
        model,
        sequences,
        edits,
        metrics,
        kind="head_pair_ablation",
        settings={**replacement_settings(mode, positions, reference, seed), "heads": labels},
        **options,
    )
    return kept(Result(_squared(result, metric_names(metrics), cells, labels)), options.get("out"))


def _squared(
    result: Result, names: Sequence[str], cells: Sequence[tuple[int, int]], labels: list[str]
) -> xr.Dataset:
    """From a list of pairs to a symmetric square of heads, with the interaction."""
    data = result.data.drop_dims("intervention")
    a, b = (np.array(side) for side in zip(*cells, strict=True))
    squares: dict[str, Any] = {}
    for name in names:
        values = result[name].values
        square = np.full((len(values), len(labels), len(labels), *values.shape[2:]), np.nan)
        square[:, a, b] = values
        square[:, b, a] = values
        squares[name] = (("sequence", "head_a", "head_b", *result[name].dims[2:]), square)
    data = data.assign(squares).assign_coords(head_a=labels, head_b=labels)
    both = data[names[0]]
    alone = both.values[:, range(len(labels)), range(len(labels))]
    first = both.copy(data=np.broadcast_to(alone[:, :, None], both.shape))
    second = both.copy(data=np.broadcast_to(alone[:, None], both.shape))
    interaction = both - first - second + result.baseline(names[0])
    off = xr.DataArray(~np.eye(len(labels), dtype=bool), dims=("head_a", "head_b"))
    return data.assign(interaction=interaction.where(off).transpose(*both.dims))
