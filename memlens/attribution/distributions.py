r"""Next-token distributions of many residuals, reduced at once to a few numbers each.

Rows are taken in portions that are unembedded once for all layers, and reduced in smaller ones that stay in
the processor's cache: everything is read from the shifted logits :math:`z - \max z` and one softmax. Entropy
and cross-entropy are sums of positive terms then, so that nothing cancels, and a distribution compared with
itself has a divergence of exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlens.models.trunk import Trunk

__all__ = ["STATISTICS", "compare_to_final", "portions"]

STATISTICS = ("probability", "rank", "predicted_probability", "predicted_rank", "entropy", "kl_to_final")
_PORTION_BYTES = {"cpu": 2**25, "cuda": 2**28}
"""Logits that are unembedded together. On the CPU, larger tensors would be given fresh memory every time."""
_CACHE_BYTES = {"cpu": 2**22, "cuda": 2**28}
"""Logits that are reduced together. On the CPU they stay in the cache from one operation to the next."""


def portions(
    trunk: Trunk, n_rows: int, copies: int, sizes: Mapping[str, int] = _PORTION_BYTES
) -> Iterator[slice]:
    """Cut rows so that the logits of `copies` residuals a row stay small."""
    budget = sizes["cpu" if trunk.device.type == "cpu" else "cuda"]
    step = max(1, budget // (trunk.d_vocab * 4 * copies))
    for first in range(0, n_rows, step):
        yield slice(first, min(first + step, n_rows))


@torch.no_grad()
def compare_to_final(
    trunk: Trunk,
    resid: Float[Tensor, "row site d_model"],
    final: Float[Tensor, "row d_model"],
    ids: Int[Tensor, " row"],
    last_site: int | None = None,
) -> Float[Tensor, "row site statistic"]:
    r"""Decode residuals and compare each distribution with that of the final residual of its row.

    Args:
        trunk: The model.
        resid: What is decoded, translated already where there is a lens.
        final: The residual after the last block.
        ids: Target token of each row.
        last_site: The site whose residual is `final` itself: it is not unembedded twice.

    Returns:
        `STATISTICS` in order: probability and zero-based rank (tokens with a strictly larger logit) of the
        target, the same of the token that is most likely in the end, the entropy of :math:`p_l`, and
        :math:`D_{KL}(p_{L-1} \,\|\, p_l)`, in nats.
    """
    n_sites = resid.shape[1]
    sites = [site for site in range(n_sites) if site != last_site]
    out = resid.new_empty((len(resid), n_sites, len(STATISTICS)), dtype=torch.float32)
    for part in portions(trunk, len(resid), len(sites) + 1):
        stacked = torch.cat([final[part, None], resid[part][:, sites]], dim=1)
        logits, wanted = trunk.unembed(stacked), ids[part]
        inner = portions(trunk, len(wanted), len(sites) + 1, _CACHE_BYTES)
        found = torch.cat([_reduced(logits[rows], wanted[rows]) for rows in inner])
        out[part, sites] = found[:, 1:]
        if last_site is not None:
            out[part, last_site] = found[:, 0]
    return out


def _reduced(
    logits: Float[Tensor, "row site vocab"], ids: Int[Tensor, " row"]
) -> Float[Tensor, "row site statistic"]:
    """Reduce logits of which site 0 is the final one."""
    wide = logits.float()
    shifted = wide - wide.amax(-1, keepdim=True)
    probs = shifted.softmax(-1)
    work = torch.empty_like(shifted)
    normalizer = -probs.amax(-1).log()  # logsumexp of the shifted logits
    final = probs[:, :1]
    crossed = normalizer - torch.mul(final, shifted, out=work).sum(-1)
    entropy = normalizer - torch.mul(probs, shifted, out=work).sum(-1)
    kl = (crossed - crossed[:, :1]).clamp_min(0)

    def of(token: Tensor) -> tuple[Tensor, Tensor]:
        index = token[:, None, None].expand(*wide.shape[:2], 1)
        larger = torch.gt(wide, wide.gather(-1, index), out=work)  # as floats: summing those is faster
        return probs.gather(-1, index)[..., 0], larger.sum(-1)

    predicted = wide[:, 0].argmax(-1)
    return torch.stack([*of(ids), *of(predicted), entropy, kl], dim=-1)
