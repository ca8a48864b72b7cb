"""The shapes that organisms come in: a specification and the Hugging Face model it builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from memlens.errors import OptionError, check_option

__all__ = ["ARCHITECTURES", "ModelSpec", "architecture_facts", "build_model"]


@dataclass(frozen=True)
class ModelSpec:
    """The shape of an organism.

    Attributes:
        family: a key of `ARCHITECTURES`.
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_heads: attention heads of a block.
        n_ctx: longest input in tokens.
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
                f"d_model={self.d_model} cannot be shared by n_heads={self.n_heads}: choose a multiple of it."
            )


def _gpt_neox(spec: ModelSpec, vocab_size: int) -> PreTrainedModel:
    """Pythia's kind: rotary positions on a quarter of each head, parallel blocks, untied embeddings."""
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=spec.d_model,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        intermediate_size=4 * spec.d_model,
        max_position_embeddings=spec.n_ctx,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        tie_word_embeddings=False,
        hidden_act="gelu",
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


ARCHITECTURES: dict[str, Callable[[ModelSpec, int], PreTrainedModel]] = {"pythia": _gpt_neox}


def build_model(spec: ModelSpec, vocab_size: int, *, seed: int) -> PreTrainedModel:
    """Return a model with fresh weights, in float32, on the CPU; the caller's random state stays as it was.

    Args:
        spec: its shape.
        vocab_size: of its tokenizer.
        seed: of the weights.

    >>> tiny = ModelSpec(d_model=16, n_layers=1, n_heads=2)
    >>> build_model(tiny, 300, seed=0).num_parameters()
    12912
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[spec.family](spec, vocab_size).float()


def architecture_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a card tells of a model: parameters, layers, heads, widths, context, vocabulary."""
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
