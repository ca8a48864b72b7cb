"""Decoding the residual stream: how the prediction develops over layers (logit lens and tuned lens)."""

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
from memlens.forward.capture import AtTargets, captured_at_targets
from memlens.forward.exclusive import computes
from memlens.forward.hooks import has_site, hook_name
from memlens.forward.trunk import Trunk
from memlens.instruments.decode.lens import TunedLens, as_lens
from memlens.instruments.decode.promotion import promotion_layers
from memlens.instruments.donors import check_donor, donor_settings
from memlens.results.kinds import register_kind
from memlens.results.plots.tokens import plot_decoding
from memlens.results.readings import read_decoding
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result, token_labels

STATISTICS = ("probability", "rank", "predicted_probability", "predicted_rank", "entropy", "kl_to_final")
_PORTION_BYTES = {"cpu": 2**25, "cuda": 2**28}
"""Size of the logits unembedded together. On the CPU, larger tensors get fresh memory every time."""
_CACHE_BYTES = {"cpu": 2**22, "cuda": 2**28}
"""Size of the logits reduced together. On the CPU, they stay in the cache from one operation to the next."""


def portions(
    trunk: Trunk, n_rows: int, copies: int, sizes: Mapping[str, int] = _PORTION_BYTES
) -> Iterator[slice]:
    """Divide rows so that the logits of `copies` residuals per row stay small."""
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
        resid: The residuals to decode, already translated if there is a lens.
        final: The residual after the last block.
        ids: Target token of each row.
        last_site: The site whose residual is `final` itself and need not be unembedded again.

    Returns:
        `STATISTICS` in order: probability and zero-based rank (tokens with a strictly larger logit) of the
        target, the same for the token that the final residual predicts, the entropy of :math:`p_l`, and
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
    """Reduce logits to `STATISTICS`; site 0 is the final residual."""
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


@computes
@torch.no_grad()
def decode_residual(
    model: Any,
    sequences: SequenceSet,
    *,
    lens: str | Path | TunedLens = "logit",
    streams: Sequence[str] = ("resid_post",),
    donor: Any = None,
    cache: Any = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Result:
    r"""Decode the residual after every block into next-token probabilities, at each target.

    The logit lens applies the final norm and the unembedding,
    :math:`p_l = \mathrm{softmax}(W_U\,\mathrm{LN}_f(x_l))`, at the position that predicts each target token,
    teacher-forced; a tuned lens replaces :math:`x_l` by :math:`x_l + W x_l + b`. At the last layer, both are
    the model itself.

    Args:
        model: A TransformerLens model.
        sequences: The recalled sequences.
        lens: "logit", a `TunedLens`, or the folder of one (see `TunedLens.load`). A tuned lens reads only the
            residual after a block, on which it was trained; other streams are read by the logit lens.
        streams: The activations to decode: "resid_post" (after each block), "resid_mid" (after its attention,
            in sequential blocks), "attn_out" and "mlp_out" (one part alone, normed by itself: its scores are
            directions, not probabilities of the model). More than one adds a dimension.
        donor: Another model of the same shape and vocabulary, whose final norm and unembedding decode this
            model's activations: what its readout makes of them. The predicted token and the last layer are
            then those of this model's final residual under the donor's readout.
        cache: An `ActivationCache` of ``sequences.tokens`` to read instead of running the model.
        batch_size: Sequences at a time.
        progress: Show a progress bar.

    Returns:
        Kind "residual_decoding", `(sequence, layer, target)`:

        - `probability`, `rank` (zero-based) of the target token;
        - `predicted_probability`, `predicted_rank` of the token that the model finally predicts;
        - `entropy` of :math:`p_l`, and `kl_to_final` :math:`= D_{KL}(p_{L-1} \,\|\, p_l)`, in nats;

        and for the predicted token in the (first) stream, the variables `(sequence, target)` of
        `promotion_layers`. NaN outside ragged continuations. The settings `lens` and `lens_fingerprint`
        identify the lens, and `donor` the other model.

    Raises:
        OptionError: Unknown stream, a tuned lens without "resid_post", or a tuned lens with a donor.
        DonorError: The donor does not fit the model.
        SiteError: "resid_mid" in parallel blocks, or a cache without the activations.
        ResultError: A tuned lens that does not fit the model.
        SourceNotFoundError: There is no lens at the path.
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
    if donor is not None:
        if tuned is not None:
            raise OptionError("a tuned lens was trained for one model's unembedding: leave donor= out.")
        check_donor(model, donor, same_logits=True)
    readout = trunk if donor is None else Trunk(donor)
    names = [hook_name(s, layer) for s in streams for layer in range(trunk.n_layers)]
    how: dict[str, Any] = {"cache": cache, "batch_size": batch_size, "progress": progress}
    batches = captured_at_targets(trunk, sequences, names, desc="decode residual", **how)
    parts = [_decode(trunk, readout, item, streams, tuned) for item in batches]
    values = {key: _joined([p[key] for p in parts]) for key in parts[0]}
    several = len(streams) > 1
    dims = ("sequence", *(["stream"] if several else []), "layer", "target")
    variables: dict[str, Any] = {
        key: (dims, array if several else array[:, 0]) for key, array in values.items()
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
    if several:
        coords["stream"] = list(streams)
    settings = {**_lens_settings(tuned), "streams": list(streams)}
    if donor is not None:
        settings |= donor_settings(donor)
    return make_result("residual_decoding", model, sequences, variables, coords, settings)


def _check_streams(model: Any, streams: Sequence[str], lens: TunedLens | None) -> None:
    for stream in streams:
        check_option("stream", stream, STREAMS)
        if not has_site(model, stream):
            raise SiteError(f"this model's parallel blocks have no {stream!r}: decode 'resid_post' instead.")
    if lens is not None and "resid_post" not in streams:
        raise OptionError(
            f"streams={tuple(streams)} has nothing that a tuned lens reads: add 'resid_post', or give "
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
    trunk: Trunk, readout: Trunk, item: AtTargets, streams: Sequence[str], lens: TunedLens | None
) -> dict[str, Float[np.ndarray, "seq stream layer target"]]:
    """Decode one batch of a model with its own readout or another's."""
    mask, n_layers = item.targets.mask, trunk.n_layers
    sites: list[Tensor] = []
    for stream in streams:
        for layer in range(n_layers):
            resid = item.acts[hook_name(stream, layer)][mask]
            sites.append(lens.translate(resid, layer) if lens and stream == "resid_post" else resid)
    last = (list(streams).index("resid_post") + 1) * n_layers - 1 if "resid_post" in streams else None
    place: dict[str, Any] = {"device": readout.device, "dtype": readout.dtype}
    resid, final = (x.to(**place) for x in (torch.stack(sites, dim=1), item.final[mask]))
    flat = compare_to_final(readout, resid, final, item.targets.ids[mask].to(readout.device), last).cpu()
    out: dict[str, np.ndarray] = {}
    for k, key in enumerate(STATISTICS):
        full = torch.full((*mask.shape, len(sites)), torch.nan)
        full[mask.cpu()] = flat[..., k]
        out[key] = full.reshape(*mask.shape, len(streams), -1).permute(0, 2, 3, 1).numpy()
    return out


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Join batches, padded along `target` to a common width."""
    width = max(p.shape[-1] for p in parts)
    pads = [np.pad(p, [(0, 0)] * 3 + [(0, width - p.shape[-1])], constant_values=np.nan) for p in parts]
    return np.concatenate(pads)


register_kind("residual_decoding", plot=plot_decoding, reading=read_decoding)
