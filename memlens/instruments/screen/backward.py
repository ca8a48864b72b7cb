"""Gradients of a metric with respect to activations, and the estimates of effects that they give.

The sweep engine runs no gradients; only this module does. Gradients are taken of activations alone: the
parameters' `requires_grad` is off while the model runs and restored afterwards, and no `.grad` is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from memlens.errors import NonFiniteError, OptionError, SilentInterventionError, SiteError, check_option
from memlens.forward.batches import Batch, Targets, at_targets, logits_at, make_batches
from memlens.forward.hooks import SITES, attached, capturing, chosen_layers, has_site, hook_name
from memlens.forward.memory import backward_bytes, budget_bytes, check_batch_size, fitting
from memlens.forward.metrics import METRICS, Metric, MetricLike, as_metric
from memlens.forward.trunk import Trunk
from memlens.instruments.patch.pairs import checked_positions
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result


@dataclass(frozen=True)
class Spot:
    """Where a gradient is taken.

    Attributes:
        layer: The layer.
        read: The hook of the activation.
        write: The hook at which changes of the activation are written.
    """

    layer: int
    read: str
    write: str

    @classmethod
    def of(cls, site: str, layer: int) -> Spot:
        """Return the spot of a site.

        The residual between attention and MLP is changed through its second summand, attention's output,
        because the bridge's own hook is on the branch to the MLP only.
        """
        write = "attn_out" if site == "resid_mid" else site
        return cls(layer, hook_name(site, layer), hook_name(write, layer))


@dataclass(frozen=True)
class Pass:
    """The outcome of one forward and backward pass.

    Attributes:
        values: The metric, `[batch]`.
        gradients: By layer, the gradient of each sequence's metric, in the shape of the activation.
        activations: By layer, the activation that was read.
        by_layer: Whether each layer ran again for the backward pass, to save memory.
    """

    values: Float[Tensor, " batch"]
    gradients: Mapping[int, Tensor]
    activations: Mapping[int, Tensor]
    by_layer: bool = False


def _differentiable(metric: MetricLike) -> Metric:
    """Return a metric that has a gradient; `margin` has that of the one token with the smallest lead."""
    found = as_metric(metric)
    if not found.differentiable:
        smooth = [repr(m.name) for m in METRICS.values() if m.differentiable]
        stepping = [repr(m.name) for m in METRICS.values() if not m.differentiable]
        raise OptionError(
            f"metric={found.name!r} has no gradient (nor have {', '.join(stepping)}): use one of "
            f"{', '.join(smooth)}, or a differentiable function."
        )
    return found


def run_backward(
    trunk: Trunk,
    targets: Targets,
    resid: Float[Tensor, "batch pos d_model"],
    start: int,
    metric: Metric,
    spots: Sequence[Spot],
    shift: Tensor | None = None,
    *,
    memory_budget: int | None = None,
) -> Pass:
    """Run the layers from `start` on and take the metric's gradient at `spots`.

    The backward pass needs the activations of all layers, among them the attention patterns, which grow with
    the square of the length. Where they do not fit the memory budget, each layer runs once more instead when
    the backward pass comes to it: a third slower, and one layer's activations in memory at a time.

    Args:
        trunk: The model.
        targets: The targets and where they are predicted.
        resid: The residual at the input of layer `start`.
        start: The first layer that runs.
        metric: A differentiable metric.
        spots: Where gradients are taken; without any, nothing is differentiated.
        shift: Added to the activation at the only spot, for a gradient at another point.
        memory_budget: Bytes for activations; `default_budget` by default.

    Raises:
        SilentInterventionError: A spot's hook did not run, or nothing depends on its activation.
        NonFiniteError: The metric is NaN or infinite.
        OptionError: A custom metric has another shape, or no gradient.
    """
    whole = len(resid) * _pass_bytes(trunk, resid.shape[1], targets.ids.shape[1], by_layer=False)
    by_layer = bool(spots) and whole > budget_bytes(memory_budget, trunk.device)
    hooked = _Hooked(trunk, spots, shift)
    with parameters_at_rest(trunk.model):
        if by_layer:
            values, gradients = _backward_by_layer(hooked, targets, resid, start, metric)
        else:
            with torch.set_grad_enabled(bool(spots)):
                final = hooked.run(resid, start, trunk.n_layers)
                values = _measured(trunk, targets, final, metric)
                gradients = _gradients(values, hooked.leaves(), spots)
    return Pass(
        values.detach(),
        {s.layer: g.to(trunk.device) for s, g in zip(spots, gradients, strict=True)},
        {s.layer: hooked.seen[s.read].detach().to(trunk.device) for s in spots},
        by_layer,
    )


class _Hooked:
    """Runs layers with leaves at the spots; `taken` are the leaves and `seen` the activations, by hook."""

    def __init__(self, trunk: Trunk, spots: Sequence[Spot], shift: Tensor | None) -> None:
        self.trunk, self.spots, self.shift = trunk, spots, shift
        self.taken: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}

    def run(self, resid: Tensor, start: int, stop: int) -> Tensor:
        here = [s for s in self.spots if start <= s.layer < stop]
        apart = [s.read for s in here if s.read != s.write]
        with (
            attached(self.trunk.model, [(s.write, partial(self._take, s.write)) for s in here]),
            capturing(self.trunk.model, apart) as seen,
        ):
            out = self.trunk.run(resid.clone(), start, stop)
        for s in here:
            if s.write not in self.taken:
                raise SilentInterventionError(f"the hook {s.write!r} did not run: it has no gradient.")
        if here and torch.is_grad_enabled() and not out.requires_grad:
            raise _ignored(here[0])
        self.seen |= {**{s.write: self.taken[s.write] for s in here}, **seen}
        return out

    def _take(self, name: str, x: Tensor, hook: Any) -> Tensor:
        moved = x if self.shift is None else (x + self.shift.to(x)).detach()
        leaf = moved.clone() if moved.requires_grad else moved.detach().clone()
        self.taken[name] = leaf.requires_grad_(torch.is_grad_enabled())
        return leaf.clone()  # later in-place writes are not allowed on a leaf

    def leaves(self) -> list[Tensor]:
        return [self.taken[s.write] for s in self.spots]


def _measured(trunk: Trunk, targets: Targets, final: Tensor, metric: Metric) -> Tensor:
    at = at_targets(final, targets)
    values = metric(logits_at(trunk.unembed, at, targets.mask), targets.ids, targets.mask)
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            "the metric is NaN or infinite without any intervention: check the weights, or use a wider dtype."
        )
    return values


def _backward_by_layer(
    hooked: _Hooked, targets: Targets, resid: Tensor, start: int, metric: Metric
) -> tuple[Tensor, list[Tensor]]:
    """Go back layer by layer, so that only one layer's activations are kept for it.

    The layers run twice: without gradients to find the input of each, and again one by one, from the last to
    the first with a spot, each passing its gradient on to the one before.
    """
    trunk, found, inputs = hooked.trunk, dict[str, Tensor](), [resid]
    with torch.no_grad():
        for layer in range(start, trunk.n_layers):
            inputs.append(hooked.run(inputs[-1], layer, layer + 1))
    with torch.enable_grad():
        final = inputs.pop().detach().requires_grad_()
        values = _measured(trunk, targets, final, metric)
        (gradient,) = _gradients(values, [final], hooked.spots[-1:])
        for layer in range(trunk.n_layers - 1, min(s.layer for s in hooked.spots) - 1, -1):
            here = [s for s in hooked.spots if s.layer == layer]
            below = any(s.layer < layer for s in hooked.spots)
            at = inputs.pop().detach().requires_grad_(below)
            out = hooked.run(at, layer, layer + 1)
            leaves = [hooked.taken[s.write] for s in here]
            grads = torch.autograd.grad(out, [*leaves, *([at] if below else [])], gradient, allow_unused=True)
            for s, own in zip(here, grads, strict=False):
                if own is None:
                    raise _ignored(s)
                found[s.write] = own
                hooked.taken[s.write], hooked.seen[s.read] = own, hooked.seen[s.read].detach()
            gradient = grads[-1]
    return values, [found[s.write] for s in hooked.spots]


def _pass_bytes(trunk: Trunk, width: int, n_targets: int, *, by_layer: bool) -> int:
    return backward_bytes(trunk.model.cfg, width, n_targets, trunk.dtype.itemsize, by_layer=by_layer)


def _gradients(values: Tensor, leaves: Sequence[Tensor], spots: Sequence[Spot]) -> Sequence[Tensor]:
    if not leaves:
        return []
    if not values.requires_grad:
        raise OptionError("the metric has no gradient: it must be a differentiable function of the logits.")
    found = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
    for s, gradient in zip(spots, found, strict=True):
        if gradient is None:
            raise _ignored(s)
    return [g for g in found if g is not None]


def _ignored(s: Spot) -> SilentInterventionError:
    return SilentInterventionError(
        f"what is written to the hook {s.write!r} changes no logit of this model: use another site."
    )


@contextmanager
def parameters_at_rest(model: nn.Module) -> Iterator[None]:
    """Differentiate no parameter inside the `with` block."""
    inner = getattr(model, "original_model", None)
    modules = [model, *([inner] if isinstance(inner, nn.Module) else [])]
    held = {id(p): (p, p.requires_grad) for m in modules for p in m.parameters()}
    try:
        for p, _ in held.values():
            p.requires_grad_(False)
        yield
    finally:
        for p, wanted in held.values():
            p.requires_grad_(wanted)


GRADIENT_SITES = (
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_post", "z", "q", "k", "v", "pattern",
)  # fmt: skip
OVER = ("position", "layer", "head", "head_position", "neuron", "neuron_position")
_PARTS = {"head": ("head", "kv_head"), "neuron": ("d_mlp",)}
GRADIENT_METHODS = ("attribution_patching", "integrated_gradients")
PATHS = ("site", "embedding")
_MOST_STEPS = 256
_LOG = logging.getLogger(__name__)


def _checked_over(site: str, over: str | None) -> str:
    """Return `over` if the site has it; the parts of the site if it is None."""
    axes = SITES[site].shape.split()
    own = next((part for part, names in _PARTS.items() if set(names) & set(axes)), None)
    if over is None:
        return own or "layer"
    check_option("over", over, OVER)
    part = over.removesuffix("_position")
    if part in _PARTS and part != own:
        needed = "'z'" if part == "head" else "'mlp_post'"
        raise OptionError(f"over={over!r} needs site={needed}: {site!r} has no {part}s.")
    return over


Deltas = Callable[[Batch, Mapping[int, Tensor]], dict[int, Tensor]]
"""Maps a batch and its activations by layer to what is added to each of them."""


class GradientRun:
    """Estimates from gradients at one site; `attribute_gradients` describes the options.

    All options are checked before anything runs. The attributes are the options as checked: `layers` and
    `positions` are complete, `metric` is differentiable, and `batch_size` is chosen. `by_layer` says
    afterwards whether a backward pass went layer by layer to save memory.
    """

    trunk: Trunk
    seqs: SequenceSet
    site: str
    over: str
    layers: list[int]
    positions: list[int]
    metric: Metric
    method: str
    path: str
    steps: int
    tolerance: float | None
    batch_size: int
    memory_budget: int | None
    by_layer: bool

    def __init__(
        self,
        model: Any,
        seqs: SequenceSet,
        site: str,
        over: str | None,
        *,
        layers: Sequence[int] | None,
        positions: Sequence[int] | None = None,
        metric: MetricLike,
        method: str,
        path: str = "site",
        steps: int,
        tolerance: float | None = None,
        batch_size: int | None,
        memory_budget: int | None = None,
    ) -> None:
        check_option("site", site, GRADIENT_SITES)
        check_option("method", method, GRADIENT_METHODS)
        check_option("path", path, PATHS)
        self.metric = _differentiable(metric)
        if not isinstance(steps, int) or steps < 1:
            raise OptionError(f"steps={steps!r} is not a number of points on a path: give 1 or more.")
        if tolerance is not None and not (
            method == "integrated_gradients" and path == "site" and tolerance > 0
        ):
            raise OptionError(
                f"tolerance={tolerance!r} is not available: it is a number above 0, for "
                'method="integrated_gradients" with path="site", whose cells sum to an exact effect.'
            )
        check_batch_size(batch_size)
        check_sequences(seqs, model, on_eos="keep")
        self.trunk, self.seqs, self.site = Trunk(model), seqs, site
        budget_bytes(memory_budget, self.trunk.device)
        if not has_site(model, site):
            raise SiteError(f"this model has no site {site!r}: parallel blocks have no 'resid_mid'.")
        self.layers = chosen_layers(layers, self.trunk.n_layers)
        self.over, self.positions = _checked_over(site, over), checked_positions(seqs, positions)
        self.method, self.path, self.steps, self.tolerance = method, path, steps, tolerance
        self.memory_budget, self.by_layer = memory_budget, False
        self.batch_size = batch_size or _batch_size(self.trunk, seqs, memory_budget)

    @property
    def dims(self) -> tuple[str, ...]:
        """The dimensions of a result after the layer."""
        return () if self.over == "layer" else tuple(self.over.split("_"))

    def result(
        self,
        deltas: Deltas,
        progress: bool,
        settings: Mapping[str, Any],
        embedded: Callable[[Batch], Tensor] | None = None,
    ) -> Result:
        """Return the metric of the base run and its estimate for every cell.

        Args:
            deltas: What would be added to the activations.
            progress: Show a progress bar.
            settings: Further settings of the result.
            embedded: Returns the residual at the end of the path "embedding".
        """
        values, effects, gap = self._estimate(deltas, embedded, progress)
        while self.tolerance is not None and gap > self.tolerance and self.steps < _MOST_STEPS:
            self.steps *= 2
            values, effects, gap = self._estimate(deltas, embedded, progress)
        if self.tolerance is not None and gap > self.tolerance:
            _LOG.warning(
                "the estimates of a layer miss its exact effect by up to %.3g (tolerance %.3g) with %d steps",
                gap, self.tolerance, self.steps,
            )  # fmt: skip
        shape = (-1, *[1] * (effects.ndim - 1))
        coords = {dim: list(range(n)) for dim, n in zip(self.dims, effects.shape[2:], strict=True)}
        coords["layer"] = self.layers
        if "position" in self.dims:
            coords["position"] = self.positions
            last = self.seqs.lengths.numpy().reshape(shape) - 1
            effects = np.where(np.array(self.positions) < last, effects, np.nan)
        name = self.metric.name
        variables = {
            name: (("sequence", "layer", *self.dims), values.reshape(shape) + effects),
            f"{name}_baseline": (("sequence",), values),
        }
        about: dict[str, Any] = {
            "site": self.site, "over": self.over, "method": self.method, "metrics": [name],
            "backward": "by layer" if self.by_layer else "whole",
        }  # fmt: skip
        if self.method == "integrated_gradients":
            about |= {"path": self.path, "steps": self.steps, "tolerance": self.tolerance}
            about["completeness_gap"] = gap if self.path == "site" else None
        return make_result(
            "gradient_attribution", self.trunk.model, self.seqs, variables, coords, {**about, **settings}
        )

    @torch.inference_mode(False)
    def _estimate(
        self, deltas: Deltas, embedded: Callable[[Batch], Tensor] | None, progress: bool
    ) -> tuple[Float[np.ndarray, "seq"], Float[np.ndarray, "seq layer *cell"], float]:
        """Return the metric, the effects and the largest completeness gap, in the metric's unit.

        The gap of a sequence and layer is the size of (sum of all cells - exact effect of the whole layer).
        """
        spots = [Spot.of(self.site, layer) for layer in self.layers]
        values, effects, largest = [], [], 0.0
        integrated = self.method == "integrated_gradients"
        on_path = self.steps * (len(self.layers) if self.path == "site" else 1)
        total = len(self.seqs) * (1 + on_path if integrated else 1)
        with tqdm(total=total, disable=not progress, desc="gradient attribution", unit="pass") as bar:
            for batch, targets in make_batches(self.seqs, self.batch_size, self.trunk.device):
                with torch.no_grad():
                    resid = self.trunk.embed(batch.tokens)
                base = self._back(targets, resid, 0, spots)
                bar.update(len(batch.rows))
                delta = deltas(batch, base.activations)
                gradients: Mapping[int, Tensor] = base.gradients
                if integrated:
                    end = None if self.path == "site" or embedded is None else embedded(batch)
                    gradients = dict.fromkeys(self.layers, torch.zeros(()))
                    for step in self._path(targets, spots, resid, delta, end):
                        for layer, g in step.items():
                            gradients[layer] = gradients[layer] + _wide(g) / self.steps
                        bar.update(len(batch.rows))
                values.append(base.values.double().cpu().numpy())
                products = [_wide(delta[n]) * _wide(gradients[n]) for n in self.layers]
                if integrated and self.path == "site":
                    exact = self._whole(targets, spots, resid, delta)
                    for product, value in zip(products, exact, strict=True):
                        gap = product.flatten(1).sum(1) - (value - base.values).to(product.device)
                        largest = max(largest, float(gap.abs().max()))
                effects.append(np.stack([self._summed(p) for p in products], axis=1))
        return np.concatenate(values), np.concatenate(effects), largest

    def _back(
        self,
        targets: Targets,
        resid: Tensor,
        start: int,
        spots: Sequence[Spot],
        shift: Tensor | None = None,
    ) -> Pass:
        found = run_backward(
            self.trunk, targets, resid, start, self.metric, spots, shift, memory_budget=self.memory_budget
        )
        self.by_layer |= found.by_layer
        return found

    def _whole(
        self, targets: Targets, spots: Sequence[Spot], resid: Tensor, delta: Mapping[int, Tensor]
    ) -> Iterator[Float[Tensor, "batch"]]:
        """Yield the metric with each layer's whole activation at the end of the path."""
        for s, here in zip(spots, self._inputs(resid), strict=True):
            yield self._back(targets, here, s.layer, [s], delta[s.layer]).values

    def _path(
        self,
        targets: Targets,
        spots: Sequence[Spot],
        resid: Tensor,
        delta: Mapping[int, Tensor],
        end: Tensor | None,
    ) -> Iterator[Mapping[int, Tensor]]:
        """Yield the gradients at the midpoints of the path, by layer."""
        middles = [(k + 0.5) / self.steps for k in range(self.steps)]
        if end is not None:
            for share in middles:
                moved = resid + share * (end - resid).to(resid.dtype)
                yield self._back(targets, moved, 0, spots).gradients
            return
        for s, here in zip(spots, self._inputs(resid), strict=True):
            for share in middles:
                shift = share * delta[s.layer]
                yield self._back(targets, here, s.layer, [s], shift).gradients

    @torch.no_grad()
    def _inputs(self, resid: Tensor) -> Iterator[Float[Tensor, "batch pos d_model"]]:
        """Yield the residual at the input of each of `layers`."""
        at, start = resid, 0
        for layer in self.layers:
            at, start = (resid, 0) if layer < start else (at, start)
            at, start = self.trunk.run(at, start, layer), layer
            yield at

    def _summed(self, x: Tensor) -> Float[np.ndarray, "batch *cell"]:
        """Sum an array in the shape of the activation over the axes that `over` does not name."""
        x = x.transpose(1, 2) if self.site == "pattern" else x  # heads first, then queries
        parted = len(SITES[self.site].shape.split()) == 4
        kept = x.sum(-1) if parted else x  # [batch, pos] and heads or features
        if self.over == "layer":
            kept = kept.flatten(1).sum(1)
        elif self.over in ("head", "neuron"):
            kept = kept.sum(1)
        else:
            kept = kept.sum(-1) if self.over == "position" else kept.transpose(1, 2)
        summed = kept.double().cpu().numpy()
        if "position" not in self.dims:
            return summed
        wide = np.full((*summed.shape[:-1], max(self.positions, default=-1) + 1), np.nan)
        n = min(wide.shape[-1], summed.shape[-1])
        wide[..., :n] = summed[..., :n]  # positions beyond the sequences of this batch stay NaN
        return wide[..., self.positions]


def _wide(x: Tensor) -> Tensor:
    """Convert to at least float32: products of 16-bit numbers are summed over many positions."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _batch_size(trunk: Trunk, seqs: SequenceSet, memory_budget: int | None) -> int:
    """As many sequences as fit with all layers' activations; where not one does, as fit layer by layer."""
    total = budget_bytes(memory_budget, trunk.device)
    width, n_targets = int(seqs.lengths.max()), seqs.max_targets
    rows = (_pass_bytes(trunk, width, n_targets, by_layer=by_layer) for by_layer in (False, True))
    row = next((each for each in rows if each <= total), total)
    return fitting(row, total, share=1, most=min(len(seqs), 32))
