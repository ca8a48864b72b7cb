"""One batch of `bypass_bounds`: what a bypass changes, layer by layer, and bounds on the change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memlens.forward.batches import Targets
from memlens.forward.blocks import BlockTrace, FunctionalBlocks, trace_block
from memlens.forward.read_weights import Norm
from memlens.instruments.bypass.lipschitz import BlockNorms, norm_between

_ROUNDINGS = 32


@dataclass(frozen=True)
class Known:
    """What is computed once for a model.

    Attributes:
        blocks: Its blocks.
        norms: Their norms, by layer.
    """

    blocks: FunctionalBlocks
    norms: Mapping[int, BlockNorms]

    @classmethod
    def of(cls, blocks: FunctionalBlocks) -> Known:
        """Read a model."""
        norms = {layer: BlockNorms.of(blocks, layer) for layer in blocks.blocks}
        return cls(blocks, norms)


@dataclass
class BatchBounds:
    """The results of one batch, by variable and bypassed layer; NaN where there is no token.

    Attributes:
        tokens: Variables `[row, position]`.
        rows: Variables `[row]`.
        targets: Variables `[row, target]`.
    """

    tokens: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    rows: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    targets: dict[str, dict[int, Tensor]] = field(default_factory=dict)


def bound_batch(
    known: Known,
    resid: Float[Tensor, "row pos d_model"],
    real: Bool[Tensor, "row pos"],
    targets: Targets,
    layers: Sequence[int],
) -> BatchBounds:
    """Run all bypasses of one batch side by side, and bound each of them in the layer that is bypassed.

    Args:
        known: The model.
        resid: The residual at the input of layer 0.
        real: True where there is a token.
        targets: Where logits are compared.
        layers: The layers that are bypassed, each alone.
    """
    out, n = BatchBounds(), len(resid)
    started: list[int] = []
    edited, unchanged = resid[:0], real[:0, 0]  # residuals of the bypassed runs, stacked; rows that are equal
    for layer in range(known.blocks.trunk.n_layers):
        both = trace_block(known.blocks, layer, torch.cat([resid, edited]))
        base = both[slice(0, n)]
        same = base.out.repeat(len(started), 1, 1)  # rows of one batch may differ in their rounding
        edited = torch.where(unchanged[:, None, None], same, both.out[n:])
        if layer in layers:
            bypassed = trace_block(known.blocks, layer, resid, bypass=True)
            rounding = _rounding(base, bypassed, real)
            none = _total(bypassed.out - base.out, real) <= rounding
            bypassed = base.where(none, bypassed)
            out.rows.setdefault("rounding", {})[layer] = rounding
            _bound_block(known, layer, base, bypassed, real, out)
            started.append(layer)
            edited, unchanged = torch.cat([edited, bypassed.out]), torch.cat([unchanged, none])
        resid = base.out
    _compare_logits(known, resid, dict(zip(started, edited.split(n), strict=True)), targets, out)
    return out


def _bound_block(
    known: Known, layer: int, base: BlockTrace, edited: BlockTrace, real: Tensor, out: BatchBounds
) -> None:
    """The identity D1 and the bounds B1 to B4, in the block that is bypassed."""
    norms, blocks = known.norms[layer], known.blocks
    block = norms.block
    pattern = blocks.pattern(layer, base.q, base.k)
    change = edited.projected - base.projected
    moved, identity = _mixing(norms, base, pattern)
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
        "diagonal_mass": 1 - shared.mean(1).masked_fill(~real, 0).sum(-1) / real.sum(-1),
    }
    for name, value in whole.items():
        out.rows.setdefault(name, {})[layer] = value


def _mixing(norms: BlockNorms, base: BlockTrace, pattern: Tensor) -> tuple[Tensor, Tensor]:
    """The bound B1 and the identity D1, head by head to save memory."""
    z = base.attn_in
    groups = pattern.shape[1] // base.v.shape[1]
    moved, identity = torch.zeros_like(z[..., 0]), torch.zeros_like(z)
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
    return moved, identity


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


def _compare_logits(
    known: Known, final: Tensor, edited: Mapping[int, Tensor], targets: Targets, out: BatchBounds
) -> None:
    """What each bypass changes in the predictions."""
    rows = torch.arange(len(final), device=final.device)[:, None]
    plain = known.blocks.unembed(final[rows, targets.positions])
    for layer, resid in edited.items():
        logits = known.blocks.unembed(resid[rows, targets.positions])
        found = {
            "logit_change": (logits - plain).norm(dim=-1),
            "max_logit_change": (logits - plain).abs().amax(-1),
            "kl": _kl(plain, logits),
        }
        for name, value in found.items():
            out.targets.setdefault(name, {})[layer] = value.masked_fill(~targets.mask, torch.nan)


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
