"""Every family, from a local folder or an already loaded model, equals Hugging Face's computation."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from memlens.errors import OptionError, UnsupportedModelError
from memlens.models.load import load_model
from memlens.models.names import has_hooked_transformer
from memlens.models.provenance import describe
from tests.devices import dev
from tests.models.equality import distance_from_huggingface
from tests.tiny import FAMILIES, HOOKED_FAMILIES, N_CTX, random_tokens, tiny_tokenizer, write_tiny

BOTH = [(f, b) for f in FAMILIES for b in ("hooked", "bridge") if b == "bridge" or f in HOOKED_FAMILIES]
needs_hooked = pytest.mark.skipif(not has_hooked_transformer(), reason="this TransformerLens has none")


def huggingface(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize(("family", "backend"), BOTH)
def test_logits_equal_huggingface(family, backend, tiny_folder, tiny_model):
    model, tokens = tiny_model(family, backend), random_tokens(3, 40)
    with torch.no_grad():
        expected = huggingface(tiny_folder(family))(tokens).logits
        actual = model(tokens)
    assert expected.std(0).median() > 1e-2  # the checkpoint tells positions and sequences apart
    assert (actual - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["gpt_neo", "olmo3"])
def test_windows_matter(family, tiny_folder):
    """The equality above would say nothing of local attention if the window never cut anything off."""
    tokens = random_tokens(1, 40)
    hf = huggingface(tiny_folder(family))
    changed = huggingface(
        tiny_folder(family), **{"window_size": 64} if family == "gpt_neo" else {"sliding_window": 64}
    )
    with torch.no_grad():
        assert (hf(tokens).logits - changed(tokens).logits)[0, -1].abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_prefers_hooked_transformer(family, tiny_model):
    hooked = family in HOOKED_FAMILIES and has_hooked_transformer()
    assert type(tiny_model(family)).__name__ == ("HookedTransformer" if hooked else "TransformerBridge")


@pytest.mark.parametrize(("family", "backend"), BOTH)
def test_processing_changes_weights_but_no_prediction(family, backend, tiny_folder, tiny_model):
    raw = tiny_model(family, backend)
    processed = load_model(tiny_folder(family), backend=backend, process_weights=True, device=dev())
    tokens = random_tokens(2, 30)
    with torch.no_grad():
        before, after = raw(tokens), processed(tokens)
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after.log_softmax(-1), before.log_softmax(-1), atol=1e-5, rtol=0)
    assert processed.W_U.mean(-1).abs().max() < 1e-5  # the unembedding is centered
    assert raw.W_U.mean(-1).abs().max() > 1e-3


@needs_hooked
def test_shape_is_read_from_the_config(tmp_path):
    folder = write_tiny(
        "olmo2", tmp_path / "OLMo-2-0425-1B", num_hidden_layers=2, num_key_value_heads=4, head_dim=8
    )
    cfg = load_model(folder, backend="hooked", device=dev()).cfg
    assert (cfg.n_layers, cfg.d_model, cfg.n_key_value_heads, cfg.n_ctx) == (2, 32, None, N_CTX)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5000.0}
OVERRIDES = [
    ("gpt_neox", {"rotary_pct": 1.0}),
    (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    ),
    ("gpt_neox", {"tie_word_embeddings": True, "hidden_act": "gelu_new"}),
    ("gpt_neo", {"attention_types": [[["local", "global", "global"], 1]], "num_layers": 3}),
    ("olmo", {"clip_qkv": 0.5, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
    ("olmo", {"tie_word_embeddings": True}),
    ("olmo2", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    ("olmo3", {"rope_parameters": {"full_attention": YARN}}),
    (
        "olmo3",
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": {**YARN, "rope_theta": 900.0}}},
    ),
    ("olmo3", {"num_key_value_heads": 4, "layer_types": ["full_attention"] * 4}),
]


@needs_hooked
@pytest.mark.parametrize(("family", "overrides"), OVERRIDES)
def test_hooked_follows_the_config(family, overrides, tmp_path):
    folder = write_tiny(family, tmp_path, **overrides)
    model = load_model(folder, backend="hooked", device=dev())
    with torch.no_grad():
        plain = huggingface(write_tiny(family, tmp_path / "plain"))(random_tokens(2, 40)).logits
        expected = huggingface(folder)(random_tokens(2, 40)).logits
    assert (plain - expected).abs().max() > 1e-3  # the option acts
    assert distance_from_huggingface(model, huggingface(folder), random_tokens(2, 40)) < 1e-5


OBSTACLES = [
    ("gpt_neox", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "scaled"),
    ("gpt_neox", {"hidden_act": "tanh"}, "'tanh'"),
    ("olmo", {"num_key_value_heads": 2}, "key-value heads"),
    ("olmo2", {"attention_bias": True}, "biases"),
    ("llama", {}, "LlamaForCausalLM"),
]


@needs_hooked
@pytest.mark.parametrize(("family", "overrides", "reason"), OBSTACLES)
def test_what_hooked_cannot_run_goes_to_the_bridge(family, overrides, reason, tmp_path):
    folder = write_tiny(family, tmp_path, **overrides)
    with pytest.raises(UnsupportedModelError, match=reason):
        load_model(folder, backend="hooked", device=dev())
    model = load_model(folder, device=dev())
    assert type(model).__name__ == "TransformerBridge"
    assert distance_from_huggingface(model, huggingface(folder), random_tokens()) < 1e-5


@pytest.mark.skipif(has_hooked_transformer(), reason="this TransformerLens has it")
def test_hooked_backend_needs_the_class(tiny_folder):
    with pytest.raises(UnsupportedModelError, match="has no HookedTransformer"):
        load_model(tiny_folder("gpt_neox"), backend="hooked")


def test_zoo_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLENS_CACHE", str(tmp_path))
    folder = write_tiny("gpt_neox", tmp_path / "zoo" / "tiny")
    model = load_model("zoo/tiny", device=dev())
    assert describe(model)["model"] == "zoo/tiny"
    assert distance_from_huggingface(model, huggingface(folder), random_tokens()) < 1e-5


def test_transformer_lens_model_comes_back_as_it_is(tiny_model):
    model = tiny_model("gpt_neox")
    assert load_model(model) is model
    with pytest.raises(OptionError, match="revision='main'"):
        load_model(model, revision="main")
    with pytest.raises(OptionError, match="process_weights=True"):
        load_model(model, process_weights=True)


def test_transformer_lens_model_of_the_other_backend(tiny_model):
    with pytest.raises(OptionError, match="this is a TransformerBridge"):
        load_model(tiny_model("llama", "bridge"), backend="hooked")


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_bigcode"])
def test_huggingface_model_is_wrapped(family, tiny_folder):
    tokens = random_tokens()
    hf = huggingface(tiny_folder(family))
    with torch.no_grad():
        expected = hf(tokens).logits
        model = load_model(hf)
        torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=0)
    assert model.original_model is hf
    assert model.tokenizer is None


def test_huggingface_model_shows_attention_patterns(tiny_folder):
    """Attention that is computed at one go (sdpa) would leave the pattern's hook silent."""
    model = load_model(huggingface(tiny_folder("llama"), attn_implementation="sdpa"))
    _, cache = model.run_with_cache(random_tokens(), names_filter="blocks.1.attn.hook_pattern")
    torch.testing.assert_close(cache["blocks.1.attn.hook_pattern"].sum(-1), torch.ones(2, 4, 20))


@needs_hooked
def test_huggingface_model_as_hooked_transformer(tiny_folder):
    hf = huggingface(tiny_folder("olmo2"))
    model = load_model(hf, backend="hooked", tokenizer=tiny_tokenizer())
    assert distance_from_huggingface(model, hf, random_tokens()) < 1e-5
    assert model.to_tokens("w5 w6", prepend_bos=False).tolist() == [[5, 6]]


def test_tokenizer_made_in_memory(tiny_folder):
    model = load_model(huggingface(tiny_folder("llama")), tokenizer=tiny_tokenizer())
    assert model.to_tokens("w5 w6", prepend_bos=False).tolist() == [[5, 6]]
    assert model.to_tokens("w5 w6", prepend_bos=True).tolist() == [[100, 5, 6]]
    assert model.tokenizer.decode([5, 6]) == "w5 w6"


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_own_tokenizer(backend, tiny_model):
    model = tiny_model("gpt_neox", backend)
    assert model.to_tokens("w5 w6", prepend_bos=False).tolist() == [[5, 6]]
    assert model.tokenizer("w5 w6", add_special_tokens=False).input_ids == [5, 6]


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_without_tokenizer(family, tmp_path, caplog):
    folder = write_tiny(family, tmp_path, tokenizer=False)
    with caplog.at_level(logging.WARNING, logger="memlens"):
        model = load_model(folder, device=dev())
    assert model.tokenizer is None
    assert "takes token ids only" in caplog.text
    assert distance_from_huggingface(model, huggingface(folder), random_tokens()) < 1e-5


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype(backend, dtype, tiny_folder, tiny_model):
    if backend == "hooked" and not has_hooked_transformer():
        pytest.skip("this TransformerLens has no HookedTransformer")
    model = load_model(tiny_folder("olmo2"), backend=backend, dtype=dtype, device=dev())
    wanted = torch.bfloat16 if dtype == "bfloat16" else torch.float16
    assert {p.dtype for p in model.parameters()} == {wanted}
    with torch.no_grad():
        narrow, wide = model(random_tokens()), tiny_model("olmo2", backend)(random_tokens())
    assert model.cfg.dtype == wanted
    assert 0 < (narrow.float() - wide).abs().max() < 0.1


def test_device_map_goes_to_the_bridge(tiny_folder):
    folder = tiny_folder("gpt_neox")
    model = load_model(folder, device_map={"": "cpu"})
    assert type(model).__name__ == "TransformerBridge"
    assert distance_from_huggingface(model, huggingface(folder), random_tokens()) < 1e-5


OPTIONS = [
    ({"backend": "hoked"}, "Did you mean 'hooked'"),
    ({"dtype": "float8"}, "dtype='float8'"),
    ({"device": "gpu"}, "device='gpu'"),
    ({"device": "cpu", "device_map": "auto"}, "contradict"),
    ({"backend": "hooked", "device_map": "auto"}, "HookedTransformer"),
    ({"revision": "main"}, "local folder"),
    ({"checkpoint_step": 3000}, "local folder"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_that_cannot_be(options, message, tiny_folder):
    with pytest.raises(OptionError, match=message):
        load_model(tiny_folder("gpt_neox"), **options)


@needs_hooked
def test_neither_backend_knows_it(tmp_path):
    folder = write_tiny("gpt_neox", tmp_path, attention_bias=False)
    with pytest.raises(UnsupportedModelError, match="no biases"):
        load_model(folder, backend="hooked", device=dev())
    with pytest.raises(UnsupportedModelError, match="could not bridge"):
        load_model(folder, backend="bridge", device=dev())


def test_no_dropout(tmp_path):
    model = load_model(
        write_tiny("gpt_neox", tmp_path, hidden_dropout=0.5, attention_dropout=0.5), device=dev()
    )
    first, second = model(random_tokens()), model(random_tokens())
    assert torch.equal(first, second)


@pytest.mark.parametrize("family", ["gpt_neo", "starcoder2"])
def test_loading_is_quiet_and_leaves_no_trace(family, tiny_folder, capfd):
    root = logging.getLogger()
    before = (list(root.handlers), list(root.filters), list(warnings.filters))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model(tiny_folder(family), device=dev(), process_weights=True)
    assert not caught
    assert capfd.readouterr() == ("", "")
    assert (root.handlers, root.filters, warnings.filters) == before
