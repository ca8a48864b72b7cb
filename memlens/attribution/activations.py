"""Activations at the positions that predict targets, from a run or from a cache the user already has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from memlens.errors import SequenceError, SiteError
from memlens.models.hooks import capturing
from memlens.models.trunk import Trunk
from memlens.sequences import SequenceSet
from memlens.sequences.checks import check_sequences
from memlens.sweeps.batches import Targets, make_batches

__all__ = ["AtTargets", "at_targets"]


@dataclass(frozen=True)
class AtTargets:
    """One batch.

    Attributes:
        targets: Where the targets are predicted, and which they are.
        acts: Each activation at the predicting positions, ``{name: [batch, target, …]}``.
        final: The residual after the last block there, `[batch, target, d_model]`.
    """

    targets: Targets
    acts: dict[str, Tensor]
    final: Float[Tensor, "batch target d_model"]


@torch.no_grad()
def at_targets(
    trunk: Trunk,
    seqs: SequenceSet,
    names: Sequence[str],
    *,
    cache: Any = None,
    batch_size: int = 16,
    progress: bool = True,
    desc: str = "",
) -> Iterator[AtTargets]:
    """Yield activations at the predicting positions, batch by batch.

    Args:
        trunk: The model.
        seqs: The sequences.
        names: Hook names (blocks only).
        cache: An `ActivationCache` (or mapping) of the model on exactly ``seqs.tokens``; run anew if None.
        batch_size: Sequences at a time.
        progress: Show a bar.
        desc: The bar's words.

    Raises:
        EmptySetError: No sequences.
        SequenceError: The cache is of another number of sequences or positions.
        SiteError: The cache lacks an activation.
    """
    check_sequences(seqs, trunk.model, on_eos="keep")
    last = f"blocks.{trunk.n_layers - 1}.hook_resid_post"
    with tqdm(total=len(seqs), disable=not progress, desc=desc, unit="seq") as bar:
        for batch, targets in make_batches(seqs, batch_size, trunk.device):
            if cache is None:
                with capturing(trunk.model, [*names, last]) as full:
                    trunk.run(trunk.embed(batch.tokens))
            else:
                full = {n: _from_cache(cache, n, seqs)[batch.rows] for n in {*names, last}}
            rows = torch.arange(len(batch.rows), device=targets.positions.device)[:, None]
            picked = {n: a.to(trunk.device)[rows, targets.positions] for n, a in full.items()}
            yield AtTargets(targets, {n: picked[n] for n in names}, picked[last])
            bar.update(len(batch.rows))


def _from_cache(cache: Any, name: str, seqs: SequenceSet) -> Tensor:
    try:
        value = cache[name]
    except KeyError as error:
        raise SiteError(
            f"the cache has no {name!r}: make it with names_filter=None, or leave cache= out."
        ) from error
    if value.shape[0] != len(seqs) or value.shape[1] < int(seqs.lengths.max()):
        raise SequenceError(
            f"the cache's {name!r} has the shape {tuple(value.shape)} and the set "
            f"{tuple(seqs.tokens.shape)}: make the cache from sequences.tokens."
        )
    return value
