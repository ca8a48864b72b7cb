"""Bounds on what an attention bypass can change, and what it does change, at every layer and token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from memlens.errors import OptionError, UnsupportedModelError
from memlens.forward.batches import Targets, make_batches
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.exclusive import computes
from memlens.forward.read_weights import Norm
from memlens.forward.trunk import Trunk
from memlens.instruments.bypass.lipschitz import BlockNorms, norm_between
from memlens.instruments.bypass.predictor import check_readable, some_layers
from memlens.instruments.bypass.traces import BlockTrace, trace_block
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


@computes
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
    r"""Bound what bypassing the attention of each layer ("identity") can change, and measure what it changes.

    The identity and the bounds are ours; they are not a published theorem. :math:`A_h` is a head's attention
    matrix, :math:`z_t` the input of attention, :math:`\|M_h\|` the spectral norm of :math:`W_O^h W_V^h`, and
    :math:`\Delta_t` the change of attention's projected output at token :math:`t`.

    - D1, an identity: :math:`\Delta = \sum_h (I - A_h) Z M_h^\top`; biases cancel, since rows of
      :math:`A_h` sum to 1.
    - B1: :math:`\|\Delta_t\| \le \sum_h \|((I - A_h) Z)_t\| \|M_h\|`.
    - B2: :math:`\|\Delta_t\| \le \max_{s<t} \|z_s - z_t\| \sum_h (1 - A_h[t, t]) \|M_h\|`, over the tokens
      that :math:`t` attends to.
    - B3, from weights alone: what attention adds changes by
      :math:`\le 2 \sqrt d\, \|\gamma\|_\infty \sum_h \|M_h\|`, with :math:`\gamma` of the norm before
      attention; if there is a norm after it, by :math:`\le 2 \sqrt d\, \|\gamma_{post}\|_\infty`.
    - B4: the block's output changes by
      :math:`\le (1 + L_{ln2} L_{mlp} L_{post}) L_{post} \|\Delta_t\|`, or by :math:`\|\Delta_t\|` if
      attention and MLP are parallel. Each :math:`L` holds on the line between both runs; that of a norm is
      :math:`\|\gamma\|_\infty / \sqrt{\min \mathrm{var} + \epsilon}`, with the least variance in closed form.

    For clipped values (OLMo 1), :math:`\|W_O^h\| \|W_V^h\|` takes the place of :math:`\|M_h\|`, and
    :math:`\sum_s A_{ts} \|z_s - z_t\|` that of :math:`\|((I - A) Z)_t\|`.

    With untrained weights, changes also shrink with the depth of the bypass: compare with a control.

    Args:
        model: A TransformerLens model; its weights are held in `dtype` as well while this runs.
        sequences: The input of the model, teacher-forced.
        layers: The layers to bypass, one at a time; all by default.
        dtype: "float64", or "float32" to save memory; rounding errors may then exceed a bound.
        batch_size: Sequences at a time; all bypasses of a batch run side by side.
        progress: Show a progress bar.

    Returns:
        Kind "bypass_bounds":

        - `measured`, `limit` and `slack` (limit / measured, NaN where nothing changed)
          `(sequence, bound, layer, position)` for the bounds B1 to B4;
        - `rounding` `(sequence, layer)`: a change of the block's output (over all tokens) up to this size
          counts as no change;
        - `identity_error` `(sequence, layer)`, the largest error of D1 over attention's largest output;
        - `logit_change` (the norm), `max_logit_change` and `kl` (of the bypassed from the plain prediction,
          in nats) `(sequence, layer, target)`;
        - `predictor` `(sequence, layer, position)`, :math:`\sum_h (1 - A_h[t, t]) \|M_h\|`, and
          `diagonal_mass` `(sequence, layer)`, the mean of :math:`A_h[t, t]`.

    Raises:
        OptionError: Another dtype, or no layers.
        SiteError: A layer that does not exist.
        UnsupportedModelError: Blocks that memlens cannot read or that have hooks, or a bridge with processed
            weights.
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
    parts: list[Found] = []
    with in_dtype(model, wide), tqdm(total=len(sequences), disable=not progress, desc="bounds") as bar:
        trunk = Trunk(model)
        blocks, norms = _read(trunk, int(sequences.lengths.max()))
        for batch, targets in make_batches(sequences, batch_size, trunk.device):
            resid = trunk.embed(batch.tokens)
            if not parts:
                _check_blocks(blocks, resid[:1], _AGREES[wide])
            parts.append(_bound_batch(blocks, norms, resid, batch.mask, targets, chosen))
            bar.update(len(batch.rows))
    variables, coords = _variables(parts, sequences, chosen)
    settings = {
        "mode": "identity",
        "layers": list(chosen),
        "dtype": str(wide).removeprefix("torch."),
        "bounds_are": "memlens' own, not a published theorem",
    }
    return make_result("bypass_bounds", model, sequences, variables, coords, settings)


def _read(trunk: Trunk, width: int) -> tuple[FunctionalBlocks, dict[int, BlockNorms]]:
    try:
        blocks = FunctionalBlocks(trunk, range(trunk.n_layers), width)
        return blocks, {layer: BlockNorms.of(blocks, layer) for layer in blocks.blocks}
    except (AttributeError, KeyError, TypeError) as error:
        raise UnsupportedModelError(
            f"this model's blocks cannot be read as matrices and norms ({error}), so they cannot be bounded: "
            "measure with bypass_attention."
        ) from error


def _check_blocks(blocks: FunctionalBlocks, resid: Float[Tensor, "1 pos d_model"], tolerance: float) -> None:
    """Compare each block with the model's own, which may compute its softmax in float32."""
    for layer in range(blocks.trunk.n_layers):
        want, found = blocks.trunk.run(resid, layer, layer + 1), blocks.run(layer, resid)
        off = float((found - want).abs().max() / want.abs().max())
        if not off <= tolerance:
            raise UnsupportedModelError(
                f"block {layer} does not compute what its weights say (off by {off:.2g} of its output): it "
                "has a hook, or a part that memlens does not know."
            )
        resid = want


def _variables(
    parts: Sequence[Found], seqs: SequenceSet, layers: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Join batches to arrays with dimensions."""
    sizes = {"position": int(seqs.lengths.max()), "target": seqs.max_targets}
    by_token, by_row = ("sequence", "bound", "layer", "position"), ("sequence", "layer")
    found: dict[str, Any] = {}
    for name in parts[0]:
        last = "target" if name in _BY_TARGET else "position"
        dims = by_row if name in _BY_ROW else (*by_row, last)
        found[name] = (dims, _joined([part[name] for part in parts], layers, sizes.get(dims[-1])))
    measured, limit = (np.stack([found.pop(f"{n}_{b}")[1] for b in BOUNDS], 1) for n in ("measured", "bound"))
    with np.errstate(divide="ignore", invalid="ignore"):
        changed = measured > found["rounding"][1][:, None, :, None]
        slack = np.where(changed, limit / measured, np.nan)
    found["kl"] = (*found["kl"], {"units": "nats", "long_name": "KL of the predictions"})
    variables = {
        "measured": (by_token, measured, {"long_name": "change by the bypass"}),
        "limit": (by_token, limit, {"long_name": "bound on the change"}),
        "slack": (by_token, slack, {"long_name": "bound over measured"}),
        **found,
    }
    along = {dim: list(range(size)) for dim, size in sizes.items()}
    return variables, {"layer": list(layers), "bound": list(BOUNDS), **along}


def _joined(
    parts: Sequence[Mapping[int, Tensor]], layers: Sequence[int], width: int | None
) -> Float[np.ndarray, "sequence layer *rest"]:
    """One array, padded with NaN to `width` along the last axis."""
    stacked = [torch.stack([part[layer] for layer in layers], 1) for part in parts]
    if width is not None:
        pads = [(0, width - s.shape[-1]) for s in stacked]
        stacked = [torch.nn.functional.pad(s, p, value=torch.nan) for s, p in zip(stacked, pads, strict=True)]
    return torch.cat(stacked).cpu().numpy()


Found = dict[str, dict[int, Tensor]]
"""One batch: by variable and bypassed layer `[row, position]`, `[row]` or `[row, target]`; NaN is padding."""
_BY_ROW = ("identity_error", "diagonal_mass", "rounding")
_BY_TARGET = ("logit_change", "max_logit_change", "kl")
_ROUNDINGS = 32


def _bound_batch(
    blocks: FunctionalBlocks,
    norms: Mapping[int, BlockNorms],
    resid: Float[Tensor, "row pos d_model"],
    real: Bool[Tensor, "row pos"],
    targets: Targets,
    layers: Sequence[int],
) -> Found:
    """Run all bypasses of one batch side by side, and bound each in the layer that is bypassed."""
    out: Found = defaultdict(dict)
    n = len(resid)
    started: list[int] = []
    edited, unchanged = resid[:0], real[:0, 0]  # residuals of the bypassed runs, stacked; rows left unchanged
    for layer in range(blocks.trunk.n_layers):
        both = trace_block(blocks, layer, torch.cat([resid, edited]))
        base = both[slice(0, n)]
        same = base.out.repeat(len(started), 1, 1)  # rounding may differ between the rows of a batch
        edited = torch.where(unchanged[:, None, None], same, both.out[n:])
        if layer in layers:
            bypassed = trace_block(blocks, layer, resid, bypass=True)
            rounding = _rounding(base, bypassed, real)
            none = _total(bypassed.out - base.out, real) <= rounding
            bypassed = base.where(none, bypassed)
            pattern = blocks.pattern(layer, base.q, base.k)
            home = norms[layer].block.o.weight.device
            placed = pattern.to(home), base.to(home), bypassed.to(home), real.to(home)
            for name, value in _bound_block(norms[layer], *placed).items():
                out[name][layer] = value.to(resid.device)
            out["rounding"][layer] = rounding
            started.append(layer)
            edited, unchanged = torch.cat([edited, bypassed.out]), torch.cat([unchanged, none])
        resid = base.out
    rows = torch.arange(n, device=resid.device)[:, None]
    plain = blocks.unembed(resid[rows, targets.positions])
    for layer, final in zip(started, edited.split(n), strict=True):
        logits = blocks.unembed(final[rows, targets.positions])
        for name, value in _changes(plain, logits).items():
            out[name][layer] = value.masked_fill(~targets.mask, torch.nan)
    return out


def _bound_block(
    norms: BlockNorms, pattern: Tensor, base: BlockTrace, edited: BlockTrace, real: Tensor
) -> dict[str, Tensor]:
    """The identity D1 and the bounds B1 to B4, in the block that is bypassed."""
    block = norms.block
    change = edited.projected - base.projected
    moved, identity = _mixing(norms, base, pattern)
    error = (change - identity).norm(dim=-1).masked_fill(~real, 0).amax(-1)
    others = pattern - torch.diag_embed(pattern.diagonal(dim1=-2, dim2=-1))
    shared = others.sum(-1)  # 1 - A[t, t], without the rounding error of the difference
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
    return {
        **{name: value.masked_fill(~real, torch.nan) for name, value in values.items()},
        "identity_error": error / torch.maximum(longest(base), longest(edited)),
        "diagonal_mass": 1 - shared.mean(1).masked_fill(~real, 0).sum(-1) / real.sum(-1),
    }


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
        else:  # clipped values are not linear in z, but no farther apart than unclipped ones
            v = base.v[:, head // groups]
            length = (weights * far).sum(-1)
            identity += (v - weights @ v) @ norms.w_o[head].mT
        moved += gain * length
    return moved, identity


def _distances(z: Tensor) -> Float[Tensor, "row query key"]:
    return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")


def _farthest(z: Tensor, others: Float[Tensor, "row head query key"]) -> Float[Tensor, "row pos"]:
    """Distance from each token to the farthest token that any head attends to."""
    return _distances(z).masked_fill(~(others > 0).any(1), 0).amax(-1)


def _from_weights(norms: BlockNorms) -> float:
    """B3: two outputs of a norm differ by at most twice its radius."""
    post = norms.block.attn_post_norm
    norm, gain = (norms.block.attn_norm, float(norms.gain.sum())) if post is None else (post, 1.0)
    if not isinstance(norm, Norm):
        return float("inf")
    return 2 * len(norm.weight) ** 0.5 * float(norm.weight.abs().max()) * gain


def _changes(plain: Tensor, logits: Tensor) -> dict[str, Tensor]:
    """What a bypass changes in the predictions."""
    p, q = plain.log_softmax(-1), logits.log_softmax(-1)
    return {
        "logit_change": (logits - plain).norm(dim=-1),
        "max_logit_change": (logits - plain).abs().amax(-1),
        "kl": (p.exp() * (p - q)).sum(-1).clamp_min(0),
    }


def _rounding(base: BlockTrace, edited: BlockTrace, real: Tensor) -> Float[Tensor, " row"]:
    """Largest change that float arithmetic can leave between equal sums."""
    largest = [_total(x, real) for t in (base, edited) for x in (t.resid, t.projected, t.out)]
    return _ROUNDINGS * torch.finfo(base.out.dtype).eps * torch.stack(largest).amax(0)


def _total(x: Float[Tensor, "row pos d"], real: Int[Tensor, "row pos"]) -> Float[Tensor, " row"]:
    """The norm over all real tokens."""
    return x.masked_fill(~real[..., None], 0).flatten(1).norm(dim=-1)


register_kind("bypass_bounds", plot=plot_bounds, reading=read_bounds)
