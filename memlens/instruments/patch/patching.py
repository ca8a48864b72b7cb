"""Activation patching: which site, moved from one run into another, carries the recall."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
from torch import Tensor

from memlens.choices import PatchSite
from memlens.errors import OptionError, SiteError, check_option
from memlens.forward.batches import Batch
from memlens.forward.capture import ActivationSource
from memlens.forward.hooks import HookFn, chosen_layers, has_site, hook_name
from memlens.forward.metrics import MetricLike, metric_names
from memlens.forward.trunk import Trunk, is_bridge
from memlens.instruments.patch.pairs import DIRECTIONS, check_pairs, checked_positions, compare_runs
from memlens.instruments.screen.gradients import attribute_gradients
from memlens.instruments.screen.instruments import Cell, Interventions, Screen, register_instrument
from memlens.results.kinds import register_kind
from memlens.results.plots.heads import plot_sites
from memlens.results.plots.tokens import plot_patch_map
from memlens.results.readings import read_restored
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import BatchHook, ByBatch, Intervention, Reads
from memlens.sweeps.run import kept, measure, sweep

PATCH_SITES: tuple[str, ...] = get_args(PatchSite)
_HEAD_AXIS = {"z": 2, "q": 2, "k": 2, "v": 2, "pattern": 1}
"""Sites that tell heads apart, and on which axis; `pattern` has the query position on axis 2."""
OVER = ("position", "head", "head_position")


def patch_activations(
    model: Any,
    clean: SequenceSet,
    corrupt: SequenceSet | Intervention,
    *,
    site: str = "resid_pre",
    over: str | None = None,
    direction: str = "denoising",
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    **options: Any,
) -> Result:
    r"""Move activations between a clean and a corrupt run, one site at a time.

    *Denoising* runs `corrupt` and writes the clean activation: what is enough to restore recall.
    *Noising* runs `clean` and writes the corrupt one: what recall cannot do without.

    The normalized effect of the first metric :math:`m` is

    .. math:: \frac{m_\text{patched} - m_\text{corrupt}}{m_\text{clean} - m_\text{corrupt}}

    so 1 is the clean run and 0 the corrupt one, in both directions; NaN where both runs are equal.

    Args:
        model: A TransformerLens model.
        clean: The sequences as recalled.
        corrupt: The same targets after another prefix (see `memlens.corrupt`), row by row; or an edit that
            corrupts the clean run, such as `memlens.edits.embedding_noise`.
        site: "resid_pre", "resid_mid" (sequential blocks), "resid_post", "attn_out", "mlp_out"; of heads
            "z", "q", "k", "v" (before rotary; `k` and `v` have the key-value heads), or "pattern" (the
            attention weights, if the model uses what is written to them).
        over: "position" (each layer and position; the default, all heads together), or for sites that have
            heads "head" (each head at all positions) or "head_position". A position of `pattern` is the
            query's.
        direction: "denoising" or "noising".
        layers: All by default.
        positions: Token positions for "position"; by default all that can reach a target.
        metrics: As for `sweep`; measured on the clean targets.
        options: Further options of `sweep`.

    Returns:
        Kind "activation_patching": each metric `(sequence, layer, position)` (or with `head`), its values
        `<metric>_clean` and `<metric>_corrupt` `(sequence)`, and `normalized_effect`.

    Raises:
        OptionError: Unknown site, direction or `over`.
        SiteError: A layer, a position or (in parallel blocks) a site that does not exist.
        SequenceError: The two sets do not fit.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> clean = ml.load_sequences("zoo", model)[:2]
        >>> result = ml.patch_activations(model, clean, ml.corrupt(clean), positions=[0, 31], progress=False)
        >>> result["normalized_effect"].dims
        ('sequence', 'layer', 'position')
    """
    check_option("direction", direction, DIRECTIONS)
    settings: dict[str, Any] = {"site": site, "over": over or "position", "direction": direction}
    cells: dict[str, Any] = {"site": site, "over": over, "layers": layers, "positions": positions}
    run: dict[str, Any] = {"kind": "activation_patching", **options}
    if isinstance(corrupt, Intervention):
        settings["corruption"] = corrupt.name
        result, of_source = _under_edit(model, clean, corrupt, direction, cells, metrics, settings, run)
    else:
        check_pairs(clean, corrupt)
        settings["corruption"] = dict(corrupt.attrs)
        source, base = (clean, corrupt) if direction == "denoising" else (corrupt, clean)
        patches = activation_patches(model, source, **cells)
        result = sweep(model, base, patches, metrics, settings=settings, **run)
        of_source = measure(model, source, metrics, per_token=options.get("per_token", False))
    whole = compare_runs(result, model, of_source, metric_names(metrics), direction, clean)
    return kept(whole, options.get("out"))


def _under_edit(
    model: Any,
    clean: SequenceSet,
    corrupt: Intervention,
    direction: str,
    cells: dict[str, Any],
    metrics: Sequence[MetricLike],
    settings: dict[str, Any],
    run: dict[str, Any],
) -> tuple[Result, dict[str, np.ndarray]]:
    """Patch between a clean run and the same run under an edit; the result, and the source run's metrics."""
    denoising = direction == "denoising"
    patches = activation_patches(model, clean, under=None if denoising else corrupt, **cells)
    if denoising:
        patches = [replace(corrupt + patch, name=patch.name, coords=patch.coords) for patch in patches]
    result = sweep(model, clean, patches, metrics, settings=settings, **run)
    quick = {n: v for n, v in run.items() if n in ("engine", "memory_budget", "batch_size", "per_token")}
    edited = sweep(model, clean, [replace(corrupt, coords={})], metrics, progress=False, **quick)
    of_edit = {n: edited[n].values[:, 0] for n in metric_names(metrics)}
    if not denoising:
        return result, of_edit
    of_clean = {n: edited.baseline(n).values for n in of_edit}
    base = {f"{n}_baseline": result.data[f"{n}_baseline"].copy(data=v) for n, v in of_edit.items()}
    return Result(result.data.assign(base)), of_clean


def activation_patches(
    model: Any,
    source: SequenceSet,
    *,
    site: str = "resid_pre",
    over: str | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    under: Intervention | None = None,
) -> list[Intervention]:
    """Return the interventions that write `source`'s activations, row by row; see `patch_activations`.

    With `under` the activations are those of the run on `source` under that edit.
    """
    over = over or "position"
    check_option("site", site, PATCH_SITES)
    check_option("over", over, OVER)
    trunk = Trunk(model)
    if over != "position" and site not in _HEAD_AXIS:
        raise OptionError(f"over={over!r} needs a site with heads, such as site='z': {site!r} has none.")
    if not has_site(model, site):
        raise SiteError(
            f"this model's parallel blocks have no site {site!r}: use 'resid_pre' or 'resid_post'."
        )
    layers = chosen_layers(layers, trunk.n_layers)
    places = checked_positions(source, positions)
    names = {layer: hook_name(site, layer) for layer in layers}
    store = ActivationSource(model, source, list(names.values()), under=under)
    heads = range(trunk.n_kv_heads if site in ("k", "v") else trunk.n_heads)
    cells = ((layer, cell) for layer in layers for cell in _cells(over, heads, places))
    return [
        Intervention(
            " ".join([f"{site} L{layer}", *(f"{key}{value}" for key, value in cell.items())]),
            _writes(trunk, site, layer, store, cell),
            {"layer": layer, **cell},
            first_position=cell.get("position", 0),
        )
        for layer, cell in cells
    ]


def _cells(over: str, heads: Iterable[int], positions: Sequence[int]) -> Iterator[dict[str, int]]:
    if over == "position":
        yield from ({"position": p} for p in positions)
    elif over == "head":
        yield from ({"head": h} for h in heads)
    else:
        yield from ({"head": h, "position": p} for h in heads for p in positions)


def _writes(
    trunk: Trunk, site: str, layer: int, store: ActivationSource, cell: dict[str, int]
) -> list[tuple[str, HookFn | BatchHook]]:
    name = hook_name(site, layer)
    if site != "resid_mid" or not is_bridge(trunk.model):
        return [(name, _write(store, name, site, cell))]
    # The bridge's hook_resid_mid stands on the MLP's branch alone. The sum itself is set by way of its
    # second summand: resid_mid = resid_pre + attn_out.
    pre: list[Tensor] = []

    def remember(x: Tensor, hook: Any) -> None:
        pre[:] = [x]

    write = _write(store, name, site, cell, less=pre)
    return [(hook_name("resid_pre", layer), Reads(remember)), (hook_name("attn_out", layer), write)]


def _write(
    store: ActivationSource, name: str, site: str, cell: dict[str, int], less: Sequence[Tensor] = ()
) -> ByBatch:
    """Write the source's activation at a cell, less what `less` holds by then."""
    every, head, place = slice(None), cell.get("head", slice(None)), cell.get("position", slice(None))
    axis = _HEAD_AXIS.get(site)
    index = (every, head, place) if axis == 1 else (every, place, head) if axis == 2 else (every, place)

    def make(batch: Batch) -> Callable[..., Tensor]:
        new, width = store.of(batch)[name], batch.tokens.shape[1]

        def fn(x: Tensor, hook: Any) -> Tensor:
            if cell.get("position", 0) >= width:
                return x  # a batch of shorter sequences has no such position
            out = x.clone()
            out[index] = (new[index] - sum(t[index] for t in less)).to(x.dtype)
            return out

        return fn

    return ByBatch(make)


def _screen(model: Any, clean: SequenceSet, corrupt: SequenceSet, options: dict[str, Any]) -> Screen:
    site = options["site"] or "resid_pre"
    common = {"layers": options["layers"], "positions": options["positions"], "over": options["over"]}

    def made(source: SequenceSet) -> Interventions:
        patches = activation_patches(model, source, site=site, **common)
        by_cell = {tuple(sorted(p.coords.items())): p for p in patches}
        return lambda cells: [by_cell[tuple(sorted(cell.items()))] for cell in cells]

    return _between_runs(
        model, clean, corrupt, options["direction"], options["path"], made, site=site, **common
    )


def _neuron_screen(model: Any, clean: SequenceSet, corrupt: SequenceSet, options: dict[str, Any]) -> Screen:
    def made(source: SequenceSet) -> Interventions:
        def interventions(cells: Sequence[Cell]) -> list[Intervention]:
            names = {cell["layer"]: hook_name("mlp_post", cell["layer"]) for cell in cells}
            store = ActivationSource(model, source, list(names.values()))
            return [_neuron_patch(store, names[cell["layer"]], cell) for cell in cells]

        return interventions

    common = {"layers": options["layers"], "over": "neuron"}
    return _between_runs(
        model, clean, corrupt, options["direction"], options["path"], made, site="mlp_post", **common
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
    **common: Any,
) -> Screen:
    check_option("direction", direction, DIRECTIONS)
    check_pairs(clean, corrupt)
    source, base = (clean, corrupt) if direction == "denoising" else (corrupt, clean)

    def estimate(**method: Any) -> Result:
        return attribute_gradients(model, clean, corrupt, direction=direction, path=path, **common, **method)

    def finish(result: Result, metrics: Sequence[MetricLike]) -> Result:
        of_source = measure(model, source, metrics)
        return compare_runs(result, model, of_source, metric_names(metrics), direction, clean)

    settings = {**common, "direction": direction, "corruption": dict(corrupt.attrs)}
    return Screen(base, estimate, made(source), settings, finish)


_CITES = (("meng2022", "causal tracing, the origin of activation patching"),)
register_kind("activation_patching", plot=plot_patch_map, reading=read_restored, cites=_CITES)
register_kind("neuron_patching", plot=plot_sites, reading=read_restored, cites=_CITES)
register_instrument(
    "patching", ranks="site", kind="activation_patching", run=patch_activations, pairs=True, screen=_screen,
    options=("direction", "path", "site", "over", "positions"),
)  # fmt: skip
register_instrument(
    "neuron_patching", ranks="neuron", kind="neuron_patching", pairs=True, screen=_neuron_screen,
    options=("direction", "path"),
)  # fmt: skip
