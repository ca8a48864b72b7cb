"""Extraction by sampling, without sampling: the probability that one sample is the whole continuation.

Under temperature, top-k and top-p the probability of a continuation is a product over its tokens, and each
factor follows from the teacher-forced logits. One pass computes what millions of samples would estimate.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor

from memlens.errors import OptionError
from memlens.options import options_class


@options_class
class Sampling:
    r"""How tokens are sampled: temperature, then top-k, then top-p, then what is left is renormalized.

    With logits :math:`l`: (1) :math:`l / T`; (2) only tokens whose logit is at least the k-th largest remain
    (including ties); (3) the least likely tokens whose probabilities (renormalized after step 2) add up to at
    most :math:`1 - \text{top\_p}` are removed, but never the most likely token. These are the semantics and
    the order of `transformers`' `generate(do_sample=True)`, whose own code is used.

    Raises:
        OptionError: A value out of range.

    >>> Sampling().logprob(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).exp().tolist()
    [0.5]
    >>> Sampling(top_k=1).logprob(torch.tensor([[0.0, 1.0]]), torch.tensor([1])).exp().tolist()
    [1.0]
    """

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """T, above 0 (`exact_match` is decoding at 0)."""
    top_k: PositiveInt | None = None
    """Number of tokens kept; None keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability kept, in (0, 1]; 1 keeps all tokens."""

    @property
    def plain(self) -> bool:
        """Whether tokens are sampled from the model's own distribution."""
        return self.temperature == 1 and self.top_k is None and self.top_p == 1

    def settings(self) -> dict[str, float | int]:
        """Return the parameters as numbers; `top_k` is 0 if all tokens are kept."""
        return {**asdict(self), "top_k": self.top_k or 0}

    def warp(self, logits: Float[Tensor, "target vocab"]) -> Float[Tensor, "target vocab"]:
        """Return the logits that are sampled from: minus infinity for tokens that are never sampled."""
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        unused: Any = torch.empty(len(logits), 0, dtype=torch.long)
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if self.temperature != 1:
            scores = TemperatureLogitsWarper(float(self.temperature))(unused, scores)
        if self.top_k is not None:
            scores = TopKLogitsWarper(self.top_k)(unused, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(unused, scores)
        return scores

    def logprob(
        self, logits: Float[Tensor, "target vocab"], ids: Int[Tensor, "target"]
    ) -> Float[Tensor, "target"]:
        """Return each target's log-probability (nats) under this scheme, minus infinity if it is cut off."""
        scores = self.warp(logits)
        chosen = scores.gather(-1, ids.to(scores.device)[:, None])[:, 0]
        top = scores.amax(-1)
        total = (scores - top[:, None]).exp().sum(-1).double()
        return (chosen - top).double() - total.log()


def samples_needed(
    logprob: Float[Tensor, "*seq"] | Float[np.ndarray, "*seq"], probability: float = 0.5
) -> Float[np.ndarray, "*seq"]:
    r"""Return the fewest independent samples that contain the continuation with at least this probability.

    With the probability :math:`p_z` of one sample, :math:`1 - (1 - p_z)^n \ge p` first holds at

    .. math:: n = \left\lceil \frac{\log(1 - p)}{\log(1 - p_z)} \right\rceil

    A sequence is (n, p)-discoverable from this n on.

    Args:
        logprob: :math:`\log p_z`, in nats.
        probability: p, in (0, 1).

    Returns:
        Whole numbers as floats; infinite if the continuation is never sampled or takes over 1e308 samples.

    Raises:
        OptionError: A probability outside (0, 1).

    Source: arXiv 2410.19482, (n, p)-discoverable extraction.

    >>> samples_needed(np.array([np.log(0.5), np.log(0.01), 0.0, -np.inf]), 0.75).tolist()
    [2.0, 138.0, 1.0, inf]
    """
    if not 0 < probability < 1:
        raise OptionError(f"probability={probability} is not in (0, 1): give p of (n, p), such as 0.5")
    logs = np.asarray(logprob, dtype=np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        # log(1 - p_z) = -p_z for tiny p_z: computed from the logarithm, it does not underflow too early.
        log_miss = np.where(logs > -30, np.log1p(-np.exp(np.minimum(logs, 0))), -np.exp(logs))
        exact = math.log1p(-probability) / log_miss
        exact = np.where(np.isnan(exact), np.inf, np.abs(exact))
    # A quotient that is whole except for rounding must not be rounded up.
    return np.maximum(np.ceil(exact * (1 - 1e-12)), 1.0)
