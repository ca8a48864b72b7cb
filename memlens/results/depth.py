"""Layers: those of each quarter of a model, results averaged over them, and what a set of them is called."""

from __future__ import annotations

from collections.abc import Iterable

from memlens.results.result import Result

__all__ = ["by_part", "layers_label", "quartiles"]


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


def layers_label(layers: Iterable[int]) -> str:
    """Return what a set of layers is called, as `memlens generate --bypass` takes it.

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
