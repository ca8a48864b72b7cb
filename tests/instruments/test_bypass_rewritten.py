"""Bypass against a second implementation: GPT-NeoX and GPT-Neo in plain torch, with identity weights.

Written from the checkpoint's tensors alone, in float64, one position after the other, without a cache.
Scores are rounded where the architectures' own code rounds them to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import memlens as ml
from tests.devices import dev
from tests.tiny import tiny_config

FAMILIES = ["gpt_neox", "gpt_neox_sequential", "gpt_neo"]
BACKENDS = ["bridge", "hooked"]
BYPASSED = [[0], [1], [2], [0, 2], [0, 1, 2]]
ROWS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46], [27, 18, 28, 45, 90]]
N_NEW = 7

Weights = dict[str, Tensor]


def layer_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def affine(x: Tensor, weights: Weights, name: str) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def mixed(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, rounding: torch.dtype) -> Tensor:
    """Softmax attention of one head: `[pos, d_head]`."""
    scores = (q @ k.T * scale).masked_fill(~seen, -math.inf)
    return scores.to(rounding).softmax(-1).to(v.dtype) @ v


def rotated(x: Tensor, width: int) -> Tensor:
    """The first `width` features turn with the position, feature i against feature i + width / 2."""
    angles = [[p / 10000 ** (2 * i / width) for i in range(width // 2)] for p in range(len(x))]
    turn = torch.tensor(angles, dtype=torch.float32)
    cos, sin = turn.cos().to(x.dtype), turn.sin().to(x.dtype)
    low, high, rest = x.split([width // 2, width // 2, x.shape[1] - width], 1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], 1)


def neox_logits(
    weights: Weights, ids: list[int], bypassed: list[int], parallel: bool, rounding: Any
) -> Tensor:
    """GPT-NeoX of 3 blocks with 4 heads of 8 features, of which 2 are rotated."""
    x = weights["gpt_neox.embed_in.weight"][ids]
    seen = torch.ones(len(ids), len(ids)).tril().bool()
    for layer in range(3):
        at = f"gpt_neox.layers.{layer}"
        heads = affine(
            layer_norm(x, weights, f"{at}.input_layernorm"), weights, f"{at}.attention.query_key_value"
        )
        out = []
        for head in heads.split(24, 1):  # queries, keys and values stand together by head
            q, k, v = head.split(8, 1)
            plain = layer not in bypassed
            out.append(mixed(rotated(q, 2), rotated(k, 2), v, seen, 8**-0.5, rounding) if plain else v)
        attn = affine(torch.cat(out, 1), weights, f"{at}.attention.dense")
        read = x if parallel else x + attn
        hidden = affine(
            layer_norm(read, weights, f"{at}.post_attention_layernorm"), weights, f"{at}.mlp.dense_h_to_4h"
        )
        gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + attn + affine(gelu, weights, f"{at}.mlp.dense_4h_to_h")
    return affine(layer_norm(x, weights, "gpt_neox.final_layer_norm"), weights, "embed_out")


def neo_logits(weights: Weights, ids: list[int], bypassed: list[int], rounding: Any) -> Tensor:
    """GPT-Neo of 4 blocks with 4 heads of 8 features, every other one with a window of 8 tokens."""
    places = torch.arange(len(ids))
    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][places]
    for layer in range(4):
        at = f"transformer.h.{layer}"
        read = layer_norm(x, weights, f"{at}.ln_1")
        q, k, v = (affine(read, weights, f"{at}.attn.attention.{n}_proj").split(8, 1) for n in "qkv")
        gap = places[:, None] - places[None]
        seen = (gap >= 0) & (gap < (8 if layer % 2 else 1000))
        out = [
            v[h]
            if layer in bypassed
            else mixed(q[h].to(rounding), k[h].to(rounding), v[h], seen, 1.0, rounding)
            for h in range(4)
        ]
        x = x + affine(torch.cat(out, 1), weights, f"{at}.attn.attention.out_proj")
        hidden = affine(layer_norm(x, weights, f"{at}.ln_2"), weights, f"{at}.mlp.c_fc")
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        x = x + affine(0.5 * hidden * (1 + inner.tanh()), weights, f"{at}.mlp.c_proj")
    return layer_norm(x, weights, "transformer.ln_f") @ weights["transformer.wte.weight"].T


@pytest.fixture(scope="module")
def double(tiny_folder: Any, tiny_model: Any) -> Callable[..., tuple[Any, Callable[..., Tensor]]]:
    """`double("gpt_neo", "bridge")`: the model in float64, and its rewrite ``(ids, bypassed) -> logits``."""
    loaded: dict[tuple[str, str], Any] = {}

    def pair_of(family: str, backend: str) -> tuple[Any, Callable[..., Tensor]]:
        tiny_model(family, backend)  # skips what the installed release does not have
        folder = tiny_folder(family)
        if (family, backend) not in loaded:
            loaded[family, backend] = ml.load_model(folder, backend=backend, dtype="float64", device=dev())
        weights = {name: t.double() for name, t in load_file(folder / "model.safetensors").items()}
        rounding = torch.float32 if backend == "bridge" else torch.float64

        def rewrite(ids: list[int], bypassed: list[int]) -> Tensor:
            if family == "gpt_neo":
                return neo_logits(weights, ids, bypassed, rounding)
            parallel = tiny_config(family).use_parallel_residual
            return neox_logits(weights, ids, bypassed, parallel, rounding)

        return loaded[family, backend], rewrite

    return pair_of


@pytest.mark.parametrize("bypassed", [[], *BYPASSED], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward_equals_the_rewrite(double: Any, family: str, backend: str, bypassed: list[int]) -> None:
    model, rewrite = double(family, backend)
    want = rewrite(ROWS[0], bypassed)
    with ml.applied(model, *ml.edits.attention_bypasses(model, layers=[bypassed] if bypassed else [])):
        found = model(torch.tensor([ROWS[0]]))[0]
    assert (found - want).abs().max() < 1e-6
    assert (rewrite(ROWS[0], [1] if bypassed != [1] else [])[1:] - want[1:]).abs().max() > 1e-2


@pytest.mark.parametrize("bypassed", BYPASSED, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_sweep_measures_what_the_rewrite_gives(double: Any, family: str, bypassed: list[int]) -> None:
    model, rewrite = double(family, "bridge")
    seqs = ml.SequenceSet.from_tokens(ROWS, [4, 2])
    found = ml.sweep(
        model,
        seqs,
        ml.edits.attention_bypasses(model, layers=[bypassed]),
        ("target_logprob",),
        progress=False,
    )["target_logprob"].values[:, 0]
    for i, (row, start) in enumerate(zip(ROWS, (4, 2), strict=True)):
        logprobs = rewrite(row, bypassed).log_softmax(-1)
        want = torch.stack([logprobs[p - 1, row[p]] for p in range(start, len(row))]).mean()
        assert abs(float(want) - found[i]) < 1e-6


@pytest.mark.parametrize("bypassed", BYPASSED, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generation_equals_the_rewrite(double: Any, family: str, bypassed: list[int]) -> None:
    """With a cache and without, in a left-padded batch, and after a prompt that was fed in chunks."""
    model, rewrite = double(family, "bridge")
    hf = model.original_model
    alone = [continued(rewrite, row, bypassed) for row in ROWS]
    gap = len(ROWS[0]) - len(ROWS[1])
    tokens = torch.tensor([ROWS[0], [0] * gap + ROWS[1]])
    mask = torch.ones_like(tokens)
    mask[1, :gap] = 0
    options: dict[str, Any] = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": None, "attention_mask": mask}
    with ml.bypassed(model, bypassed):
        for more in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}):
            out = hf.generate(tokens, **options, **more)
            assert out[0].tolist() == alone[0], more
            assert out[1, gap:].tolist() == alone[1], more
        first = hf(torch.tensor([ROWS[0][:4]]), use_cache=True)
        second = hf(torch.tensor([ROWS[0][4:]]), past_key_values=first.past_key_values, use_cache=True)
        both = hf(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    want = [rewrite(row, bypassed) for row in ROWS]
    assert (torch.cat([first.logits, second.logits], 1)[0] - want[0]).abs().max() < 1e-6
    assert (both[0] - want[0]).abs().max() < 1e-6
    assert (both[1, gap:] - want[1]).abs().max() < 1e-6


@pytest.mark.parametrize("bypassed", BYPASSED, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_hooked_transformer_generates_as_the_rewrite(double: Any, family: str, bypassed: list[int]) -> None:
    model, rewrite = double(family, "hooked")
    options: dict[str, Any] = {
        "max_new_tokens": N_NEW,
        "do_sample": False,
        "stop_at_eos": False,
        "verbose": False,
    }
    for row in ROWS:
        want = continued(rewrite, row, bypassed)
        with ml.bypassed(model, bypassed):
            for cache in (True, False):
                out = model.generate(torch.tensor([row]), use_past_kv_cache=cache, **options)
                assert out[0].tolist() == want


def continued(rewrite: Callable[..., Tensor], row: list[int], bypassed: list[int]) -> list[int]:
    row = list(row)
    for _ in range(N_NEW):
        row.append(int(rewrite(row, bypassed)[-1].argmax()))
    return row
