"""The bypass of a plain Hugging Face model: the same tokens as through TransformerLens, nothing left on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import memlens as ml
from memlens.errors import OptionError, SilentInterventionError, SiteError, UnsupportedModelError
from memlens.instruments.bypass.serving import _HELD, bypass_in_transformers
from tests.instruments.test_bypass import greedy
from tests.tiny import FAMILIES, HOOKED_FAMILIES, tiny_huggingface_model

ROWS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38], [27, 18, 28, 45, 90]]
N_NEW = 6
GREEDY: dict[str, Any] = {
    "max_new_tokens": N_NEW,
    "min_new_tokens": N_NEW,
    "do_sample": False,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def plain_model(tiny_folder: Callable[[str], Path]) -> Iterator[Callable[[str], Any]]:
    """`plain_model("olmo2")`: the family's checkpoint as transformers loads it; clean afterwards."""
    loaded: dict[str, Any] = {}

    def model_of(family: str) -> Any:
        if family not in loaded:
            loaded[family] = AutoModelForCausalLM.from_pretrained(tiny_folder(family)).eval()
        return loaded[family]

    yield model_of
    assert not len(_HELD)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Both rows, the shorter one with zeros to its left, and which tokens are real."""
    gap = len(ROWS[0]) - len(ROWS[1])
    tokens = torch.tensor([ROWS[0], [0] * gap + ROWS[1]])
    mask = torch.ones_like(tokens)
    mask[1, :gap] = 0
    return tokens, mask


@pytest.mark.parametrize("mode", ["identity", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_bridge_under_bypass(
    tiny_model: Any, plain_model: Any, family: str, mode: str
) -> None:
    model, hf, tokens = tiny_model(family, "bridge"), plain_model(family), torch.tensor([ROWS[0]])
    before = hf(tokens).logits
    with ml.bypassed(model, [1, 2], mode=mode):
        want = model.original_model(tokens).logits
    with bypass_in_transformers(hf, [1, 2], mode=mode) as handle:
        assert handle.layers == (1, 2)
        assert torch.allclose(hf(tokens).logits, want, atol=2e-5)
    assert (before - want).abs().max() > 1e-2
    assert torch.equal(hf(tokens).logits, before)


@pytest.mark.parametrize("mode", ["identity", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generation_with_any_cache_gives_the_tokens_of_plain_forwards(
    tiny_model: Any, plain_model: Any, family: str, mode: str
) -> None:
    model, hf = tiny_model(family, "bridge"), plain_model(family)
    tokens, mask = padded()
    with ml.bypassed(model, [0, 1], mode=mode):
        alone = [greedy(model, torch.tensor([row]), N_NEW, [hf.config.eos_token_id])[0] for row in ROWS]
    with bypass_in_transformers(hf, [0, 1], mode=mode):
        found = {
            "cache": hf.generate(tokens, attention_mask=mask, **GREEDY),
            "no cache": hf.generate(tokens, attention_mask=mask, use_cache=False, **GREEDY),
            "chunks": hf.generate(tokens, attention_mask=mask, prefill_chunk_size=4, **GREEDY),
        }
        if family != "gpt_neo":  # whose own mask does not know static caches, bypassed or not
            static = hf.generate(tokens, attention_mask=mask, cache_implementation="static", **GREEDY)
            found["static"] = static
    for how, out in found.items():
        assert torch.equal(out[0], alone[0]), how
        assert torch.equal(out[1, -len(alone[1]) :], alone[1]), how
    without = hf.generate(tokens, attention_mask=mask, **GREEDY)
    assert not torch.equal(without, found["cache"])


@pytest.mark.parametrize("family", HOOKED_FAMILIES)
@torch.no_grad()
def test_generation_is_that_of_a_bypassed_hooked_transformer(
    tiny_model: Any, plain_model: Any, family: str
) -> None:
    model, hf, tokens = tiny_model(family, "hooked"), plain_model(family), torch.tensor([ROWS[0]])
    with ml.bypassed(model, [1]):
        want = model.generate(tokens, max_new_tokens=N_NEW, do_sample=False, stop_at_eos=False, verbose=False)
    with bypass_in_transformers(hf, [1]):
        found = hf.generate(tokens, **{**GREEDY, "min_new_tokens": 0, "eos_token_id": None})
    assert torch.equal(found, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_blocks_keep_their_implementation_and_all_is_given_back(plain_model: Any, family: str) -> None:
    hf, tokens = plain_model(family), torch.tensor([ROWS[0]])
    before = state_of(hf)
    with contextlib.suppress(KeyboardInterrupt), bypass_in_transformers(hf, 1):
        changed = [name for name, state in state_of(hf).items() if state != before[name]]
        assert changed
        assert all(".1." in name for name in changed)
        with torch.no_grad():
            hf(tokens)
        raise KeyboardInterrupt
    assert state_of(hf) == before


def state_of(model: Any) -> dict[str, Any]:
    """By module: which config it has, what that asks for, and its hooks."""
    return {
        name: (
            id(getattr(m, "config", None)),
            getattr(getattr(m, "config", None), "_attn_implementation", None),
            list(m._forward_hooks),
            list(m._forward_pre_hooks),
        )
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("family", ["llama_gqa", "gpt_neo"])
@torch.no_grad()
def test_nested_bypasses_may_be_removed_in_any_order(plain_model: Any, family: str) -> None:
    hf, tokens = plain_model(family), torch.tensor([ROWS[0]])
    plain = hf(tokens).logits
    with bypass_in_transformers(hf, [1]):
        one = hf(tokens).logits
    with bypass_in_transformers(hf, [1, 2]):
        both = hf(tokens).logits
    outer = bypass_in_transformers(hf, [1])
    inner = bypass_in_transformers(hf, [1, 2])
    assert torch.equal(hf(tokens).logits, both)
    outer.remove()
    assert torch.equal(hf(tokens).logits, both)
    outer.remove()
    again = bypass_in_transformers(hf, [1])
    inner.remove()
    assert torch.equal(hf(tokens).logits, one)
    again.remove()
    assert torch.equal(hf(tokens).logits, plain)
    assert "removed" in repr(again)


@torch.no_grad()
def test_the_cache_is_filled_as_without_a_bypass(plain_model: Any) -> None:
    """So that the lengths of caches and masks agree in all blocks."""
    hf, tokens = plain_model("llama_gqa"), torch.tensor([ROWS[0]])
    plain = hf(tokens, use_cache=True).past_key_values
    with bypass_in_transformers(hf, [1]):
        other = hf(tokens, use_cache=True).past_key_values
    assert torch.equal(plain.layers[1].values, other.layers[1].values)
    assert other.get_seq_length() == len(ROWS[0])


def test_a_layer_that_ignores_the_registry_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hf: Any = tiny_huggingface_model("llama")
    attention = hf.model.layers[1].self_attn

    def own(hidden_states: torch.Tensor, **_: Any) -> Any:
        return attention.o_proj(hidden_states), None

    monkeypatch.setattr(attention, "forward", own)
    with (
        pytest.raises(SilentInterventionError, match="LlamaAttention did not use"),
        bypass_in_transformers(hf, 1),
    ):
        hf(torch.tensor([ROWS[0]]))


def test_bad_input(tiny_model: Any, plain_model: Any) -> None:
    hf, model = plain_model("llama"), tiny_model("llama", "bridge")
    with pytest.raises(SiteError, match="layer 3 does not exist: the model has layers 0 to 2"):
        bypass_in_transformers(hf, [0, 3])
    with pytest.raises(OptionError, match="mode='identiy'"):
        bypass_in_transformers(hf, 0, mode="identiy")
    with pytest.raises(OptionError, match="at least one layer"):
        bypass_in_transformers(hf, [])
    for wrong in (model, model.original_model):
        with pytest.raises(UnsupportedModelError, match=r"use memlens\.bypassed"):
            bypass_in_transformers(wrong, 0)
    with pytest.raises(UnsupportedModelError, match="str is not a Hugging Face model"):
        bypass_in_transformers("gpt2", 0)
    with pytest.raises(UnsupportedModelError, match="Linear is not a decoder"):
        bypass_in_transformers(torch.nn.Linear(2, 2), 0)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
    )
    with pytest.raises(UnsupportedModelError, match="is not a decoder of transformers"):
        bypass_in_transformers(t5, 0)


def test_an_architecture_that_cannot_be_served_is_an_error() -> None:
    from transformers import CodeGenConfig, CodeGenForCausalLM

    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 16}
    hf = CodeGenForCausalLM(CodeGenConfig(vocab_size=9, **shape))
    with pytest.raises(UnsupportedModelError, match=r"use memlens\.bypassed"):
        bypass_in_transformers(hf, 0)
