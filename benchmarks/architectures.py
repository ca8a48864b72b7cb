"""Load one tiny model of many architectures and tabulate what memlens makes of each.

For every architecture, on both backends and in float32 and bfloat16: are the logits Hugging Face's, do
sweeps take the fast path, or is the model refused, and why? The table in docs/how-to/models.md comes from

    python -m benchmarks.architectures
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as hf

import memlens as ml

_SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MHA = {key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"}
_GPT = {
    "vocab_size": 128,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Pythia": ("GPTNeoX", {**_MHA, "rotary_pct": 0.25}),
    "GPT-NeoX, sequential": ("GPTNeoX", {**_MHA, "use_parallel_residual": False}),
    "GPT-Neo": (
        "GPTNeo",
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 8,
            "max_position_embeddings": 64,
            "intermediate_size": 96,
        },
    ),
    "OLMo": ("Olmo", _MHA),
    "OLMo 2": ("Olmo2", _MHA),
    "OLMo 3": ("Olmo3", {**_MHA, "sliding_window": 8}),
    "OLMoE": ("Olmoe", {**_MHA, "num_experts": 4, "num_experts_per_tok": 2}),
    "Llama": ("Llama", _MHA),
    "Llama, grouped queries": ("Llama", _SHAPE),
    "Llama, tied embeddings": ("Llama", {**_SHAPE, "tie_word_embeddings": True}),
    "Llama, attention bias": ("Llama", {**_SHAPE, "attention_bias": True}),
    "StarCoder": ("GPTBigCode", _GPT),
    "StarCoder 2": ("Starcoder2", _SHAPE),
    "GPT-2": ("GPT2", _GPT),
    "GPT-J": ("GPTJ", {**_GPT, "rotary_dim": 8}),
    "CodeGen": ("CodeGen", {**_GPT, "rotary_dim": 8}),
    "Mistral": ("Mistral", {**_SHAPE, "sliding_window": 8}),
    "Mixtral": ("Mixtral", {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen 2": ("Qwen2", _SHAPE),
    "Qwen 3": ("Qwen3", {**_SHAPE, "head_dim": 16}),
    "Qwen 3 MoE": ("Qwen3Moe", {**_SHAPE, **_EXPERTS, "head_dim": 16}),
    "Gemma": ("Gemma", {**_SHAPE, "head_dim": 16}),
    "Gemma 2": ("Gemma2", {**_SHAPE, "head_dim": 16, "sliding_window": 8}),
    "Gemma 3": ("Gemma3", {**_SHAPE, "head_dim": 16, "sliding_window": 8}),
    "Granite": (
        "Granite",
        {**_SHAPE, "logits_scaling": 8.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0},
    ),
    "Cohere": ("Cohere", {**_SHAPE, "logit_scale": 0.25}),
    "Cohere 2": ("Cohere2", {**_SHAPE, "logit_scale": 0.25, "sliding_window": 8}),
    "Phi": ("Phi", _MHA),
    "Phi 3": ("Phi3", _SHAPE),
    "StableLM": ("StableLm", _SHAPE),
    "Falcon": (
        "Falcon",
        {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "BLOOM": ("Bloom", {"vocab_size": 128, "hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "MPT": ("Mpt", {"vocab_size": 128, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    "OPT": (
        "OPT",
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "ffn_dim": 96,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 64,
        },
    ),
    "SmolLM 3": ("SmolLM3", _SHAPE),
    "GLM 4": ("Glm4", {**_SHAPE, "head_dim": 16}),
    "Nemotron": ("Nemotron", _SHAPE),
}


def tiny(name: str, dtype: torch.dtype) -> Any:
    """Return a random Hugging Face model of an architecture, with weights large enough to matter."""
    stem, options = ARCHITECTURES[name]
    kind = "GPT2LMHeadModel" if stem == "GPT2" else f"{stem}ForCausalLM"
    config = f"{stem}TextConfig" if stem == "Gemma3" else f"{stem}Config"
    torch.manual_seed(0)
    model = getattr(hf, kind)(getattr(hf, config)(**options))
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    return model.to(dtype).eval()


def verdict(make: Callable[[], Any], backend: str) -> str:
    """Return what happens to a model: "fast", "slow", or why it is refused."""
    try:
        model = ml.load_model(make(), backend=backend, device="cpu")
        checks = {check.name: check for check in ml.check_model(model).checks}
    except ml.errors.MemlensError as error:
        return f"refused: {_short(str(error))}"
    if (failed := next((c for c in checks.values() if c.status == "failed"), None)) is not None:
        return f"fails: {failed.name}"
    return "fast" if checks.get("fast path") and checks["fast path"].status == "ok" else "slow"


def _short(text: str) -> str:
    for start, short in (
        ("cannot be a HookedTransformer", "not in HookedTransformer"),
        ("fails the check of its", "fails the check of its"),
        ("cannot put a bridge around", "no bridge for it"),
        ("could not put a bridge around", "no bridge for this variant"),
    ):
        if start in text:
            if start != short or "check" not in short:
                return short
            return text[text.index(start) :].split(":")[0]
    return text.split(":")[0][:80]


def rows() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield name, class and the verdict by backend and dtype."""
    for name, (stem, _) in ARCHITECTURES.items():
        found: dict[str, str] = {}
        for backend in ("bridge", "hooked"):
            for dtype in (torch.float32, torch.bfloat16):
                try:
                    model = tiny(name, dtype)
                except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                    found[f"{backend} {dtype}"] = f"not made: {type(error).__name__}"
                    continue
                found[f"{backend} {dtype}"] = verdict(lambda model=model: model, backend)
        yield name, stem, found


def main() -> None:
    """Print the table as Markdown."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(
        "| architecture | class | bridge, float32 | bridge, bfloat16 | hooked, float32 | hooked, bfloat16 |"
    )
    print("|---|---|---|---|---|---|")
    for name, stem, found in rows():
        print(f"| {name} | `{stem}` | " + " | ".join(found.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
