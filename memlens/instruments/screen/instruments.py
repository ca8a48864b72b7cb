"""Instruments that come as a pair: a gradient estimate of every site, and the exact intervention at some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from memlens.errors import OptionError, SequenceError, check_option
from memlens.forward.batches import Batch
from memlens.forward.capture import ActivationSource
from memlens.forward.hooks import hook_name
from memlens.forward.metrics import MetricLike, metric_names
from memlens.instruments.ablate.heads import head_ablations
from memlens.instruments.ablate.neurons import neuron_knock_outs
from memlens.instruments.patch.pairs import DIRECTIONS, check_pairs, compare_runs
from memlens.instruments.patch.patching import activation_patches
from memlens.instruments.screen.gradients import attribute_ablation, attribute_gradients
from memlens.results.kinds import register_kind
from memlens.results.plots.heads import plot_sites
from memlens.results.readings import read_effects, read_restored
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import ByBatch, Intervention
from memlens.sweeps.measure import measure

Cell = Mapping[str, int]
Interventions = Callable[[Sequence[Cell]], list[Intervention]]


@dataclass(frozen=True)
class Instrument:
    """One instrument, ready to run.

    Attributes:
        kind: What the exact result calls itself.
        base: The sequences that are changed.
        estimate: Gives the gradients' result; takes the options of the method.
        interventions: Gives the exact interventions at some cells.
        settings: What the exact result records.
        finish: Completes the exact result.
    """

    kind: str
    base: SequenceSet
    estimate: Callable[..., Result]
    interventions: Interventions
    settings: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[Result, Sequence[MetricLike]], Result] = lambda result, metrics: result


def instrument_of(
    name: str, model: Any, clean: SequenceSet, corrupt: SequenceSet | None, **options: Any
) -> Instrument:
    """Return an instrument by name; see `memlens.screen_then_verify` for its options.

    Raises:
        OptionError: An unknown name, or an option that the instrument does not have.
        SequenceError: `corrupt` is missing, or given where there is nothing to patch.
    """
    check_option("instrument", name, list(INSTRUMENTS))
    patching = name.endswith("patching")
    if patching and corrupt is None:
        raise SequenceError(f"instrument={name!r} needs corrupt sequences: make them with memlens.corrupt.")
    if not patching and corrupt is not None:
        raise SequenceError(f"instrument={name!r} has no use for corrupt sequences: leave them out.")
    for option, value in options.items():
        if option not in _USES[name] and value != _UNSET[option]:
            raise OptionError(f"{option}={value!r} means nothing to instrument={name!r}: leave it out.")
    return INSTRUMENTS[name](model, clean, corrupt, options)


def _patching(model: Any, clean: SequenceSet, corrupt: SequenceSet, options: dict[str, Any]) -> Instrument:
    site = options["site"] or "resid_pre"
    common = {"layers": options["layers"], "positions": options["positions"], "over": options["over"]}

    def made(source: SequenceSet) -> Interventions:
        patches = activation_patches(model, source, site=site, **common)
        by_cell = {tuple(sorted(p.coords.items())): p for p in patches}
        return lambda cells: [by_cell[tuple(sorted(cell.items()))] for cell in cells]

    return _between_runs(
        model,
        clean,
        corrupt,
        options["direction"],
        options["path"],
        made,
        "activation_patching",
        site=site,
        **common,
    )


def _neuron_patching(
    model: Any, clean: SequenceSet, corrupt: SequenceSet, options: dict[str, Any]
) -> Instrument:
    def made(source: SequenceSet) -> Interventions:
        def interventions(cells: Sequence[Cell]) -> list[Intervention]:
            names = {cell["layer"]: hook_name("mlp_post", cell["layer"]) for cell in cells}
            store = ActivationSource(model, source, list(names.values()))
            return [_neuron_patch(store, names[cell["layer"]], cell) for cell in cells]

        return interventions

    common = {"layers": options["layers"], "over": "neuron"}
    return _between_runs(
        model,
        clean,
        corrupt,
        options["direction"],
        options["path"],
        made,
        "neuron_patching",
        site="mlp_post",
        **common,
    )


def _neuron_patch(store: ActivationSource, name: str, cell: Cell) -> Intervention:
    neuron = cell["neuron"]

    def make(batch: Batch) -> Callable[..., Tensor]:
        new = store.of(batch)[name][..., neuron].clone()

        def fn(x: Tensor, hook: Any) -> Tensor:
            out = x.clone()
            out[..., neuron] = new.to(x.dtype)
            return out

        return fn

    return Intervention(f"mlp_post L{cell['layer']}N{neuron}", [(name, ByBatch(make))], cell)


def _between_runs(
    model: Any,
    clean: SequenceSet,
    corrupt: SequenceSet,
    direction: str,
    path: str,
    made: Callable[[SequenceSet], Interventions],
    kind: str,
    **common: Any,
) -> Instrument:
    check_option("direction", direction, DIRECTIONS)
    check_pairs(clean, corrupt)
    source, base = (clean, corrupt) if direction == "denoising" else (corrupt, clean)

    def estimate(**method: Any) -> Result:
        return attribute_gradients(model, clean, corrupt, direction=direction, path=path, **common, **method)

    def finish(result: Result, metrics: Sequence[MetricLike]) -> Result:
        of_source = measure(model, source, metrics)
        return compare_runs(result, model, of_source, metric_names(metrics), direction, clean)

    settings = {**common, "direction": direction, "corruption": dict(corrupt.attrs)}
    return Instrument(kind, base, estimate, made(source), settings, finish)


def _head_ablation(model: Any, clean: SequenceSet, _: None, options: dict[str, Any]) -> Instrument:
    mode, positions = options["mode"], options["positions"] or "all"
    common = {"mode": mode, "positions": positions, "reference": options["reference"]}
    common |= {"seed": options["seed"], "layers": options["layers"]}

    def interventions(cells: Sequence[Cell]) -> list[Intervention]:
        some = {**common, "layers": sorted({cell["layer"] for cell in cells})}
        by_cell = {(i.coords["layer"], i.coords["head"]): i for i in head_ablations(model, clean, **some)}
        return [by_cell[cell["layer"], cell["head"]] for cell in cells]

    def estimate(**method: Any) -> Result:
        return attribute_ablation(model, clean, site="z", over="head", **common, **method)

    settings = {"mode": mode, "positions": positions, "seed": options["seed"]}
    return Instrument("head_ablation", clean, estimate, interventions, settings)


def _neuron_ablation(model: Any, clean: SequenceSet, _: None, options: dict[str, Any]) -> Instrument:
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
    return Instrument("neuron_ablation", clean, estimate, interventions, settings)


INSTRUMENTS: Mapping[str, Callable[..., Instrument]] = {
    "patching": _patching,
    "head_ablation": _head_ablation,
    "neuron_ablation": _neuron_ablation,
    "neuron_patching": _neuron_patching,
}
"""From a name to what makes the instrument."""

_PATCHING = {"direction", "layers", "path", "seed"}
_ABLATION = {"mode", "layers", "positions", "reference", "seed"}
_USES = {
    "patching": {*_PATCHING, "site", "over", "positions"},
    "neuron_patching": _PATCHING,
    "head_ablation": _ABLATION,
    "neuron_ablation": _ABLATION,
}
_UNSET = {
    "site": None, "over": None, "direction": "denoising", "mode": "zero", "positions": None,
    "reference": None, "path": "site",
}  # fmt: skip


register_kind("neuron_ablation", plot=plot_sites, reading=read_effects)
register_kind(
    "neuron_patching",
    plot=plot_sites,
    reading=read_restored,
    cites=(("meng2022", "causal tracing, the origin of activation patching"),),
)
