"""The models: random weights in the shapes of Pythia and other families, and the bundled zoo models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    PreTrainedConfig,
    Qwen3Config,
)

import memlens as ml

SHAPES: dict[str, tuple[int, int, int]] = {
    "pythia-70m": (6, 512, 8),
    "pythia-160m": (12, 768, 12),
    "pythia-410m": (24, 1024, 16),
    "pythia-1.4b": (24, 2048, 16),
}
"""Layers, width and heads."""

OTHERS: dict[str, PreTrainedConfig] = {
    "gpt2-124m": GPT2Config(),
    "qwen3-160m": Qwen3Config(
        vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, head_dim=64,
        num_key_value_heads=4, intermediate_size=2048, max_position_embeddings=2048,
    ),
    "gemma3-160m": Gemma3TextConfig(
        vocab_size=50304, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, head_dim=64,
        num_key_value_heads=4, intermediate_size=2048, max_position_embeddings=2048, sliding_window=512,
    ),
}  # fmt: skip
"""Shapes of other families, of about the size of `pythia-160m`; the bridge runs all of them."""


def build(name: str, backend: str, *, dtype: str = "float32", device: str | None = None) -> Any:
    """Return a zoo model, or a model of this shape with random weights (always the same seed)."""
    if name.startswith("zoo/"):
        return ml.load_model(name, backend=backend, dtype=dtype, device=device)
    config = OTHERS[name] if name in OTHERS else _pythia(*SHAPES[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return ml.load_model(model, backend=backend, dtype=dtype, device=device)


def _pythia(layers: int, width: int, heads: int) -> PreTrainedConfig:
    return GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=2048,
        rotary_pct=0.25,
        bos_token_id=0,
        eos_token_id=0,
    )


@torch.no_grad()
def recalled(model: Any, n: int, prefix: int, targets: int, *, seed: int = 0) -> ml.SequenceSet:
    """Return random prefixes with the model's own greedy continuations, so that all are "memorized"."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, model.cfg.d_vocab, (n, prefix), generator=generator)
    for _ in range(targets):
        logits = model(tokens.to(model.cfg.device))[:, -1]
        logits[:, 0] = float("-inf")  # end of text would stop generation early
        tokens = torch.cat([tokens, logits.argmax(-1)[:, None].cpu()], 1)
    return ml.SequenceSet.from_tokens(tokens, prefix)
