"""Build a `HookedTransformer` from a Hugging Face model of a family that it runs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from memlens.errors import ModelLoadError
from memlens.models.families import architecture_of, family_by_architecture
from memlens.models.names import has_hooked_transformer
from memlens.models.quiet import quiet

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


def hooked_obstacle(config: PreTrainedConfig) -> str:
    """Return why `HookedTransformer` cannot run a model of this config, or `""` if it can.

    >>> from transformers import LlamaConfig
    >>> "LlamaForCausalLM" in hooked_obstacle(LlamaConfig()) or not has_hooked_transformer()
    True
    """
    if not has_hooked_transformer():
        return "the installed TransformerLens has no HookedTransformer (removed in 4.0)"
    family = family_by_architecture(architecture_of(config))
    if family is None or family.hooked is None:
        return f"memlens makes no HookedTransformer of a {architecture_of(config)}"
    if (n_ctx := config.max_position_embeddings) > _LONGEST:
        return f"it makes a table of {n_ctx:,} x {n_ctx:,} for this context"
    return family.hooked.obstacle(config)


_LONGEST = 2**16
"""Of all contexts that families with a `HookedTransformer` have."""


def build_hooked(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    process_weights: bool = False,
) -> HookedTransformer:
    """Return a `HookedTransformer` with a copy of a Hugging Face model's weights.

    Args:
        hf_model: A model for whose config `hooked_obstacle` returns `""`.
        tokenizer: One from `prepare_tokenizer`, or None for a model that takes token ids only.
        name: The value of `cfg.model_name`.
        dtype: The dtype of the new model's weights.
        device: Device of the new model.
        process_weights: Fold LayerNorms, and center the unembedding and what writes to the residual stream.
    """
    lens: Any = import_module("transformer_lens")
    architecture = architecture_of(hf_model)
    family = family_by_architecture(architecture)
    assert family is not None
    assert family.hooked is not None
    settings = family.hooked.settings(hf_model.config)
    settings |= {"original_architecture": architecture, "model_name": name, "init_weights": False}
    settings |= {"dtype": dtype, "device": str(device)}
    conversions: Any = import_module("transformer_lens.pretrained.weight_conversions")
    with quiet(), torch.no_grad():
        cfg = lens.HookedTransformerConfig(**settings)
        converted = getattr(conversions, family.hooked.converter)(hf_model, cfg)
        weights = {k: v.to(dtype) for k, v in converted.items()}
        model = lens.HookedTransformer(cfg, tokenizer, move_to_device=False)
        _load(model, weights, process_weights=process_weights, post_norm=family.post_norm, name=name)
        model.to(device, print_details=False)
    return model.eval()


def _load(
    model: Any, weights: dict[str, Tensor], *, process_weights: bool, post_norm: bool, name: str
) -> None:
    """Load converted weights; every parameter must get a value, except for biases the architecture lacks."""
    zeros = {key: p for key, p in model.named_parameters() if key.endswith((".b_Q", ".b_K", ".b_V"))}
    weights = {key: torch.zeros_like(p) for key, p in zeros.items()} | weights
    missing = sorted({key for key, _ in model.named_parameters()} - set(weights))
    if missing:
        raise ModelLoadError(
            f"TransformerLens gave no value for {missing[0]!r} (and {len(missing) - 1} more parameters) "
            f"of {name!r}: use backend='bridge'."
        )
    if not process_weights:
        model.load_state_dict(weights, strict=False)
        return
    # norms after a sublayer cannot be folded into what comes before them
    model.load_and_process_state_dict(weights, fold_ln=not post_norm, center_writing_weights=not post_norm)
