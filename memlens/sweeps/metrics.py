"""What is measured: names of `METRICS`, or a user's function of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memlens.errors import OptionError, check_option
from memlens.recall.targets import METRICS, LazyTargetStats, reduce_metric

__all__ = ["MetricLike", "make_reduce", "metric_names"]

MetricLike = str | Callable[[Tensor, Tensor, Tensor], Tensor]
"""A name, or ``fn(logits [seq, target, vocab], ids [seq, target], mask [seq, target]) -> [seq]``."""


def metric_names(metrics: Sequence[MetricLike]) -> list[str]:
    """Return the names that metrics have in results.

    Raises:
        OptionError: An unknown name, two metrics of one name, or none at all.
    """
    if isinstance(metrics, str) or not metrics:
        raise OptionError(
            f"metrics={metrics!r}: give a sequence with at least one metric, such as ('exact_match',)."
        )
    names = [m if isinstance(m, str) else getattr(m, "__name__", type(m).__name__) for m in metrics]
    for metric in metrics:
        if isinstance(metric, str):
            check_option("metric", metric, list(METRICS))
    if len(set(names)) < len(names):
        raise OptionError(f"metrics={names!r}: two metrics have one name; rename one.")
    return names


def make_reduce(
    metrics: Sequence[MetricLike], *, per_token: bool
) -> Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """Return a function from target logits, ids and mask to one CPU tensor a metric."""
    names = metric_names(metrics)
    built_in = [m for m in metrics if isinstance(m, str)]

    def reduce(logits: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if built_in:
            stats = LazyTargetStats(logits, ids, mask)
            out |= {name: reduce_metric(name, stats, per_token=per_token) for name in built_in}
        for name, metric in zip(names, metrics, strict=True):
            if not isinstance(metric, str):
                out[name] = _checked(name, metric(logits, ids, mask), len(logits))
        return {name: out[name] for name in names}

    return reduce


def _checked(name: str, value: Tensor, n: int) -> Tensor:
    if not isinstance(value, torch.Tensor) or value.shape != (n,):
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise OptionError(
            f"metric {name!r} gave {shape}: it must give a tensor of shape ({n},), one number a sequence."
        )
    return value.detach().float().cpu()
