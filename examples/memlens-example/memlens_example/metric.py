"""A metric: the share of targets among the ten largest logits."""

from __future__ import annotations

from torch import Tensor

from memlens.forward.metrics import Metric, register_metric


def top10(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the share of targets that are among the ten largest logits, per sequence."""
    found = (logits.topk(10).indices == ids[..., None]).any(-1)
    return (found & mask).sum(-1) / mask.sum(-1)


register_metric(
    Metric(
        top10,
        unit="share of tokens",
        meaning="share of the continuation's tokens that are among the ten largest logits",
        label="targets in the top 10",
        better="higher",
        differentiable=False,
    )
)
