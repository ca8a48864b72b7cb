"""Wrap a Hugging Face model as a `TransformerBridge`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlens.errors import UnsupportedModelError
from memlens.models.families import architecture_of
from memlens.models.huggingface import placeholder_tokenizer
from memlens.models.quiet import quiet

_REFUSALS = (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError)


def check_bridge_supports(config: Any, name: str) -> None:
    """Raise `UnsupportedModelError` unless the installed bridge has an adapter for this architecture."""
    architecture = architecture_of(config)
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModelError(
            f"{name!r} is a {architecture}, which the installed TransformerLens cannot bridge: "
            f"upgrade transformer-lens, or use a model of another architecture."
        )


def build_bridge(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str,
    dtype: torch.dtype,
    process_weights: bool = False,
) -> TransformerBridge:
    """Return a bridge around a Hugging Face model, which is changed in place and kept as `.original_model`.

    Args:
        hf_model: The model; its attention is set to the eager implementation, so that hooks see the pattern.
        tokenizer: One from `prepare_tokenizer`, or None for a model that takes token ids only.
        name: The value of `cfg.model_name`.
        dtype: The dtype of its weights.
        process_weights: Fold LayerNorms and center weights (TransformerLens' compatibility mode).

    Raises:
        UnsupportedModelError: TransformerLens cannot bridge this variant of the architecture.
    """
    hf_model.config.architectures = hf_model.config.architectures or [type(hf_model).__name__]
    with quiet(), _readable_refusal(name):
        hf_model.set_attn_implementation("eager")
        bridge = TransformerBridge.boot_transformers(
            name,
            hf_model=hf_model,
            tokenizer=tokenizer or placeholder_tokenizer(),
            device=next(hf_model.parameters()).device,
            dtype=dtype,
        )
        _rotate_in_the_weights_dtype(bridge)
        _forget_patterns(bridge)
        if process_weights:
            bridge.enable_compatibility_mode(disable_warnings=True)
    if tokenizer is None:
        bridge.tokenizer = None
    return bridge


def _rotate_in_the_weights_dtype(bridge: TransformerBridge) -> None:
    """Cast rotated queries and keys back, as Hugging Face does.

    OLMo's rotations are float32 whatever the dtype of the weights; the bridge leaves queries and keys in it,
    and attention then fails with 16-bit weights.
    """
    for block in bridge.blocks:
        for name in ("hook_rot_q", "hook_rot_k"):
            point = getattr(getattr(block, "attn", None), name, None)
            if point is not None:
                point.register_forward_hook(partial(_cast, next(block.parameters())))


def _forget_patterns(bridge: TransformerBridge) -> None:
    """Let go of each layer's attention pattern when the layer has run.

    The bridge keeps the last one of fused attention, which nothing reads: positions squared per head and
    layer, and with gradients all that it was computed from.
    """
    for block in bridge.blocks:
        if "_pattern" in vars(getattr(block, "attn", block)):
            block.attn.register_forward_hook(_forget)


def _forget(module: Any, args: Any, output: Any) -> None:
    vars(module)["_pattern"] = None


def _cast(like: Tensor, module: Any, args: Any, output: Tensor) -> Tensor:
    return output.to(like.dtype)


@contextmanager
def _readable_refusal(name: str) -> Iterator[None]:
    """Adapters assume the form of a family's published models, and fail in arbitrary ways on a variant."""
    try:
        yield
    except _REFUSALS as error:
        reason = f"{type(error).__name__}: {error}".strip(": ")
        raise UnsupportedModelError(
            f"TransformerLens could not bridge {name!r} ({reason}): its config has an option that "
            "TransformerLens' adapter for this architecture does not know."
        ) from error
