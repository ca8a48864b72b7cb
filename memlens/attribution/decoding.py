"""Decoding the residual stream: how the prediction unfolds over layers (logit lens and tuned lens)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from memlens.attribution.activations import AtTargets, at_targets
from memlens.attribution.distributions import STATISTICS, compare_to_final
from memlens.attribution.lenses import TunedLens, as_lens
from memlens.attribution.promotion import promotion_layers
from memlens.errors import OptionError, SiteError, check_option
from memlens.models.hooks import has_site, hook_name
from memlens.models.trunk import Trunk
from memlens.results import Result
from memlens.sequences import SequenceSet
from memlens.sweeps.run import make_result, token_labels

__all__ = ["STREAMS", "decode_residual"]

STREAMS = ("resid_post", "resid_mid", "attn_out", "mlp_out")
_LOGIT_LENS = "logit lens: final norm and unembedding"


@torch.no_grad()
def decode_residual(
    model: Any,
    sequences: SequenceSet,
    *,
    lens: str | Path | TunedLens = "logit",
    streams: Sequence[str] = ("resid_post",),
    cache: Any = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Result:
    r"""Turn the residual after every block into next-token probabilities, at each target.

    With the final norm and unembedding, :math:`p_l = \mathrm{softmax}(W_U\,\mathrm{LN}_f(x_l))` (logit
    lens), for the position that predicts each target token, teacher-forced; a tuned lens puts
    :math:`x_l + W x_l + b` in the place of :math:`x_l`. The last layer's lens is the model itself, with both.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        lens: "logit", a `TunedLens`, or the folder of one (see `TunedLens.load`). It is trained on, and
            reads, the residual after a block; further streams are read by the logit lens, whatever `lens` is.
        streams: What to decode: "resid_post" (after each block), "resid_mid" (after its attention, in
            sequential blocks), "attn_out" and "mlp_out" (that part alone, normed by itself: its scores
            are directions, not probabilities of anything the model says). More than one adds a dimension.
        cache: An `ActivationCache` of ``sequences.tokens`` to read instead of running the model.
        batch_size: Sequences at a time.
        progress: Show a bar.

    Returns:
        Kind "residual_decoding", `(sequence, layer, target)`:

        - `probability`, `rank` (zero-based) of the target token;
        - `predicted_probability`, `predicted_rank` of the token that the model predicts in the end;
        - `entropy` of :math:`p_l`, and `kl_to_final` :math:`= D_{KL}(p_{L-1} \,\|\, p_l)`, in nats;

        and for the predicted token in the (first) stream, `(sequence, target)`: `first_promotion`, the
        first layer of rank 0; `near_promotion`, the first of rank 10 or less; `stable_promotion`, the first
        layer from which the rank stays 0; `boost`, the probability gained from there to the end;
        `promotion_share`, the share of the final probability reached there. NaN outside ragged
        continuations. The settings `lens` and `lens_fingerprint` say which lens it was.

    Raises:
        OptionError: Unknown stream, or a tuned lens without "resid_post".
        SiteError: "resid_mid" in parallel blocks, or a cache without the activations.
        ResultError: A tuned lens of another model's shape, or for processed weights.
        SourceNotFoundError: No lens there.
        FileFormatError: A damaged lens.
        EmptySetError: No sequences.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> result = ml.decode_residual(model, ml.load_sequences("zoo", model)[:2], progress=False)
        >>> result["rank"].dims
        ('sequence', 'layer', 'target')
    """
    trunk = Trunk(model)
    tuned = as_lens(lens, model)
    _check_streams(model, streams, tuned)
    names = [hook_name(s, layer) for s in streams for layer in range(trunk.n_layers)]
    parts = [
        _decode(trunk, item, streams, tuned)
        for item in at_targets(
            trunk,
            sequences,
            names,
            cache=cache,
            batch_size=batch_size,
            progress=progress,
            desc="decode residual",
        )
    ]
    values = {key: _joined([p[key] for p in parts]) for key in parts[0]}
    tail = ("sequence", "stream", "layer", "target") if len(streams) > 1 else ("sequence", "layer", "target")
    variables: dict[str, Any] = {
        key: (tail, array if len(streams) > 1 else array[:, 0]) for key, array in values.items()
    }
    phases = promotion_layers(
        torch.from_numpy(values["predicted_rank"][:, 0]),
        torch.from_numpy(values["predicted_probability"][:, 0]),
    )
    variables |= {key: (("sequence", "target"), array.numpy()) for key, array in phases.items()}
    labels = token_labels(model, sequences.target_ids, sequences.target_mask)
    if labels is not None:
        variables["token"] = (("sequence", "target"), labels)
    coords: dict[str, Any] = {
        "layer": list(range(trunk.n_layers)),
        "target": list(range(sequences.max_targets)),
    }
    if len(streams) > 1:
        coords["stream"] = list(streams)
    settings = {**_lens_settings(tuned), "streams": list(streams)}
    return make_result("residual_decoding", model, sequences, variables, coords, settings)


def _check_streams(model: Any, streams: Sequence[str], lens: TunedLens | None) -> None:
    for stream in streams:
        check_option("stream", stream, STREAMS)
        if not has_site(model, stream):
            raise SiteError(f"this model's parallel blocks have no {stream!r}: decode 'resid_post' instead.")
    if lens is not None and "resid_post" not in streams:
        raise OptionError(
            f"streams={tuple(streams)} has nothing that a tuned lens reads: add 'resid_post', or use "
            "lens='logit'."
        )


def _lens_settings(lens: TunedLens | None) -> dict[str, Any]:
    if lens is None:
        return {"lens": _LOGIT_LENS}
    return {
        "lens": f"tuned lens {lens.name}: h + W h + b at resid_post, then final norm and unembedding",
        "lens_fingerprint": lens.fingerprint,
        "lens_of": lens.facts.get("base_model", ""),
        "other_streams": _LOGIT_LENS,
    }


def _decode(
    trunk: Trunk, item: AtTargets, streams: Sequence[str], lens: TunedLens | None
) -> dict[str, Float[np.ndarray, "seq stream layer target"]]:
    """Decode one batch."""
    mask, layers = item.targets.mask, range(trunk.n_layers)
    sites: list[Tensor] = []
    for stream in streams:
        for layer in layers:
            resid = item.acts[hook_name(stream, layer)][mask]
            read = lens is not None and stream == "resid_post"
            sites.append(lens.translate(resid, layer) if lens is not None and read else resid)
    last = (list(streams).index("resid_post") + 1) * len(layers) - 1 if "resid_post" in streams else None
    resid = torch.stack(sites, dim=1)
    flat = compare_to_final(trunk, resid, item.final[mask], item.targets.ids[mask], last).cpu()
    out: dict[str, np.ndarray] = {}
    for k, key in enumerate(STATISTICS):
        full = torch.full((*mask.shape, len(sites)), torch.nan)
        full[mask.cpu()] = flat[..., k]
        out[key] = full.reshape(*mask.shape, len(streams), -1).permute(0, 2, 3, 1).numpy()
    return out


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Join batches; each is padded along `target` to the whole set's width."""
    width = max(p.shape[-1] for p in parts)
    pads = [np.pad(p, [(0, 0)] * 3 + [(0, width - p.shape[-1])], constant_values=np.nan) for p in parts]
    return np.concatenate(pads)
