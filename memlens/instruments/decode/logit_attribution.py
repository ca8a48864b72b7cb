"""Direct logit attribution: what each head and MLP writes directly into the target's logit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from memlens.errors import check_option
from memlens.forward.capture import AtTargets, captured_at_targets
from memlens.forward.exclusive import computes
from memlens.forward.hooks import hook_name
from memlens.forward.read_weights import (
    Norm,
    attention_post_norm,
    output_projection,
    read_norm,
    target_directions,
)
from memlens.forward.trunk import Trunk
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_attribution
from memlens.results.readings import read_attribution
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result

BASELINES = ("mean_logit", "none")


@computes
@torch.no_grad()
def attribute_logits(
    model: Any,
    sequences: SequenceSet,
    *,
    baseline: str = "mean_logit",
    cache: Any = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Result:
    r"""Divide each target's logit among what embedding, heads and MLPs wrote to the residual.

    With the scale :math:`\sigma` of the final norm fixed at its value in this run, the logit is linear in the
    residual: component :math:`c` contributes :math:`\frac{(c - \bar c)\,\gamma}{\sigma}\cdot W_U[:,y]`
    (without :math:`\bar c` for RMSNorm). All components and the biases sum to the logit exactly. If a block
    norms its attention output (OLMo 2 and 3), the scale of that norm is fixed too.

    Args:
        model: A TransformerLens model.
        sequences: The recalled sequences.
        baseline: "mean_logit" measures the target's logit above the mean over the vocabulary, without what
            raises all tokens alike; "none" measures the logit itself.
        cache: An `ActivationCache` of ``sequences.tokens`` to read instead of running the model.
        batch_size: Sequences at a time.
        progress: Show a progress bar.

    Returns:
        Kind "logit_attribution", in logits, means over the continuation's tokens: `head_logit`
        `(sequence, layer, head)`, `attn`, `attn_bias` and `mlp` `(sequence, layer)`, `embedding`, `bias`
        and `total` `(sequence)`. `attn` is the sum of its heads and `attn_bias`; `total` is `embedding` +
        all `attn` + all `mlp` + `bias`.

    Raises:
        OptionError: Unknown baseline.
        EmptySetError: No sequences.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> data = ml.attribute_logits(model, ml.load_sequences("zoo", model)[:2], progress=False).data
        >>> whole = data.embedding + data.attn.sum("layer") + data.mlp.sum("layer") + data.bias
        >>> bool(abs(whole - data.total).max() < 1e-3)
        True
    """
    check_option("baseline", baseline, BASELINES)
    trunk = Trunk(model)
    layers = range(trunk.n_layers)
    names = [hook_name(site, layer) for site in ("attn_out", "mlp_out", "z") for layer in layers]
    names.append(hook_name("resid_pre", 0))
    writers = [_Writer(trunk, layer) for layer in layers]
    norm = read_norm(model.ln_final, trunk.d_model, model.cfg, next(model.parameters()))
    how: dict[str, Any] = {"cache": cache, "batch_size": batch_size, "progress": progress}
    batches = captured_at_targets(trunk, sequences, names, desc="attribute logits", **how)
    centered = baseline == "mean_logit"
    parts = [_attribute(trunk, writers, norm, item, centered=centered) for item in batches]
    dims = {"head_logit": ("layer", "head"), "attn": ("layer",), "attn_bias": ("layer",), "mlp": ("layer",)}
    variables = {k: (("sequence", *dims.get(k, ())), np.concatenate([p[k] for p in parts])) for k in parts[0]}
    coords = {"layer": list(layers), "head": list(range(trunk.n_heads))}
    return make_result("logit_attribution", model, sequences, variables, coords, {"baseline": baseline})


class _Writer:
    """What the heads of one layer add to the residual, after the block's post-norm if it has one."""

    def __init__(self, trunk: Trunk, layer: int) -> None:
        self.layer = layer
        self.w_o, self.b_o = output_projection(trunk.model, layer)
        self.post = attention_post_norm(trunk.model, layer)
        cfg = trunk.model.cfg
        self.affine = None if self.post is None else read_norm(self.post, trunk.d_model, cfg, self.b_o)

    def heads(
        self, z: Float[Tensor, "batch target head d_head"]
    ) -> Float[Tensor, "batch target head d_model"]:
        """Return the part of each head in `hook_attn_out`."""
        out = einsum(z, self.w_o, "b t h d, h d m -> b t h m")
        if self.post is None or self.affine is None:
            return out
        raw = out.sum(2) + self.b_o
        return self.affine.linear(out) * self.affine.inverse_scale(raw, self.post(raw))[:, :, None]


def _attribute(
    trunk: Trunk, writers: list[_Writer], norm: Norm, item: AtTargets, *, centered: bool
) -> dict[str, np.ndarray]:
    direction, unembed_bias = target_directions(trunk.model, item.targets.ids, centered=centered)
    inverse = norm.inverse_scale(item.final, trunk.final_norm(item.final))
    mask = item.targets.mask

    def credit(part: Float[Tensor, "batch target *site d_model"]) -> np.ndarray:
        """Return the mean over targets of a part's logit, `[batch, *site]`."""
        extra = part.ndim - 3
        shape = (*direction.shape[:2], *[1] * extra, -1)
        logit = (norm.linear(part) * direction.reshape(shape) * inverse.reshape(shape)).sum(-1)
        return _mean(logit, mask)

    heads = np.stack([credit(w.heads(item.acts[hook_name("z", w.layer)])) for w in writers], axis=1)
    attn = np.stack([credit(item.acts[hook_name("attn_out", w.layer)]) for w in writers], axis=1)
    mlp = np.stack([credit(item.acts[hook_name("mlp_out", w.layer)]) for w in writers], axis=1)
    logits = trunk.unembed(item.final)
    total = logits.gather(-1, item.targets.ids[..., None])[..., 0] - (logits.mean(-1) if centered else 0)
    return {
        "attn": attn, "attn_bias": attn - heads.sum(-1), "mlp": mlp,
        "embedding": credit(item.acts[hook_name("resid_pre", 0)]),
        "bias": _mean((norm.bias * direction).sum(-1) + unembed_bias, mask), "total": _mean(total, mask),
        "head_logit": heads,
    }  # fmt: skip


def _mean(values: Float[Tensor, "batch target *site"], mask: Tensor) -> np.ndarray:
    weight = mask.reshape(*mask.shape, *[1] * (values.ndim - 2))
    return (torch.where(weight, values, 0).sum(1) / weight.sum(1)).float().cpu().numpy()


register_kind(
    "logit_attribution",
    plot=plot_attribution,
    reading=read_attribution,
    cites=(("elhage2021", "direct effects on the logits"),),
)
