r"""Gradients as a cheap filter: first-order estimates of patching or ablation, for all sites at once.

Sign and unit are those of the exact instruments: an effect is the estimated change of the metric, in its own
unit, when a site's activation :math:`a` becomes :math:`a'`. Every estimate has the form

.. math:: \hat\Delta = (a' - a) \cdot g

and the methods differ only in :math:`g`: the gradient of the metric at the base run (attribution patching),
or its mean along a path (integrated gradients). The estimates are not exact: `memlens.screen_then_verify`
runs the exact sweep where they are largest. Gradients of parameters are out of scope.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from torch import Tensor

from memlens.choices import AblationMode
from memlens.errors import check_option
from memlens.forward.batches import Batch
from memlens.forward.capture import ActivationSource
from memlens.forward.exclusive import computes
from memlens.forward.hooks import chosen_layers, hook_name
from memlens.forward.metrics import MetricLike
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.replacing import Replacement, ReplacementOptions
from memlens.instruments.donors import check_donor, donor_settings
from memlens.instruments.patch.pairs import Pairs
from memlens.instruments.screen.backward import GRADIENT_SITES, GradientRun
from memlens.instruments.screen.instruments import MakeScreen, Screen
from memlens.results.kinds import register_kind
from memlens.results.plots.heads import plot_gradients
from memlens.results.readings import read_estimated
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention


@computes
def attribute_gradients(
    model: Any,
    clean: SequenceSet,
    corrupt: SequenceSet | None = None,
    *,
    donor: Any = None,
    site: str = "resid_pre",
    over: str | None = None,
    direction: str | None = None,
    method: str = "attribution_patching",
    path: str = "site",
    steps: int = 8,
    tolerance: float | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    metric: MetricLike = "target_logprob",
    batch_size: int | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
) -> Result:
    r"""Estimate the result of `patch_activations` for every site of a kind from a few passes.

    With :math:`a` the activation of a cell in the patched run (the base: `corrupt` for denoising), :math:`a'`
    that in the other run (the source) and :math:`m` the metric, the estimate is

    .. math:: \hat m_\text{patched} = m_\text{base} + (a' - a) \cdot g

    - ``method="attribution_patching"``: :math:`g = \partial m / \partial a` at the base run. One forward and
      one backward pass give all cells. (Attribution patching: Nanda 2023; Syed et al., arXiv 2310.10348,
      score edges by the same first-order product.)
    - ``method="integrated_gradients"``, ``path="site"``: :math:`g` is the mean gradient along the straight
      line from base to source *of the whole activation of this site in one layer* (all positions, heads and
      neurons together), with nothing else changed. The cells of a layer therefore sum to the exact effect of
      patching all of them at once, up to the error of the sum over `steps` midpoints (completeness:
      Sundararajan et al., arXiv 1703.01365). This takes one forward and backward pass from the layer on per
      step and layer.
    - ``method="integrated_gradients"``, ``path="embedding"``: the residual at the input of block 0 moves
      along the straight line; the gradient at every cell is averaged over the path and multiplied with the
      cell's own :math:`a' - a` (as in EAP-IG, Hanna et al., arXiv 2403.17806). This takes one forward and
      backward pass per step for all layers, and is complete at the `resid_pre` of block 0 only.

    Args:
        model: A TransformerLens model; `torch.no_grad` may be active.
        clean: The recalled sequences.
        corrupt: The same targets after another prefix, row by row; may be left out with a donor.
        donor: Another model of the same shape, whose run is the source, as for `patch_activations`.
        site: One of `GRADIENT_SITES`. `k` and `v` have key-value heads; the positions of "pattern" are those
            of the query.
        over: "position" (each layer and position; the default), "layer", "head" or "head_position" (sites
            with heads), "neuron" or "neuron_position" (`mlp_post`); other dimensions are summed.
        direction: "denoising" patches clean into corrupt, "noising" the reverse; the defaults are those of
            `patch_activations`.
        method: See above.
        path: See above; for integrated gradients.
        steps: Points on the path; for integrated gradients.
        tolerance: Double the steps, up to 256, until the cells of every layer and sequence sum to the exact
            effect of the whole layer within this, in the metric's unit; for path="site". The largest gap is
            in the result's settings, as `completeness_gap`.
        layers: All by default.
        positions: Token positions to keep, if `over` has positions; by default all that can reach a target.
        metric: "target_logprob", "margin" (of the token with the smallest lead), "completion_entropy", or a
            differentiable function of (logits, ids, mask) that returns one number per sequence.
        batch_size: Sequences at a time; chosen to fit the memory by default.
        memory_budget: Bytes for activations. Where those of all layers do not fit, each layer runs once more
            when the backward pass comes to it, and only one layer's activations are kept; the result's
            settings say which (`backward`). By default 1 GiB on a CPU, 40 % of a GPU's free memory.
        progress: Show a progress bar.

    Returns:
        Kind "gradient_attribution", in the form of `patch_activations`: the estimated value of the metric in
        each patched run, `(sequence, layer, position)` or as given by `over`; `<metric>_baseline`,
        `<metric>_clean`, `<metric>_corrupt` `(sequence)`, which are exact; and `normalized_effect`.
        `Result.effect` returns the estimated change.

    Raises:
        OptionError: An unknown option, a metric without a gradient, or an `over` that the site does not have.
        SiteError: A layer, a position or (in parallel blocks) a site that does not exist.
        SequenceError: The two sets do not fit, or there is neither a corrupt set nor a donor.
        DonorError: The donor does not fit the model.
        SilentInterventionError: The model ignores what is written to the site.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> clean = ml.load_sequences("zoo", model)[:2]
        >>> result = ml.attribute_gradients(
        ...     model, clean, ml.corrupt(clean), site="z", over="head", progress=False
        ... )
        >>> result.effect("target_logprob").dims
        ('sequence', 'layer', 'head')
    """
    pairs = Pairs.of(clean, corrupt, direction, donor)
    source = pairs.source
    run = GradientRun(
        model, pairs.base, site, over or "position", layers=layers, positions=positions, metric=metric,
        method=method, path=path, steps=steps, tolerance=tolerance, batch_size=batch_size,
        memory_budget=memory_budget,
    )  # fmt: skip
    check_sequences(source, model, on_eos="keep")
    if donor is not None:
        check_donor(model, donor, source, sites=[site])
    names = [hook_name(site, layer) for layer in run.layers]
    store = ActivationSource(model if donor is None else donor, source, [*names, hook_name("resid_pre", 0)])

    def deltas(batch: Batch, here: Mapping[int, Tensor]) -> dict[int, Tensor]:
        there = store.of(batch)
        return {layer: there[hook_name(site, layer)] - a for layer, a in here.items()}

    def embedded(batch: Batch) -> Tensor:
        return store.of(batch)[hook_name("resid_pre", 0)]

    result = run.result(deltas, progress, pairs.settings, embedded)
    return pairs.compared(model, result, [metric])


@computes
def attribute_ablation(
    model: Any,
    sequences: SequenceSet,
    *,
    site: str = "z",
    over: str | None = None,
    mode: AblationMode = "zero",
    method: str = "integrated_gradients",
    steps: int = 8,
    tolerance: float | None = None,
    layers: Sequence[int] | None = None,
    metric: MetricLike = "target_logprob",
    batch_size: int | None = None,
    memory_budget: int | None = None,
    progress: bool = True,
    **options: Unpack[ReplacementOptions],
) -> Result:
    r"""Estimate the result of ablating each head, neuron or layer from a few passes.

    The estimate is :math:`\hat m = m + (a' - a) \cdot g`, where :math:`a'` is what replaces the activation
    :math:`a`; see `ablate_heads` for `mode`, `positions`, `reference` and `seed`. :math:`g` is the mean
    gradient along the straight line on which the *whole layer* is ablated together ("integrated_gradients",
    the default: the cells of a layer then sum to the effect of ablating all of it), or the gradient at the
    unchanged run ("attribution_patching").

    An ablation is a large step along which the metric is far from linear: expect the estimates to order the
    sites, not to give their sizes. Where recall is almost certain, the log-probability is flat and its
    gradient almost zero, so the one-pass estimate says little about recalled sequences. With 16 of them in
    `zoo/pythia-s`, its rank correlation with exact head ablation is about 0.4; that of integrated gradients
    with 8 steps is at least 0.9.

    Args:
        model: A TransformerLens model; `torch.no_grad` may be active.
        sequences: The recalled sequences.
        site: "z", "mlp_post" (neurons), "mlp_out", "attn_out", or another of `GRADIENT_SITES` except
            "pattern".
        over: As for `attribute_gradients`; by default "head" for sites with heads, "neuron" for `mlp_post`,
            "layer" for others.
        mode: What replaces the activation.
        method: "integrated_gradients" (`steps` passes per layer) or "attribution_patching" (one pass).
        steps: Points on the path; for integrated gradients.
        tolerance: Double the steps, up to 256, until the cells of every layer and sequence sum to the exact
            effect of the whole layer within this, in the metric's unit; for path="site". The largest gap is
            in the result's settings, as `completeness_gap`.
        layers: All by default.
        metric: As for `attribute_gradients`.
        batch_size: Sequences at a time; chosen to fit the memory by default.
        memory_budget: Bytes for activations. Where those of all layers do not fit, each layer runs once more
            when the backward pass comes to it, and only one layer's activations are kept; the result's
            settings say which (`backward`). By default 1 GiB on a CPU, 40 % of a GPU's free memory.
        progress: Show a progress bar.
        options: `positions`, `reference` and `seed`, as for `ablate_heads`.

    Returns:
        Kind "gradient_attribution", in the form of `ablate_heads`: the estimated value of the metric in each
        ablated run, `(sequence, layer, head)` or as given by `over`, and `<metric>_baseline` `(sequence)`.

    Raises:
        OptionError: An unknown option, a metric without a gradient, or an `over` that the site does not have.
        SiteError: A layer or a site that does not exist, or "mean_of_other_heads" with only one head.
        SequenceError: "resample" with fewer than two reference sequences.
        SilentInterventionError: The model ignores what is written to the site.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> neurons = ml.instruments.attribute_ablation(
        ...     model, ml.load_sequences("zoo", model)[:2], site="mlp_post", layers=[0], progress=False
        ... )
        >>> neurons.effect("target_logprob").dims
        ('sequence', 'layer', 'neuron')
    """
    check_option("site", site, [s for s in GRADIENT_SITES if s != "pattern"])
    replacement = Replacement(mode, **options)
    run = GradientRun(
        model, sequences, site, over, layers=layers, metric=metric, method=method, steps=steps,
        tolerance=tolerance, batch_size=batch_size, memory_budget=memory_budget,
    )  # fmt: skip
    by = replacement.by_layer(model, site, run.layers, sequences)

    def deltas(batch: Batch, here: Mapping[int, Tensor]) -> dict[int, Tensor]:
        at = replacement.where(batch)
        found = {layer: by[layer](batch)(a, None) - a for layer, a in here.items()}
        if at is None:
            return found
        return {layer: d * at.reshape(*at.shape, *[1] * (d.ndim - 2)) for layer, d in found.items()}

    return run.result(deltas, progress, replacement.settings)


def ablation_screen(site: str, over: str) -> MakeScreen:
    """Return the function that makes the screen of an ablation at a site: "head", "neuron" or "layer"."""

    def screen(model: Any, clean: SequenceSet, _: None, options: Mapping[str, Any]) -> Screen:
        replacement = Replacement(
            options["mode"], options["positions"] or "all", options["reference"], options["seed"],
            options["donor"],
        )  # fmt: skip

        def estimate(**method: Any) -> Result:
            own = vars(replacement)
            return attribute_ablation(
                model, clean, site=site, over=over, layers=options["layers"], **own, **method
            )

        def interventions(cells: Sequence[Mapping[str, int]]) -> list[Intervention]:
            named = [
                (f"{replacement.mode} {site} {c['layer']}", {c["layer"]: None}, c)
                if over == "layer"
                else (f"{replacement.mode} L{c['layer']}{over[0].upper()}{c[over]}", {c["layer"]: c[over]}, c)
                for c in cells
            ]
            return replacement.interventions(model, clean, site, named)

        def cells() -> list[dict[str, int]]:
            trunk = Trunk(model)
            layers = chosen_layers(options["layers"], trunk.n_layers)
            if over == "layer":
                return [{"layer": layer} for layer in layers]
            each = range(trunk.n_heads if over == "head" else model.cfg.d_mlp)
            return [{"layer": layer, over: place} for layer in layers for place in each]

        settings = {name: getattr(replacement, name) for name in ("mode", "positions", "seed")}
        settings |= {} if replacement.donor is None else donor_settings(replacement.donor)
        return Screen(clean, estimate, interventions, settings, cells=cells)

    return screen


register_kind(
    "gradient_attribution",
    plot=plot_gradients,
    reading=read_estimated,
    cites=(("syed2023", "attribution patching"),),
)
