"""One batch of `bypass_bounds`: what a bypass changes, layer by layer, and what it could change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memlens.forward.batches import Targets
from memlens.forward.blocks import BlockTrace, FunctionalBlocks, trace_block
from memlens.forward.read_blocks import Norm
from memlens.instruments.bypass.lipschitz import (
    BlockNorms,
    local_norm,
    norm_between,
    norm_stretch,
    spectral_norm,
)

_ROUNDINGS = 32


@dataclass(frozen=True)
class Known:
    """What is computed once for a model.

    Attributes:
        blocks: Its blocks.
        norms: Their norms, by layer.
        unembedding: The norm of the unembedding matrix.
    """

    blocks: FunctionalBlocks
    norms: Mapping[int, BlockNorms]
    unembedding: Tensor

    @classmethod
    def of(cls, blocks: FunctionalBlocks) -> Known:
        """Read a model."""
        norms = {layer: BlockNorms.of(blocks, layer) for layer in blocks.blocks}
        return cls(blocks, norms, spectral_norm(blocks.unembedding.weight))


@dataclass
class BatchBounds:
    """What one batch gave, by variable and bypassed layer; `NaN` where no token stands.

    Attributes:
        tokens: Variables `[row, position]`.
        rows: Variables `[row]`.
        targets: Variables `[row, target]`.
        later: Variables `[row]`, by bypassed layer and later layer.
    """

    tokens: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    rows: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    targets: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    later: dict[str, dict[tuple[int, int], Tensor]] = field(default_factory=dict)


def bound_batch(
    known: Known,
    resid: Float[Tensor, "row pos d_model"],
    real: Bool[Tensor, "row pos"],
    targets: Targets,
    layers: Sequence[int],
    *,
    power_iterations: int = 0,
) -> BatchBounds:
    """Run all bypasses of one batch side by side, and bound each step.

    Args:
        known: The model.
        resid: The residual at the input of block 0.
        real: True where a token stands.
        targets: Where logits are compared.
        layers: The layers that are bypassed, each alone.
        power_iterations: Steps of the estimate of a local norm; 0 for none.
    """
    out, edits = BatchBounds(), _Edits([], {}, resid[:0], real[:0, 0])
    n = len(resid)
    for layer in range(known.blocks.trunk.n_layers):
        both = trace_block(known.blocks, layer, torch.cat([resid, edits.resid]))
        base = both[slice(0, n)]
        if edits.layers:
            edits = _carried(known, layer, base, both[slice(n, None)], edits, real, out)
        if layer in layers:
            edited = trace_block(known.blocks, layer, resid, bypass=True)
            rounding = _rounding(base, edited, real)
            none = _total(edited.out - base.out, real) <= rounding
            edited = base.where(none, edited)
            out.rows.setdefault("rounding", {})[layer] = rounding
            _bound_block(known, layer, base, edited, real, out)
            start = _total(edited.out - base.out, real)
            edits = _Edits(
                [*edits.layers, layer],
                {**edits.log_bound, layer: start.log10()},
                torch.cat([edits.resid, edited.out]),
                torch.cat([edits.none, none]),
            )
            if power_iterations:
                put = out.rows.setdefault("local_norm", {})
                put[layer] = local_norm(known.blocks, layer, base.out, edited.out, real, power_iterations)
        resid = base.out
    _bound_logits(known, resid, edits, real, targets, out)
    return out


@dataclass(frozen=True)
class _Edits:
    """Bypasses under way.

    Attributes:
        layers: Which blocks were bypassed, each alone.
        log_bound: By layer, the logarithm of what bounds the difference of its residual.
        resid: Their residuals, stacked.
        none: True for rows that the bypass did not change.
    """

    layers: list[int]
    log_bound: dict[int, Tensor]
    resid: Float[Tensor, "edit*row pos d_model"]
    none: Bool[Tensor, "edit*row"]


def _carried(
    known: Known,
    layer: int,
    base: BlockTrace,
    edited: BlockTrace,
    edits: _Edits,
    real: Tensor,
    out: BatchBounds,
) -> _Edits:
    """Take all bypasses through a later block (B5), and measure what it did to them (B6)."""
    times, n = len(edits.layers), len(real)
    same, reals = base.repeated(times), real.repeat(times, 1)
    edited = same.where(edits.none, edited)  # rows of one batch may differ in their rounding
    stretch = known.norms[layer].block_stretch(same, edited, reals).log10().split(n)
    before = _total(edited.resid - same.resid, reals).split(n)
    after = _total(edited.out - same.out, reals).split(n)
    bounds = {}
    for i, start in enumerate(edits.layers):
        bounds[start] = edits.log_bound[start] + stretch[i]
        out.later.setdefault("amplification", {})[start, layer] = after[i] / before[i]
        out.later.setdefault("amplification_bound_log10", {})[start, layer] = stretch[i]
    return _Edits(edits.layers, bounds, edited.out, edits.none)


def _bound_block(
    known: Known, layer: int, base: BlockTrace, edited: BlockTrace, real: Tensor, out: BatchBounds
) -> None:
    """The identity D1 and the bounds B1 to B4, in the block that is bypassed."""
    norms, blocks = known.norms[layer], known.blocks
    block = norms.block
    pattern = blocks.pattern(layer, base.q, base.k)
    change = edited.projected - base.projected
    moved, total, identity = _mixing(norms, base, pattern, real)
    error = (change - identity).norm(dim=-1).masked_fill(~real, 0).amax(-1)
    others = pattern - torch.diag_embed(pattern.diagonal(dim1=-2, dim2=-1))
    shared = others.sum(-1)  # 1 - A[t, t], without the rounding of the difference
    weighted = torch.einsum("bht,h->bt", shared, norms.gain)
    projected = change.norm(dim=-1)
    after = norm_between(block.attn_post_norm, base.projected, edited.projected)
    path = 1 if block.parallel else 1 + norms.mlp_path(base, edited)

    def longest(trace: BlockTrace) -> Tensor:
        return trace.projected.norm(dim=-1).masked_fill(~real, 0).amax(-1).clamp_min(1e-300)

    values = {
        "measured_B1": projected,
        "bound_B1": moved,
        "measured_B2": projected,
        "bound_B2": _farthest(base.attn_in, others) * weighted,
        "measured_B3": (edited.added - base.added).norm(dim=-1),
        "bound_B3": torch.full_like(projected, _from_weights(norms)),
        "measured_B4": (edited.out - base.out).norm(dim=-1),
        "bound_B4": path * after * projected,
        "predictor": weighted,
    }
    for name, value in values.items():
        out.tokens.setdefault(name, {})[layer] = value.masked_fill(~real, torch.nan)
    whole = {
        "identity_error": error / torch.maximum(longest(base), longest(edited)),
        "total_measured_B1": _total(change, real),
        "total_bound_B1": total.log10(),
        "diagonal_mass": 1 - shared.mean(1).masked_fill(~real, 0).sum(-1) / real.sum(-1),
    }
    for name, value in whole.items():
        out.rows.setdefault(name, {})[layer] = value


def _mixing(
    norms: BlockNorms, base: BlockTrace, pattern: Tensor, real: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """B1 by token and for all tokens together, and the identity D1, head by head to save memory."""
    z = base.attn_in
    groups = pattern.shape[1] // base.v.shape[1]
    moved, total, identity = torch.zeros_like(z[..., 0]), torch.zeros_like(z[:, 0, 0]), torch.zeros_like(z)
    far = None if norms.block.clip is None else _distances(z)
    for head, gain in enumerate(norms.gain):
        weights = pattern[:, head]
        if far is None:
            apart = z - weights @ z
            length = apart.norm(dim=-1)
            identity += apart @ norms.w_v[head].mT @ norms.w_o[head].mT
        else:  # clipped values are no linear function of z, but no farther apart than unclipped ones
            v = base.v[:, head // groups]
            length = (weights * far).sum(-1)
            identity += (v - weights @ v) @ norms.w_o[head].mT
        moved += gain * length
        total += gain * length.masked_fill(~real, 0).norm(dim=-1)
    return moved, total, identity


def _distances(z: Tensor) -> Float[Tensor, "row query key"]:
    return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")


def _farthest(z: Tensor, others: Float[Tensor, "row head query key"]) -> Float[Tensor, "row pos"]:
    """How far the farthest token that any head looks at stands from each token."""
    return _distances(z).masked_fill(~(others > 0).any(1), 0).amax(-1)


def _from_weights(norms: BlockNorms) -> float:
    """B3: outputs of a norm stand within twice its radius of each other."""
    post = norms.block.attn_post_norm
    norm, gain = (norms.block.attn_norm, float(norms.gain.sum())) if post is None else (post, 1.0)
    if not isinstance(norm, Norm):
        return float("inf")
    return 2 * len(norm.weight) ** 0.5 * float(norm.weight.abs().max()) * gain


def _bound_logits(
    known: Known, final: Tensor, edits: _Edits, real: Tensor, targets: Targets, out: BatchBounds
) -> None:
    """B5 to the last residual and to the logits, and what it came to in the predictions (B6)."""
    blocks, n = known.blocks, len(real)
    norm = blocks.final_norm
    rows = torch.arange(n, device=final.device)[:, None]
    plain = blocks.unembed(final[rows, targets.positions])
    trivial = 2 * final.shape[-1] ** 0.5 * norm.weight.abs().max() * known.unembedding
    for layer, edited in zip(edits.layers, edits.resid.split(n), strict=True):
        change = edited - final
        stretch = norm_stretch(norm, final, change) * known.unembedding
        worst = stretch.masked_fill(~real, 0).amax(-1)
        logits = blocks.unembed(edited[rows, targets.positions])
        moved = (logits - plain).norm(dim=-1).masked_fill(~targets.mask, torch.nan)
        at_target = (stretch * change.norm(dim=-1))[rows, targets.positions]
        found = {
            "logit_change": moved,
            "logit_change_bound": at_target.masked_fill(~targets.mask, torch.nan),
            "max_logit_change": (logits - plain).abs().amax(-1).masked_fill(~targets.mask, torch.nan),
            "kl": _kl(plain, logits).masked_fill(~targets.mask, torch.nan),
        }
        for name, value in found.items():
            out.targets.setdefault(name, {})[layer] = value
        bound = edits.log_bound[layer]
        whole = {
            "total_measured_B5 residual": _total(change, real),
            "total_bound_B5 residual": bound,
            "total_measured_B5 logits": moved.nan_to_num(0).amax(-1),
            "total_bound_B5 logits": bound + worst.log10(),
            "vacuous": (bound + worst.log10() >= trivial.log10()).to(bound.dtype),
        }
        for name, value in whole.items():
            out.rows.setdefault(name, {})[layer] = value


def _rounding(base: BlockTrace, edited: BlockTrace, real: Tensor) -> Float[Tensor, " row"]:
    """How large a change may be that is none: what float arithmetic leaves of equal sums."""
    largest = [_total(x, real) for t in (base, edited) for x in (t.resid, t.projected, t.out)]
    return _ROUNDINGS * torch.finfo(base.out.dtype).eps * torch.stack(largest).amax(0)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """Divergence of the bypassed model's prediction from the plain one's, in nats."""
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0)


def _total(x: Float[Tensor, "row pos d"], real: Int[Tensor, "row pos"]) -> Float[Tensor, " row"]:
    """The norm over all real tokens."""
    return x.masked_fill(~real[..., None], 0).flatten(1).norm(dim=-1)
