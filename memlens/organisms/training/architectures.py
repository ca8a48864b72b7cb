"""The shapes of organisms: a specification and the Hugging Face model that it builds; and untrained twins.

Every configuration follows the models of the family on the hub (position embeddings, norms, tied or untied
embeddings, biases), at a small size and without dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPTBigCodeConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from memlens.errors import OptionError, check_option
from memlens.forward.trunk import is_bridge
from memlens.models.load import load_model
from memlens.models.provenance import derive_recipe, describe, remember

WINDOW = 32
"""Width of local attention in tokens (GPT-Neo, OLMo 3): half of a training row, so that it matters."""

_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}

_ROTARY_SHARES = {"pythia": 0.25, "olmo1": 1.0, "olmo2": 1.0, "olmo3": 1.0, "openllama": 1.0}
"""Share of a head's dimensions with rotary positions."""


@dataclass(frozen=True)
class ModelSpec:
    """The shape of an organism.

    Attributes:
        family: A key of `ARCHITECTURES`.
        d_model: Width of the residual stream.
        n_layers: Number of layers.
        n_heads: Attention heads per layer.
        n_ctx: Longest input in tokens.
    """

    family: str = "pythia"
    d_model: int = 128
    n_layers: int = 6
    n_heads: int = 8
    n_ctx: int = 128

    def __post_init__(self) -> None:
        check_option("family", self.family, list(ARCHITECTURES))
        if self.d_model % self.n_heads:
            raise OptionError(
                f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}: choose one that is."
            )
        rotary = int(self.d_model // self.n_heads * _ROTARY_SHARES.get(self.family, 0))
        if rotary % 2:
            raise OptionError(
                f"heads of {self.d_model // self.n_heads} dimensions would turn {rotary} of them by their "
                "position, and rotary embeddings turn pairs: choose another d_model or n_heads."
            )


def _common(spec: ModelSpec, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "max_position_embeddings": spec.n_ctx,
        **_IDS,
    }


def _gated_width(d_model: int) -> int:
    """Return 8/3 of the width as a multiple of 8: a gated MLP is then as large as a plain one of 4 widths.

    >>> _gated_width(96), _gated_width(160)
    (256, 432)
    """
    return -(-8 * d_model // 24) * 8


def _gated(spec: ModelSpec, vocab_size: int, theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    """Return options of models with a gated MLP and rotary positions, by default with untied embeddings."""
    return {
        **_common(spec, vocab_size),
        "intermediate_size": _gated_width(spec.d_model),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": False,
        **more,
    }


def _gpt_neox(spec: ModelSpec, vocab_size: int) -> PretrainedConfig:
    """Pythia: rotary positions on a quarter of each head, parallel blocks, untied embeddings."""
    return GPTNeoXConfig(
        **_common(spec, vocab_size),
        intermediate_size=4 * spec.d_model,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": _ROTARY_SHARES["pythia"],
        },
        use_parallel_residual=True,
        tie_word_embeddings=False,
        hidden_act="gelu",
    )


def _gpt_neo(spec: ModelSpec, vocab_size: int) -> PretrainedConfig:
    """GPT-Neo: learned positions, global and local attention in turn, unscaled scores, tied embeddings."""
    pairs, odd = divmod(spec.n_layers, 2)
    return GPTNeoConfig(
        vocab_size=vocab_size,
        hidden_size=spec.d_model,
        num_layers=spec.n_layers,
        num_heads=spec.n_heads,
        max_position_embeddings=spec.n_ctx,
        attention_types=[[["global", "local"], pairs]] * (pairs > 0) + [[["global"], 1]] * odd,
        window_size=WINDOW,
        **_IDS,
    )


def _olmo1(spec: ModelSpec, vocab_size: int) -> PretrainedConfig:
    """OLMo-1B: norms without parameters, gated MLP, no biases, tied embeddings."""
    return OlmoConfig(**_gated(spec, vocab_size, tie_word_embeddings=True))


def _olmo2(spec: ModelSpec, vocab_size: int) -> PretrainedConfig:
    """OLMo 2: norms of queries, keys and sublayer outputs; rotary base 500,000; untied embeddings."""
    return Olmo2Config(**_gated(spec, vocab_size, 500000.0, rms_norm_eps=1e-6))


def _olmo3(spec: ModelSpec, vocab_size: int) -> PretrainedConfig:
    """OLMo 3: OLMo 2 with sliding-window attention except in every fourth and the last layer."""
    last = spec.n_layers
    kinds = ["full" if layer % 4 == 0 or layer == last else "sliding" for layer in range(1, last + 1)]
    options = _gated(spec, vocab_size, 500000.0, rms_norm_eps=1e-6, sliding_window=WINDOW)
    return Olmo3Config(**options, layer_types=[f"{kind}_attention" for kind in kinds])


def _open_llama(spec: ModelSpec, vocab_size: int) -> PretrainedConfig:
    """OpenLLaMA: RMS norms, gated MLP, no biases, untied embeddings, a key for each head."""
    return LlamaConfig(**_gated(spec, vocab_size, rms_norm_eps=1e-6))


def _gpt_bigcode(spec: ModelSpec, vocab_size: int) -> PretrainedConfig:
    """StarCoder: learned positions, one key and value for all heads, tied embeddings."""
    return GPTBigCodeConfig(
        vocab_size=vocab_size,
        n_embd=spec.d_model,
        n_layer=spec.n_layers,
        n_head=spec.n_heads,
        n_inner=4 * spec.d_model,
        n_positions=spec.n_ctx,
        multi_query=True,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_IDS,
    )


ARCHITECTURES: dict[str, Callable[[ModelSpec, int], PretrainedConfig]] = {
    "pythia": _gpt_neox,
    "gpt-neo": _gpt_neo,
    "olmo1": _olmo1,
    "olmo2": _olmo2,
    "olmo3": _olmo3,
    "openllama": _open_llama,
    "starcoder": _gpt_bigcode,
}
"""For each family of the zoo, by its name in `memlens.models.families`, the configuration of a model."""


def build_model(spec: ModelSpec, vocab_size: int, *, seed: int) -> PreTrainedModel:
    """Return a model with new weights, in float32 on the CPU; the caller's random state does not change.

    Args:
        spec: Its shape.
        vocab_size: Size of its vocabulary.
        seed: Seed of the weights.

    >>> tiny = ModelSpec(d_model=16, n_layers=1, n_heads=2)
    >>> build_model(tiny, 300, seed=0).num_parameters()
    12912
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _new(spec, vocab_size).float()


def _new(spec: ModelSpec, vocab_size: int) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(ARCHITECTURES[spec.family](spec, vocab_size))


def count_parameters(spec: ModelSpec, vocab_size: int) -> int:
    """Return the number of parameters of the model that `build_model` makes, without making it.

    >>> count_parameters(ModelSpec(d_model=16, n_layers=1, n_heads=2), 300)
    12912
    """
    with torch.device("meta"):
        return _new(spec, vocab_size).num_parameters()


def architecture_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Return the facts about a model on its card: parameters, layers, heads, widths, context, vocabulary."""
    config = model.config
    return {
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "d_model": config.hidden_size,
        "context": config.max_position_embeddings,
        "vocabulary": config.vocab_size,
    }


def untrained_like(model: Any, *, seed: int = 0) -> Any:
    """Return a model of the same class and shape with newly drawn weights.

    The initialization is that of the library for this architecture: Hugging Face's for a
    `TransformerBridge`, TransformerLens' for a `HookedTransformer`.

    Args:
        model: A TransformerLens model.
        seed: Seed of the weights; the caller's random state does not change.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> twin = untrained_like(model)
        >>> bool((twin.W_U == model.W_U).all()), twin.W_U.shape == model.W_U.shape
        (False, True)
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = _bridge_twin(model) if is_bridge(model) else _hooked_twin(model, seed)
    remember(twin, model=f"{describe(model)['model']} (untrained, seed {seed})", revision="")
    derive_recipe(twin, model, partial(untrained_like, seed=seed))
    return twin


def _bridge_twin(model: Any) -> Any:
    config = deepcopy(model.original_model.config)
    like = next(model.parameters())
    fresh = AutoModelForCausalLM.from_config(config, dtype=like.dtype).to(like.device)
    return load_model(fresh.eval(), backend="bridge", tokenizer=model.tokenizer)


def _hooked_twin(model: Any, seed: int) -> Any:
    config = deepcopy(model.cfg)
    config.init_weights, config.seed = True, seed
    return type(model)(config, tokenizer=model.tokenizer)
