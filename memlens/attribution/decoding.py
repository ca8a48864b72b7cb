"""Decoding the residual stream: how the prediction unfolds over layers (logit lens)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memlens.attribution.activations import AtTargets, at_targets
from memlens.errors import SiteError, check_option
from memlens.models.hooks import has_site, hook_name
from memlens.models.trunk import Trunk
from memlens.results import Result
from memlens.sequences import SequenceSet
from memlens.sweeps.run import make_result, token_labels

__all__ = ["STREAMS", "decode_residual", "promotion_layers"]

STREAMS = ("resid_post", "resid_mid", "attn_out", "mlp_out")
_UNEMBED_BYTES = 2**28


@torch.no_grad()
def decode_residual(
    model: Any,
    sequences: SequenceSet,
    *,
    streams: Sequence[str] = ("resid_post",),
    cache: Any = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Result:
    r"""Turn the residual after every block into next-token probabilities (logit lens), at each target.

    With the final norm and unembedding, :math:`p_l = \mathrm{softmax}(W_U\,\mathrm{LN}_f(x_l))`, for the
    position that predicts each target token, teacher-forced. The last layer's lens is the model itself.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
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
        first layer of rank 0; `stable_promotion`, the first layer from which the rank stays 0; `boost`,
        the probability gained from there to the end; `promotion_share`, the share of the final
        probability reached there. NaN outside ragged continuations.

    Raises:
        OptionError: Unknown stream.
        SiteError: "resid_mid" in parallel blocks, or a cache without the activations.
        EmptySetError: No sequences.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> result = ml.decode_residual(model, ml.load_sequences("zoo", model)[:2], progress=False)
        >>> result["rank"].dims
        ('sequence', 'layer', 'target')
    """
    trunk = Trunk(model)
    for stream in streams:
        check_option("stream", stream, STREAMS)
        if not has_site(model, stream):
            raise SiteError(f"this model's parallel blocks have no {stream!r}: decode 'resid_post' instead.")
    names = [hook_name(s, layer) for s in streams for layer in range(trunk.n_layers)]
    shape = (len(streams), trunk.n_layers)
    parts = [
        _decode(trunk, item, names, shape)
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
    settings = {"lens": "logit lens: final norm and unembedding", "streams": list(streams)}
    return make_result("residual_decoding", model, sequences, variables, coords, settings)


def _decode(
    trunk: Trunk, item: AtTargets, names: Sequence[str], shape: tuple[int, int]
) -> dict[str, Float[np.ndarray, "seq stream layer target"]]:
    """Decode one batch, in portions of target positions so that logits stay small."""
    mask, ids = item.targets.mask, item.targets.ids[item.targets.mask]
    step = max(1, _UNEMBED_BYTES // (trunk.d_vocab * 4 * 6))
    chosen = [item.acts[n][mask] for n in names]
    final = item.final[mask]
    rows: list[Tensor] = []
    for i in range(0, len(ids), step):
        part = slice(i, i + step)
        last = _logp(trunk, final[part])
        predicted = last.argmax(-1)
        rows.append(
            torch.stack([_compare(_logp(trunk, a[part]), last, ids[part], predicted) for a in chosen], dim=1)
        )
    flat = torch.cat(rows).cpu()  # [target in mask, name, key]
    out: dict[str, np.ndarray] = {}
    for k, key in enumerate(_KEYS):
        full = torch.full((*mask.shape, len(names)), torch.nan)
        full[mask.cpu()] = flat[..., k]
        out[key] = full.reshape(*mask.shape, *shape).permute(0, 2, 3, 1).numpy()
    return out


_KEYS = ("probability", "rank", "predicted_probability", "predicted_rank", "entropy", "kl_to_final")


def _logp(trunk: Trunk, resid: Tensor) -> Tensor:
    return trunk.unembed(resid).float().log_softmax(-1)


def _compare(logp: Tensor, last: Tensor, ids: Tensor, predicted: Tensor) -> Float[Tensor, "target key"]:
    def of(token: Tensor) -> tuple[Tensor, Tensor]:
        chosen = logp.gather(-1, token[:, None])
        return chosen[:, 0].exp(), (logp > chosen).sum(-1).float()

    entropy = torch.special.entr(logp.exp()).sum(-1)
    kl = (last.exp() * (last - logp)).sum(-1).clamp_min(0)
    return torch.stack([*of(ids), *of(predicted), entropy, kl], dim=-1)


def promotion_layers(
    rank: Float[Tensor, "*batch layer target"], probability: Float[Tensor, "*batch layer target"]
) -> dict[str, Float[Tensor, "*batch target"]]:
    """Return where a token is promoted to the top and how far its probability is boosted after that.

    Args:
        rank: Zero-based rank of the token at each layer; NaN where there is no target.
        probability: Its probability at each layer.

    Returns:
        `first_promotion`: first layer of rank 0; `stable_promotion`: first layer from which the rank is 0
        up to the last; `boost`: last probability minus that at `stable_promotion`; `promotion_share`: the
        ratio of the two. NaN where the token never gets (or stays) there.

    >>> rank = torch.tensor([5.0, 0.0, 2.0, 0.0, 0.0])[:, None]
    >>> out = promotion_layers(rank, torch.tensor([0.0, 0.2, 0.1, 0.4, 0.8])[:, None])
    >>> out["first_promotion"].item(), out["stable_promotion"].item(), round(out["boost"].item(), 2)
    (1.0, 3.0, 0.4)
    """
    top: Bool[Tensor, "*batch layer target"] = rank == 0
    stays = top.flip(-2).int().cumprod(-2).flip(-2).bool()
    stable = _first(stays)
    at = probability.gather(-2, stable.nan_to_num(0).long()[..., None, :])[..., 0, :]
    last = probability[..., -1, :]
    missing = stable.isnan()
    return {
        "first_promotion": _first(top),
        "stable_promotion": stable,
        "boost": (last - at).masked_fill(missing, torch.nan),
        "promotion_share": (at / last).masked_fill(missing, torch.nan),
    }


def _first(flags: Bool[Tensor, "*batch layer target"]) -> Float[Tensor, "*batch target"]:
    index: Int[Tensor, "*batch target"] = flags.int().argmax(-2)
    return torch.where(flags.any(-2), index.float(), torch.nan)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Join batches; each is padded along `target` to the whole set's width."""
    width = max(p.shape[-1] for p in parts)
    pads = [np.pad(p, [(0, 0)] * 3 + [(0, width - p.shape[-1])], constant_values=np.nan) for p in parts]
    return np.concatenate(pads)
