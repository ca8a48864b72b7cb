"""The comparison with Hugging Face's model, and the bounds of every comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlens.errors import ModelLoadError
from memlens.forward.check.table import Check, Status
from memlens.forward.hooks import hook_name
from memlens.forward.trunk import Trunk
from memlens.models.provenance import describe
from memlens.models.state import content_key

_ROWS, _LENGTH = 2, 12
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.04, torch.float16: 0.01}
"""Largest root mean square of a difference, relative to that of what it is compared with (centered).

In 16 bits rounding adds up over layers, so there these bounds are for four layers and grow with the square
root of the depth; what one layer adds is compared as well, from the same residual."""
SAME = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
"""The same, where both sides run on the same modules or through one layer only."""


@dataclass(frozen=True)
class Reference:
    """What the Hugging Face model computes on the probe tokens.

    Attributes:
        tokens: The probe tokens.
        resid: The residual at the input of each layer, `[layer, seq, pos, d_model]`; empty where the model
            does not give it.
        logits: Its logits.
    """

    tokens: Int[Tensor, "seq pos"]
    resid: list[Float[Tensor, "seq pos d_model"]]
    logits: Float[Tensor, "seq pos vocab"]


def probe_tokens(vocab: int, n_ctx: int | None) -> Int[Tensor, "seq pos"]:
    """Return the tokens that models are compared on: fixed, and spread over the vocabulary."""
    length = min(_LENGTH, n_ctx or _LENGTH)
    ids = torch.arange(_ROWS * length) * 7919 + 11
    return (ids % vocab).reshape(_ROWS, length)


@torch.no_grad()
def record_reference(hf_model: Any, name: str) -> Reference:
    """Run the Hugging Face model on the probe tokens, before anything changes it.

    Raises:
        ModelLoadError: It does not run.
    """
    config: Any = hf_model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    tokens = probe_tokens(config.vocab_size, getattr(config, "max_position_embeddings", None))
    was_training, attention = hf_model.training, getattr(config, "_attn_implementation", None)
    try:
        hf_model.set_attn_implementation("eager")  # as TransformerLens runs it: rounding alike
        out = hf_model.eval()(
            input_ids=tokens.to(next(hf_model.parameters()).device),
            output_hidden_states=True,
            use_cache=False,
        )
    except Exception as error:
        raise ModelLoadError(
            f"{name!r} does not run in transformers ({type(error).__name__}: {error})."
        ) from error
    finally:
        hf_model.train(was_training)
        if attention is not None:
            hf_model.set_attn_implementation(attention)
    states = getattr(out, "hidden_states", None) or ()
    return Reference(tokens, [state.detach() for state in states[:-1]], out.logits.detach())


def size_of(x: Tensor) -> float:
    """Return the root mean square."""
    return float(wide(x).square().mean().sqrt())


def wide(x: Tensor) -> Tensor:
    """Return numbers in which sums of squares are far more exact than any bound here."""
    return x if x.dtype == torch.float64 else x.float()


def compared(
    name: str, a: Tensor, b: Tensor, bounds: dict[torch.dtype, float], note: str = "", depth: int = 1
) -> Check:
    """Compare two tensors by the root mean square of their difference, relative to that of `b`, centered."""
    allowed = bounds.get(a.dtype, bounds[torch.float32])
    if a.dtype.itemsize < 4:
        allowed *= max(1.0, depth / 4) ** 0.5
    if a.shape != b.shape:
        return Check(name, "failed", allowed=allowed, note=f"shape {tuple(a.shape)}, not {tuple(b.shape)}")
    a, b = wide(a), wide(b).to(a.device)
    difference = size_of(a - b) / max(size_of(b - b.mean(-1, keepdim=True)), 1e-12)
    difference = difference if difference == difference else float("inf")
    status: Status = "ok" if difference <= allowed else "failed"
    return Check(name, status, difference, allowed, note=note)


def against_huggingface(
    model: Any, reference: Reference | None, resid: dict[str, Tensor], logits: Tensor
) -> Check:
    """Compare logits with Hugging Face's; without a reference, return what was found when it was loaded."""
    if reference is None:
        found, key = AT_LOAD.get(model, (None, None))
        if found is None:
            return Check("logits", "not compared", note="not loaded by memlens, or unchecked")
        if key != content_key(model):
            return Check("logits", "not compared", note="the model has been changed since it was loaded")
        return found
    expected = reference.logits.to(logits.device)
    depth = len(model.blocks)
    if _processed(model):  # centering the unembedding shifts all logits of a position by one constant
        logits, expected = logits.float().log_softmax(-1), expected.float().log_softmax(-1)
        return compared(
            "logits", logits, expected, TOLERANCE, "log-probabilities against Hugging Face's", depth
        )
    found = compared("logits", logits, expected, TOLERANCE, "against Hugging Face's", depth)
    if found.status == "ok":
        return found
    for layer, own in enumerate(reference.resid):
        name = hook_name("resid_pre", layer)
        if name in resid and compared("", resid[name], own, TOLERANCE, depth=layer).status == "failed":
            first = max(0, layer - 1)
            note = "differs from Hugging Face's model" + (" in its embedding" if layer == 0 else "")
            return replace(found, layer=first, note=note)
    note = "differs from Hugging Face's model after the last layer's input"
    return replace(found, layer=depth - 1, note=note)


def by_layer(trunk: Trunk, reference: Reference, found: Check) -> Check:
    """Compare what each layer adds to the residual, from Hugging Face's own residual: nothing adds up."""
    if _processed(trunk.model):
        return found
    allowed = SAME[reference.logits.dtype]
    rounding = torch.finfo(reference.logits.dtype).eps
    for layer, (start, end) in enumerate(pairwise(reference.resid)):
        out = trunk.run(start.to(trunk.device), layer, layer + 1).to(end.device)
        added = size_of(wide(end) - start) + rounding * size_of(end) / allowed
        off = size_of(wide(out) - end) / max(added, 1e-12)
        if not off <= allowed:
            note = "what the layer adds to the residual differs from Hugging Face's model"
            return Check("logits", "failed", off, allowed, layer, note)
    return found


def _processed(model: Any) -> bool:
    return bool(describe(model)["processed_weights"])


AT_LOAD: WeakKeyDictionary[Any, tuple[Check, tuple[Any, ...]]] = WeakKeyDictionary()
"""The comparison with Hugging Face's model, which is gone later, and the content when it was loaded."""
