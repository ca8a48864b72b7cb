"""Parts of depth: the layers of each quarter of a model, and results averaged over them."""

from __future__ import annotations

from memlens.results.result import Result

__all__ = ["by_part", "quartiles"]


def quartiles(n_layers: int, parts: int = 4) -> list[list[int]]:
    """Return the layers of each quartile of depth: layer l is in part floor(4 (l + 1/2) / L).

    Parts without a layer are left out.

    >>> quartiles(6)
    [[0], [1, 2], [3], [4, 5]]
    """
    place = [min(parts - 1, int(parts * (layer + 0.5) / n_layers)) for layer in range(n_layers)]
    return [[layer for layer in range(n_layers) if place[layer] == part] for part in sorted(set(place))]


def by_part(result: Result, parts: int = 4) -> Result:
    """Average a result over the layers of each part of depth; a part's number, from 1 on, stands as `layer`.

    Args:
        result: With the dimension `layer`, which runs over all layers.
        parts: In how many parts depth is cut; parts without a layer are left out.
    """
    data = result.data
    cut = quartiles(data.sizes["layer"], parts)
    number = [next(n for n, part in enumerate(cut, 1) if i in part) for i in range(data.sizes["layer"])]
    layered = [str(name) for name, array in data.data_vars.items() if "layer" in array.dims]
    mean = data[layered].assign_coords(layer=number).groupby("layer").mean(keep_attrs=True)
    mean = mean.assign({name: mean[name].transpose(*data[name].dims) for name in layered})
    rest = {name: array for name, array in data.data_vars.items() if name not in layered}
    return Result(mean.assign(rest).assign_attrs(data.attrs))
