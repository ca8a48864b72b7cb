"""One forward and one backward pass: the gradient of a metric with respect to activations.

The sweep engine runs no gradients; this is the one place that does. Only activations get a gradient: the
parameters' `requires_grad` is off while the model runs and then as it was before, and no `.grad` is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from memlens.errors import NonFiniteError, OptionError, SilentInterventionError
from memlens.models.hooks import HookFn, attached, hook_name
from memlens.models.trunk import Trunk
from memlens.recall.targets import METRICS, LazyTargetStats, reduce_metric
from memlens.sweeps.batches import Targets, at_targets
from memlens.sweeps.metrics import MetricLike, metric_names

__all__ = ["DIFFERENTIABLE", "Pass", "Spot", "differentiable", "run_backward", "spot"]

DIFFERENTIABLE = ("target_logprob", "margin", "completion_entropy")
"""The metrics that have a gradient. `margin`'s is that of the one token with the smallest lead."""

SequenceMetric = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def differentiable(metric: MetricLike) -> tuple[str, SequenceMetric]:
    """Return a metric's name and its function of logits, ids and mask.

    Raises:
        OptionError: A metric that is unknown, or steps instead of changing smoothly.
    """
    (name,) = metric_names([metric])
    if not isinstance(metric, str):
        return name, metric
    if metric not in DIFFERENTIABLE:
        stepping = ", ".join(map(repr, sorted(set(METRICS) - set(DIFFERENTIABLE))))
        raise OptionError(
            f"metric={metric!r} has no gradient, as have none of {stepping}: use one of "
            f"{', '.join(map(repr, DIFFERENTIABLE))}, or a differentiable function."
        )
    return name, lambda logits, ids, mask: reduce_metric(metric, LazyTargetStats(logits, ids, mask))


def run_backward(
    trunk: Trunk,
    targets: Targets,
    resid: Float[Tensor, "batch pos d_model"],
    start: int,
    metric: SequenceMetric,
    spots: Sequence[Spot],
    shift: Tensor | None = None,
) -> Pass:
    """Run the blocks from `start` and take the metric's gradient at `spots`.

    Args:
        trunk: The model.
        targets: What is predicted where.
        resid: The residual at the input of block `start`.
        start: The first block that runs.
        metric: A function from `differentiable`.
        spots: Where; with none of them nothing is differentiated.
        shift: What is added at the spots (then there is one), for a gradient elsewhere than here.

    Raises:
        SilentInterventionError: A spot's hook never ran, or nothing depends on what it gives.
        NonFiniteError: The metric is NaN or infinite.
        OptionError: A user's metric gives another shape, or has no gradient.
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


def _metric(trunk: Trunk, targets: Targets, final: Tensor, metric: SequenceMetric) -> Tensor:
    values = metric(_logits(trunk, at_targets(final, targets), targets.mask), targets.ids, targets.mask)
    if not isinstance(values, Tensor) or values.shape != (len(final),):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise OptionError(
            f"the metric gave {shape}: it must give a tensor of shape ({len(final)},), one number a sequence."
        )
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            "the metric is NaN or infinite on a run without any change: check the weights, or use a wider "
            "dtype."
        )
    return values


def _logits(trunk: Trunk, rows: Tensor, mask: Tensor) -> Tensor:
    """The logits where a target stands; 0 elsewhere, as in a sweep."""
    if bool(mask.all()):
        return trunk.unembed(rows)
    some = trunk.unembed(rows[mask])
    return some.new_zeros(*mask.shape, some.shape[-1]).index_put((mask,), some)


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
