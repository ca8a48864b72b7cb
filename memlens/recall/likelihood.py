"""How likely a continuation is: NLL, perplexity, Min-K %, Min-K %++, and NLL against compressed size.

All of them come from the statistics of the one teacher-forced pass, over the continuation's tokens given the
prefix. Papers on membership score all tokens of a text: give a prefix of one token for that.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from memlens.errors import OptionError
from memlens.forward.metrics import TargetStats


def nll(stats: TargetStats) -> Float[Tensor, "seq"]:
    r"""Return the negative log-likelihood of each continuation, in nats.

    .. math:: \mathrm{NLL} = -\sum_j \log p(y_j \mid \text{prefix}, y_{<j})

    A sum over the targets, so it grows with their number; ``exp(-nll)`` is the chance that one plain sample
    from the model is the continuation.
    """
    return -torch.where(stats.mask, stats.logprob, 0).sum(-1)


def perplexity(stats: TargetStats) -> Float[Tensor, "seq"]:
    """Return ``exp(nll / n)`` with n target tokens: no unit, 1 for a continuation that is certain."""
    return (nll(stats) / stats.mask.sum(-1)).exp()


def min_k(stats: TargetStats, share: float = 0.2) -> Float[Tensor, "seq"]:
    """Return Min-K %: the mean log-probability (nats) of the least likely tokens; higher is more likely seen.

    The ``max(1, floor(share * n))`` targets with the lowest log-probability, of n.

    Args:
        stats: What `target_stats` gave.
        share: k as a share of the targets, in (0, 1]; with 1 it is the mean log-probability.

    Raises:
        OptionError: A share outside (0, 1].

    Source: arXiv 2310.16789 (Min-K% Prob), there over all tokens of a text. The rounding is ours.
    """
    return _mean_of_lowest(stats.logprob, stats.mask, share)


def min_k_plus_plus(stats: TargetStats, share: float = 0.2) -> Float[Tensor, "seq"]:
    r"""Return Min-K %++: the mean of the lowest standardized log-probabilities; no unit.

    .. math:: z_j = \frac{\log p(y_j) - \mu_j}{\sigma_j}, \quad
        \mu_j = \sum_v p_j(v) \log p_j(v), \quad
        \sigma_j^2 = \sum_v p_j(v) (\log p_j(v) - \mu_j)^2

    with sums over the whole vocabulary: how much likelier the token is than one drawn from the model. Where a
    distribution has no spread at all, z is 0.

    Args:
        stats: What `target_stats` gave.
        share: As for `min_k`.

    Raises:
        OptionError: A share outside (0, 1].

    Source: arXiv 2404.02936 (Min-K%++), there over all tokens of a text. The rounding is ours.
    """
    gap = stats.logprob + stats.entropy
    z = torch.where(stats.spread > 0, gap / stats.spread.clamp_min(1e-30), 0)
    return _mean_of_lowest(z, stats.mask, share)


def zlib_bytes(texts: Sequence[str]) -> Float[Tensor, "seq"]:
    """Return how many bytes each text takes in UTF-8 when zlib has compressed it (level 6).

    >>> zlib_bytes(["", "aaaaaaaaaaaaaaaaaaaaaaaa"]).tolist()
    [8.0, 11.0]
    """
    sizes = [len(zlib.compress(text.encode("utf-8", "replace"), 6)) for text in texts]
    return torch.tensor(sizes, dtype=torch.float64)


def zlib_ratio(stats: TargetStats, texts: Sequence[str]) -> Float[Tensor, "seq"]:
    """Return NLL / `zlib_bytes`, in nats a byte: low where the model knows more than a compressor sees.

    Args:
        stats: What `target_stats` gave.
        texts: The continuations as text.

    Source: the idea of the ratio is that of arXiv 2012.07805 (its "zlib" attack compares perplexity with zlib
    entropy of a whole text); here it is the summed NLL of the continuation over that of its own text.
    """
    return nll(stats) / zlib_bytes(texts)


def check_share(share: float) -> None:
    """Raise `OptionError` unless `share` is in (0, 1]."""
    if not 0 < share <= 1:
        raise OptionError(f"min_k={share} is not in (0, 1]: give a share of the targets, such as 0.2")


def _mean_of_lowest(values: Tensor, mask: Tensor, share: float) -> Tensor:
    check_share(share)
    ordered = torch.where(mask, values, torch.inf).sort(-1).values
    # A guard against 0.29 * 100 = 28.999…
    count = (share * mask.sum(-1).double() + 1e-9).floor().clamp_min(1)
    lowest = torch.arange(mask.shape[1]) < count[:, None]
    return torch.where(lowest, ordered, 0).sum(-1) / count
