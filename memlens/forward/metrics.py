"""The one place where logits at target positions become numbers.

The logits that predict the token at position ``p`` stand at ``p - 1``; callers hand in the logits that
*predict* the targets, already gathered. Everything is reduced at once, so that no tensor of the size of
``[sequence, position, vocabulary]`` is ever kept.

Ties: `argmax` is the first of the largest logits (as `torch.argmax` on one row), and `rank` counts the
tokens with a *strictly* greater logit. So ``rank == 0`` with ``margin == 0`` is a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memlens.errors import OptionError, check_option


@dataclass(frozen=True)
class TargetStats:
    """What the model says of each target token, teacher-forced.

    Attributes:
        logprob: Log-probability of the target, in nats.
        rank: Zero-based rank of the target: how many tokens have a strictly greater logit.
        argmax: Id of the token with the greatest logit.
        entropy: Shannon entropy of the next-token distribution, in nats.
        spread: Standard deviation of log p under the next-token distribution, in nats; its mean is -entropy.
        margin: Logit of the target minus the greatest other logit; positive where the target is on top.
        mask: True where a target stands; the other entries mean nothing.
    """

    logprob: Float[Tensor, "seq target"]
    rank: Int[Tensor, "seq target"]
    argmax: Int[Tensor, "seq target"]
    entropy: Float[Tensor, "seq target"]
    spread: Float[Tensor, "seq target"]
    margin: Float[Tensor, "seq target"]
    correct: Bool[Tensor, "seq target"]
    mask: Bool[Tensor, "seq target"]

    @staticmethod
    def cat(parts: list[TargetStats]) -> TargetStats:
        """Join along the sequence axis."""
        return TargetStats(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(TargetStats)))


class LazyTargetStats:
    """What `TargetStats` holds, each computed from the logits when first asked for (on the logits' device).

    Sums over the vocabulary are taken relative to the greatest logit and their logarithm in float64, so
    that a log-probability or an entropy is as exact as the logits, not as coarse as a float32 of its size.

    Args:
        logits: The logits that predict the targets.
        ids: The target tokens; entries outside `mask` may be anything.
        mask: True where a target stands.
    """

    mask: Tensor

    def __init__(
        self,
        logits: Float[Tensor, "seq target vocab"],
        ids: Int[Tensor, "seq target"],
        mask: Bool[Tensor, "seq target"],
    ) -> None:
        self._logits = logits if logits.dtype == torch.float64 else logits.float()
        self._ids = ids.clamp_min(0).to(logits.device)[..., None]
        self.mask = mask.cpu()

    @cached_property
    def _top(self) -> tuple[Tensor, Tensor]:
        return self._logits.max(-1)

    @cached_property
    def _chosen(self) -> Tensor:
        return self._logits.gather(-1, self._ids)

    @cached_property
    def _shifted(self) -> Tensor:
        return (self._logits - self._top[0][..., None]).clamp_(min=-1e4)  # a banned token's is -inf

    @cached_property
    def _weights(self) -> Tensor:
        return self._shifted.exp()

    @cached_property
    def _total(self) -> Tensor:
        return self._weights.sum(-1).double()

    @cached_property
    def logprob(self) -> Float[Tensor, "seq target"]:
        """Log-probability of the target, in nats."""
        return ((self._chosen[..., 0] - self._top[0]).double() - self._total.log()).cpu()

    @cached_property
    def rank(self) -> Int[Tensor, "seq target"]:
        """How many tokens have a strictly greater logit."""
        return (self._logits > self._chosen).sum(-1).cpu()

    @cached_property
    def argmax(self) -> Int[Tensor, "seq target"]:
        """Id of the token with the greatest logit."""
        return self._top[1].cpu()

    @cached_property
    def entropy(self) -> Float[Tensor, "seq target"]:
        """Shannon entropy of the next-token distribution, in nats."""
        mean = (self._weights * self._shifted).sum(-1).double() / self._total
        return (self._total.log() - mean).cpu()

    @cached_property
    def spread(self) -> Float[Tensor, "seq target"]:
        """Standard deviation of log p under the next-token distribution, in nats."""
        mean = (self._weights * self._shifted).sum(-1, keepdim=True) / self._total[..., None]
        squares = (self._weights * (self._shifted - mean).square()).sum(-1).double() / self._total
        return squares.sqrt().cpu()

    @cached_property
    def margin(self) -> Float[Tensor, "seq target"]:
        """Logit of the target minus the greatest other logit."""
        others = self._logits.scatter(-1, self._ids, float("-inf")).amax(-1)
        return (self._chosen[..., 0] - others).double().cpu()

    @cached_property
    def correct(self) -> Bool[Tensor, "seq target"]:
        """Whether the target is the arg-max."""
        return (self._top[1] == self._ids[..., 0]).cpu()


def target_stats(
    logits: Float[Tensor, "seq target vocab"],
    ids: Int[Tensor, "seq target"],
    mask: Bool[Tensor, "seq target"],
) -> TargetStats:
    """Reduce logits at target positions to `TargetStats` (on the CPU, computed in at least float32).

    Args:
        logits: The logits that predict the targets.
        ids: The target tokens; entries outside `mask` may be anything.
        mask: True where a target stands.

    >>> stats = target_stats(torch.tensor([[[0.0, 2.0, 1.0]]]), torch.tensor([[2]]), torch.tensor([[True]]))
    >>> stats.rank.item(), stats.argmax.item(), stats.margin.item()
    (1, 1, -1.0)
    """
    lazy = LazyTargetStats(logits, ids, mask)
    return TargetStats(**{f.name: getattr(lazy, f.name) for f in fields(TargetStats)})


@dataclass(frozen=True)
class Metric:
    """A number per sequence (or per target token) made of `TargetStats`.

    Attributes:
        name: The name used everywhere.
        unit: Its unit.
        meaning: One line that says what it is.
        per_target: `[seq, target]` values.
        reduce: From the values and the mask to one number a sequence.
    """

    name: str
    unit: str
    meaning: str
    per_target: Callable[[TargetStats | LazyTargetStats], Tensor]
    reduce: Callable[[Tensor, Tensor], Tensor]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum(-1) / mask.sum(-1)


def _sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).sum(-1)


def _minimum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, torch.inf).amin(-1)


def _all(values: Tensor, mask: Tensor) -> Tensor:
    return (values.bool() | ~mask).all(-1).to(values.dtype)


def _leading_run(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).cumprod(-1).sum(-1)


def _hits(stats: TargetStats | LazyTargetStats) -> Tensor:
    return stats.correct.double()


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        m.name: m
        for m in (
            Metric(
                "target_logprob",
                "nats",
                "mean over the continuation's tokens of their log-probability",
                lambda s: s.logprob,
                _mean,
            ),
            Metric(
                "exact_match",
                "0 or 1",
                "1 where the arg-max is the target at every position: what greedy decoding gives too",
                _hits,
                _all,
            ),
            Metric(
                "matching_prefix",
                "tokens",
                "how many of the continuation's first tokens are right in a row",
                _hits,
                _leading_run,
            ),
            Metric(
                "target_accuracy",
                "share",
                "share of the continuation's tokens that are the arg-max, teacher-forced",
                _hits,
                _mean,
            ),
            Metric(
                "target_rank",
                "rank",
                "mean over the continuation's tokens of their zero-based rank",
                lambda s: s.rank.double(),
                _mean,
            ),
            Metric(
                "completion_entropy",
                "nats",
                "sum over the continuation's steps of the next-token entropy, teacher-forced",
                lambda s: s.entropy,
                _sum,
            ),
            Metric(
                "margin",
                "logits",
                "smallest lead of a target's logit over the best other token's",
                lambda s: s.margin,
                _minimum,
            ),
        )
    }
)
"""The built-in metrics by name. Each is documented by its `meaning` and `unit`."""


def reduce_metric(name: str, stats: TargetStats | LazyTargetStats, *, per_token: bool = False) -> Tensor:
    """Return a metric per sequence `[seq]`, or per target `[seq, target]` with NaN outside the mask.

    Args:
        name: A key of `METRICS`.
        stats: What `target_stats` gave.
        per_token: Keep the target axis: for `exact_match`, `matching_prefix` and `target_accuracy` that
            is 0 or 1 a token, for the others the token's own value.

    Raises:
        OptionError: There is no such metric.
    """
    check_option("metric", name, list(METRICS))
    metric = METRICS[name]
    values = metric.per_target(stats)
    if per_token:
        return torch.where(stats.mask, values, torch.nan)
    return metric.reduce(values, stats.mask)


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
