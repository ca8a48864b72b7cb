"""GGUF files: the same model written as GGUF and as safetensors computes the same."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from einops import rearrange
from tqdm import notebook
from transformers import modeling_gguf_pytorch_utils as reading

from memlens.errors import ModelLoadError, OptionError
from memlens.models.load import load_model
from memlens.models.provenance import describe
from tests.devices import dev
from tests.models.equality import distance_from_huggingface
from tests.tiny import D_VOCAB, END_OF_TEXT, N_CTX, random_tokens, tiny_huggingface_model

N_HEADS, N_KV_HEADS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in outside:
        return f"{outside[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def gguf_weight(name: str, weight: torch.Tensor) -> np.ndarray:
    """GGUF stores the two halves of each rotary head interleaved."""
    heads = {"q_proj": N_HEADS, "k_proj": N_KV_HEADS}.get(name.split(".")[-2])
    if heads is not None:
        weight = rearrange(weight, "(head half d) m -> (head d half) m", head=heads, half=2)
    return weight.numpy()


def write_gguf(path, model, *, quantize: bool = False) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(D_VOCAB)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, "Ġ", "th", "the", "Ġthe", "er", "in", END_OF_TEXT][:D_VOCAB]
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * (D_VOCAB - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["t h", "th e", "Ġ the", "e r", "i n"])
    writer.add_bos_token_id(D_VOCAB - 1)
    writer.add_eos_token_id(D_VOCAB - 1)
    for name, weight in model.state_dict().items():
        values = gguf_weight(name, weight)
        if quantize and values.ndim == 2 and "proj" in name:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def hf_model():
    return tiny_huggingface_model("llama_gqa")


@pytest.fixture(scope="module")
def files(hf_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny-f32.gguf", hf_model)
    write_gguf(folder / "tiny-q8.gguf", hf_model, quantize=True)
    return folder


def test_by_path(files, hf_model, capfd):
    model = load_model(files / "tiny-f32.gguf", device=dev())
    assert capfd.readouterr() == ("", "")
    assert distance_from_huggingface(model, hf_model, random_tokens(2, 40)) < 1e-5
    assert describe(model)["model"] == "tiny-f32"
    assert describe(model)["family"] == "llama"
    assert model.cfg.n_key_value_heads == N_KV_HEADS


def test_by_folder_and_file(files, hf_model):
    model = load_model(files, gguf_file="tiny-f32.gguf", device=dev())
    assert distance_from_huggingface(model, hf_model, random_tokens()) < 1e-5


def test_quantized_weights_become_float32(files, hf_model):
    model = load_model(files / "tiny-q8.gguf", device=dev())
    with torch.no_grad():
        difference = (model(random_tokens()) - hf_model(random_tokens()).logits).abs()
    assert 1e-5 < difference.max() < 0.1  # eight bits: near, and not the same
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not hasattr(model.original_model.config, "quantization_config")


def test_dequantized_weights_can_be_processed(files):
    plain, model = (
        load_model(files / "tiny-q8.gguf", device=dev(), process_weights=p) for p in (False, True)
    )
    with torch.no_grad():
        expected, actual = plain(random_tokens()).log_softmax(-1), model(random_tokens()).log_softmax(-1)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_tokenizer_of_the_file(files):
    model = load_model(files / "tiny-f32.gguf", device=dev())
    ids = model.to_tokens("in the", prepend_bos=False)
    assert model.tokenizer.convert_ids_to_tokens(ids[0].tolist()) == ["in", "Ġthe"]
    assert model.to_tokens("the", prepend_bos=True)[0, 0] == D_VOCAB - 1


def test_the_header_is_read_once_and_a_notebook_gets_no_bar(files, tmp_path, monkeypatch):
    """Config, tokenizer and weights share one reading, and nothing of it stays behind."""
    reads, init = [], gguf.GGUFReader.__init__

    def counted(self, path, *args):
        reads.append(path)
        init(self, path, *args)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    monkeypatch.setattr(notebook.tqdm_notebook, "display", lambda *_, **__: bars.append(1))
    monkeypatch.setattr(reading, "tqdm", notebook.tqdm_notebook)  # tqdm.auto's choice in Jupyter
    bars = []
    own = gguf.GGUFReader, gguf.get_tensor_name_map
    load_model(files / "tiny-q8.gguf", device=dev())
    assert len(reads) == 1
    assert not bars
    assert reading.tqdm is notebook.tqdm_notebook
    (tmp_path / "cut.gguf").write_bytes((files / "tiny-q8.gguf").read_bytes()[:600])
    with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
        load_model(tmp_path / "cut.gguf")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own


def test_file_that_is_no_gguf(tmp_path):
    (tmp_path / "fake.gguf").write_bytes(b"GGML is something else" * 10)
    with pytest.raises(ModelLoadError, match="'fake' could not be read"):
        load_model(tmp_path / "fake.gguf")


def test_two_files_named(files):
    with pytest.raises(OptionError, match="contradicts the path"):
        load_model(files / "tiny-f32.gguf", gguf_file="tiny-q8.gguf")
