"""Knock-out of neurons' sub-updates: how many of an MLP's neurons recall depends on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Unpack

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from memlens.choices import AblationMode
from memlens.errors import OptionError, SiteError, check_option
from memlens.files import exact_json
from memlens.forward.batches import Batch
from memlens.forward.exclusive import computes
from memlens.forward.hooks import HookFn, check_layer, chosen_layers, hook_name
from memlens.forward.metrics import MetricLike
from memlens.forward.read_weights import value_vectors
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.neuron_choice import (
    MEASURED_AT,
    SELECTIONS,
    check_controls,
    check_top_k,
    chosen_neurons,
    dominant_neurons,
    value_norms,
)
from memlens.instruments.ablate.replacing import AblationOptions, MakeReplace, Replacement, ReplacementOptions
from memlens.instruments.screen.gradients import ablation_screen
from memlens.instruments.screen.instruments import register_instrument
from memlens.results.kinds import register_kind
from memlens.results.plots.heads import plot_sites
from memlens.results.plots.layers import plot_knock_outs
from memlens.results.readings import read_effects, read_knock_outs
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import BatchHook, ByBatch, Intervention
from memlens.sweeps.run import kept, sweep

_TOP_K = {False: (1, 10, 100, 1000), True: (10, 100, 1000)}
_WINDOWS = {False: (1, 2, 3, 4, 5), True: (1, 2, 3)}
"""What the released code of arXiv 2210.03588 runs, for the top k and for all but the top k."""


@dataclass(frozen=True)
class _Grid:
    """What is knocked out: every setting of `knock_out_neurons` except the replacement."""

    top_k: tuple[int, ...]
    keep: bool
    windows: tuple[int, ...]
    selection: tuple[str, ...]
    measured_at: str
    n_draws: int

    def cells(self, starts: Sequence[int], n_layers: int, width: int) -> Iterator[dict[str, Any]]:
        """Every knock-out whose window ends inside the model, and whose layers are wide enough for it."""
        for selection, k, window, start in product(self.selection, self.top_k, self.windows, starts):
            if (selection == "norm_matched" and 2 * k > width) or start + window > n_layers:
                continue
            for draw in range(1 if selection == "dominant" else self.n_draws):
                cell = {"layer": start, "window": window, "k": k}
                yield {**cell, "selection": selection, "draw": draw}

    def coords(self, cell: Mapping[str, Hashable]) -> dict[str, Hashable]:
        """The labels of a cell, without dimensions of one entry."""
        single = {"selection"} if len(self.selection) == 1 else set()
        single |= {"draw"} if self.n_draws == 1 else set()
        return {key: value for key, value in cell.items() if key not in single}

    def name(self, cell: Mapping[str, Any]) -> str:
        """The name of a cell's intervention."""
        what = f"{'all but ' if self.keep else ''}{cell['selection']} {cell['k']}"
        last = cell["layer"] + cell["window"] - 1
        return f"{what} L{cell['layer']}-{last}" + (f" draw {cell['draw']}" if self.n_draws > 1 else "")


@computes
def knock_out_neurons(
    model: Any,
    sequences: SequenceSet,
    *,
    top_k: int | Sequence[int] | None = None,
    keep: bool = False,
    windows: int | Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    selection: str | Sequence[str] = "dominant",
    mode: AblationMode = "zero",
    measured_at: str = "last_prompt",
    n_draws: int = 1,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    **options: Unpack[AblationOptions],
) -> Result:
    r"""Knock out each sequence's most dominant neurons in windows of consecutive layers.

    The MLP's output is :math:`b + \sum_i m_i v_i`. Knocking out a set :math:`S` of neurons sets
    :math:`m_i := 0` for :math:`i \in S` (with `keep`, for :math:`i \notin S`); the bias stays. Dominance is
    measured in the unchanged run, as by `memlens.instruments.dominant_neurons`; :math:`S` is fixed for each
    sequence and layer and not chosen again downstream. (As in the released code of arXiv 2210.03588;
    controls, positions, other modes and gated MLPs are ours.) A gated MLP is cut at the input of its output
    matrix, where gate and up are already multiplied.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        top_k: How many neurons per layer; one number or several. The default is 1, 10, 100 and 1000 (with
            `keep` 10, 100 and 1000), as far as a layer has that many; norm-matched controls are then left out
            (NaN) for a k of more than half a layer.
        keep: Knock out all but the top k.
        windows: How many consecutive layers; by default 1 to 5 (with `keep` 1 to 3), if the model has them.
        layers: First layers of the windows; all by default.
        selection: "dominant", or a control: "random", any k neurons of a layer; "norm_matched", for each
            dominant neuron one outside the top k whose value vector has the nearest norm. Several add a
            dimension `selection`.
        mode: What replaces the coefficients: "zero", "mean", "resample" or "donor"; see `ablate_heads`.
        measured_at: Where dominance is measured: "last_prompt", the position that predicts the first target,
            or "targets", the mean over all predicting positions.
        n_draws: Draws of the controls; more than one adds a dimension `draw`.
        metrics: As for `sweep`.
        options: `positions`, `reference`, `donor` and `seed` (which also draws the controls) as for
            `ablate_heads`; further options of `sweep`. With `per_token` there are no metrics of the first
            target.

    Returns:
        Kind "neuron_knockout": each metric `(sequence, layer, window, k)`, where `layer` is the window's
        first layer (NaN where the window ends outside the model, or for further draws of "dominant"),
        its baseline `(sequence)`, and two metrics of the first target, 0 or 1:

        - `prediction_flipped`: the arg-max is no longer the one of the unchanged model;
        - `target_missed`: the arg-max is not the target.

        The coordinate `first_prediction` holds that arg-max, a token id (-1 where there is no value).

    Raises:
        OptionError: An unknown option, a k above the number of neurons, a window longer than the model, or
            too few neurons for norm-matched controls.
        SiteError: A layer that does not exist.
        UnsupportedModelError: An MLP without one output matrix.
        DonorError: The donor does not fit the model.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> result = ml.knock_out_neurons(model, seqs, top_k=[0, 10], windows=1, progress=False)
        >>> result["prediction_flipped"].dims, float(result["prediction_flipped"].sel(k=0).sum())
        (('sequence', 'layer', 'window', 'k'), 0.0)
    """
    replacement, rest = Replacement.split(mode, options)
    n_layers = Trunk(model).n_layers
    starts = chosen_layers(layers, n_layers)
    if not starts:
        raise OptionError("layers=[] knocks out nothing: give at least one layer.")
    width = int(value_vectors(model, 0).shape[0])
    selections = (selection,) if isinstance(selection, str) else tuple(selection)
    most = width // 2 if set(selections) == {"norm_matched"} else width
    ks, lengths = knock_out_sizes(n_layers - min(starts), most, top_k, windows, keep=keep)
    grid = _Grid(ks, keep, lengths, selections, measured_at, n_draws)
    _check(grid, width, starts, n_layers, every_control=top_k is not None)
    cells = list(grid.cells(starts, n_layers, width))
    progress = rest.get("progress", True)
    interventions = _knock_outs(model, sequences, grid, cells, replacement, progress)
    with_first = not rest.get("per_token", False)
    left_out = {
        "top_k": [] if top_k is not None else [k for k in _TOP_K[keep] if k not in ks],
        "windows": [] if windows is not None else [n for n in _WINDOWS[keep] if n not in lengths],
    }
    value_norm = "L2, before any norm after the MLP"
    settings = {**vars(grid), **replacement.settings, "left_out": left_out, "value_norm": value_norm}
    measured = [*metrics, first_prediction] if with_first else metrics
    found = sweep(
        model, sequences, interventions, measured, kind="neuron_knockout", settings=settings, **rest
    )
    if not with_first:
        return found
    return kept(Result(_with_first_target(found, sequences)), rest.get("out"))


def _knock_outs(
    model: Any,
    sequences: SequenceSet,
    grid: _Grid,
    cells: Sequence[Mapping[str, Any]],
    replacement: Replacement,
    progress: bool,
) -> list[Intervention]:
    layers = sorted({c["layer"] + i for c in cells for i in range(c["window"])})
    most = max(1, *grid.top_k)
    found = dominant_neurons(
        model, sequences, most, layers=layers, measured_at=grid.measured_at, progress=progress
    )
    dominant, norms = found["neuron"].values, value_norms(model, layers).cpu().numpy()
    sets: dict[tuple[str, int, int], Tensor] = {}
    chosen: dict[str, dict[int, Tensor]] = {}
    for c in cells:
        key = c["selection"], c["k"], c["draw"]
        if key not in sets:
            neurons = chosen_neurons(
                dominant, norms, layers, c["k"], c["selection"], draw=c["draw"], seed=replacement.seed
            )
            sets[key] = torch.from_numpy(neurons.astype(np.int64))
        window = range(c["layer"], c["layer"] + c["window"])
        chosen[grid.name(c)] = {layer: sets[key][:, layers.index(layer)] for layer in window}
    coords = {grid.name(c): grid.coords(c) for c in cells}
    return _cuts(model, sequences, chosen, grid.keep, replacement, coords)


@computes
def neuron_knock_outs(
    model: Any,
    sequences: SequenceSet,
    sets: Mapping[str, Mapping[int, Sequence[int] | np.ndarray | Tensor]],
    *,
    keep: bool = False,
    mode: AblationMode = "zero",
    **options: Unpack[ReplacementOptions],
) -> list[Intervention]:
    """Return one intervention per set of neurons, which are knocked out together.

    `sets` holds, by name, the numbers of the neurons in each layer: a list for all sequences, or `[seq, k]`,
    one list per sequence. With `keep`, all other neurons of these layers are knocked out. `mode` ("zero",
    "mean", "resample" or "donor") says what replaces the coefficients; it and the options are those of
    `ablate_heads`. Lists per sequence, a donor, and positions other than "all" need `sweep`.

    Raises:
        OptionError: Unknown mode or positions, or a set without a layer.
        SiteError: A layer or a neuron that does not exist.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> edits = ml.edits.neuron_knock_outs(model, seqs, {"three": {0: [5, 17], 1: [3]}})
        >>> with ml.applied(model, *edits):
        ...     logits = model(seqs.tokens)
        >>> [edit.name for edit in edits]
        ['three']
    """
    replacement = Replacement(mode, **options)
    chosen: dict[str, dict[int, Tensor]] = {}
    for name, by_layer in sets.items():
        if not by_layer:
            raise OptionError(f"the set {name!r} knocks out nothing: give the neurons of at least one layer.")
        chosen[name] = {n: torch.as_tensor(np.asarray(some, dtype=np.int64)) for n, some in by_layer.items()}
        for layer, neurons in chosen[name].items():
            check_layer(layer, Trunk(model).n_layers)
            width = len(value_vectors(model, layer))
            wrong = neurons[(neurons < 0) | (neurons >= width)]
            if len(wrong):
                raise SiteError(
                    f"neuron {int(wrong[0])} does not exist: layer {layer} has neurons 0 to {width - 1}."
                )
    return _cuts(model, sequences, chosen, keep, replacement, {})


def _cuts(
    model: Any,
    sequences: SequenceSet,
    sets: Mapping[str, Mapping[int, Int[Tensor, "*seq k"]]],
    keep: bool,
    replacement: Replacement,
    coords: Mapping[str, Mapping[str, Hashable]],
) -> list[Intervention]:
    layers = sorted({layer for by_layer in sets.values() for layer in by_layer})
    by = replacement.by_layer(model, "mlp_post", layers, sequences)
    return [
        Intervention(
            name,
            [
                (hook_name("mlp_post", n), _cut(some, keep, replacement, by[n]))
                for n, some in by_layer.items()
            ],
            coords.get(name, {}),
        )
        for name, by_layer in sets.items()
    ]


def _cut(
    neurons: Int[Tensor, "*seq k"], keep: bool, replacement: Replacement, by: MakeReplace
) -> HookFn | BatchHook:
    """The hook that replaces the coefficients of some neurons, possibly different ones in each sequence."""

    def make(batch: Batch | None) -> HookFn:
        rows = neurons[None] if neurons.ndim == 1 or batch is None else neurons[batch.rows]
        new, at = by(batch), replacement.where(batch)

        def fn(x: Tensor, hook: Any) -> Tensor:
            cut = torch.zeros(len(rows), x.shape[-1], dtype=torch.bool, device=x.device)
            cut.scatter_(1, rows.to(x.device), True)
            cut = (~cut if keep else cut)[:, None]
            cut = cut if at is None else cut & at[..., None]
            return torch.where(cut, new(x, None).to(x), x)

        return fn

    return ByBatch(make) if neurons.ndim > 1 else replacement.bound(make)


def knock_out_sizes(
    n_layers: int,
    width: int,
    top_k: int | Sequence[int] | None = None,
    windows: int | Sequence[int] | None = None,
    *,
    keep: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the `top_k` and `windows` that `knock_out_neurons` runs on `n_layers` layers of `width` neurons.

    >>> knock_out_sizes(4, 64)
    ((1, 10), (1, 2, 3, 4))
    """

    def fitting(given: int | Sequence[int] | None, default: Sequence[int], most: int) -> tuple[int, ...]:
        if given is None:
            return tuple(n for n in default if n <= most)
        return (given,) if isinstance(given, int) else tuple(given)

    return fitting(top_k, _TOP_K[keep], width), fitting(windows, _WINDOWS[keep], n_layers)


def _check(grid: _Grid, width: int, starts: Sequence[int], n_layers: int, *, every_control: bool) -> None:
    check_option("measured_at", grid.measured_at, MEASURED_AT)
    for name, values in (("top_k", grid.top_k), ("windows", grid.windows), ("selection", grid.selection)):
        if not values or len(set(values)) < len(values):
            raise OptionError(f"{name}={list(values)}: give at least one, and each only once.")
    check_top_k(grid.top_k, width)
    for window in grid.windows:
        if not 1 <= window <= n_layers - min(starts):
            raise OptionError(
                f"windows={window}: no window of this many layers starts at one of {list(starts)} and ends "
                f"inside this model of {n_layers} layers."
            )
    if grid.n_draws < 1:
        raise OptionError(f"n_draws={grid.n_draws}: draw at least once.")
    for selection in grid.selection:
        check_option("selection", selection, SELECTIONS)
        if every_control:
            check_controls(max(grid.top_k), width, selection)


def first_prediction(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The arg-max where the first target is predicted: a token id (a metric for `sweep`)."""
    return logits[:, 0].argmax(-1)


def _with_first_target(result: Result, sequences: SequenceSet) -> xr.Dataset:
    """Turn the first prediction into the two metrics that follow from it, and keep it as a coordinate."""
    names = ("first_prediction", "first_prediction_baseline")
    now, own = (result[name].drop_attrs() for name in names)
    target = xr.DataArray(sequences.target_ids[:, 0].numpy(), dims="sequence")
    metrics = {
        "prediction_flipped": (now != own).where(now.notnull()).transpose(*now.dims),
        "target_missed": (now != target).where(now.notnull()).transpose(*now.dims),
        "prediction_flipped_baseline": xr.zeros_like(own, dtype=float),
        "target_missed_baseline": (own != target).astype(float),
    }
    settings = result.settings
    settings["metrics"] = [*settings["metrics"][:-1], "prediction_flipped", "target_missed"]
    data = result.data.drop_vars(names).assign(metrics).assign_attrs(settings=exact_json(settings))
    return data.assign_coords({name: result[name].fillna(-1).astype(np.int64) for name in names})


register_kind(
    "neuron_knockout",
    plot=plot_knock_outs,
    reading=read_knock_outs,
    cites=(("haviv2023", "knocking out the neurons that promote a prediction"),),
)
register_kind("neuron_ablation", plot=plot_sites, reading=read_effects)
register_instrument("neuron_knockout", ranks="layer", kind="neuron_knockout", run=knock_out_neurons)
register_instrument(
    "neuron_ablation", ranks="neuron", kind="neuron_ablation", screen=ablation_screen("mlp_post", "neuron"),
    options=("mode", "positions", "reference", "donor"),
)  # fmt: skip
