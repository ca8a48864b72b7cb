r"""Gradients as a cheap filter: what a patch or an ablation would do, to first order, for all sites at once.

Sign and unit are those of the exact instruments: an effect is the estimated change of the metric, in the
metric's unit, when a site's activation :math:`a` becomes :math:`a'`. Every estimate has the form

.. math:: \hat\Delta = (a' - a) \cdot g

and the methods differ in :math:`g` alone: the gradient of the metric at the base run (attribution patching),
or its mean along a path (integrated gradients). Nothing here is exact: `memlens.screen_then_verify` runs
the exact sweep where these estimates are largest. Out of scope: gradients of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from memlens.choices import Mode, Positions
from memlens.errors import check_option
from memlens.forward.batches import Batch
from memlens.forward.capture import ActivationSource
from memlens.forward.hooks import hook_name
from memlens.forward.metrics import MetricLike
from memlens.instruments.ablate.replacing import Replacement
from memlens.instruments.patch.pairs import Pairs, checked_positions
from memlens.instruments.screen.backward import GRADIENT_SITES, GradientRun
from memlens.instruments.screen.cells import Cells, check_over
from memlens.instruments.screen.instruments import MakeScreen, Screen
from memlens.results.kinds import register_kind
from memlens.results.plots.heads import plot_gradients
from memlens.results.readings import read_estimated
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.labels import make_result


def attribute_gradients(
    model: Any,
    clean: SequenceSet,
    corrupt: SequenceSet,
    *,
    site: str = "resid_pre",
    over: str | None = None,
    direction: str = "denoising",
    method: str = "attribution_patching",
    path: str = "site",
    steps: int = 8,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
    metric: MetricLike = "target_logprob",
    batch_size: int | None = None,
    progress: bool = True,
) -> Result:
    r"""Estimate what `patch_activations` would give, for every site of a kind from a few passes.

    With :math:`a` the activation of a cell in the run that is patched (the base: `corrupt` when denoising),
    :math:`a'` that of the other run (the source) and :math:`m` the metric, the estimate is

    .. math:: \hat m_\text{patched} = m_\text{base} + (a' - a) \cdot g

    - ``method="attribution_patching"``: :math:`g = \partial m / \partial a` at the base run. One forward and
      one backward pass give all cells. (Attribution patching: Nanda 2023; Syed et al., arXiv 2310.10348,
      score edges by the same first-order product.)
    - ``method="integrated_gradients"``, ``path="site"``: :math:`g` is the mean gradient along the straight
      line from base to source *of this site's whole activation in one layer*, all positions, heads and
      neurons together, with nothing else changed. So the cells of a layer sum to the exact effect of
      patching all of them at once, up to the error of the sum over `steps` midpoints (completeness:
      Sundararajan et al., arXiv 1703.01365). One forward and backward from that layer on, for each step and
      layer.
    - ``method="integrated_gradients"``, ``path="embedding"``: the residual at the input of block 0 goes along
      the straight line, the gradient at every cell is averaged over that, and multiplied with the cell's own
      :math:`a' - a` (the inputs' path that Hanna et al., arXiv 2403.17806, use in EAP-IG). One forward and
      backward per step for all layers; complete at block 0's `resid_pre` only.

    Args:
        model: A TransformerLens model; it may be in a `torch.no_grad` block.
        clean: The sequences as recalled.
        corrupt: The same targets after another prefix, row by row.
        site: One of `GRADIENT_SITES`. `k` and `v` have the key-value heads; a position of "pattern" is the
            query's.
        over: "position" (each layer and position; the default), "layer", "head" or "head_position" (sites
            with heads), "neuron" or "neuron_position" (`mlp_post`); what is not named is summed.
        direction: "denoising" patches clean into corrupt, "noising" the reverse.
        method: As above.
        path: As above; for integrated gradients.
        steps: Points on the path; for integrated gradients.
        layers: All by default.
        positions: Token positions to keep where `over` names them; by default all that can reach a target.
        metric: "target_logprob", "margin" (of the token with the smallest lead), "completion_entropy", or a
            differentiable function of (logits, ids, mask) that gives one number per sequence.
        batch_size: Sequences at a time; chosen by memory by default.
        progress: Show a bar.

    Returns:
        Kind "gradient_attribution", in the form of `patch_activations`: the metric's estimated value in each
        patched run, `(sequence, layer, position)` or as `over` says; `<metric>_baseline`, `<metric>_clean`,
        `<metric>_corrupt` `(sequence)`, which are exact; and `normalized_effect`. `Result.effect` gives the
        estimated change.

    Raises:
        OptionError: An unknown option, a metric without a gradient, or `over` that the site does not have.
        SiteError: A layer, a position or (in parallel blocks) a site that does not exist.
        SequenceError: The two sets do not fit.
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
    pairs = Pairs(clean, corrupt, direction)
    source, base = pairs.source, pairs.base
    run = GradientRun.of(model, base, site, layers, metric, method, path, steps, batch_size)
    over = check_over(site, over or "position")
    cells = Cells(over, checked_positions(source, positions), site)
    check_sequences(source, model, on_eos="keep")
    names = [hook_name(site, layer) for layer in run.layers]
    store = ActivationSource(model, source, [*names, hook_name("resid_pre", 0)])

    def deltas(batch: Batch, here: Mapping[int, Tensor]) -> dict[int, Tensor]:
        there = store.of(batch)
        return {layer: there[hook_name(site, layer)] - a for layer, a in here.items()}

    def embedded(batch: Batch) -> Tensor:
        return store.of(batch)[hook_name("resid_pre", 0)]

    name, values, effects = run.estimate(deltas, embedded, cells, progress)
    result = _result(model, base, name, values, effects, cells, run, pairs.settings)
    return pairs.compared(model, result, [metric])


def attribute_ablation(
    model: Any,
    sequences: SequenceSet,
    *,
    site: str = "z",
    over: str | None = None,
    mode: Mode = "zero",
    positions: Positions = "all",
    reference: SequenceSet | None = None,
    method: str = "integrated_gradients",
    steps: int = 8,
    layers: Sequence[int] | None = None,
    metric: MetricLike = "target_logprob",
    batch_size: int | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Result:
    r"""Estimate what ablating each head, neuron or block would give, from a few passes.

    The estimate is :math:`\hat m = m + (a' - a) \cdot g`, where :math:`a'` is what the ablation puts in the
    place of :math:`a`: 0 ("zero"), its mean over all positions of `reference` ("mean"), what it is at the
    same position of another sequence ("resample"), or the mean of the layer's other heads
    ("mean_of_other_heads"); see `ablate_heads`. :math:`g` is the mean gradient along the straight line on
    which the *whole layer* is ablated together ("integrated_gradients", the default: then the cells of a
    layer sum to the effect of ablating all of it), or the gradient at the run without any change
    ("attribution_patching").

    An ablation is a large step, and the metric is far from linear along it: expect an order of the sites and
    not their sizes. Where recall is all but certain, the log-probability is flat and its gradient next to
    nothing, so that the one-pass estimate says little of recalled sequences: with 16 of them in
    `zoo/pythia-s`, its rank correlation with exact head ablation is about 0.4, that of integrated gradients
    with 8 steps 0.9 and more.

    Args:
        model: A TransformerLens model; it may be in a `torch.no_grad` block.
        sequences: What is recalled.
        site: "z", "mlp_post" (neurons), "mlp_out", "attn_out", or another of `GRADIENT_SITES` but "pattern".
        over: As for `attribute_gradients`; by default "head" for sites with heads, "neuron" for `mlp_post`,
            "layer" for others.
        mode: What replaces the activation.
        positions: "all", "prompt", "targets" or "last_prompt", as for `ablate_heads`.
        reference: The set for "mean" and "resample"; `sequences` itself by default.
        method: "integrated_gradients" (`steps` passes a layer) or "attribution_patching" (one pass).
        steps: Points on the path; for integrated gradients.
        layers: All by default.
        metric: As for `attribute_gradients`.
        batch_size: Sequences at a time; chosen by memory by default.
        progress: Show a bar.
        seed: For "resample".

    Returns:
        Kind "gradient_attribution", in the form of `ablate_heads`: the metric's estimated value in each
        ablated run, `(sequence, layer, head)` or as `over` says, and `<metric>_baseline` `(sequence)`.

    Raises:
        OptionError: An unknown option, a metric without a gradient, or `over` that the site does not have.
        SiteError: A layer or a site that does not exist, or a lone head without others.
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
    replacement = Replacement(mode, positions, reference, seed)
    run = GradientRun.of(model, sequences, site, layers, metric, method, "site", steps, batch_size)
    cells = Cells(check_over(site, over), checked_positions(sequences, None), site)
    by = replacement.by_layer(model, site, run.layers, sequences)

    def deltas(batch: Batch, here: Mapping[int, Tensor]) -> dict[int, Tensor]:
        at = replacement.where(batch)
        found = {layer: by[layer](batch)(a, None) - a for layer, a in here.items()}
        if at is None:
            return found
        return {layer: d * at.reshape(*at.shape, *[1] * (d.ndim - 2)) for layer, d in found.items()}

    name, values, effects = run.estimate(deltas, None, cells, progress)
    return _result(model, sequences, name, values, effects, cells, run, replacement.settings)


def _result(
    model: Any,
    seqs: SequenceSet,
    name: str,
    values: np.ndarray,
    effects: np.ndarray,
    cells: Cells,
    run: GradientRun,
    settings: Mapping[str, Any],
) -> Result:
    if "position" in cells.dims:
        last = seqs.lengths.numpy().reshape(-1, *[1] * (effects.ndim - 1)) - 1
        effects = np.where(np.array(cells.positions) < last, effects, np.nan)
    estimate = values.reshape(-1, *[1] * (effects.ndim - 1)) + effects
    variables = {
        name: (("sequence", "layer", *cells.dims), estimate),
        f"{name}_baseline": (("sequence",), values),
    }
    coords = {"layer": run.layers, **cells.coords(effects.shape)}
    about: dict[str, Any] = {"site": run.site, "over": cells.over, "method": run.method, "metrics": [name]}
    if run.method == "integrated_gradients":
        about |= {"path": run.path, "steps": run.steps}
    return make_result("gradient_attribution", model, seqs, variables, coords, {**about, **settings})


def ablation_screen(site: str, over: str) -> MakeScreen:
    """Return the function that makes the screen of an ablation.

    Args:
        site: The site that is ablated.
        over: "head" or "neuron".
    """

    def screen(model: Any, clean: SequenceSet, _: None, options: Mapping[str, Any]) -> Screen:
        replacement = Replacement(
            options["mode"], options["positions"] or "all", options["reference"], options["seed"]
        )

        def estimate(**method: Any) -> Result:
            own = vars(replacement)
            return attribute_ablation(
                model, clean, site=site, over=over, layers=options["layers"], **own, **method
            )

        def interventions(cells: Sequence[Mapping[str, int]]) -> list[Intervention]:
            named = [
                (f"{replacement.mode} L{c['layer']}{over[0].upper()}{c[over]}", {c["layer"]: c[over]}, c)
                for c in cells
            ]
            return replacement.interventions(model, clean, site, named)

        settings = {name: getattr(replacement, name) for name in ("mode", "positions", "seed")}
        return Screen(clean, estimate, interventions, settings)

    return screen


register_kind(
    "gradient_attribution",
    plot=plot_gradients,
    reading=read_estimated,
    cites=(("syed2023", "attribution patching"),),
)
