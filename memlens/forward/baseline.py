"""The teacher-forced pass: what the unchanged model predicts at each target token.

Scoring, `memlens.sweeps.run.measure` and the baseline of a sweep are all this one pass. Only target positions
are unembedded, in portions that fit the memory budget, and their logits are reduced immediately: no tensor
`[sequence, position, vocabulary]` is ever created.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from memlens.errors import UnsupportedModelError
from memlens.forward.batches import Batch, Targets, at_targets, logits_at, make_batches
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.capture import FunctionalPass, run_capturing
from memlens.forward.exclusive import computes
from memlens.forward.hooks import hook_name
from memlens.forward.memory import Budget, check_batch_size, rows_per_batch, unembedding_rows
from memlens.forward.metrics import TargetStats, target_stats
from memlens.forward.trunk import Trunk, has_own_forward
from memlens.models.checks import nonfinite_error
from memlens.sequences.set import SequenceSet

Reduce = Callable[
    [Float[Tensor, "row target vocab"], Int[Tensor, "row target"], Bool[Tensor, "row target"]],
    dict[str, Tensor],
]
"""From logits, target ids and mask to one CPU tensor per name, `[row, …]`."""

Reducer = Callable[[Float[Tensor, "target vocab"], Int[Tensor, "target"]], Tensor]
"""From the logits that predict targets, and the targets, to one number per target."""


@dataclass(frozen=True)
class TeacherForced:
    """Runs batches of sequences through the unchanged model and reduces the logits at their targets.

    Attributes:
        model: A TransformerLens model.
        trunk: The model by layers; None if it cannot be run so, and its logits take the residual's place.
        reduce: Turns logits at target positions into numbers.
        unembed_rows: The largest number of target positions unembedded at a time.
        reduced_rows: The largest number of target positions reduced at a time.
    """

    model: Any
    trunk: Trunk | None
    reduce: Reduce
    unembed_rows: int
    reduced_rows: int

    @staticmethod
    def of(trunk: Trunk, reduce: Reduce, budget: Budget) -> TeacherForced:
        """Return the pass of a model within a memory budget."""
        return TeacherForced(trunk.model, trunk, reduce, budget.unembed_rows, budget.reduced_rows)

    def run(
        self,
        batch: Batch,
        names: Sequence[str] = (),
        blocks: FunctionalBlocks | None = None,
        by: FunctionalPass | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], dict[str, Tensor]]:
        """Return the residual after the last layer, and the activations at the hooks `names`.

        Args:
            batch: The sequences.
            names: Hook names.
            blocks: Run in place of the model's own, where no activation is asked for.
            by: Runs in place of the model's own layers.

        Raises:
            NonFiniteError: The residual is NaN or infinite at a real token; names the first layer.
        """
        if self.trunk is None:
            final, acts = self.model(batch.tokens), {}
        elif by is not None:
            final, acts = by.run(batch.tokens, names)
        elif blocks is not None and not names:
            final, acts = blocks.run_all(self.trunk.embed(batch.tokens)), {}
        else:
            final, acts = run_capturing(self.trunk, batch.tokens, names, before_hooks=True)
        if not bool(torch.isfinite(final[batch.mask]).all()):
            bad = ~torch.isfinite(final).flatten(2).all(-1) & batch.mask
            raise nonfinite_error(self.model, batch.tokens[bad.any(1)][:1])
        return final, acts

    def reduced(
        self,
        targets: Targets,
        rows: Float[Tensor, "row target d_model"],
        unembed: Callable[[Tensor], Tensor] | None = None,
    ) -> list[dict[str, Tensor]]:
        """Unembed final residuals in portions and reduce them immediately.

        Args:
            targets: The targets of a batch.
            rows: The residuals at its predicting positions, for one or more copies of the batch.
            unembed: Used instead of the model's own unembedding.

        Returns:
            One dictionary per copy.
        """
        copies = len(rows) // len(targets.ids)
        ids, mask = (t.repeat(copies, 1) for t in (targets.ids, targets.mask))
        step, few = (max(1, n // max(1, ids.shape[1])) for n in (self.unembed_rows, self.reduced_rows))
        unembed = unembed or (self.trunk.unembed if self.trunk else nn.Identity())
        parts = []
        for some in torch.arange(len(rows)).split(step):
            logits = logits_at(unembed, rows[some], mask[some])
            each = zip(logits.split(few), ids[some].split(few), mask[some].split(few), strict=True)
            parts += [self.reduce(*part) for part in each]
        values = {name: torch.cat([p[name] for p in parts]).chunk(copies) for name in parts[0]}
        return [{name: value[i] for name, value in values.items()} for i in range(copies)]


def teacher_forced_stats(
    model: Any,
    seqs: SequenceSet,
    *,
    batch_size: int | None = None,
    banned: int | None = None,
    progress: bool = True,
) -> TargetStats:
    """Return the statistics of every target token; see `teacher_forced` for the arguments."""
    return teacher_forced(model, seqs, {}, batch_size=batch_size, banned=banned, progress=progress)[0]


@computes
def teacher_forced(
    model: Any,
    seqs: SequenceSet,
    extras: Mapping[str, Reducer],
    *,
    batch_size: int | None = None,
    banned: int | None = None,
    progress: bool = True,
) -> tuple[TargetStats, dict[str, Tensor]]:
    """Return the statistics of every target token, `[seq, target]`, and further numbers from the same pass.

    Sequences of similar length are batched together. From several batches on, the model's blocks run as
    functions (`FunctionalBlocks`) where they reproduce it, which is faster and differs by rounding.

    Args:
        model: A TransformerLens model.
        seqs: The set, which has been checked; results are in its order.
        extras: By name, functions of a portion of logits; they may return infinities.
        batch_size: Sequences per forward pass; chosen by the memory budget by default.
        banned: A token that decoding may not emit: its logit is taken to be minus infinity everywhere.
        progress: Show a progress bar.

    Returns:
        The statistics, and each extra as `[seq, target]` with 0 where there is no target.

    Raises:
        NonFiniteError: A logit is NaN or infinite; names the first layer.
    """
    check_batch_size(batch_size)
    device, cfg = next(model.parameters()).device, model.cfg
    try:
        trunk = None if has_own_forward(model) else Trunk(model)
    except UnsupportedModelError:
        trunk = None
    reduce = _stats_and(extras, banned)
    forward = TeacherForced(model, trunk, reduce, *unembedding_rows(cfg.d_vocab, device))
    size = batch_size or rows_per_batch(cfg, int(seqs.lengths.max()), device)
    order, parts = seqs.lengths.argsort(stable=True), []
    blocks = unembed = None
    if trunk is not None and len(seqs) > _OWN_BATCHES * size:
        blocks = _functional(trunk, seqs[order[-1:]])
        unembed = blocks and blocks.unembed
    bar = tqdm(total=len(seqs), desc="scoring", unit="seq", disable=not progress)
    with torch.no_grad(), bar:
        for batch, targets in make_batches(seqs, size, device, order):
            final, _ = forward.run(batch, blocks=blocks)
            rows = at_targets(final, targets)[targets.mask][:, None]
            (found,) = forward.reduced(targets.each(), rows, unembed)
            finite = torch.isfinite(found["logprob"] + found["entropy"])[:, 0]
            if not finite.all():
                owners = targets.mask.cpu().nonzero()[:, 0][~finite]
                raise nonfinite_error(model, batch.tokens[owners[:1]])
            parts.append(found)
            bar.update(len(batch.rows))
    arrays = {name: _placed(torch.cat([p[name][:, 0] for p in parts]), seqs, order) for name in parts[0]}
    stats = TargetStats(**{f.name: arrays.pop(f.name) for f in fields(TargetStats)})
    return stats, arrays


_OWN_BATCHES = 3
"""So few batches run through the model itself: comparing its blocks with functions would not pay."""


@torch.no_grad()
def _functional(trunk: Trunk, longest: SequenceSet) -> FunctionalBlocks | None:
    """Return a model's blocks as functions, compared with the model on its longest sequence.

    None where they do not reproduce it, or where a rounding difference is not small.
    """
    if trunk.dtype.itemsize < 4:
        return None
    ((batch, _),) = make_batches(longest, 1, trunk.device)
    names = {hook_name("resid_pre", layer): layer for layer in range(trunk.n_layers)}
    final, acts = run_capturing(trunk, batch.tokens, list(names), before_hooks=True)
    resid = {layer: acts[name] for name, layer in names.items()}
    return FunctionalBlocks.of(trunk, {**resid, trunk.n_layers: final})


def _stats_and(extras: Mapping[str, Reducer], banned: int | None) -> Reduce:
    """Reduce logits `[row, 1, vocab]` to `TargetStats` and further numbers."""

    def reduce(logits: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        if banned is not None:
            logits = logits.index_fill(-1, torch.tensor([banned], device=logits.device), float("-inf"))
        found = vars(target_stats(logits, ids, mask))
        return {**found, **{name: fn(logits[:, 0], ids[:, 0]).cpu()[:, None] for name, fn in extras.items()}}

    return reduce


def _placed(flat: Tensor, seqs: SequenceSet, order: Tensor) -> Tensor:
    """Return numbers of all targets, given row by row in another order, as `[seq, target]` arrays."""
    mask = seqs.target_mask[order]
    grid = torch.zeros(mask.shape, dtype=flat.dtype)
    grid[mask] = flat
    return grid[order.argsort()]
