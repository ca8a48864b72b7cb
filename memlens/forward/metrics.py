"""Metrics: how logits at target positions become numbers.

The token at position ``p`` is predicted by the logits at ``p - 1``; callers pass the logits that *predict*
the targets, already gathered. They are reduced immediately, so that no tensor
``[sequence, position, vocabulary]`` is ever kept.

Ties: `argmax` is the first of the largest logits (as in `torch.argmax` on one row), and `rank` counts the
tokens with a *strictly* greater logit. So ``rank == 0`` with ``margin == 0`` is a tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memlens.errors import MemlensError, OptionError, check_cites, check_option
from memlens.figures.labels import describe_quantity
from memlens.registry import Registry
from memlens.results.result import COMPANIONS


@dataclass(frozen=True)
class TargetStats:
    """What the model predicts at each target token, teacher-forced.

    Attributes:
        logprob: Log-probability of the target, in nats.
        rank: Zero-based rank of the target: how many tokens have a strictly greater logit.
        argmax: Id of the token with the greatest logit.
        entropy: Shannon entropy of the next-token distribution, in nats.
        spread: Standard deviation of log p under the next-token distribution, in nats; its mean is -entropy.
        margin: Logit of the target minus the greatest other logit; positive where the target is the arg-max.
        correct: Whether the target is the arg-max.
        mask: True where there is a target; other entries are meaningless.
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
        """Concatenate along the sequence axis."""
        return TargetStats(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(TargetStats)))


class LazyTargetStats:
    """The fields of `TargetStats`, each computed from the logits on first use (on the logits' device).

    Sums over the vocabulary are relative to the greatest logit and their logarithm is in float64, so that a
    log-probability or an entropy is as exact as the logits, not as coarse as a float32 of its size.

    Args:
        logits: The logits that predict the targets.
        ids: The target tokens; entries outside `mask` may be anything.
        mask: True where there is a target.
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
        return _first_largest(self._logits)

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
        """Number of tokens with a strictly greater logit."""
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


_BLOCK = 128


def _first_largest(x: Float[Tensor, "*row vocab"]) -> tuple[Tensor, Tensor]:
    """Return what ``x.max(-1)`` returns, with the first index of equal numbers.

    On a CPU a maximum with its index takes three times as long as one without, so the index is looked for in
    the first block that holds the maximum only.
    """
    whole = x.shape[-1] // _BLOCK * _BLOCK
    if x.device.type != "cpu" or whole < 64 * _BLOCK:
        return x.max(-1)
    blocks = x[..., :whole].unflatten(-1, (-1, _BLOCK))
    value, block = blocks.amax(-1).max(-1)
    found = blocks.gather(-2, block[..., None, None].expand(*block.shape, 1, _BLOCK))[..., 0, :]
    index = block * _BLOCK + found.argmax(-1)
    if whole < x.shape[-1]:
        rest, place = x[..., whole:].max(-1)
        later = (rest > value) | (rest.isnan() & ~value.isnan())
        value, index = torch.where(later, rest, value), torch.where(later, whole + place, index)
    return value, index


def target_stats(
    logits: Float[Tensor, "seq target vocab"],
    ids: Int[Tensor, "seq target"],
    mask: Bool[Tensor, "seq target"],
) -> TargetStats:
    """Reduce logits at target positions to `TargetStats` on the CPU; arguments as for `LazyTargetStats`.

    >>> stats = target_stats(torch.tensor([[[0.0, 2.0, 1.0]]]), torch.tensor([[2]]), torch.tensor([[True]]))
    >>> stats.rank.item(), stats.argmax.item(), stats.margin.item()
    (1, 1, -1.0)
    """
    lazy = LazyTargetStats(logits, ids, mask)
    return TargetStats(**{f.name: getattr(lazy, f.name) for f in fields(TargetStats)})


Stats = TargetStats | LazyTargetStats
MetricFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``fn(logits [seq, target, vocab], ids [seq, target], mask [seq, target]) -> [seq]``."""

Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric:
    """A number per sequence, computed from the logits that predict its targets.

    Attributes:
        fn: The function, ``fn(logits [seq, target, vocab], ids [seq, target], mask [seq, target]) -> [seq]``;
            None where `per_target` and `reduce` are given instead.
        name: The name in results; the function's own by default.
        unit: Unit of the value.
        meaning: One line that says what is measured.
        better: Whether a higher or a lower value means better recall. Where it is None, figures and readings
            speak of a change and never of harm.
        proportion: Whether the value is 0 or 1, so that its mean is a share of sequences.
        differentiable: Whether gradients are useful; a function is taken to have some until it shows none.
        label: A few words for axes and sentences; the name by default.
        cites: Pairs of a reference's key and what it is cited for (see `memlens.report.bibliography`).
        per_target: From statistics of the targets to `[seq, target]` values: with these, sweeps can keep the
            target dimension and share work among metrics.
        reduce: From those values and the mask to `[seq]`.

    Raises:
        OptionError: Neither or both forms of the computation are given, one that cannot be called, an unknown
            direction, or `cites` that are no pairs.

    Example:
        >>> def surprise(logits, ids, mask):
        ...     return -METRICS["target_logprob"](logits, ids, mask)
        >>> bits = Metric(surprise, unit="nats", better="lower")
        >>> bits.name, bits.attrs
        ('surprise', {'label': 'surprise', 'units': 'nats', 'better': 'lower'})
    """

    fn: MetricFunction | None = None
    _: KW_ONLY
    name: str = ""
    unit: str = ""
    meaning: str = ""
    better: Direction | None = None
    proportion: bool = False
    differentiable: bool = True
    label: str = ""
    cites: tuple[tuple[str, str], ...] = ()
    per_target: Callable[[Stats], Tensor] | None = None
    reduce: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        name = self.name or getattr(self.fn, "__name__", type(self.fn).__name__)
        if (self.per_target is None) != (self.reduce is None) or (self.fn is None) == (self.reduce is None):
            raise OptionError(f"metric {name!r}: give a function, or per_target= together with reduce=.")
        for part in (self.fn, self.per_target, self.reduce):
            if part is not None and not callable(part):
                raise OptionError(f"metric {name!r} holds {part!r}, which is not a function.")
        check_cites(f"metric {name!r}", self.cites)
        if self.better is not None:
            check_option("better", self.better, get_args(Direction))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "label", self.label or name.replace("_", " "))

    def __call__(self, logits: Tensor, ids: Tensor, mask: Tensor) -> Float[Tensor, " seq"]:
        """Return the value of each sequence.

        Raises:
            OptionError: The function raises, changes what it is given, or does not return one number per
                sequence.
        """
        if self.fn is None:
            return self.of(LazyTargetStats(logits, ids, mask))
        given = {"logits": logits, "ids": ids, "mask": mask}
        before = [_version(tensor) for tensor in given.values()]
        try:
            value = self.fn(*given.values())
        except (MemlensError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise OptionError(f"metric {self.name!r} raised {type(error).__name__}: {error}") from error
        if not isinstance(value, Tensor) or value.shape != (len(logits),):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise OptionError(
                f"metric {self.name!r} returned {shape}: it must return a tensor of shape ({len(logits)},), "
                "one number per sequence."
            )
        for (name, tensor), version in zip(given.items(), before, strict=True):
            if _version(tensor) != version:
                raise OptionError(
                    f"metric {self.name!r} changes its {name} in place, which other metrics read too: let it "
                    f"change a copy, {name}.clone()."
                )
        return value

    def of(self, stats: Stats, *, per_token: bool = False) -> Tensor:
        """Return the metric per sequence `[seq]`, or per target `[seq, target]` with NaN outside the mask.

        Args:
            stats: What `target_stats` gave.
            per_token: Keep the target axis: for `exact_match`, `matching_prefix` and `target_accuracy` each
                token has 0 or 1, for the others its own value.

        Raises:
            OptionError: The metric needs the logits themselves.
        """
        if self.per_target is None or self.reduce is None:
            raise OptionError(f"metric {self.name!r} is a function of logits: it has no values per target.")
        values = self.per_target(stats)
        return torch.where(stats.mask, values, torch.nan) if per_token else self.reduce(values, stats.mask)

    @property
    def attrs(self) -> dict[str, Any]:
        """The attributes of an array of the metric's values, which figures and readings use."""
        said = {"label": self.label, "units": self.unit, "long_name": self.meaning, "better": self.better}
        return {key: value for key, value in said.items() if value} | (
            {"proportion": True} if self.proportion else {}
        )


def _version(tensor: Tensor) -> int:
    """Return what counts the changes in place of a tensor; tensors of inference mode are not counted."""
    return 0 if tensor.is_inference() else tensor._version


METRICS: Registry[Metric] = Registry("metric", of=Metric)
"""The metrics by name: those of memlens and of installed plugins."""


def register_metric(metric: Metric) -> Metric:
    """Make a metric known by its name, and return it.

    Raises:
        OptionError: Another metric has this name, or it is a function that no `Metric` describes.
    """
    if not isinstance(metric, Metric):
        raise OptionError(f"{metric!r} is not a Metric: register Metric(fn, unit=..., better=...).")
    describe_quantity(metric.name, metric.attrs)
    return METRICS.add(metric.name, metric)


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


def _field(name: str) -> Callable[[Stats], Tensor]:
    def values(stats: Stats) -> Tensor:
        return getattr(stats, name).double()

    return values


_BUILT_IN = (
    Metric(
        name="target_logprob",
        label="target log-prob",
        unit="nats",
        meaning="mean log-probability of the continuation's tokens",
        better="higher",
        per_target=_field("logprob"),
        reduce=_mean,
    ),
    Metric(
        name="exact_match",
        unit="0 or 1",
        meaning="1 where the arg-max is the target at every position, as in greedy decoding",
        better="higher",
        proportion=True,
        differentiable=False,
        cites=(("carlini2023", "exact match of the continuation"),),
        per_target=_field("correct"),
        reduce=_all,
    ),
    Metric(
        name="matching_prefix",
        unit="tokens",
        meaning="number of the continuation's tokens that are right before the first error",
        better="higher",
        differentiable=False,
        per_target=_field("correct"),
        reduce=_leading_run,
    ),
    Metric(
        name="target_accuracy",
        unit="share of tokens",
        meaning="share of the continuation's tokens that are the arg-max, teacher-forced",
        better="higher",
        differentiable=False,
        per_target=_field("correct"),
        reduce=_mean,
    ),
    Metric(
        name="target_rank",
        unit="0 = top",
        meaning="mean zero-based rank of the continuation's tokens",
        better="lower",
        differentiable=False,
        per_target=_field("rank"),
        reduce=_mean,
    ),
    Metric(
        name="completion_entropy",
        unit="nats",
        meaning="sum of the next-token entropies over the continuation's steps, teacher-forced",
        better="lower",
        cites=(("menta2025", "completion entropy"),),
        per_target=_field("entropy"),
        reduce=_sum,
    ),
    Metric(
        name="margin",
        label="margin over the best other token",
        unit="logits",
        meaning="smallest difference between a target's logit and the best other token's",
        better="higher",
        per_target=_field("margin"),
        reduce=_minimum,
    ),
)
BUILT_IN = tuple(register_metric(metric).name for metric in _BUILT_IN)
"""Names of memlens' own metrics, all of which can be computed from `TargetStats`."""

MetricLike = str | Metric | MetricFunction
"""The name of a registered metric, a `Metric`, or a plain function of logits, ids and mask."""


def as_metric(metric: MetricLike) -> Metric:
    """Return the metric of a name or a function.

    Raises:
        OptionError: No metric has this name.
    """
    if isinstance(metric, Metric):
        return metric
    return METRICS[metric] if isinstance(metric, str) else Metric(metric)


def as_metrics(metrics: Sequence[MetricLike]) -> list[Metric]:
    """Return the metrics of names or functions.

    Raises:
        OptionError: An unknown name, two metrics of one name, or none at all.
    """
    if isinstance(metrics, str) or not metrics:
        such = METRICS[metrics].name if isinstance(metrics, str) else "exact_match"
        raise OptionError(
            f"metrics={metrics!r}: give a sequence with at least one metric, such as ({such!r},)."
        )
    found = [as_metric(metric) for metric in metrics]
    names = [metric.name for metric in found]
    companions = {f"{name}{tail}" for name in names for tail in COMPANIONS}
    if len(set(names)) < len(names) or not companions.isdisjoint(names):
        raise OptionError(f"metrics={names!r}: two metrics have the same name in a result; rename one.")
    return found


def metric_names(metrics: Sequence[MetricLike]) -> list[str]:
    """Return the names that metrics have in results; errors as in `as_metrics`."""
    return [metric.name for metric in as_metrics(metrics)]


def make_reduce(
    metrics: Sequence[MetricLike], *, per_token: bool
) -> Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """Return a function from target logits, ids and mask to one CPU tensor per metric."""
    chosen = as_metrics(metrics)

    def reduce(logits: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        stats = LazyTargetStats(logits, ids, mask)
        return {
            m.name: m(logits, ids, mask).detach().float().cpu() if m.fn else m.of(stats, per_token=per_token)
            for m in chosen
        }

    return reduce
