"""Hub names, revisions and training checkpoints, from a hub cache made by the test, without a network."""

from __future__ import annotations

import time
from types import SimpleNamespace

import httpx
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import AutoModelForCausalLM

from memlens.errors import ModelLoadError, ModelNotFoundError, OptionError, SourceNotFoundError
from memlens.models import names
from memlens.models.bos import expects_bos
from memlens.models.families import find_model
from memlens.models.load import load_model
from memlens.models.names import has_hooked_transformer
from memlens.models.provenance import describe
from memlens.sequences.readers.load import load_sequences
from tests.devices import dev
from tests.models.equality import distance_from_huggingface
from tests.models.hub_cache import put_in_cache
from tests.tiny import random_tokens, write_tiny

REAL_NAMES = [
    ("EleutherAI/pythia-70m", "gpt_neox", "pythia"),
    ("EleutherAI/gpt-neo-125m", "gpt_neo", "gpt-neo"),
    ("allenai/OLMo-1B-hf", "olmo", "olmo1"),
    ("allenai/OLMo-2-0425-1B", "olmo2", "olmo2"),
    ("allenai/Olmo-3-1025-7B", "olmo3", "olmo3"),
    ("openlm-research/open_llama_3b", "llama", "openllama"),
    ("allegrolab/hubble-1b-100b_toks-perturbed-hf", "llama_gqa", "hubble"),
    ("bigcode/starcoderbase-1b", "gpt_bigcode", "starcoder"),
    ("bigcode/starcoder2-3b", "starcoder2", "starcoder2"),
]
HOOKED = {"pythia", "gpt-neo", "olmo1", "olmo2", "olmo3"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, in the place of the user's."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("repo", "tiny", "family"), REAL_NAMES)
def test_real_names(repo, tiny, family, cache):
    snapshot = put_in_cache(cache, repo, tiny)
    model = load_model(repo, device=dev())
    hf_model = AutoModelForCausalLM.from_pretrained(snapshot).eval()
    assert distance_from_huggingface(model, hf_model, random_tokens(2, 40)) < 1e-5
    facts = describe(model)
    hooked = family in HOOKED and has_hooked_transformer()
    assert facts["backend"] == ("HookedTransformer" if hooked else "TransformerBridge")
    assert (facts["model"], facts["family"], facts["revision"]) == (repo, family, "main")
    assert model.to_tokens("w3", prepend_bos=False).tolist() == [[3]]


def test_name_without_organization(cache):
    put_in_cache(cache, "EleutherAI/pythia-70m", "gpt_neox")
    assert describe(load_model("pythia-70m", device=dev()))["model"] == "EleutherAI/pythia-70m"


CHECKPOINTS = [
    ("EleutherAI/pythia-70m", "gpt_neox", ["step512", "step3000", "step143000"]),
    ("allenai/OLMo-1B-hf", "olmo", ["step512-tokens2B", "step3000-tokens12B", "step20000-tokens84B"]),
    (
        "allenai/OLMo-2-0425-1B",
        "olmo2",
        ["stage1-step512-tokens2B", "stage1-step3000-tokens7B", "stage2-ingredient1-step3000-tokens7B"],
    ),
    ("allenai/Olmo-3-1025-7B", "olmo3", ["stage1-step512", "stage1-step3000", "stage2-step3000"]),
    ("allegrolab/hubble-1b-100b_toks-perturbed-hf", "llama_gqa", ["step512", "step3000", "step48000"]),
]


@pytest.mark.parametrize(("repo", "tiny", "names"), CHECKPOINTS)
def test_checkpoint_step(repo, tiny, names, cache):
    for seed, revision in enumerate(["main", *names]):
        put_in_cache(cache, repo, tiny, revision=revision, seed=seed)
    by_step = load_model(repo, checkpoint_step=3000, device=dev())
    by_name = load_model(repo, revision=names[1], device=dev())
    tokens = random_tokens()
    assert describe(by_step)["revision"] == names[1]
    assert (by_step(tokens) == by_name(tokens)).all()
    assert (by_step(tokens) - load_model(repo, device=dev())(tokens)).abs().max() > 0.1
    with pytest.raises(
        ModelNotFoundError, match=r"no checkpoint of step 3001: the nearest of [23] .* 512, 3000"
    ):
        load_model(repo, checkpoint_step=3001)
    with pytest.raises(OptionError, match="contradict"):
        load_model(repo, checkpoint_step=3000, revision="main")


@pytest.mark.parametrize("kind", ["standard", "perturbed"])
def test_hubble_s_shape_in_a_folder(kind, tmp_path):
    """Four query heads per key and value head, no biases, embeddings that are not tied."""
    shape = {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    folder = write_tiny("llama", tmp_path / f"hubble-1b-100b_toks-{kind}-hf", **shape)
    model = load_model(folder, device=dev())
    hf_model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert distance_from_huggingface(model, hf_model, random_tokens(2, 40)) < 1e-5
    assert describe(model)["family"] == "hubble"
    assert not torch.equal(model.W_U.T, model.W_E)
    assert not expects_bos(model, model.tokenizer)  # unlike OpenLLaMA, of the same architecture
    shapes = [find_model(f"hubble-{size}-100b_toks-{kind}-hf")[1].shape for size in ("1b", "8b")]
    assert [shape.n_heads // shape.n_kv_heads for shape in shapes] == [4, 4]
    assert [shape.tied for shape in shapes] == [False, False]
    assert [round(shape.n_params / 1e9, 1) for shape in shapes] == [1.2, 8.3]


def test_no_checkpoints(cache):
    put_in_cache(cache, "openlm-research/open_llama_3b", "llama")
    with pytest.raises(ModelNotFoundError, match="none of its revisions"):
        load_model("openlm-research/open_llama_3b", checkpoint_step=1000)


def test_unknown_revision(cache):
    put_in_cache(cache, "EleutherAI/pythia-70m", "gpt_neox")
    with pytest.raises(ModelNotFoundError, match="pythia-70m"):
        load_model("EleutherAI/pythia-70m", revision="step7")


@pytest.mark.parametrize("name", ["EleutherAI/pythia-71m", "pythia-7Om", "EleutherAI/pythia 70m"])
def test_unknown_name_gives_near_matches(name, cache):
    with pytest.raises(ModelNotFoundError, match=r"Did you mean .*pythia-70m"):
        load_model(name)


def test_name_that_is_not_in_the_cache(cache):
    with pytest.raises(ModelNotFoundError, match="could not be asked"):
        load_model("EleutherAI/pythia-70m")


def test_steps_listed_on_the_hub(monkeypatch):
    refs = [SimpleNamespace(name=n) for n in ("main", "step10", "step2", "step1-tokens1B", "v0")]
    monkeypatch.setattr(names, "hub_answers", lambda: True)
    monkeypatch.setattr(
        names.HfApi,
        "list_repo_refs",
        lambda self, repo: SimpleNamespace(branches=refs[:3], tags=refs[3:]),
    )
    assert list(names.list_steps("a/b").items()) == [(1, "step1-tokens1B"), (2, "step2"), (10, "step10")]


def test_steps_of_a_repository_that_does_not_exist(monkeypatch):
    def refuse(self, repo):
        response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
        raise RepositoryNotFoundError("no such repository", response=response)

    monkeypatch.setattr(names, "hub_answers", lambda: True)
    monkeypatch.setattr(names.HfApi, "list_repo_refs", refuse)
    with pytest.raises(ModelNotFoundError, match="pythia-70m"):
        names.list_steps("EleutherAI/pythia-7Om")


def test_steps_fall_back_on_the_cache(cache, monkeypatch):
    def no_network(self, repo):
        raise httpx.ConnectError("no route")

    put_in_cache(cache, "EleutherAI/pythia-70m", "gpt_neox", revision="step64")
    monkeypatch.setattr(names, "hub_answers", lambda: True)
    monkeypatch.setattr(names.HfApi, "list_repo_refs", no_network)
    assert names.list_steps("EleutherAI/pythia-70m") == {64: "step64"}


def test_without_a_network_the_cache_is_read_at_once(cache, monkeypatch):
    """The hub is asked once; its clients would ask again and again for each file."""
    asked = []

    def no_network(*args, **kwargs):
        asked.append(args)
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(names, "get_session", lambda: SimpleNamespace(head=no_network))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    names._answers.cache_clear()
    started = time.monotonic()
    try:
        with pytest.raises(ModelNotFoundError, match="could not be asked"):
            load_model("EleutherAI/pythia-70m")
        with pytest.raises(ModelNotFoundError, match=r"none of its revisions in the local cache \(offline\)"):
            load_model("EleutherAI/pythia-70m", checkpoint_step=8)
        with pytest.raises(SourceNotFoundError, match=r"split 'train', is not in the cache, and https://hug"):
            load_sequences("hf:no/name")
        put_in_cache(cache, "EleutherAI/pythia-70m", "gpt_neox")
        assert load_model("EleutherAI/pythia-70m", device=dev()).cfg.n_layers == 3
    finally:
        names._answers.cache_clear()
    assert len(asked) <= 2
    assert time.monotonic() - started < 30
    assert not constants.HF_HUB_OFFLINE


def test_pickled_weights_only_when_asked(cache, tmp_path_factory):
    import torch

    snapshot = put_in_cache(cache, "openlm-research/open_llama_3b", "llama")
    model = AutoModelForCausalLM.from_pretrained(snapshot)
    torch.save(model.state_dict(), snapshot / "pytorch_model.bin")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="allow_pickle=True"):
        load_model("openlm-research/open_llama_3b")
    loaded = load_model("openlm-research/open_llama_3b", allow_pickle=True, device=dev())
    assert distance_from_huggingface(loaded, model.eval(), random_tokens()) < 1e-5
