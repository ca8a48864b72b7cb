"""How `HookedTransformer` describes each family that it runs, read from a checkpoint's own config.

TransformerLens takes the shapes of OLMo 1 and 2 from a table of model names, and cannot load a local folder
of any of these families.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

_ACTIVATIONS = {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu"}


@dataclass(frozen=True)
class HookedForm:
    """A family as `HookedTransformer` sees it; the last three fields say which variants it can run.

    Attributes:
        settings: From a Hugging Face config to the fields of a `HookedTransformerConfig`.
        converter: TransformerLens' function that converts the weights.
        attention_bias: Whether queries, keys and values have biases; None where the config does not say.
        grouped: Whether there may be fewer key-value heads than heads.
        rotary: Kinds of rotary embedding.
    """

    settings: Callable[[PreTrainedConfig], dict[str, Any]]
    converter: str
    attention_bias: bool | None = None
    grouped: bool = True
    rotary: frozenset[str] = frozenset({"default"})

    def obstacle(self, config: PreTrainedConfig) -> str:
        """Return why `HookedTransformer` cannot run a model of this config, or `""` if it can."""
        settings = self.settings(config)
        if settings["act_fn"] not in _ACTIVATIONS:
            return f"HookedTransformer has no activation function {settings['act_fn']!r}"
        if settings["d_head"] * settings["n_heads"] != settings["d_model"]:
            return "the sizes of the heads do not add up to the model's width"
        bias = getattr(config, "attention_bias", self.attention_bias)
        if self.attention_bias is not None and bool(bias) != self.attention_bias:
            has, must = ("biases", "must not have") if bias else ("no biases", "must have")
            return f"its attention has {has}, which HookedTransformer {must} in this family"
        if not self.grouped and config.num_key_value_heads != config.num_attention_heads:
            return (
                "it has fewer key-value heads than heads, which HookedTransformer cannot have in this family"
            )
        kinds = {rope.get("rope_type", "default") for rope in _rope_dicts(config)}
        if not kinds <= self.rotary:
            return f"its rotary embedding is scaled ({', '.join(sorted(kinds - self.rotary))})"
        return ""


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
    """Settings may differ by the kind of layer: YaRN for global attention, plain for sliding windows."""
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
    return float(stated) if stated is not None else 0.1 * math.log(float(rope["factor"])) + 1.0


GPT_NEOX = HookedForm(_gpt_neox, "convert_neox_weights", attention_bias=True)
GPT_NEO = HookedForm(_gpt_neo, "convert_neo_weights")
OLMO = HookedForm(_olmo, "convert_olmo_weights", attention_bias=False, grouped=False)
OLMO2 = HookedForm(_olmo2, "convert_olmo3_weights", attention_bias=False)
"""OLMo 3's conversion fits OLMo 2 as well, and knows grouped queries."""
OLMO3 = HookedForm(
    _olmo3, "convert_olmo3_weights", attention_bias=False, rotary=frozenset({"default", "yarn"})
)
