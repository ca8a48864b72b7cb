"""Unlearning depth: is a memory gone inside a model, or only at its output?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, Unpack

import xarray as xr
from torch import nn

from memlens.choices import Positions
from memlens.errors import OptionError
from memlens.forward.capture import ActivationSource
from memlens.forward.exclusive import computes
from memlens.forward.hooks import chosen_layers, hook_name
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.replacing import Replacement, from_source
from memlens.instruments.donors import check_donor, donor_settings
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_depth
from memlens.results.readings import read_depth
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention, as_interventions
from memlens.sweeps.run import SweepOptions, kept, sweep

_SITE = "resid_post"


@computes
def unlearning_depth(
    model: Any,
    sequences: SequenceSet,
    *,
    retain: Any,
    edited: Any,
    threshold: float = 0.05,
    positions: Positions = "targets",
    layers: Sequence[int] | None = None,
    **options: Unpack[SweepOptions],
) -> Result:
    r"""Measure how deep inside a model an edit takes a memory out, layer by layer.

    The residual after each layer of two other models is patched into the unchanged, full model, and the fall
    of the targets' mean log-probability :math:`\ell` is compared:

    .. math::

        s^1_l = \ell_\text{full} - \ell_{\text{retain} \to l}, \qquad
        s^2_l = \ell_\text{full} - \ell_{\text{edited} \to l}, \qquad
        D = \frac{\sum_{l \in L} s^1_l \,\mathrm{clip}(s^2_l / s^1_l,\, 0, 1)}{\sum_{l \in L} s^1_l},
        \quad L = \{l : s^1_l > \tau\}

    A layer counts where the retain model, which never learned the sequence, lacks what the full model needs.
    :math:`D = 0`: from the edited model's states the full model recalls as before, so that the edit hides the
    memory at the output only, or does nothing; :math:`D = 1`: its states lack as much as the retain model's
    do. The definition is that of Lee et al. (arXiv 2605.24614) as their released code has it: outputs of
    layers, at the positions that predict the targets, the mean over target tokens in nats,
    :math:`\tau = 0.05`. Other positions, interventions as edits, and intervals are ours.

    A retain model that was trained on its own writes other features than the full model in every direction,
    so that :math:`s^1` also counts what is foreign to the full model without being the memory: compare with
    the depth on sequences that were not memorized. It is cleanest where both were fine-tuned from one base.

    Args:
        model: The full model, which recalls the sequences.
        sequences: What was to be unlearned.
        retain: A model of the same shape that never learned them (a clean twin).
        edited: The unlearned model; or an intervention on `model`, or several that are applied together.
        threshold: :math:`\tau`, in nats.
        positions: Where the residual is patched, as for `ablate_heads`.
        layers: All by default.
        options: Further options of `sweep`, without `per_token`.

    Returns:
        Kind "unlearning_depth": `fall_retain` and `fall_edited` `(sequence, layer)` in nats, `erased`
        `(sequence, layer)`, the clipped ratio where a layer counts and NaN elsewhere, and `depth`
        `(sequence)`, NaN where no layer counts.

    Raises:
        OptionError: `per_token`, a threshold below 0, or unknown positions.
        DonorError: A model does not fit.
        SiteError: A layer that does not exist.
        InterventionError: `edited` is neither a model nor interventions.

    Example:
        >>> import memlens as ml
        >>> model, twin = ml.load_model("zoo/pythia-s"), ml.load_model("zoo/pythia-s-clean")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> often = seqs[seqs.table["copies"].to_numpy() == 256][:4]
        >>> edits = ml.edits.attention_bypasses(model, layers=[[3, 4, 5]], mode="identity")
        >>> depth = ml.instruments.unlearning_depth
        >>> result = depth(model, often, retain=twin, edited=edits, progress=False)
        >>> result["depth"].dims, bool((result["depth"] < 1).all())
        (('sequence',), True)
    """
    if options.get("per_token"):
        raise OptionError("per_token=True: the depth is one number per sequence, so leave it out.")
    if not isinstance(threshold, (int, float)) or not threshold >= 0:
        raise OptionError(f"threshold={threshold!r}: give a fall in nats, 0 or more.")
    layers = chosen_layers(layers, Trunk(model).n_layers)
    names = [hook_name(_SITE, layer) for layer in layers]
    sources = {
        "retain": _model_source(model, retain, sequences, names),
        "edited": _edited_source(model, edited, sequences, names),
    }
    patches = [
        Intervention(f"{who} {layer}", [(name, _hook(source, name, positions))], {"of": who, "layer": layer})
        for who, source in sources.items()
        for layer, name in zip(layers, names, strict=True)
    ]
    settings = {
        "threshold": threshold, "positions": positions, "retain": donor_settings(retain)["donor"],
        "edited": _named(edited),
    }  # fmt: skip
    result = sweep(
        model, sequences, patches, ("target_logprob",), kind="unlearning_depth", settings=settings, **options
    )
    return kept(Result(_depths(result, threshold)), options.get("out"))


def _model_source(model: Any, other: Any, seqs: SequenceSet, names: Sequence[str]) -> ActivationSource:
    check_donor(model, other, seqs, sites=[_SITE])
    return ActivationSource(other, seqs, names)


def _edited_source(model: Any, edited: Any, seqs: SequenceSet, names: Sequence[str]) -> ActivationSource:
    if isinstance(edited, nn.Module):
        return _model_source(model, edited, seqs, names)
    return ActivationSource(model, seqs, names, under=reduce(add, as_interventions(edited)))


def _named(edited: Any) -> Any:
    if isinstance(edited, nn.Module):
        return donor_settings(edited)["donor"]
    return [edit.name for edit in as_interventions(edited)]


def _hook(source: ActivationSource, name: str, positions: Positions) -> Any:
    replacement = Replacement("donor", positions, donor=source.trunk.model)
    return replacement.hook(from_source(source, name))


def _depths(result: Result, threshold: float) -> xr.Dataset:
    """Return the falls of both models' patches, what of them is erased, and the depth of each sequence."""
    fall = result.baseline("target_logprob") - result["target_logprob"].astype(float)
    own, theirs = (fall.sel(of=who, drop=True).transpose("sequence", "layer") for who in ("retain", "edited"))
    counts = own > threshold
    weight = own.where(counts)
    erased = (theirs / weight).clip(0, 1)
    # without a layer that counts there is no depth
    depth = ((erased * weight).sum("layer") / weight.sum("layer").where(counts.any("layer"))).astype(float)
    nats = {"units": "nats", "better": ""}
    named = {
        "depth": depth.assign_attrs(label="unlearning depth", units="", better="higher"),
        "erased": erased.assign_attrs(label="share erased", units="", better="higher"),
        "fall_retain": own.assign_attrs(label="fall from the retain model's states", **nats),
        "fall_edited": theirs.assign_attrs(label="fall from the edited model's states", **nats),
        "target_logprob_baseline": result["target_logprob_baseline"],
    }
    kept = {name: c for name, c in result.data.coords.items() if "of" not in c.dims}
    return xr.Dataset(
        {n: a.drop_vars("of", errors="ignore") for n, a in named.items()}, kept, result.data.attrs
    )


register_kind(
    "unlearning_depth",
    plot=plot_depth,
    reading=read_depth,
    cites=(("lee2026", "unlearning depth"),),
)
