"""Labels: how a sweep's numbers become a `Result` with dimensions, coordinates and attributes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import xarray as xr

from memlens.errors import OptionError
from memlens.files import exact_json
from memlens.forward.metrics import METRICS, Metric
from memlens.models.provenance import describe
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention

Values = dict[str, np.ndarray]


def _grid_keys(interventions: Sequence[Intervention]) -> list[str] | None:
    """Return the coordinates that all interventions share and that tell them apart, or None."""
    keys = list(interventions[0].coords)
    if not keys or any(list(i.coords) != keys for i in interventions):
        return None
    cells = {tuple(i.coords.values()) for i in interventions}
    return keys if len(cells) == len(interventions) else None


@dataclass(frozen=True)
class Grid:
    """Where the interventions of a sweep are in its result.

    Attributes:
        keys: The dimensions that they spread over.
        axes: The coordinates of each.
        index: The place of each intervention, `[intervention, key]`; None where they lie along one axis in
            order.
    """

    keys: list[str]
    axes: dict[str, list[Hashable]]
    index: np.ndarray | None

    @classmethod
    def of(cls, interventions: Sequence[Intervention]) -> Grid:
        """Return the grid of the coordinates that all of them share, or one dimension of their names."""
        keys = _grid_keys(interventions)
        if keys is None:
            return cls(["intervention"], {"intervention": [i.name for i in interventions]}, None)
        axes = {key: list(dict.fromkeys(i.coords[key] for i in interventions)) for key in keys}
        places = {key: {value: n for n, value in enumerate(axis)} for key, axis in axes.items()}
        return cls(
            keys, axes, np.array([[places[key][i.coords[key]] for key in keys] for i in interventions])
        )

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse variables that are called like a dimension.

        Raises:
            OptionError: One is; the message names it.
        """
        taken = {"sequence", "target"}
        for name in self.keys:
            if name in taken:
                raise OptionError(
                    f"interventions have the coordinate {name!r}, a dimension of every result: rename it."
                )
        for name in names:
            if name in taken | {*self.keys}:
                raise OptionError(f"the metric {name!r} is called like a dimension of the result: rename it.")

    @property
    def cells(self) -> dict[str, Any]:
        """The places as a variable of a result."""
        places = np.arange(len(self.axes[self.keys[0]]))[:, None] if self.index is None else self.index
        return {"cell": (("item", "axis"), places)}

    @property
    def stretch(self) -> float:
        """How many cells there are for each intervention."""
        return 1.0 if self.index is None else math.prod(map(len, self.axes.values())) / len(self.index)

    def variables(self, baseline: Values, values: Values, *, per_token: bool) -> dict[str, Any]:
        """Return the variables of a result with their dimensions, NaN in cells without an intervention.

        Args:
            baseline: `[seq, …]` of each metric.
            values: `[seq, intervention, …]` of each metric; NumPy or Dask arrays.
            per_token: Whether metrics have a `target` axis at the end.
        """
        found: dict[str, Any] = {}
        for name, array in values.items():
            tail = ("target",) if per_token and array.ndim > 2 else ()
            found[name] = (("sequence", *self.keys, *tail), self._spread(array))
        for name, array in baseline.items():
            tail = ("target",) if per_token and array.ndim > 1 else ()
            found[f"{name}_baseline"] = (("sequence", *tail), array)
        self.check_names(found)
        return found

    def _spread(self, array: Any) -> Any:
        """Put `[seq, intervention, …]` into its cells; a Dask array block by block."""
        if self.index is None:
            return array
        sizes = tuple(map(len, self.axes.values()))
        if not isinstance(array, np.ndarray):
            return array.map_blocks(
                self._spread, dtype=array.dtype, chunks=(array.chunks[0], *sizes, *array.chunks[2:]),
                drop_axis=1, new_axis=range(1, 1 + len(sizes)),
            )  # fmt: skip
        grid = np.full((len(array), *sizes, *array.shape[2:]), np.nan, array.dtype)
        grid[(slice(None), *self.index.T)] = array
        return grid


def labels_of(seqs: SequenceSet) -> dict[str, Any]:
    """Return the coordinates of a `sequence` dimension: ids, lengths, and the table's plain columns."""
    table = seqs.table
    coords: dict[str, Any] = {
        "sequence": table["id"].astype(str).to_numpy(),
        "prefix_len": ("sequence", seqs.prefix_len.numpy()),
        "n_targets": ("sequence", seqs.n_targets.numpy()),
    }
    for column in table.columns:
        values = table[column].to_numpy()
        plain = values.dtype.kind in "biuf" or all(isinstance(v, str) for v in values)
        if column not in {"id", *coords} and plain:
            coords[str(column)] = ("sequence", values if values.dtype.kind in "biuf" else values.astype(str))
    return coords


def token_labels(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray | None:
    """Return each token as text, "" outside the mask; None for a model without a tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return None
    known = {i: tokenizer.decode([i]) for i in ids[mask].unique().tolist()}
    flags = mask.tolist()
    return np.array(
        [
            [known[i] if real else "" for i, real in zip(row, flag, strict=True)]
            for row, flag in zip(ids.tolist(), flags, strict=True)
        ]
    )


def make_result(
    kind: str,
    model: Any,
    seqs: SequenceSet,
    variables: Mapping[str, Any],
    coords: Mapping[str, Any],
    settings: Mapping[str, Any],
    metrics: Sequence[Metric] = (),
) -> Result:
    """Build a `Result` whose attributes record how it was made.

    Arrays named after a metric (one of `metrics`, or a registered one) or its baseline carry its attributes.
    """
    about = describe(model)
    attrs = {
        **about,
        "kind": kind,
        "seed": settings.get("seed", 0),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": exact_json({**settings, "sequences": dict(seqs.attrs)}),
    }
    labels = {name: c for name, c in labels_of(seqs).items() if name not in variables}
    data = xr.Dataset(dict(variables), {**labels, **coords}, attrs)
    known = {metric.name: metric for metric in metrics}
    for name, array in data.data_vars.items():
        stem = str(name).removesuffix("_baseline")
        metric = known.get(stem) or METRICS.get(stem)
        if metric is not None:
            array.attrs = {**metric.attrs, **array.attrs}
    return Result(data)
