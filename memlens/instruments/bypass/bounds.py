"""Bounds on what a bypass of attention can change, with what it does change, at every layer and token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from memlens.errors import OptionError, UnsupportedModelError
from memlens.forward.batches import Targets, make_batches
from memlens.forward.blocks import BlockTrace, FunctionalBlocks, trace_block
from memlens.forward.read_weights import Norm
from memlens.forward.trunk import Trunk
from memlens.instruments.bypass.lipschitz import BlockNorms, norm_between
from memlens.instruments.bypass.predictor import check_readable, some_layers
from memlens.models.huggingface import parse_dtype
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_bounds
from memlens.results.readings import read_bounds
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sweeps.contexts import in_dtype
from memlens.sweeps.labels import make_result

BOUNDS = ("B1", "B2", "B3", "B4")
_AGREES = {torch.float64: 1e-4, torch.float32: 1e-3}


@torch.no_grad()
def bypass_bounds(
    model: Any,
    sequences: SequenceSet,
    *,
    layers: Sequence[int] | None = None,
    dtype: str | torch.dtype = "float64",
    batch_size: int = 4,
    progress: bool = True,
) -> Result:
    r"""Bound what the bypass of each layer's attention ("identity") can change, and measure what it does.

    Identity and bounds are memlens' own; no published theorem is quoted. :math:`A_h` is a head's attention
    matrix, :math:`z_t` what attention reads, :math:`M_h = W_O^h W_V^h` with its spectral norm, and
    :math:`\Delta_t` the change of attention's projected output at token :math:`t`.

    - D1, an identity: :math:`\Delta = \sum_h (I - A_h) Z M_h^\top`; biases cancel, since rows of
      :math:`A_h` sum to 1.
    - B1: :math:`\|\Delta_t\| \le \sum_h \|((I - A_h) Z)_t\| \|M_h\|`.
    - B2: :math:`\|\Delta_t\| \le \max_{s<t} \|z_s - z_t\| \sum_h (1 - A_h[t, t]) \|M_h\|`, over tokens that
      :math:`t` sees.
    - B3, from weights alone: what attention adds changes by
      :math:`\le 2 \sqrt d\, \|\gamma\|_\infty \sum_h \|M_h\|`, with :math:`\gamma` of the norm before
      attention; where a norm stands after it, :math:`2 \sqrt d\, \|\gamma_{post}\|_\infty`.
    - B4: the block's output changes by
      :math:`\le (1 + L_{ln2} L_{mlp} L_{post}) L_{post} \|\Delta_t\|`, by :math:`\|\Delta_t\|` where
      attention and MLP are parallel. Each :math:`L` holds on the line between both runs: a norm's is
      :math:`\|\gamma\|_\infty / \sqrt{\min \mathrm{var} + \epsilon}` with the least variance in closed form.

    Clipped values (OLMo 1) are bounded with :math:`\|W_O^h\| \|W_V^h\|` in the place of :math:`\|M_h\|` and
    :math:`\sum_s A_{ts} \|z_s - z_t\|` in that of :math:`\|((I - A) Z)_t\|`.

    That changes shrink with the depth of the bypass is true of untrained weights too: compare with a control.

    Args:
        model: A TransformerLens model; while this runs, its weights are held in `dtype` as well.
        sequences: What the model reads, teacher-forced.
        layers: The layers that are bypassed, each alone; all by default.
        dtype: "float64", or "float32" where memory is short; then rounding may pass a bound.
        batch_size: Sequences at a time; all bypasses of a batch run side by side.
        progress: Show a bar.

    Returns:
        Kind "bypass_bounds":

        - `measured`, `limit` and `slack` (limit / measured, NaN where nothing changed)
          `(sequence, bound, layer, position)` for the bounds B1 to B4;
        - `rounding` `(sequence, layer)`: a change of the block's output (over all tokens) of no more than
          this is counted as none;
        - `identity_error` `(sequence, layer)`, the largest error of D1 over attention's largest output;
        - `logit_change` (the norm), `max_logit_change` and `kl` (of the bypassed from the plain prediction,
          in nats) `(sequence, layer, target)`;
        - `predictor` `(sequence, layer, position)`, :math:`\sum_h (1 - A_h[t, t]) \|M_h\|`, and
          `diagonal_mass` `(sequence, layer)`, the mean of :math:`A_h[t, t]`.

    Raises:
        OptionError: Another dtype, or no layers.
        SiteError: A layer that does not exist.
        UnsupportedModelError: Blocks whose parts are not known, or that hooks change, or a bridge with
            processed weights.
        EmptySetError: No sequences.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:1]
        >>> result = ml.bypass.bounds(model, seqs, progress=False)
        >>> bool((result["measured"] <= result["limit"] + 1e-9).sel(position=5).all())
        True
    """
    wide = parse_dtype(dtype)
    if wide not in _AGREES:
        raise OptionError(f"dtype={str(dtype)!r} rounds too much for a bound: choose float64 or float32.")
    check_readable(model)
    chosen = some_layers(layers, Trunk(model).n_layers)
    check_sequences(sequences, model, on_eos="keep")
    parts: list[BatchBounds] = []
    with in_dtype(model, wide), tqdm(total=len(sequences), disable=not progress, desc="bounds") as bar:
        trunk = Trunk(model)
        known = _read(trunk, int(sequences.lengths.max()))
        for batch, targets in make_batches(sequences, batch_size, trunk.device):
            resid = trunk.embed(batch.tokens)
            if not parts:
                _check_blocks(known, resid[:1], _AGREES[wide])
            parts.append(bound_batch(known, resid, batch.mask, targets, chosen))
            bar.update(len(batch.rows))
    variables, coords = _variables(parts, sequences, chosen)
    settings = {
        "mode": "identity",
        "layers": list(chosen),
        "dtype": str(wide).removeprefix("torch."),
        "bounds_are": "memlens' own, not a published theorem",
    }
    return make_result("bypass_bounds", model, sequences, variables, coords, settings)


def _read(trunk: Trunk, width: int) -> Known:
    try:
        return Known.of(FunctionalBlocks(trunk, range(trunk.n_layers), width))
    except (AttributeError, KeyError, TypeError) as error:
        raise UnsupportedModelError(
            f"this model's blocks cannot be read as matrices and norms ({error}), so they cannot be bounded: "
            "measure with bypass_attention."
        ) from error


def _check_blocks(known: Known, resid: Float[Tensor, "one pos d_model"], tolerance: float) -> None:
    """Compare each block with the model's own, which may take its softmax in float32."""
    trunk = known.blocks.trunk
    for layer in range(trunk.n_layers):
        want, found = trunk.run(resid, layer, layer + 1), known.blocks.run(layer, resid)
        off = float((found - want).abs().max() / want.abs().max())
        if not off <= tolerance:
            raise UnsupportedModelError(
                f"block {layer} does not compute what its weights say (off by {off:.2g} of its output): a "
                "hook stands on it, or it has a part that memlens does not know."
            )
        resid = want


def _variables(
    parts: Sequence[BatchBounds], seqs: SequenceSet, layers: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Join batches to arrays with dimensions."""
    width = int(seqs.lengths.max())
    tokens = {n: _joined([p.tokens[n] for p in parts], layers, width) for n in parts[0].tokens}
    rows = {n: _joined([p.rows[n] for p in parts], layers) for n in parts[0].rows}
    targets = {n: _joined([p.targets[n] for p in parts], layers, seqs.max_targets) for n in parts[0].targets}
    measured, limit = (np.stack([tokens[f"{n}_{b}"] for b in BOUNDS], 1) for n in ("measured", "bound"))
    by_token, by_row = ("sequence", "bound", "layer", "position"), ("sequence", "layer")
    variables: dict[str, Any] = {
        "measured": (by_token, measured, {"long_name": "change by the bypass"}),
        "limit": (by_token, limit, {"long_name": "bound of the change"}),
        "slack": (by_token, _ratio(limit, measured, rows["rounding"]), {"long_name": "bound over measured"}),
        "predictor": (("sequence", "layer", "position"), tokens["predictor"]),
        **{n: (by_row, v) for n, v in rows.items()},
        **{n: (("sequence", "layer", "target"), v, _UNITS.get(n, {})) for n, v in targets.items()},
    }
    coords = {
        "layer": list(layers),
        "bound": list(BOUNDS),
        "position": list(range(width)),
        "target": list(range(seqs.max_targets)),
    }
    return variables, coords


_UNITS = {"kl": {"units": "nats", "long_name": "KL of the predictions"}}


def _joined(
    parts: Sequence[dict[int, Tensor]], layers: Sequence[int], width: int | None = None
) -> np.ndarray:
    """One array `[sequence, layer, …]`, padded with NaN to `width` along the last axis."""
    stacked = [torch.stack([part[layer] for layer in layers], 1) for part in parts]
    if width is not None:
        pads = [(0, width - s.shape[-1]) for s in stacked]
        stacked = [torch.nn.functional.pad(s, p, value=torch.nan) for s, p in zip(stacked, pads, strict=True)]
    return torch.cat(stacked).cpu().numpy()


def _ratio(limit: np.ndarray, measured: np.ndarray, rounding: np.ndarray) -> np.ndarray:
    """Limit over measured; NaN where the change is no more than rounding."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(measured > rounding[:, None, :, None], limit / measured, np.nan)


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
    """Run all bypasses of one batch side by side, and bound each of them in the layer that is bypassed."""
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
        "measured_B1": projected, "bound_B1": moved, "measured_B2": projected,
        "bound_B2": _farthest(base.attn_in, others) * weighted,
        "measured_B3": (edited.added - base.added).norm(dim=-1),
        "bound_B3": torch.full_like(projected, _from_weights(norms)),
        "measured_B4": (edited.out - base.out).norm(dim=-1), "bound_B4": path * after * projected,
        "predictor": weighted,
    }  # fmt: skip
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


register_kind("bypass_bounds", plot=plot_bounds, reading=read_bounds)
