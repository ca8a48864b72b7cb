"""Decoding the residual stream: how the prediction unfolds over layers (logit lens and tuned lens)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlens.choices import Stream
from memlens.errors import OptionError, SiteError, check_option
from memlens.forward.capture import AtTargets, at_targets
from memlens.forward.hooks import has_site, hook_name
from memlens.forward.trunk import Trunk
from memlens.instruments.decode.lens import TunedLens, as_lens
from memlens.instruments.decode.promotion import promotion_layers
from memlens.results.kinds import register_kind
from memlens.results.plots.tokens import plot_decoding
from memlens.results.readings import read_decoding
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result, token_labels

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


STREAMS: tuple[str, ...] = get_args(Stream)
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


register_kind("residual_decoding", plot=plot_decoding, reading=read_decoding)
