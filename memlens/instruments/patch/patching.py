"""Activation patching: which site, moved from one run into another, carries the recall."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Unpack, get_args

import torch
from torch import Tensor

from memlens.choices import PatchSite
from memlens.errors import OptionError, SiteError, check_option
from memlens.forward.batches import Batch
from memlens.forward.capture import ActivationSource
from memlens.forward.exclusive import computes
from memlens.forward.hooks import HookFn, chosen_layers, has_site, hook_name
from memlens.forward.metrics import MetricLike, metric_names
from memlens.forward.trunk import Trunk, is_bridge
from memlens.instruments.donors import check_donor
from memlens.instruments.patch.pairs import Pairs, checked_positions, compare_runs, direction_of
from memlens.instruments.screen.gradients import attribute_gradients
from memlens.instruments.screen.instruments import Cell, Screen, register_instrument
from memlens.results.kinds import register_kind
from memlens.results.plots.heads import plot_sites
from memlens.results.plots.tokens import plot_patch_map
from memlens.results.readings import read_restored
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import BatchHook, ByBatch, Intervention, Reads
from memlens.sweeps.run import SweepOptions, kept, sweep

PATCH_SITES: tuple[str, ...] = get_args(PatchSite)
_WITH_HEADS = ("z", "q", "k", "v", "pattern")
_NOT_ALONE = ("progress", "out", "part", "executor", "check_dtype")
"""Options of a sweep that one of a single intervention has no use for."""
OVER = ("position", "layer", "head", "head_position")


@computes
def patch_activations(
    model: Any,
    clean: SequenceSet,
    corrupt: SequenceSet | Intervention | None = None,
    *,
    donor: Any = None,
    site: str = "resid_pre",
    over: str | None = None,
    direction: str | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    **options: Unpack[SweepOptions],
) -> Result:
    r"""Move activations between a clean and a corrupt run, or between two models, one site at a time.

    *Denoising* runs `corrupt` and writes the clean activation: which sites suffice to restore recall.
    *Noising* runs `clean` and writes the corrupt one: which sites recall needs.

    With a `donor` the activations that are written are another model's: a clean twin, a checkpoint, the base
    of a fine-tune, another seed. No corrupt sequences are needed then, since both models run the same ones.
    *Noising* takes the donor's run as the corrupt one (the model recalls, the donor does not: which sites
    must be the model's own), *denoising* as the clean one (the donor recalls, the model does not: which of
    its sites bring the memory over).

    The normalized effect of the first metric :math:`m` is

    .. math:: \frac{m_\text{patched} - m_\text{corrupt}}{m_\text{clean} - m_\text{corrupt}}

    so 1 is the clean run and 0 the corrupt one, in both directions; NaN where both runs are equal.

    Args:
        model: A TransformerLens model.
        clean: The sequences as recalled.
        corrupt: The same targets after another prefix (see `memlens.corrupt`), row by row; or an
            intervention that corrupts the clean run, such as `memlens.edits.embedding_noise`. It may be left
            out with a donor; sequences and donor together take the donor's activations on the source
            sequences.
        donor: A model of the same architecture, shape and vocabulary, on either backend.
        site: "resid_pre", "resid_mid" (sequential layers), "resid_post", "attn_out", "mlp_out"; for heads
            "z", "q", "k", "v" (before rotary; `k` and `v` have the key-value heads), or "pattern" (the
            attention weights, if the model uses what is written to them).
        over: "position" (each layer and position; the default, all heads together), "layer" (each layer at
            all positions), or for sites that have heads "head" (each head at all positions) or
            "head_position". A position of `pattern` is the query's.
        direction: "denoising" (the default with `corrupt`) or "noising" (the default without).
        layers: All by default.
        positions: Token positions for "position"; by default all that can reach a target.
        metrics: As for `sweep`; measured on the clean targets.
        options: Further options of `sweep`.

    Returns:
        Kind "activation_patching": each metric `(sequence, layer, position)` (or with `head`), its values
        `<metric>_clean` and `<metric>_corrupt` `(sequence)`, and `normalized_effect`. The setting `donor`
        has the donor's name and the fingerprint of its weights.

    Raises:
        OptionError: Unknown site, direction or `over`, or a donor with an intervention.
        SiteError: A layer, a position or (in parallel blocks) a site that does not exist.
        SequenceError: The two sets do not fit, or there is neither a corrupt set nor a donor.
        DonorError: The donor does not fit the model.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> clean = ml.load_sequences("zoo", model)[:2]
        >>> result = ml.patch_activations(model, clean, ml.corrupt(clean), positions=[0, 31], progress=False)
        >>> result["normalized_effect"].dims
        ('sequence', 'layer', 'position')

        From the twin that never saw these sequences, each layer's residual as a whole:

        >>> twin = ml.load_model("zoo/pythia-s-clean")
        >>> result = ml.patch_activations(model, clean, donor=twin, over="layer", progress=False)
        >>> result.settings["donor"]["model"], result["normalized_effect"].dims
        ('zoo/pythia-s-clean', ('sequence', 'layer'))
    """
    direction = direction_of(direction, corrupt)
    cells: dict[str, Any] = {"site": site, "over": over, "layers": layers, "positions": positions}
    settings: dict[str, Any] = {"site": site, "over": over or "position"}
    kind = "activation_patching"
    if not isinstance(corrupt, Intervention):
        pairs = Pairs.of(clean, corrupt, direction, donor)
        patches = activation_patches(model, pairs.source, donor=donor, **cells)
        return pairs.sweep(model, patches, metrics, options, kind=kind, settings=settings)
    if donor is not None:
        raise OptionError(
            "donor= does not go with an intervention as corrupt, which changes the model's own run: give "
            "corrupt sequences, or leave one of the two out."
        )
    settings |= {"direction": direction, "corruption": corrupt.name}
    denoising = direction == "denoising"
    patches = activation_patches(model, clean, under=None if denoising else corrupt, **cells)
    if denoising:
        patches = [replace(corrupt + patch, name=patch.name, coords=patch.coords) for patch in patches]
    result = sweep(model, clean, patches, metrics, kind=kind, settings=settings, **options)
    quick: Any = {k: v for k, v in options.items() if k not in _NOT_ALONE}
    alone = sweep(model, clean, [replace(corrupt, coords={})], metrics, progress=False, **quick)
    source = {name: alone[name].values[:, 0] for name in metric_names(metrics)}
    if denoising:  # the base is the run under the intervention, and the source the clean one
        base = {f"{n}_baseline": result.data[f"{n}_baseline"].copy(data=v) for n, v in source.items()}
        source = {name: alone.baseline(name).values for name in source}
        result = Result(result.data.assign(base))
    return kept(compare_runs(result, model, source, direction, clean), options.get("out"))


@computes
def activation_patches(
    model: Any,
    source: SequenceSet,
    *,
    site: str = "resid_pre",
    over: str | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    under: Intervention | None = None,
    donor: Any = None,
) -> list[Intervention]:
    """Return the interventions that write `source`'s activations, row by row; see `patch_activations`.

    With `under`, the activations are those of the run on `source` under that intervention; with `donor`, of
    that model's run.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> edits = ml.edits.activation_patches(model, ml.corrupt(seqs), layers=[0, 1], positions=[30, 31])
        >>> edits[0].coords
        {'layer': 0, 'position': 30}
    """
    _check_site(model, site, over)
    if donor is not None:
        check_donor(model, donor, source, sites=[site])
    return _patches(model, source, site, _cells(model, source, site, over, layers, positions), under, donor)


def _cells(
    model: Any,
    source: SequenceSet,
    site: str,
    over: str | None,
    layers: Sequence[int] | None,
    positions: Sequence[int] | None,
) -> list[dict[str, int]]:
    """Return every cell of a site."""
    trunk = Trunk(model)
    values: dict[str, Sequence[int]] = {
        "layer": chosen_layers(layers, trunk.n_layers),
        "head": range(trunk.n_kv_heads if site in ("k", "v") else trunk.n_heads),
        "position": checked_positions(source, positions),
        "neuron": range(getattr(model.cfg, "d_mlp", None) or 0),
    }
    dims = ["layer", *(part for part in (over or "position").split("_") if part != "layer")]
    return [dict(zip(dims, cell, strict=True)) for cell in product(*(values[dim] for dim in dims))]


def _check_site(model: Any, site: str, over: str | None) -> None:
    check_option("site", site, PATCH_SITES)
    check_option("over", over or "position", OVER)
    if over in ("head", "head_position") and site not in _WITH_HEADS:
        raise OptionError(f"over={over!r} needs a site with heads, such as site='z': {site!r} has none.")
    if not has_site(model, site):
        raise SiteError(
            f"this model's parallel blocks have no site {site!r}: use 'resid_pre' or 'resid_post'."
        )


def _patches(
    model: Any,
    source: SequenceSet,
    site: str,
    cells: Sequence[Cell],
    under: Intervention | None = None,
    donor: Any = None,
) -> list[Intervention]:
    """One intervention per cell: a layer and, where it names them, one head, neuron or position."""
    layers = sorted({cell["layer"] for cell in cells})
    names = [hook_name(site, layer) for layer in layers]
    store = ActivationSource(model if donor is None else donor, source, names, under=under)
    return [
        Intervention(
            " ".join([site, *(f"{key} {value}" for key, value in cell.items())]),
            _hooks(model, store, site, cell),
            cell,
            first_position=cell.get("position", 0),
        )
        for cell in cells
    ]


def _hooks(
    model: Any, store: ActivationSource, site: str, cell: Cell
) -> list[tuple[str, HookFn | BatchHook]]:
    layer = cell["layer"]
    if site != "resid_mid" or not is_bridge(model):
        return [(hook_name(site, layer), write_cell(store, site, cell))]
    # The bridge's hook_resid_mid is on the MLP's branch only. The sum itself is set through its second
    # summand: resid_mid = resid_pre + attn_out.
    pre: list[Tensor] = []

    def remember(x: Tensor, hook: Any) -> None:
        pre[:] = [x]

    write = write_cell(store, site, cell, less=pre)
    return [(hook_name("resid_pre", layer), Reads(remember)), (hook_name("attn_out", layer), write)]


def write_cell(store: ActivationSource, site: str, cell: Cell, less: Sequence[Tensor] = ()) -> ByBatch:
    """Return a hook that writes the source's activation at a cell, less what `less` then holds."""
    every, place = slice(None), cell.get("position", slice(None))
    part = cell.get("head", cell.get("neuron", every))
    index = (every, part, place) if site == "pattern" else (every, place, part)
    name = hook_name(site, cell["layer"])

    def make(batch: Batch) -> Callable[..., Tensor]:
        new, width = store.of(batch)[name], batch.tokens.shape[1]

        def fn(x: Tensor, hook: Any) -> Tensor:
            if cell.get("position", 0) >= width:
                return x  # a batch of shorter sequences has no such position
            out, wanted = x.clone(), new[index].to(x.dtype)
            for rest in less:  # rounding must not change a sum that is there already
                there = rest[index] + x[index] == wanted
                wanted = torch.where(there, x[index], wanted - rest[index])
            out[index] = wanted
            return out

        return fn

    return ByBatch(make)


def _screen(
    model: Any, clean: SequenceSet, corrupt: SequenceSet | None, options: Mapping[str, Any]
) -> Screen:
    site = options["site"] or "resid_pre"
    _check_site(model, site, options["over"])
    return _between_runs(model, clean, corrupt, {**options, "site": site})


def _neuron_screen(
    model: Any, clean: SequenceSet, corrupt: SequenceSet | None, options: Mapping[str, Any]
) -> Screen:
    return _between_runs(model, clean, corrupt, {**options, "site": "mlp_post", "over": "neuron"})


def _between_runs(
    model: Any, clean: SequenceSet, corrupt: SequenceSet | None, options: Mapping[str, Any]
) -> Screen:
    pairs = Pairs.of(clean, corrupt, options["direction"], options["donor"])
    common = {name: options[name] for name in ("site", "over", "layers", "positions")}

    def estimate(**method: Any) -> Result:
        own = {"direction": pairs.direction, "path": options["path"], "donor": pairs.donor, **common}
        return attribute_gradients(model, clean, corrupt, **own, **method)

    return Screen(
        pairs.base,
        estimate,
        lambda cells: _patches(model, pairs.source, common["site"], cells, donor=pairs.donor),
        {**common, **pairs.settings},
        lambda result, metrics: pairs.compared(model, result, metrics),
        partial(_cells, model, pairs.source, **common),
    )


_CITES = (("meng2022", "causal tracing, the origin of activation patching"),)
register_kind("activation_patching", plot=plot_patch_map, reading=read_restored, cites=_CITES)
register_kind("neuron_patching", plot=plot_sites, reading=read_restored, cites=_CITES)
register_instrument(
    "patching", ranks="site", kind="activation_patching", run=patch_activations, pairs=True, screen=_screen,
    options=("direction", "path", "site", "over", "positions", "donor"),
)  # fmt: skip
register_instrument(
    "neuron_patching", ranks="neuron", kind="neuron_patching", pairs=True, screen=_neuron_screen,
    options=("direction", "path", "donor"),
)  # fmt: skip
