"""Bounds on what a bypass of attention can change, with what it does change, at every layer and token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from memlens.errors import OptionError, UnsupportedModelError
from memlens.forward.batches import make_batches
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.trunk import Trunk
from memlens.instruments.bypass.bound_batch import BatchBounds, Known, bound_batch
from memlens.instruments.bypass.predictor import check_readable, some_layers
from memlens.models.huggingface import parse_dtype
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_bounds
from memlens.results.readings import read_bounds
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result
from memlens.sweeps.precision import in_dtype

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


register_kind("bypass_bounds", plot=plot_bounds, reading=read_bounds)
