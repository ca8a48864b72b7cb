"""Attention bypass: the identities of specs on attention short-circuiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, SiteError
from tests.small import CASES, ragged

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])
OTHER = torch.tensor([[27, 18, 28, 18, 28, 45, 89, 79]])


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_position_zero_is_unchanged(tiny_model: Any, family: str, backend: str) -> None:
    model = tiny_model(family, backend)
    with torch.no_grad():
        plain = model(TOKENS)
        for layer in range(len(model.blocks)):
            with ml.bypassed(model, [layer]):
                changed = model(TOKENS)
            assert torch.allclose(changed[:, 0], plain[:, 0], atol=1e-6)
            assert (changed[:, 1:] - plain[:, 1:]).abs().max() > 1e-4
        assert torch.equal(model(TOKENS), plain)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_all_layers_bypassed_leaves_the_current_token_only(
    tiny_model: Any, family: str, backend: str
) -> None:
    model = tiny_model(family, backend)
    with torch.no_grad(), ml.bypassed(model, range(len(model.blocks))):
        one, other = model(TOKENS), model(OTHER)
    assert torch.allclose(one[:, 6:], other[:, 6:], atol=1e-5)  # same tokens at positions 6 and 7
    assert (one[:, 1] - other[:, 1]).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_identity_is_the_output_projection_of_the_values(tiny_model: Any, family: str, backend: str) -> None:
    model = tiny_model(family, backend)
    names = ["blocks.1.attn.hook_z", "blocks.1.attn.hook_v"]
    with torch.no_grad(), ml.bypassed(model, [1]):
        _, cache = model.run_with_cache(TOKENS, names_filter=names)
    z, v = cache[names[0]], cache[names[1]]
    group = z.shape[2] // v.shape[2]
    for head in range(z.shape[2]):
        assert torch.equal(z[:, :, head], v[:, :, head // group])


def test_one_head_only(tiny_model: Any) -> None:
    model = tiny_model("llama_gqa", "bridge")
    names = ["blocks.1.attn.hook_z", "blocks.1.attn.hook_v"]
    with torch.no_grad():
        _, plain = model.run_with_cache(TOKENS, names_filter=names)
        with ml.bypassed(model, [1], heads=[3]):
            _, cache = model.run_with_cache(TOKENS, names_filter=names)
    z = cache[names[0]]
    assert torch.equal(z[:, :, 3], cache[names[1]][:, :, 1])
    assert torch.equal(z[:, :, :3], plain[names[0]][:, :, :3])


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neo", "llama_gqa", "gpt_bigcode"])
def test_cached_generation_equals_uncached(tiny_model: Any, family: str) -> None:
    model = tiny_model(family, "bridge")
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    with torch.no_grad(), ml.bypassed(model, [1]):
        cached = model.original_model.generate(TOKENS, use_cache=True, **options)
        plain = TOKENS
        for _ in range(6):
            plain = torch.cat([plain, model(plain)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, plain)


def test_zero_takes_the_bias_too(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    with torch.no_grad(), ml.bypassed(model, [1], mode="zero"):
        _, cache = model.run_with_cache(TOKENS, names_filter=["blocks.1.hook_attn_out"])
    assert float(cache["blocks.1.hook_attn_out"].abs().max()) == 0


def test_bypass_attention_dims_and_settings(tiny_model: Any) -> None:
    model, seqs = tiny_model("olmo", "bridge"), ragged()
    result = ml.bypass_attention(model, seqs, layers=[2, 0], progress=False)
    assert result["exact_match"].dims == ("sequence", "layer")
    assert result.data.layer.values.tolist() == [2, 0]
    assert result.settings["mode"] == "identity"
    with torch.no_grad(), ml.bypassed(model, [2]):
        want = ml.measure(model, seqs)["target_logprob"]
    assert result["target_logprob"].sel(layer=2).values == pytest.approx(want, abs=1e-5)


def test_one_layer_may_be_a_number(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    with torch.no_grad():
        with ml.bypassed(model, 1):
            one = model(TOKENS)
        with ml.bypassed(model, [1]):
            listed = model(TOKENS)
    assert torch.equal(one, listed)


def test_bad_input(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    with pytest.raises(OptionError, match=r"mode='identiy'.*identity"):
        ml.bypass_intervention(model, [0], mode="identiy")
    with pytest.raises(OptionError, match="heads= goes with mode='identity'"):
        ml.bypass_intervention(model, [0], mode="zero", heads=[1])
    with pytest.raises(OptionError, match="at least one layer"):
        ml.bypass_intervention(model, [])
    with pytest.raises(SiteError, match="layer 9 does not exist"):
        ml.bypass_intervention(model, [9])
    with pytest.raises(SiteError, match="head 7 does not exist"):
        ml.bypass_intervention(model, [0], heads=[7])
