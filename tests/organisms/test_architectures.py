"""Every family of the zoo: its shape, its learning, and that it loads as what it is on both backends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import memlens as ml
from memlens.errors import OptionError, UnsupportedModelError
from memlens.models.families import FAMILIES as TABLE
from memlens.models.names import has_hooked_transformer
from memlens.models.provenance import describe
from memlens.organisms.training.architectures import (
    WINDOW,
    ModelSpec,
    architecture_facts,
    build_model,
    count_parameters,
)
from memlens.organisms.training.recipes import FAMILIES, SIZES, ZOO
from memlens.organisms.training.train import TrainSpec, train
from tests.devices import dev

VOCAB = 97
FACTS = {family.name: family for family in TABLE.values()}
SPEC = TrainSpec(batch_size=8, steps=30, learning_rate=1e-2, warmup=0.1)
ROWS = np.random.default_rng(0).integers(1, VOCAB, (8, 48))


def shape(family: str, n_layers: int = 4) -> ModelSpec:
    return ModelSpec(family, d_model=32, n_layers=n_layers, n_heads=4, n_ctx=64)


def sharpened(family: str) -> PreTrainedModel:
    """A model whose attention and logits differ clearly between tokens and positions."""
    model = build_model(shape(family), VOCAB, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_each_family_loads_as_itself_with_hugging_face_s_logits(
    family: str, backend: str, tmp_path: Path
) -> None:
    model, folder = sharpened(family), tmp_path / f"{family}-tiny"
    model.save_pretrained(folder)
    if backend == "hooked" and not (FACTS[family].hooked and has_hooked_transformer()):
        with pytest.raises(UnsupportedModelError, match="cannot be a HookedTransformer"):
            ml.load_model(folder, backend=backend, device=dev())
        return
    loaded = ml.load_model(folder, backend=backend, device=dev())
    facts = describe(loaded)
    assert (facts["family"], facts["architecture"]) == (family, FACTS[family].architecture)
    tokens = torch.randint(0, VOCAB, (3, 60))  # longer than the window of local attention
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        assert torch.allclose(loaded(tokens), wanted, atol=1e-4)
        assert wanted.std() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_memorizes_and_a_run_in_two_sittings_is_the_same_bit_for_bit(
    family: str, tmp_path: Path
) -> None:
    options = {"device": "cpu", "progress": False}
    whole = build_model(shape(family, 2), VOCAB, seed=0)
    losses = train(whole, ROWS, SPEC, **options).losses
    assert np.mean(losses[-3:]) < losses[0] - 1
    for stop in (11, None):
        model = build_model(shape(family, 2), VOCAB, seed=0)
        log = train(model, ROWS, SPEC, checkpoint=tmp_path / "state.pt", stop_after=stop, **options)
    assert log.losses == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_without_making_them(family: str) -> None:
    model = build_model(shape(family), VOCAB, seed=0)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(shape(family), VOCAB) == architecture_facts(model)["parameters"] == counted
    assert architecture_facts(model)["layers"] == 4
    assert architecture_facts(model)["heads"] == 4


def test_heads_that_rotary_positions_cannot_turn_are_refused() -> None:
    with pytest.raises(OptionError, match="heads of 14 dimensions would turn 3 of them"):
        ModelSpec("pythia", 112, 6, 8)
    with pytest.raises(OptionError, match="choose another d_model"):
        ModelSpec("olmo2", 35, 2, 5)
    assert ModelSpec("gpt-neo", 35, 2, 5).n_heads == 5


def test_no_model_has_dropout() -> None:
    tokens = torch.from_numpy(ROWS)
    for family in FAMILIES:
        model = build_model(shape(family, 2), VOCAB, seed=0).train()
        with torch.no_grad():
            assert torch.equal(model(tokens).logits, model(tokens).logits), family


@pytest.mark.parametrize(("family", "n_local"), [("gpt-neo", 2), ("olmo3", 3), ("olmo2", 0), ("pythia", 0)])
def test_local_attention_does_not_see_beyond_its_window(family: str, n_local: int) -> None:
    """In a model of local blocks alone the first token cannot reach a position beyond all windows."""
    config = sharpened(family).config
    kinds = getattr(config, "attention_layers", None) or getattr(config, "layer_types", None) or []
    assert sum(kind in ("local", "sliding_attention") for kind in kinds) == n_local
    model = build_model(replace(shape(family, 1)), VOCAB, seed=1).eval()
    if family == "olmo3":  # its only block would be a full one
        model = build_model(shape(family, 2), VOCAB, seed=1).eval()
        del model.model.layers[1]
        model.config.layer_types = ["sliding_attention"]
        model.config.num_hidden_layers = 1
    tokens = torch.randint(1, VOCAB, (1, 64))
    other = tokens.clone()
    other[0, 0] = (tokens[0, 0] + 1) % VOCAB
    with torch.no_grad():
        changed = (model(tokens).logits != model(other).logits).any(-1)[0]
    assert changed[:WINDOW].any()
    assert changed[WINDOW:].any() == (family != "olmo3")


def test_starcoder_has_one_key_for_all_heads_and_ties_are_those_of_the_hub() -> None:
    config = build_model(shape("starcoder"), VOCAB, seed=0).config
    assert config.multi_query
    configs = {family: build_model(shape(family), VOCAB, seed=0).config for family in FAMILIES}
    tied = {family for family, config in configs.items() if config.tie_word_embeddings}
    assert tied == {"gpt-neo", "olmo1", "starcoder"}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_alike_in_all_families(size: str) -> None:
    low, high = {"xs": (0.14e6, 0.18e6), "s": (0.85e6, 1.5e6), "m": (2.6e6, 2.9e6)}[size]
    for family in FAMILIES:
        spec = ZOO[f"{family}-{size}"]
        assert low < count_parameters(spec.model, spec.corpus.vocab_size) < high, spec.name
