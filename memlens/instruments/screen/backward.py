"""One forward and one backward pass: the gradient of a metric with respect to activations.

The sweep engine runs no gradients; this is the one place that does. Only activations get a gradient: the
parameters' `requires_grad` is off while the model runs and then as it was before, and no `.grad` is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from memlens.errors import NonFiniteError, OptionError, SilentInterventionError, SiteError, check_option
from memlens.forward.batches import Batch, Targets, at_targets, logits_at, make_batches
from memlens.forward.hooks import HookFn, attached, chosen_layers, has_site, hook_name
from memlens.forward.memory import check_batch_size, default_budget, fitting, logits_bytes, row_bytes
from memlens.forward.metrics import METRICS, Metric, MetricLike, as_metric
from memlens.forward.trunk import Trunk
from memlens.instruments.screen.cells import Cells
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet


@dataclass(frozen=True)
class Spot:
    """Where a gradient is taken.

    Attributes:
        layer: The block.
        read: The hook whose activation is meant.
        write: The hook that a change of it is written to.
    """

    layer: int
    read: str
    write: str


def spot(site: str, layer: int) -> Spot:
    """Return the spot of a site.

    The residual between attention and MLP is reached by way of its second summand, attention's output: a
    change of one is a change of the other, and the bridge's own hook stands on the MLP's branch alone.
    """
    write = "attn_out" if site == "resid_mid" else site
    return Spot(layer, hook_name(site, layer), hook_name(write, layer))


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass gave.

    Attributes:
        values: The metric, `[batch]`.
        gradients: By layer, the gradient of each sequence's metric, in the activation's shape.
        activations: By layer, the activation that was read.
    """

    values: Float[Tensor, " batch"]
    gradients: Mapping[int, Tensor]
    activations: Mapping[int, Tensor]


def differentiable(metric: MetricLike) -> Metric:
    """Return a metric that has a gradient; `margin`'s is that of the one token with the smallest lead.

    Raises:
        OptionError: A metric that is unknown, or piecewise constant.
    """
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
) -> Pass:
    """Run the blocks from `start` and take the metric's gradient at `spots`.

    Args:
        trunk: The model.
        targets: What is predicted where.
        resid: The residual at the input of block `start`.
        start: The first block that runs.
        metric: One that `differentiable` returned.
        spots: Where; with none of them nothing is differentiated.
        shift: What is added at the spots (then there is one), for a gradient elsewhere than here.

    Raises:
        SilentInterventionError: A spot's hook never ran, or nothing depends on what it gives.
        NonFiniteError: The metric is NaN or infinite.
        OptionError: A user's metric returns another shape, or has no gradient.
    """
    taken: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    hooks = [(s.write, _taking(taken, s.write, shift)) for s in spots]
    hooks += [(s.read, _looking(seen, s.read)) for s in spots if s.read != s.write]
    with _parameters_at_rest(trunk.model), torch.set_grad_enabled(bool(spots)), attached(trunk.model, hooks):
        final = trunk.run(resid.clone(), start)
        for s in spots:
            if s.write not in taken:
                raise SilentInterventionError(f"the hook {s.write!r} never ran: there is no gradient there.")
        if spots and not final.requires_grad:
            raise _ignored(spots[0])
        values = _metric(trunk, targets, final, metric)
        gradients = _gradients(values, [taken[s.write] for s in spots], spots)
    every = {**{name: leaf.detach() for name, leaf in taken.items()}, **seen}
    return Pass(
        values.detach(),
        {s.layer: g for s, g in zip(spots, gradients, strict=True)},
        {s.layer: every[s.read] for s in spots},
    )


def _taking(taken: dict[str, Tensor], name: str, shift: Tensor | None) -> HookFn:
    def take(x: Tensor, hook: Any) -> Tensor:
        moved = x if shift is None else (x + shift.to(x.dtype)).detach()
        leaf = moved.clone() if moved.requires_grad else moved.detach().clone().requires_grad_()
        taken[name] = leaf
        return leaf.clone()  # what comes after may write in place, which a leaf does not allow

    return take


def _looking(seen: dict[str, Tensor], name: str) -> HookFn:
    def look(x: Tensor, hook: Any) -> None:
        seen[name] = x.detach().clone()

    return look


def _metric(trunk: Trunk, targets: Targets, final: Tensor, metric: Metric) -> Tensor:
    values = metric(
        logits_at(trunk.unembed, at_targets(final, targets), targets.mask), targets.ids, targets.mask
    )
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            "the metric is NaN or infinite on a run without any change: check the weights, or use a wider "
            "dtype."
        )
    return values


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
        f"writing to the hook {s.write!r} changes no logit of this model: use another site."
    )


@contextmanager
def _parameters_at_rest(model: nn.Module) -> Iterator[None]:
    """No parameter is differentiated inside the block."""
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
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "mlp_post",
    "z",
    "q",
    "k",
    "v",
    "pattern",
)
GRADIENT_METHODS = ("attribution_patching", "integrated_gradients")
PATHS = ("site", "embedding")

Deltas = Callable[[Batch, Mapping[int, Tensor]], dict[int, Tensor]]
"""From a batch and its activations by layer to what is to be added to each."""


@dataclass(frozen=True)
class GradientRun:
    """What is differentiated, where and how; `of` checks it before anything runs.

    Attributes:
        trunk: The model.
        seqs: The base run's sequences.
        site: One of `GRADIENT_SITES`.
        layers: The layers.
        metric: What is differentiated.
        method: One of `GRADIENT_METHODS`.
        path: One of `PATHS`.
        steps: Points on the path.
        batch_size: Sequences at a time.
    """

    trunk: Trunk
    seqs: SequenceSet
    site: str
    layers: list[int]
    metric: Metric
    method: str
    path: str
    steps: int
    batch_size: int

    @staticmethod
    def of(
        model: Any,
        seqs: SequenceSet,
        site: str,
        layers: Sequence[int] | None,
        metric: MetricLike,
        method: str,
        path: str,
        steps: int,
        batch_size: int | None,
    ) -> GradientRun:
        """Check the options and choose layers and batch size; see `attribute_gradients`."""
        check_option("site", site, GRADIENT_SITES)
        check_option("method", method, GRADIENT_METHODS)
        check_option("path", path, PATHS)
        smooth = differentiable(metric)
        if not isinstance(steps, int) or steps < 1:
            raise OptionError(f"steps={steps!r} is not a number of points on a path: give 1 or more.")
        check_batch_size(batch_size)
        check_sequences(seqs, model, on_eos="keep")
        trunk = Trunk(model)
        if not has_site(model, site):
            raise SiteError(f"this model has no site {site!r}: parallel blocks have no 'resid_mid'.")
        wanted = chosen_layers(layers, trunk.n_layers)
        size = batch_size or _batch_size(trunk, seqs)
        return GradientRun(trunk, seqs, site, wanted, smooth, method, path, steps, size)

    @property
    def passes(self) -> int:
        """Forward and backward passes a batch."""
        if self.method == "attribution_patching":
            return 1
        return 1 + self.steps * (len(self.layers) if self.path == "site" else 1)

    @torch.inference_mode(False)
    def estimate(
        self, deltas: Deltas, embedded: Callable[[Batch], Tensor] | None, cells: Cells, progress: bool
    ) -> tuple[str, np.ndarray, np.ndarray]:
        """Return the metric's name, its values `[seq]` and the effects `[seq, layer, …]`."""
        metric = self.metric
        spots = [spot(self.site, layer) for layer in self.layers]
        values, effects = [], []
        total = self.passes * len(self.seqs)
        with tqdm(total=total, disable=not progress, desc="gradient attribution", unit="pass") as bar:
            for batch, targets in make_batches(self.seqs, self.batch_size, self.trunk.device):
                with torch.no_grad():
                    resid = self.trunk.embed(batch.tokens)
                base = run_backward(self.trunk, targets, resid, 0, metric, spots)
                bar.update(len(batch.rows))
                delta = deltas(batch, base.activations)
                gradients: Mapping[int, Tensor] = base.gradients
                if self.method == "integrated_gradients":
                    end = None if self.path == "site" or embedded is None else embedded(batch)
                    gradients = self._integrated(targets, metric, spots, resid, delta, end, bar)
                values.append(base.values.double().cpu().numpy())
                effects.append(cells.reduce({n: _product(delta[n], gradients[n]) for n in self.layers}))
        return metric.name, np.concatenate(values), np.concatenate(effects)

    def _integrated(
        self,
        targets: Targets,
        metric: Metric,
        spots: Sequence[Spot],
        resid: Tensor,
        delta: Mapping[int, Tensor],
        end: Tensor | None,
        bar: Any,
    ) -> dict[int, Tensor]:
        """The mean gradient over the midpoints of the path, by layer."""
        found: dict[int, Tensor] = {}
        middles = [(k + 0.5) / self.steps for k in range(self.steps)]
        if end is not None:
            for share in middles:
                moved = resid + share * (end - resid).to(resid.dtype)
                step = run_backward(self.trunk, targets, moved, 0, metric, spots)
                _accumulate(found, step.gradients, self.steps)
                bar.update(len(resid))
            return found
        for s, here in zip(spots, self._inputs(resid), strict=True):
            for share in middles:
                shift = share * delta[s.layer]
                step = run_backward(self.trunk, targets, here, s.layer, metric, [s], shift)
                _accumulate(found, step.gradients, self.steps)
                bar.update(len(resid))
        return found

    @torch.no_grad()
    def _inputs(self, resid: Tensor) -> Iterator[Float[Tensor, "batch pos d_model"]]:
        """The residual at the input of each layer, in the order of `layers`."""
        at, start = resid, 0
        for layer in self.layers:
            at, start = (resid, 0) if layer < start else (at, start)
            at, start = self.trunk.run(at, start, layer), layer
            yield at


def _accumulate(found: dict[int, Tensor], gradients: Mapping[int, Tensor], steps: int) -> None:
    for layer, g in gradients.items():
        part = _wide(g) / steps
        found[layer] = part if layer not in found else found[layer] + part


def _product(delta: Tensor, gradient: Tensor) -> Tensor:
    return _wide(delta) * _wide(gradient)


def _wide(x: Tensor) -> Tensor:
    """At least float32: products of 16-bit numbers are summed over many positions."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _batch_size(trunk: Trunk, seqs: SequenceSet) -> int:
    """As many sequences as fit: every block's activations are kept for the backward pass."""
    item = trunk.dtype.itemsize
    row = trunk.n_layers * row_bytes(trunk.model.cfg, int(seqs.lengths.max()), item)
    row += int(seqs.n_targets.max()) * logits_bytes(trunk.d_vocab, item)
    return fitting(row, default_budget(trunk.device), share=1, most=min(len(seqs), 32))
