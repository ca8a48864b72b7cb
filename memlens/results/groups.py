"""Results joined, split, averaged over parts of depth; and labels of sets of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np
import xarray as xr

from memlens.errors import OptionError, ResultError
from memlens.results.result import Result
from memlens.results.statistics.intervals import halves


def join_groups(results: Mapping[str, Result]) -> Result:
    """Join results of one kind along `sequence`, with a coordinate `group` that holds their names.

    The attributes (model and settings) are those of the first result. An id that occurs in several
    groups gets the group's name as a suffix in the later ones; the coordinate `original_id` has it without.

    Args:
        results: Name of the group to result, such as `{"memorized": a, "control": b}`.

    Returns:
        One result; ``result.plot(group="group")`` draws the groups side by side.

    Raises:
        ResultError: The results are of different kinds, or there are none.

    Example:
        >>> data = xr.Dataset({"exact_match": ("sequence", [1.0, 0.0])}, {"sequence": ["a", "b"]})
        >>> one = Result.create(data, kind="recall")
        >>> join_groups({"first": one, "second": one})["sequence"].values.tolist()
        ['a', 'b', 'a (second)', 'b (second)']
    """
    kinds = {result.kind for result in results.values()}
    if len(kinds) != 1:
        raise ResultError(f"only results of one kind can be joined, not {sorted(kinds)}.")
    seen: set[str] = set()
    parts: list[xr.Dataset] = []
    for name, result in results.items():
        data = result.data.drop_vars([c for c in result.data.coords if c not in result.data.dims])
        data = data.assign_coords({d: np.arange(data.sizes[d]) for d in data.dims if d not in data.coords})
        own = [str(i) for i in data["sequence"].values]
        ids = [f"{i} ({name})" if i in seen else i for i in own]
        seen.update(ids)
        label = np.full(len(ids), name, dtype=object)
        group = ("sequence", label, {"keep_order": 1})
        parts.append(data.assign_coords(sequence=ids, group=group, original_id=("sequence", own)))
    joined = xr.concat(
        parts, "sequence", join="outer", data_vars="all", coords="minimal", compat="override",
        combine_attrs="override",
    )  # fmt: skip
    return Result(joined)


def take_half(result: Result, part: int, seed: int, *, within: str | None = None) -> Result:
    """Return half of a result's sequences.

    Args:
        result: Any result.
        part: 0 (to choose on) or 1 (to score on).
        seed: Seed of the split.
        within: A coordinate along `sequence`, such as "task": each of its groups is split in two.
    """
    if within is None:
        rows = halves(result.data.sizes["sequence"], seed)[part]
    else:
        groups = result[within].values
        places = [np.flatnonzero(groups == name) for name in dict.fromkeys(groups.tolist())]
        rows = np.concatenate([place[halves(len(place), seed + i)[part]] for i, place in enumerate(places)])
    return Result(result.data.isel(sequence=rows))


def quartiles(n_layers: int, parts: int = 4) -> list[list[int]]:
    """Return the layers of each quartile of depth: layer l is in part floor(4 (l + 1/2) / L).

    Parts without a layer are left out.

    >>> quartiles(6)
    [[0], [1, 2], [3], [4, 5]]
    """
    place = [min(parts - 1, int(parts * (layer + 0.5) / n_layers)) for layer in range(n_layers)]
    return [[layer for layer in range(n_layers) if place[layer] == part] for part in sorted(set(place))]


def by_part(result: Result, parts: int = 4) -> Result:
    """Average a result over the layers of each part of depth; `layer` becomes the part's number, from 1.

    Args:
        result: A result whose dimension `layer` covers all layers.
        parts: Number of parts of depth; parts without a layer are left out.
    """
    data = result.data
    cut = quartiles(data.sizes["layer"], parts)
    number = [next(n for n, part in enumerate(cut, 1) if i in part) for i in range(data.sizes["layer"])]
    layered = [str(name) for name, array in data.data_vars.items() if "layer" in array.dims]
    mean = data[layered].assign_coords(layer=number).groupby("layer").mean(keep_attrs=True)
    mean = mean.assign({name: mean[name].transpose(*data[name].dims) for name in layered})
    rest = {name: array for name, array in data.data_vars.items() if name not in layered}
    return Result(mean.assign(rest).assign_attrs(data.attrs))


def layers_label(layers: Iterable[int]) -> str:
    """Return the label of a set of layers, in the form that `memlens generate --bypass` accepts.

    >>> layers_label([0, 2, 3, 4]), layers_label([5])
    ('0,2-4', '5')
    """
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def named_layers(label: str) -> str:
    """Return a label of `layers_label` after the word "layer", or "layers" where there are several.

    >>> named_layers("5"), named_layers("0,2-4")
    ('layer 5', 'layers 0,2-4')
    """
    return f"layer {label}" if label.isdigit() else f"layers {label}"


def parse_layers(text: str) -> list[int]:
    """Return the layers in a list of numbers and ranges, such as a label of `layers_label`, each once.

    Raises:
        OptionError: It is not such a list, or a range is in descending order.

    >>> parse_layers("20-23,25")
    [20, 21, 22, 23, 25]
    """
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+))?\s*", part, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise OptionError(
                f"{part.strip()!r} in {text!r} is not a layer or a range of layers: write it as in 20-23,25."
            )
        layers += range(first, last + 1)
    return list(dict.fromkeys(layers))
