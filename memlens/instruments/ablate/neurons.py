"""Knock-out of neurons' sub-updates: how many of an MLP's neurons recall depends on."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from memlens.choices import Mode, Positions
from memlens.errors import OptionError, SiteError, check_option
from memlens.forward.batches import Batch
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
    measure_dominance,
)
from memlens.instruments.ablate.replacing import MakeReplace, Replacement
from memlens.instruments.screen.gradients import attribute_ablation
from memlens.instruments.screen.instruments import Cell, Screen, register_instrument
from memlens.results.kinds import register_kind
from memlens.results.plots.heads import plot_sites
from memlens.results.plots.layers import plot_knock_outs
from memlens.results.readings import read_effects
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import ByBatch, Intervention
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
    seed: int

    def cells(self, starts: Sequence[int], n_layers: int, width: int) -> Iterator[dict[str, Any]]:
        """Every knock-out whose window ends inside the model, and whose controls it has."""
        for selection, k, window, start in product(self.selection, self.top_k, self.windows, starts):
            if selection == "norm_matched" and 2 * k > width:
                continue
            for draw in range(1 if selection == "dominant" else self.n_draws):
                if start + window <= n_layers:
                    cell = {"layer": start, "window": window, "k": k}
                    yield {**cell, "selection": selection, "draw": draw}

    def coords(self, cell: Mapping[str, Hashable]) -> dict[str, Hashable]:
        """The labels of a cell, without dimensions of one entry."""
        single = {"selection"} if len(self.selection) == 1 else set()
        single |= {"draw"} if self.n_draws == 1 else set()
        return {key: value for key, value in cell.items() if key not in single}


def knock_out_neurons(
    model: Any,
    sequences: SequenceSet,
    *,
    top_k: int | Sequence[int] | None = None,
    keep: bool = False,
    windows: int | Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    selection: str | Sequence[str] = "dominant",
    mode: Mode = "zero",
    positions: Positions = "all",
    reference: SequenceSet | None = None,
    measured_at: str = "last_prompt",
    n_draws: int = 1,
    seed: int = 0,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    **options: Any,
) -> Result:
    r"""Knock out each sequence's most dominant neurons in windows of consecutive layers.

    The MLP's output is :math:`b + \sum_i m_i v_i`. Knocking out a set :math:`S` of neurons sets
    :math:`m_i := 0` for :math:`i \in S` (with `keep`, for :math:`i \notin S`); the bias stays. Dominance is
    :math:`|m_i| \cdot \lVert v_i \rVert_2`, measured in the unchanged run; :math:`S` is fixed for each
    sequence and layer and not chosen again downstream. (As in the released code of arXiv 2210.03588;
    controls, positions, other modes and gated MLPs are ours.) A gated MLP is cut where gate and up are
    already multiplied, at the input of its output matrix. In OLMo 2 and 3 the norms of value vectors are
    those before the norm after the MLP.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        top_k: How many neurons per layer; one number or several. By default those of 1, 10, 100 and 1000
            (with `keep` 10, 100 and 1000) that a layer has; norm-matched controls are then left out (NaN)
            for a k of more than half a layer.
        keep: Knock out all but the top k.
        windows: How many consecutive layers; by default 1 to 5 (with `keep` 1 to 3), if the model has them.
        layers: First layers of the windows; all by default.
        selection: "dominant", or a control: "random", any k neurons of a layer; "norm_matched", for each
            dominant neuron another that is not among the k, of the nearest value-vector norm. Several add a
            dimension `selection`.
        mode: What replaces the coefficients: "zero", "mean" or "resample"; see `ablate_mlps`.
        positions: "all", "prompt", "targets" or "last_prompt"; see `ablate_mlps`.
        reference: The set for "mean" and "resample"; `sequences` itself by default.
        measured_at: Where dominance is measured: "last_prompt", the position that predicts the first target,
            or "targets", the mean over all predicting positions.
        n_draws: Draws of the controls; more than one adds a dimension `draw`.
        seed: For the controls, and for "resample".
        metrics: As for `sweep`.
        options: Further options of `sweep`. With `per_token` there are no metrics of the first target.

    Returns:
        Kind "neuron_knockout": each metric `(sequence, layer, window, k)`, where `layer` is the window's
        first layer (NaN where the window ends outside the model, or where "dominant" has no further draws),
        its baseline `(sequence)`, and two metrics of the first target, 0 or 1:

        - `prediction_flipped`: the arg-max is no longer the token that the model predicts as it is;
        - `target_missed`: the arg-max is not the target.

        The coordinate `first_prediction` holds that arg-max, a token id (-1 where there is no value).

    Raises:
        OptionError: An unknown option, a k that a layer has not, a window longer than the model, or too few
            neurons for norm-matched controls.
        SiteError: A layer that does not exist.
        UnsupportedModelError: An MLP without one output matrix.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> result = ml.knock_out_neurons(model, seqs, top_k=[0, 10], windows=1, progress=False)
        >>> result["prediction_flipped"].dims, float(result["prediction_flipped"].sel(k=0).sum())
        (('sequence', 'layer', 'window', 'k'), 0.0)
    """
    replacement = Replacement(mode, positions, reference, seed)
    n_layers = Trunk(model).n_layers
    starts = chosen_layers(layers, n_layers)
    if not starts:
        raise OptionError("layers=[] knocks out nothing: give at least one layer.")
    width = int(value_vectors(model, 0).shape[0])
    selections = (selection,) if isinstance(selection, str) else tuple(selection)
    most = width // 2 if set(selections) == {"norm_matched"} else width
    ks, lengths = knock_out_sizes(n_layers - min(starts), most, top_k, windows, keep=keep)
    grid = _Grid(ks, keep, lengths, selections, measured_at, n_draws, seed)
    _check(grid, width, starts, n_layers, every_control=top_k is not None)
    progress = options.get("progress", True)
    interventions = _knock_outs(model, sequences, grid, starts, replacement, progress)
    with_first = not options.get("per_token", False)
    found = sweep(
        model,
        sequences,
        interventions,
        [*metrics, first_prediction] if with_first else metrics,
        kind="neuron_knockout",
        settings={
            **vars(grid),
            **replacement.settings,
            "left_out": {
                "top_k": _left_out(top_k, _TOP_K[keep], grid.top_k),
                "windows": _left_out(windows, _WINDOWS[keep], grid.windows),
            },
            "value_norm": "L2, before any norm after the MLP",
        },
        **options,
    )
    if not with_first:
        return found
    return kept(Result(_with_first_target(found, sequences)), options.get("out"))


def _knock_outs(
    model: Any,
    sequences: SequenceSet,
    grid: _Grid,
    starts: Sequence[int],
    replacement: Replacement,
    progress: bool,
) -> list[Intervention]:
    n_layers = Trunk(model).n_layers
    cells = list(grid.cells(starts, n_layers, int(value_vectors(model, 0).shape[0])))
    layers = sorted({c["layer"] + i for c in cells for i in range(c["window"])})
    most = max(1, *grid.top_k)
    found = measure_dominance(model, sequences, most, layers, measured_at=grid.measured_at, progress=progress)
    by = replacement.by_layer(model, "mlp_post", layers, sequences)
    sets: dict[tuple[str, int, int], Tensor] = {}
    for c in cells:
        key = c["selection"], c["k"], c["draw"]
        if key not in sets:
            chosen = chosen_neurons(found, c["k"], c["selection"], draw=c["draw"], seed=grid.seed)
            sets[key] = torch.from_numpy(chosen.astype(np.int64))
    return [
        Intervention(
            _name(grid, c),
            [
                _cut(
                    layer,
                    sets[c["selection"], c["k"], c["draw"]][:, layers.index(layer)],
                    grid.keep,
                    replacement,
                    by,
                )
                for layer in range(c["layer"], c["layer"] + c["window"])
            ],
            grid.coords(c),
        )
        for c in cells
    ]


def neuron_knock_outs(
    model: Any,
    sequences: SequenceSet,
    sets: Mapping[str, Mapping[int, Sequence[int] | np.ndarray | Tensor]],
    *,
    keep: bool = False,
    mode: Mode = "zero",
    positions: Positions = "all",
    reference: SequenceSet | None = None,
    seed: int = 0,
) -> list[Intervention]:
    """Return one intervention for each set of neurons, which are knocked out together.

    Args:
        model: A TransformerLens model.
        sequences: What the interventions will run on.
        sets: By name, the numbers of the neurons in each layer: a list for all sequences, or `[seq, k]`, one
            list per sequence (which needs `sweep`).
        keep: Knock out all but these neurons of the layers.
        mode: What replaces the coefficients: "zero", "mean" or "resample"; see `ablate_mlps`.
        positions: As for `ablate_mlps`; anything but "all" needs `sweep`.
        reference: The set for "mean" and "resample"; `sequences` itself by default.
        seed: For "resample".

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
    replacement = Replacement(mode, positions, reference, seed)
    chosen: dict[str, dict[int, Tensor]] = {}
    for name, by_layer in sets.items():
        if not by_layer:
            raise OptionError(f"the set {name!r} knocks out nothing: give the neurons of at least one layer.")
        numbers = {layer: torch.as_tensor(np.asarray(n, dtype=np.int64)) for layer, n in by_layer.items()}
        for layer, neurons in numbers.items():
            check_layer(layer, Trunk(model).n_layers)
            _check_neurons(neurons, layer, len(value_vectors(model, layer)))
        chosen[name] = numbers
    layers = sorted({layer for by_layer in chosen.values() for layer in by_layer})
    by = replacement.by_layer(model, "mlp_post", layers, sequences)
    return [
        Intervention(name, [_cut(layer, some, keep, replacement, by) for layer, some in numbers.items()])
        for name, numbers in chosen.items()
    ]


def _check_neurons(chosen: Int[Tensor, "*seq k"], layer: int, width: int) -> None:
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < width:
        wrong = int(chosen.min()) if int(chosen.min()) < 0 else int(chosen.max())
        raise SiteError(f"neuron {wrong} does not exist: layer {layer} has neurons 0 to {width - 1}.")


def _cut(
    layer: int,
    neurons: Int[Tensor, "*seq k"],
    keep: bool,
    replacement: Replacement,
    by: Mapping[int, MakeReplace],
) -> tuple[str, Any]:
    """The hook that replaces some coefficients, in each sequence its own."""

    def make(batch: Batch | None) -> HookFn:
        rows = neurons[None] if neurons.ndim == 1 or batch is None else neurons[batch.rows]
        new, at = by[layer](batch), replacement.where(batch)

        def fn(x: Tensor, hook: Any) -> Tensor:
            cut = torch.zeros(len(rows), x.shape[-1], dtype=torch.bool, device=x.device)
            cut.scatter_(1, rows.to(x.device), True)
            cut = (~cut if keep else cut)[:, None]
            cut = cut if at is None else cut & at[..., None]
            return torch.where(cut, new(x, None).to(x), x)

        return fn

    hook = ByBatch(make) if neurons.ndim > 1 else replacement.bound(make)
    return hook_name("mlp_post", layer), hook


def _name(grid: _Grid, cell: Mapping[str, Any]) -> str:
    what = f"{'all but ' if grid.keep else ''}{cell['selection']} {cell['k']}"
    last = cell["layer"] + cell["window"] - 1
    return f"{what} L{cell['layer']}-{last}" + (f" draw {cell['draw']}" if grid.n_draws > 1 else "")


def knock_out_sizes(
    n_layers: int,
    width: int,
    top_k: int | Sequence[int] | None = None,
    windows: int | Sequence[int] | None = None,
    *,
    keep: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the numbers of neurons and the window lengths that `knock_out_neurons` runs.

    Args:
        n_layers: Longest window that fits.
        width: Most neurons that there are of a layer.
        top_k: As given; None for those of the default that fit.
        windows: Likewise.
        keep: Whether all but the chosen neurons are knocked out.

    >>> knock_out_sizes(4, 64)
    ((1, 10), (1, 2, 3, 4))
    """
    return _chosen(top_k, _TOP_K[keep], width), _chosen(windows, _WINDOWS[keep], n_layers)


def _chosen(given: int | Sequence[int] | None, default: Sequence[int], most: int) -> tuple[int, ...]:
    if given is None:
        return tuple(n for n in default if n <= most)
    return (given,) if isinstance(given, int) else tuple(given)


def _left_out(given: object, default: Sequence[int], used: Sequence[int]) -> list[int]:
    """What of the default the model is too small for."""
    return [n for n in default if n not in used] if given is None else []


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
    """Turn the first prediction into the two metrics it decides, and keep it as a coordinate."""
    names = ("first_prediction", "first_prediction_baseline")
    now, own = (result[name] for name in names)
    target = xr.DataArray(sequences.target_ids[:, 0].numpy(), dims="sequence")
    metrics = {
        "prediction_flipped": (now != own).where(now.notnull()).transpose(*now.dims),
        "target_missed": (now != target).where(now.notnull()).transpose(*now.dims),
        "prediction_flipped_baseline": xr.zeros_like(own, dtype=float),
        "target_missed_baseline": (own != target).astype(float),
    }
    settings = result.settings
    settings["metrics"] = [*settings["metrics"][:-1], "prediction_flipped", "target_missed"]
    data = result.data.drop_vars(names).assign(metrics).assign_attrs(settings=json.dumps(settings))
    return data.assign_coords({name: result[name].fillna(-1).astype(np.int64) for name in names})


def _screen(model: Any, clean: SequenceSet, _: None, options: dict[str, Any]) -> Screen:
    mode, positions = options["mode"], options["positions"] or "all"
    common = {
        "mode": mode,
        "positions": positions,
        "reference": options["reference"],
        "seed": options["seed"],
    }

    def interventions(cells: Sequence[Cell]) -> list[Intervention]:
        sets = {
            f"{mode} L{cell['layer']}N{cell['neuron']}": {cell["layer"]: [cell["neuron"]]} for cell in cells
        }
        edits = neuron_knock_outs(model, clean, sets, **common)
        return [replace(edit, coords=cell) for edit, cell in zip(edits, cells, strict=True)]

    def estimate(**method: Any) -> Result:
        return attribute_ablation(
            model, clean, site="mlp_post", over="neuron", layers=options["layers"], **common, **method
        )

    settings = {"mode": mode, "positions": positions}
    return Screen(clean, estimate, interventions, settings)


register_kind(
    "neuron_knockout",
    plot=plot_knock_outs,
    reading=read_effects,
    cites=(("haviv2023", "knocking out the neurons that promote a prediction"),),
)
register_kind("neuron_ablation", plot=plot_sites, reading=read_effects)
register_instrument("neuron_knockout", ranks="layer", kind="neuron_knockout", run=knock_out_neurons)
register_instrument(
    "neuron_ablation", ranks="neuron", kind="neuron_ablation", screen=_screen,
    options=("mode", "positions", "reference"),
)  # fmt: skip
