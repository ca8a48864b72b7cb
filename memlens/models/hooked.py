"""Make a `HookedTransformer` from a checkpoint of Pythia's, GPT-Neo's or OLMo's kind, by its own config.

TransformerLens has these architectures, but takes the shape of OLMo 1 and 2 from a table of model names
and has no way in for a local folder of any of them. Here the shape is read from the checkpoint's config.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from memlens.errors import ModelLoadError
from memlens.models.families import architecture_of
from memlens.models.names import has_hooked_transformer
from memlens.models.quiet import quiet

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer


_ACTIVATIONS = {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu"}
_POST_NORM = {"Olmo2ForCausalLM", "Olmo3ForCausalLM"}


def hooked_obstacle(config: PreTrainedConfig) -> str:
    """Return why `HookedTransformer` cannot run a model of this config, or `""` if it can.

    >>> from transformers import LlamaConfig
    >>> "LlamaForCausalLM" in hooked_obstacle(LlamaConfig()) or not has_hooked_transformer()
    True
    """
    if not has_hooked_transformer():
        return "the installed TransformerLens has no HookedTransformer (removed in 4.0)"
    architecture = architecture_of(config)
    if architecture not in _SETTINGS:
        return f"memlens makes no HookedTransformer of a {architecture}"
    settings = _SETTINGS[architecture](config)
    if settings["act_fn"] not in _ACTIVATIONS:
        return f"HookedTransformer has no activation function {settings['act_fn']!r}"
    if settings["d_head"] * settings["n_heads"] != settings["d_model"]:
        return "the heads' sizes do not add up to the model's width"
    return _unusual_attention(config, architecture)


def _unusual_attention(config: PreTrainedConfig, architecture: str) -> str:
    """Options of these architectures that no published model of the families uses."""
    if architecture == "GPTNeoXForCausalLM" and not getattr(config, "attention_bias", True):
        return "its attention has no biases, which HookedTransformer's GPT-NeoX must have"
    if architecture.startswith("Olmo") and getattr(config, "attention_bias", False):
        return "its attention has biases, which HookedTransformer's OLMo must not have"
    if architecture == "OlmoForCausalLM" and config.num_key_value_heads != config.num_attention_heads:
        return "it has fewer key-value heads than heads, which HookedTransformer's OLMo 1 cannot have"
    rotary_kinds = {rope.get("rope_type", "default") for rope in _rope_dicts(config)}
    allowed = {"default", "yarn"} if architecture == "Olmo3ForCausalLM" else {"default"}
    if not rotary_kinds <= allowed:
        return f"its rotary embedding is scaled ({', '.join(sorted(rotary_kinds - allowed))})"
    return ""


def hooked_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the shape of the `HookedTransformerConfig` that a Hugging Face config describes.

    Valid where `hooked_obstacle(config)` is `""`.

    >>> from transformers import GPTNeoXConfig
    >>> settings = hooked_settings(GPTNeoXConfig(hidden_size=64, num_attention_heads=4))
    >>> settings["d_head"], settings["rotary_dim"], settings["parallel_attn_mlp"]
    (16, 4, True)
    """
    return _SETTINGS[architecture_of(config)](config)


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
        hf_model: A model whose config has no `hooked_obstacle`.
        tokenizer: One from `prepare_tokenizer`, or None for a model that takes token ids only.
        name: What `cfg.model_name` shall say.
        dtype: The dtype of the new model's weights.
        device: Where the new model shall be.
        process_weights: Fold LayerNorms, center what writes to the residual stream and the unembedding.
    """
    lens: Any = import_module("transformer_lens")
    architecture = architecture_of(hf_model)
    settings = hooked_settings(hf_model.config)
    settings |= {"original_architecture": architecture, "model_name": name, "init_weights": False}
    settings |= {"dtype": dtype, "device": str(device)}
    with quiet(), torch.no_grad():
        cfg = lens.HookedTransformerConfig(**settings)
        weights = {k: v.to(dtype) for k, v in _converter(architecture)(hf_model, cfg).items()}
        model = lens.HookedTransformer(cfg, tokenizer, move_to_device=False)
        _load(
            model, weights, process_weights=process_weights, post_norm=architecture in _POST_NORM, name=name
        )
        model.to(device, print_details=False)
    return model.eval()


def _load(
    model: Any, weights: dict[str, Tensor], *, process_weights: bool, post_norm: bool, name: str
) -> None:
    """Load converted weights; every parameter must get a value, save biases the architecture lacks."""
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


def _converter(architecture: str) -> Callable[[Any, Any], dict[str, Tensor]]:
    """TransformerLens' own weight conversion; OLMo 3's fits OLMo 2 as well and knows grouped queries."""
    conversions: Any = import_module("transformer_lens.pretrained.weight_conversions")
    return {
        "GPTNeoXForCausalLM": conversions.convert_neox_weights,
        "GPTNeoForCausalLM": conversions.convert_neo_weights,
        "OlmoForCausalLM": conversions.convert_olmo_weights,
        "Olmo2ForCausalLM": conversions.convert_olmo3_weights,
        "Olmo3ForCausalLM": conversions.convert_olmo3_weights,
    }[architecture]


def _rope_dicts(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary settings: one for all layers, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _common_settings(config: PreTrainedConfig) -> dict[str, Any]:
    n_heads = config.num_attention_heads
    return {
        "d_model": config.hidden_size,
        "d_head": getattr(config, "head_dim", None) or config.hidden_size // n_heads,
        "n_heads": n_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "act_fn": config.hidden_act,
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_base": _rope_dicts(config)[0].get("rope_theta", 10000.0),
        "initializer_range": config.initializer_range,
    }


def _gpt_neox(config: PreTrainedConfig) -> dict[str, Any]:
    settings = _common_settings(config)
    rotary_share = _rope_dicts(config)[0].get("partial_rotary_factor", 1.0)
    return settings | {
        "eps": config.layer_norm_eps,
        "normalization_type": "LN",
        "parallel_attn_mlp": config.use_parallel_residual,
        "rotary_dim": int(settings["d_head"] * rotary_share),
        "default_prepend_bos": False,
    }


def _gpt_neo(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "d_model": config.hidden_size,
        "d_head": config.hidden_size // config.num_heads,
        "n_heads": config.num_heads,
        "d_mlp": config.intermediate_size or 4 * config.hidden_size,
        "n_layers": config.num_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "act_fn": config.activation_function,
        "eps": config.layer_norm_epsilon,
        "normalization_type": "LN",
        "use_attn_scale": False,
        "use_local_attn": True,
        "attn_types": list(config.attention_layers),
        "window_size": config.window_size,
        "initializer_range": config.initializer_range,
    }


def _olmo(config: PreTrainedConfig) -> dict[str, Any]:
    settings = _common_settings(config)
    return settings | {
        "eps": 1e-5,  # fixed in the architecture: its norms have no parameters
        "normalization_type": "LN",
        "gated_mlp": True,
        "rotary_dim": settings["d_head"],
        "clip_qkv": config.clip_qkv,
    }


def _olmo2(config: PreTrainedConfig) -> dict[str, Any]:
    settings = _common_settings(config)
    grouped = config.num_key_value_heads != config.num_attention_heads
    return settings | {
        "eps": config.rms_norm_eps,
        "normalization_type": "RMS",
        "gated_mlp": True,
        "rotary_dim": settings["d_head"],
        "n_key_value_heads": config.num_key_value_heads if grouped else None,
    }


def _olmo3(config: PreTrainedConfig) -> dict[str, Any]:
    local = ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types]
    windows = {"use_local_attn": True, "attn_types": local, "window_size": config.sliding_window}
    return _olmo2(config) | (windows if "local" in local else {}) | _olmo3_rotary(config)


def _olmo3_rotary(config: PreTrainedConfig) -> dict[str, Any]:
    """Settings may differ by the kind of layer: YaRN where attention is global, plain where it slides."""
    rope = getattr(config, "rope_parameters", None) or {}
    everywhere = rope.get("full_attention", rope) or {}
    sliding = rope.get("sliding_attention") or {}
    settings: dict[str, Any] = {"rotary_base": everywhere.get("rope_theta", 500000.0)}
    if sliding.get("rope_theta", settings["rotary_base"]) != settings["rotary_base"]:
        settings["rotary_base_local"] = sliding["rope_theta"]
    if everywhere.get("rope_type") == "yarn":
        settings |= {
            "use_yarn_rope": True,
            "yarn_global_attn_only": sliding.get("rope_type", "yarn") != "yarn",
            "yarn_factor": float(everywhere["factor"]),
            "yarn_attention_factor": _yarn_attention_factor(everywhere),
            "yarn_beta_fast": float(everywhere.get("beta_fast") or 32.0),
            "yarn_beta_slow": float(everywhere.get("beta_slow") or 1.0),
            "yarn_original_max_position_embeddings": everywhere["original_max_position_embeddings"],
            "yarn_truncate": everywhere.get("truncate", True),
        }
    return settings


def _yarn_attention_factor(rope: dict[str, Any]) -> float:
    """`0.1 ln(factor) + 1` unless the config states it (YaRN paper, section 3.4; transformers' default)."""
    stated = rope.get("attention_factor")
    return (
        float(stated)
        if stated is not None
        else 0.1 * float(torch.log(torch.tensor(float(rope["factor"])))) + 1.0
    )


_SETTINGS: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {
    "GPTNeoXForCausalLM": _gpt_neox,
    "GPTNeoForCausalLM": _gpt_neo,
    "OlmoForCausalLM": _olmo,
    "Olmo2ForCausalLM": _olmo2,
    "Olmo3ForCausalLM": _olmo3,
}
