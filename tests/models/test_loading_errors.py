"""Checkpoints that cannot be used are refused in one sentence, before any forward pass."""

from __future__ import annotations

import json
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config

from memlens.errors import (
    MemlensError,
    ModelLoadError,
    ModelNotFoundError,
    NonFiniteError,
    UnsupportedModelError,
)
from memlens.models.checks import first_nonfinite_layer, nonfinite_error
from memlens.models.families import family_by_architecture
from memlens.models.load import load_model
from memlens.models.names import has_hooked_transformer
from tests.devices import dev
from tests.tiny import random_tokens, tiny_config, write_tiny


@pytest.fixture
def folder(tmp_path):
    return write_tiny("gpt_neox", tmp_path / "checkpoint")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_path_that_does_not_exist(tmp_path):
    for name in (tmp_path / "nothing", str(tmp_path / "nothing"), "./nothing", str(tmp_path / "a.gguf")):
        with pytest.raises(ModelNotFoundError, match="check the path"):
            load_model(name)


def test_folder_without_config(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "model-q4.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"It holds 'model-q4\.gguf'"):
        load_model(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"no file 'other\.gguf'"):
        load_model(tmp_path, gguf_file="other.gguf")


def test_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match="is a file, not a checkpoint folder"):
        load_model(tmp_path / "weights.safetensors")


def test_zoo_name_that_does_not_exist():
    with pytest.raises(ModelNotFoundError, match=r"The zoo has no 'zoo/pythia-xx'.*Did you mean"):
        load_model("zoo/pythia-xx")


def test_a_zoo_model_that_was_not_trained_yet_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memlens.models.zoo.zoo_folders", lambda: (tmp_path / "none", tmp_path / "cache"))
    with pytest.raises(ModelNotFoundError, match="not trained here yet: `memlens zoo train olmo1-m`"):
        load_model("zoo/olmo1-m")


def test_a_zoo_model_of_the_package_that_is_not_installed_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memlens.files.find_spec", lambda name: None)
    monkeypatch.setenv("MEMLENS_CACHE", str(tmp_path))
    for name in ("olmo2-s", "olmo2-s-untrained"):
        with pytest.raises(ModelNotFoundError, match=r"package memlens-zoo.*pip install 'memlens\[zoo\]'"):
            load_model(f"zoo/{name}")
    assert load_model("zoo/pythia-s", device=dev()).cfg.n_layers == 6


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(architectures=["BertForMaskedLM"]),
        BertConfig(),
        T5Config(architectures=["T5ForConditionalGeneration"]),
    ],
)
def test_not_causal(config, tmp_path):
    config.save_pretrained(tmp_path)
    architecture = "T5" if isinstance(config, T5Config) else "Bert"
    with pytest.raises(UnsupportedModelError, match=f"{architecture}.*not a causal language model"):
        load_model(tmp_path)


def test_loaded_model_that_is_not_causal():
    model = BertForMaskedLM(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    )
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM"):
        load_model(model)
    with pytest.raises(UnsupportedModelError, match="A Linear is not a model"):
        load_model(torch.nn.Linear(2, 2))


def test_architecture_without_a_bridge(tmp_path):
    AutoModelForCausalLM.from_config(tiny_config("gpt_neox")).save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["UnheardOfForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="UnheardOfForCausalLM"):
        load_model(tmp_path)


def test_unknown_model_type(folder):
    edit_config(folder, model_type="unheard_of")
    with pytest.raises(UnsupportedModelError, match="transformers does not know the architecture"):
        load_model(folder)


def test_code_of_its_own_is_not_run(folder, tmp_path):
    ran = tmp_path / "ran"
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(UnsupportedModelError, match="trust_remote_code=True"):
        load_model(folder)
    assert not ran.exists()


def test_config_that_is_not_json(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="could not be read"):
        load_model(folder)


def test_config_with_nonsense(folder):
    edit_config(folder, hidden_size="wide")
    with pytest.raises(ModelLoadError, match="could not be read"):
        load_model(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="no weights"):
        load_model(folder)


def test_truncated_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is damaged"):
        load_model(folder)


def test_missing_weights_are_not_made_up(folder):
    edit_weights(folder, lambda weights: weights.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.weight"))
    with pytest.raises(ModelLoadError, match=r"lack 'gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.weight'"):
        load_model(folder)


def test_weights_of_another_shape(folder):
    edit_config(folder, intermediate_size=72)
    with pytest.raises(
        ModelLoadError,
        match=r"another shape to 'gpt_neox\.layers\.0\.mlp\..*\[64\] instead of \[72\].*6 more",
    ):
        load_model(folder)


def test_surplus_weights_are_not_left_out(folder):
    edit_config(folder, num_hidden_layers=2)
    with pytest.raises(ModelLoadError, match=r"also hold 'gpt_neox\.layers\.2\..* and 9 more.*do not belong"):
        load_model(folder)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neo", "llama", "gpt_bigcode"])
def test_masks_and_rotary_frequencies_in_old_checkpoints_are_no_surplus(family, tmp_path):
    folder = write_tiny(family, tmp_path / family)
    attention = {
        "gpt_neox": "gpt_neox.layers.0.attention",
        "gpt_neo": "transformer.h.0.attn.attention",
        "llama": "model.layers.0.self_attn",
        "gpt_bigcode": "transformer.h.0.attn",
    }[family]
    buffers = {
        f"{attention}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        f"{attention}.masked_bias": torch.tensor(-1e9),
        f"{attention}.rotary_emb.inv_freq": torch.ones(4),
    }
    if family == "llama":
        del buffers[f"{attention}.bias"]
    edit_weights(folder, lambda weights: weights.update(buffers))
    assert load_model(folder, device=dev()).cfg.n_layers in (3, 4)


@pytest.mark.parametrize(
    "outside", ["../other/model.safetensors", "/tmp/model.safetensors", "..\\a", "C:\\a"]
)
def test_an_index_cannot_name_files_outside_of_its_folder(outside, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (folder / "model.safetensors").rename(other / "model.safetensors")
    names = load_file(other / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, outside)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="outside of the checkpoint's folder"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_weights(value, folder):
    def spoil(weights):
        for layer in (1, 2):
            weights[f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight"][3, 5] = value

    edit_weights(folder, spoil)
    with pytest.raises(
        NonFiniteError, match=r"layer 1, in 'gpt_neox\.layers\.1\.mlp\.dense_4h_to_h\.weight' \(1 of"
    ):
        load_model(folder, device=dev())


def test_weights_too_large_for_float16(folder):
    edit_weights(folder, lambda weights: weights["gpt_neox.embed_in.weight"][0].fill_(1e6))
    with pytest.raises(NonFiniteError, match=r"outside the layers.*float16 is too narrow"):
        load_model(folder, dtype="float16", device=dev())
    load_model(folder, dtype="bfloat16", device=dev())


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_first_nonfinite_layer(backend, tiny_model, folder):
    assert first_nonfinite_layer(tiny_model("gpt_neox", backend), random_tokens()) is None

    def spoil(weights):
        weights["gpt_neox.layers.1.attention.dense.bias"][0] = float("inf")

    edit_weights(folder, spoil)
    model = load_model(folder, backend=backend, device=dev(), check_weights=False)
    assert first_nonfinite_layer(model, random_tokens()) == "layer 1"
    assert "first after layer 1" in str(nonfinite_error(model, random_tokens()))


@pytest.mark.parametrize("place", ["embedding", "unembedding"])
def test_first_nonfinite_place_outside_the_blocks(place, folder):
    key = {"embedding": "gpt_neox.embed_in.weight", "unembedding": "lm_head.weight"}[place]

    def spoil(weights):
        found = key if key in weights else "embed_out.weight"
        weights[found][:] = float("nan")

    edit_weights(folder, spoil)
    model = load_model(folder, backend="bridge", device=dev(), check_weights=False)
    assert first_nonfinite_layer(model, random_tokens()) == place


def test_every_error_is_one_sentence_that_names_the_model(folder):
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(MemlensError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "checkpoint" in message
    assert "\n" not in message
    assert caught.value.__cause__ is not None


def test_releases_of_transformers_with_other_token_ids_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny("gpt_neox", tmp_path, num_hidden_layers=1)
    monkeypatch.setattr("memlens.models.huggingface.transformers.__version__", "5.12.1")
    with pytest.raises(ModelLoadError, match=r"transformers 5\.12\.1 gives .* install 5\.13 or later"):
        load_model(folder)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert "transformers>=5.13,<6" in project["dependencies"]


@pytest.mark.skipif(not has_hooked_transformer(), reason="this TransformerLens has none")
@pytest.mark.parametrize("process_weights", [False, True])
def test_a_weight_that_the_conversion_leaves_out_is_refused(process_weights, folder, monkeypatch):
    conversions = import_module("transformer_lens.pretrained.weight_conversions")
    converter = family_by_architecture("GPTNeoXForCausalLM").hooked.converter
    convert = getattr(conversions, converter)

    def without(*args):
        return {name: weight for name, weight in convert(*args).items() if name != "blocks.1.mlp.b_out"}

    monkeypatch.setattr(conversions, converter, without)
    with pytest.raises(ModelLoadError, match=r"no value for 'blocks.1.mlp.b_out' \(and 0 more"):
        load_model(
            folder, backend="hooked", device=dev(), check_weights=False, process_weights=process_weights
        )
