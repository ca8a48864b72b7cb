"""Attention bypass: the identities of specs on attention short-circuiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, SiteError
from memlens.forward.hooks import hook_name
from memlens.forward.read_weights import attention_post_norm, output_projection
from tests.devices import dev
from tests.small import CASES, ragged
from tests.tiny import FAMILIES, HOOKED_FAMILIES

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


@pytest.mark.parametrize("mode", ["uniform", "first_token", "identity"])
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_modes_are_attention_patterns(tiny_model: Any, backend: str, mode: str) -> None:
    """The same logits as writing the pattern, where the model heeds what is written there."""
    if backend == "hooked" and "gpt_neox" not in HOOKED_FAMILIES:
        pytest.skip("this TransformerLens has no HookedTransformer")
    model = tiny_model("gpt_neox", backend)
    n = TOKENS.shape[1]
    first = torch.zeros(n, n).index_fill(1, torch.tensor([0]), 1.0)
    patterns = {
        "uniform": torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None],
        "first_token": first,
        "identity": torch.eye(n),
    }

    def write(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        return patterns[mode].expand_as(pattern).to(pattern.dtype)

    with torch.no_grad():
        expected = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_pattern", write)])
        with ml.applied(model, *ml.edits.attention_bypasses(model, layers=[1], mode=mode)):
            found = model(TOKENS)
    assert torch.allclose(found, expected, atol=1e-5)


def test_controls_that_need_the_whole_text_are_not_held(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    with pytest.raises(OptionError, match="uniform"), ml.bypassed(model, [0], mode="uniform"):
        pass


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


BYPASSES: dict[str, dict[str, Any]] = {
    "identity": {},
    "half": {"strength": 0.5},
    "one head": {"heads": [1]},
    "zero": {"mode": "zero"},
}


def greedy(model: Any, tokens: torch.Tensor, n: int, banned: Sequence[int] = ()) -> torch.Tensor:
    """Greedy tokens, each from a plain forward on all tokens before it."""
    for _ in range(n):
        logits = model(tokens)[:, -1:]
        logits[..., list(banned)] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("how", BYPASSES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generation_cached_left_padded_and_in_chunks(tiny_model: Any, family: str, how: str) -> None:
    """All of them give the tokens of plain forwards on unpadded rows."""
    model = tiny_model(family, "bridge")
    hf, n = model.original_model, 6
    options: dict[str, Any] = {
        "max_new_tokens": n,
        "do_sample": False,
        "min_new_tokens": n,
        "pad_token_id": 0,
    }
    rows = [[3, 14, 15, 92, 65, 35, 89, 79], [27, 18, 28, 45, 90]]
    with ml.bypassed(model, [1], **BYPASSES[how]):
        alone = [greedy(model, torch.tensor([row]), n, [hf.config.eos_token_id])[0] for row in rows]
        cached = hf.generate(torch.tensor([rows[0]]), use_cache=True, **options)
        padded = torch.tensor([rows[0], [0] * 3 + rows[1]])
        mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
        both = hf.generate(padded, attention_mask=mask, use_cache=True, **options)
        first = hf(torch.tensor([rows[0][:5]]), use_cache=True)
        second = hf(torch.tensor([rows[0][5:]]), past_key_values=first.past_key_values, use_cache=True)
        whole = hf(torch.tensor([rows[0]]))
    assert torch.equal(cached[0], alone[0])
    assert torch.equal(both[0], alone[0])
    assert torch.equal(both[1, 3:], alone[1])
    chunks = torch.cat([first.logits, second.logits], 1)
    assert torch.allclose(chunks, whole.logits, atol=1e-5)
    assert not torch.allclose(chunks, hf(torch.tensor([rows[0]])).logits, atol=1e-3)


@pytest.mark.parametrize("family", HOOKED_FAMILIES)
@torch.no_grad()
def test_cached_generation_of_a_hooked_transformer(tiny_model: Any, family: str) -> None:
    model = tiny_model(family, "hooked")
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "stop_at_eos": False,
        "verbose": False,
    }
    with ml.bypassed(model, [1]):
        cached = model.generate(TOKENS, use_past_kv_cache=True, **options)
        assert torch.equal(cached, greedy(model, TOKENS, 6))


@pytest.mark.parametrize(("family", "backend"), CASES)
@torch.no_grad()
def test_strength_mixes_the_attention_matrix_with_the_identity(
    tiny_model: Any, family: str, backend: str
) -> None:
    model, a = tiny_model(family, backend), 0.3
    names = [hook_name(site, 1) for site in ("pattern", "v", "z")]
    with ml.bypassed(model, [1], strength=a):
        _, cache = model.run_with_cache(TOKENS, names_filter=names)
    pattern, v, z = (cache[name] for name in names)
    v = v.repeat_interleave(z.shape[2] // v.shape[2], 2)
    mixed = (1 - a) * pattern + a * torch.eye(pattern.shape[-1])
    assert torch.allclose(torch.einsum("bhqk,bkhd->bqhd", mixed, v), z, atol=1e-5)


@pytest.mark.parametrize(("family", "backend"), CASES)
@torch.no_grad()
def test_parallel_blocks_change_by_what_attention_changes(tiny_model: Any, family: str, backend: str) -> None:
    """Where attention and MLP read the same input; in sequential blocks the MLP sees the change too."""
    model = tiny_model(family, backend)
    names = [hook_name(site, 1) for site in ("attn_out", "resid_post")]
    _, plain = model.run_with_cache(TOKENS, names_filter=names)
    with ml.bypassed(model, [1]):
        _, other = model.run_with_cache(TOKENS, names_filter=names)
    attn, block = (other[name] - plain[name] for name in names)
    assert torch.allclose(attn, block, atol=1e-6) == ml.Trunk(model).parallel


@pytest.mark.parametrize(("family", "backend"), CASES)
@torch.no_grad()
def test_what_bypass_adds_is_linear_in_the_values(
    tiny_folder: Any, tiny_model: Any, family: str, backend: str
) -> None:
    """The change of attention is sum_h (I - A_h) V_h W_O,h: biases cancel, since rows of A sum to 1."""
    tiny_model(family, backend)  # skips what the installed release does not have
    model = ml.load_model(tiny_folder(family), backend=backend, dtype="float64", device=dev())
    if attention_post_norm(model, 1) is not None:
        pytest.skip("a norm stands between attention and the residual")
    names = [hook_name(site, 1) for site in ("pattern", "v", "attn_out")]
    _, plain = model.run_with_cache(TOKENS, names_filter=names)
    with ml.bypassed(model, [1]):
        _, other = model.run_with_cache(TOKENS, names_filter=names)
    pattern, v, _ = (plain[name] for name in names)
    w_o, _ = output_projection(model, 1)
    v = v.repeat_interleave(w_o.shape[0] // v.shape[2], 2)
    eye = torch.eye(pattern.shape[-1], dtype=pattern.dtype)
    want = torch.einsum("bhqk,bkhd,hdm->bqm", eye - pattern, v, w_o)
    error = (other[names[2]] - plain[names[2]] - want).abs().max()
    assert float(error) < (1e-12 if pattern.dtype == torch.float64 and exact_rows(pattern) else 1e-6)
    assert float(want.abs().max()) > 1e-3


def exact_rows(pattern: torch.Tensor) -> bool:
    """Whether the softmax was taken in float64: some architectures always take it in float32."""
    return float((pattern.sum(-1) - 1).abs().max()) < 1e-13


def test_spans(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    for span, width, expected in (
        ("window", 2, {0: [0, 1], 1: [1, 2]}),
        ("suffix", 2, {0: [0, 1, 2], 1: [1, 2], 2: [2]}),
        ("prefix", 2, {0: [0], 1: [0, 1], 2: [0, 1, 2]}),
    ):
        result = ml.bypass_attention(model, seqs, span=span, width=width, progress=False)
        assert result["layer"].values.tolist() == list(expected)
        for layer, blocks in expected.items():
            joint = ml.edits.attention_bypasses(model, layers=[blocks])
            want = ml.sweep(model, seqs, joint, engine="reference", progress=False)["target_logprob"][:, 0]
            assert np.allclose(result["target_logprob"].sel(layer=layer), want, atol=1e-5)
        assert result.settings["span"] == span


def test_heads_and_strengths_are_dimensions(tiny_model: Any) -> None:
    model, seqs = tiny_model("llama_gqa", "bridge"), ragged()
    result = ml.bypass_attention(
        model, seqs, layers=[1], over="head", heads=[0, 3], strengths=(0.0, 0.5, 1.0), progress=False
    )
    values = result["target_logprob"]
    assert values.dims == ("sequence", "layer", "head", "strength")
    none = values.sel(strength=0.0)
    assert np.allclose(none, result.baseline("target_logprob").values[:, None, None], atol=1e-6)
    one = ml.edits.attention_bypasses(model, layers=[1], heads=[3])
    want = ml.sweep(model, seqs, one, engine="reference", progress=False)["target_logprob"][:, 0]
    assert np.allclose(values.sel(layer=1, head=3, strength=1.0), want, atol=1e-5)


def test_figures(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    parts = ml.bypass_attention(model, seqs, strengths=(0.5, 1.0), progress=False)
    lines = [t for t in parts.plot("target_logprob").data if t.mode == "lines+markers"]
    assert [t.name for t in lines] == ["strength 0.5", "strength 1"]
    heads = ml.bypass_attention(model, seqs, over="head", progress=False)
    shown = np.array(heads.plot("target_logprob").data[0].z, dtype=float)
    assert np.allclose(shown, heads.effect("target_logprob").mean("sequence"))


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
        ml.edits.attention_bypasses(model, mode="identiy")
    with pytest.raises(OptionError, match="heads= does not work with mode='zero'"):
        ml.edits.attention_bypasses(model, mode="zero", heads=[1])
    with pytest.raises(OptionError, match=r"strength=1.5 is out of range"):
        ml.edits.attention_bypasses(model, strengths=[1.5])
    with pytest.raises(OptionError, match=r"width=4 is not a window of a model with 3 layers"):
        ml.bypass_attention(model, ragged(), span="window", width=4)
    with pytest.raises(OptionError, match=r"span='windows'.*window"):
        ml.bypass_attention(model, ragged(), span="windows")
    with pytest.raises(OptionError, match="at least one layer"):
        ml.edits.attention_bypasses(model, layers=[[]])
    with pytest.raises(SiteError, match="layer 9 does not exist"):
        ml.edits.attention_bypasses(model, layers=[9])
    with pytest.raises(SiteError, match="head 7 does not exist"):
        ml.edits.attention_bypasses(model, layers=[[0]], heads=[7])
