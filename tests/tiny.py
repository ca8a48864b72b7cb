"""Tiny random checkpoints of every family, written to disk as ordinary Hugging Face folders.

The weights are scaled up so that logits differ clearly between tokens and positions: a test on a
freshly initialized model would pass with half of the network missing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTBigCodeConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Starcoder2Config,
)

D_VOCAB = 101
END_OF_TEXT = "<|endoftext|>"
N_CTX = 64

_SPECIAL = {"bos_token_id": D_VOCAB - 1, "eos_token_id": D_VOCAB - 1, "pad_token_id": D_VOCAB - 1}
_SHAPE = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": N_CTX,
    **_SPECIAL,
}
_GPT_NEO_SHAPE = {
    "vocab_size": D_VOCAB,
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": N_CTX,
    "window_size": 8,
    "attention_types": [[["global", "local"], 2]],
    **_SPECIAL,
}
_BIGCODE_SHAPE = {
    "vocab_size": D_VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 64,
    "n_positions": N_CTX,
    "multi_query": True,
    **_SPECIAL,
}

_CONFIGS: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "gpt_neox": (GPTNeoXConfig, {**_SHAPE, "rotary_pct": 0.25}),
    "gpt_neox_sequential": (GPTNeoXConfig, {**_SHAPE, "rotary_pct": 0.25, "use_parallel_residual": False}),
    "gpt_neo": (GPTNeoConfig, _GPT_NEO_SHAPE),
    "olmo": (OlmoConfig, _SHAPE),
    "olmo2": (Olmo2Config, {**_SHAPE, "num_key_value_heads": 2}),
    "olmo3": (Olmo3Config, {**_SHAPE, "num_hidden_layers": 4, "num_key_value_heads": 2, "sliding_window": 8}),
    "llama": (LlamaConfig, _SHAPE),
    "llama_gqa": (LlamaConfig, {**_SHAPE, "num_key_value_heads": 2}),
    "gpt_bigcode": (GPTBigCodeConfig, _BIGCODE_SHAPE),
    "starcoder2": (Starcoder2Config, {**_SHAPE, "num_key_value_heads": 2, "sliding_window": None}),
}

FAMILIES: list[str] = list(_CONFIGS)
HOOKED_FAMILIES: list[str] = ["gpt_neox", "gpt_neox_sequential", "gpt_neo", "olmo", "olmo2", "olmo3"]
"""Those that HookedTransformer runs where the installed TransformerLens has the class."""


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Return the Hugging Face config of a tiny model of this family."""
    make, settings = _CONFIGS[family]
    return make(**{**settings, **overrides})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer: `"w3 w14"` is `[3, 14]`, end of text is the last id."""
    vocab = {f"w{i}": i for i in range(D_VOCAB - 1)} | {END_OF_TEXT: D_VOCAB - 1}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=END_OF_TEXT))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=N_CTX,
    )


def tiny_huggingface_model(family: str, *, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """Return a tiny random Hugging Face model, in float32 and evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(4)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_tiny(
    family: str, folder: str | Path, *, seed: int = 0, tokenizer: bool = True, **overrides: Any
) -> Path:
    """Write a tiny random checkpoint (config, safetensors, tokenizer) and return its folder.

    `overrides` change the Hugging Face config, e.g. `num_hidden_layers=2`.
    """
    folder = Path(folder)
    tiny_huggingface_model(family, seed=seed, **overrides).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def random_tokens(n: int = 2, length: int = 20, *, seed: int = 0) -> torch.Tensor:
    """Return token ids `[n, length]` without the end-of-text id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, D_VOCAB - 1, (n, length), generator=generator)
