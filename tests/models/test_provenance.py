"""What a model says about itself, and what the table of families says about models."""

from __future__ import annotations

import gc
from importlib.metadata import version

import pytest
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig

import memlens
from memlens.errors import OptionError
from memlens.models import provenance
from memlens.models.families import (
    FAMILIES,
    Family,
    ModelEntry,
    families_table,
    family_of,
    find_model,
    known_names,
    register_family,
    step_of,
)
from memlens.models.load import load_model
from memlens.models.names import has_hooked_transformer
from memlens.models.provenance import describe, remember
from tests.devices import dev
from tests.tiny import FAMILIES as TINY
from tests.tiny import tiny_config, tiny_huggingface_model, tiny_tokenizer, write_tiny

KEYS = {
    "model",
    "revision",
    "backend",
    "family",
    "architecture",
    "dtype",
    "device",
    "transformer_lens",
    "memlens",
    "processed_weights",
    "n_params",
}
FAMILY_OF_TINY = dict(
    zip(
        TINY,
        [
            "pythia",
            "pythia",
            "gpt-neo",
            "olmo1",
            "olmo2",
            "olmo3",
            "llama",
            "llama",
            "starcoder",
            "starcoder2",
        ],
        strict=True,
    )
)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_describe(backend, tiny_model, tiny_folder):
    facts = describe(tiny_model("olmo2", backend))
    folder = tiny_folder("olmo2")
    n_params = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert facts == {
        "model": folder.name,
        "revision": "",
        "backend": "HookedTransformer" if backend == "hooked" else "TransformerBridge",
        "family": "olmo2",
        "architecture": "Olmo2ForCausalLM",
        "dtype": "float32",
        "device": "cpu",
        "transformer_lens": version("transformer-lens"),
        "memlens": memlens.__version__,
        "processed_weights": False,
        "n_params": n_params,
    }


def test_describe_a_model_that_was_never_remembered(tiny_folder):
    bridge = TransformerBridge.boot_transformers(str(tiny_folder("starcoder2")), device=dev())
    facts = describe(bridge)
    assert set(facts) == KEYS
    assert (facts["family"], facts["backend"]) == ("starcoder2", "TransformerBridge")
    assert (facts["processed_weights"], facts["revision"]) == (False, "")
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert describe(bridge)["processed_weights"] is True


@pytest.mark.skipif(not has_hooked_transformer(), reason="this TransformerLens has none")
def test_describe_a_hooked_transformer_made_by_hand():
    import transformer_lens as lens

    cfg = lens.HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=8, d_head=4, n_heads=2, d_vocab=9, act_fn="relu", device=dev()
    )
    facts = describe(lens.HookedTransformer(cfg))
    assert set(facts) == KEYS
    assert (facts["backend"], facts["family"], facts["model"]) == ("HookedTransformer", "unknown", "custom")


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_processed_weights_are_said_to_be(backend, tiny_folder):
    if backend == "hooked" and not has_hooked_transformer():
        pytest.skip("this TransformerLens has no HookedTransformer")
    for family in ("gpt_neox", "olmo3"):
        model = load_model(tiny_folder(family), backend=backend, process_weights=True, device=dev())
        assert describe(model)["processed_weights"] is True


def test_remembered_facts_win_and_go_with_the_model(tmp_path):
    model = load_model(write_tiny("llama", tmp_path), device=dev())
    remember(model, model="my own", note=3)
    assert (describe(model)["model"], describe(model)["note"]) == ("my own", 3)
    before = len(provenance._FACTS)
    del model
    gc.collect()
    assert len(provenance._FACTS) < before


def test_huggingface_model_is_named_after_its_folder(tiny_folder):
    folder = tiny_folder("llama")
    named = load_model(AutoModelForCausalLM.from_pretrained(folder))
    assert describe(named)["model"] == str(folder)
    unnamed = load_model(tiny_huggingface_model("llama"), tokenizer=tiny_tokenizer())
    assert describe(unnamed)["model"] == "LlamaForCausalLM"


@pytest.mark.parametrize("tiny", TINY)
def test_family_of_configs_and_models(tiny, tiny_model):
    assert family_of(tiny_config(tiny)) == FAMILY_OF_TINY[tiny]
    assert family_of(tiny_model(tiny)) == FAMILY_OF_TINY[tiny]
    assert family_of(tiny_model(tiny).cfg) == FAMILY_OF_TINY[tiny]


def test_llama_is_openllama_or_hubble_by_name_only():
    assert family_of(LlamaConfig(), name="openlm-research/open_llama_7b") == "openllama"
    assert family_of(LlamaConfig(), name="allegrolab/hubble-8b-500b_toks-standard-hf") == "hubble"
    assert family_of(LlamaConfig(), name="hubble-1b-100b_toks-injectrange_0_25-hf") == "hubble"
    assert family_of(LlamaConfig(), name="EleutherAI/pythia-70m") == "llama"


def test_table():
    table = families_table()
    assert table["model"].is_unique
    assert list(table["model"]) == known_names()
    assert not table.isna().any().any()
    counts = table.groupby("family").size().to_dict()
    assert counts == {
        "pythia": 18,
        "gpt-neo": 3,
        "olmo1": 5,
        "olmo2": 4,
        "olmo3": 2,
        "openllama": 3,
        "hubble": 17,
        "starcoder": 4,
        "starcoder2": 3,
    }
    hooked = set(table.loc[table["HookedTransformer"] != "", "family"])
    assert hooked == {"pythia", "gpt-neo", "olmo1", "olmo2", "olmo3"}


@pytest.mark.parametrize("tiny", TINY)
def test_table_tells_the_backend_that_auto_gives(tiny, tiny_model):
    by_family = families_table().groupby("family")["backend"].first()
    family = FAMILY_OF_TINY[tiny].replace("llama", "openllama")
    assert by_family[family] == type(tiny_model(tiny)).__name__


def test_architectures_of_the_table_are_transformers_classes():
    import transformers

    assert all(hasattr(transformers, family.architecture) for family in FAMILIES.values())


def test_short_names_are_unambiguous():
    short = [name.rpartition("/")[2].lower() for name in known_names()]
    assert len(set(short)) == len(short)
    assert find_model("OLMO-2-0425-1b")[1].name == "allenai/OLMo-2-0425-1B"
    assert find_model("someone-else/pythia-70m") is None


def test_shapes_have_the_parameters_that_their_names_say():
    shaped = [entry for family in FAMILIES.values() for entry in family.models if entry.shape is not None]
    assert len(shaped) == 49
    for entry in shaped:
        said = float(entry.size[:-1]) * {"M": 1e6, "B": 1e9}[entry.size[-1]]
        tolerance = 0.5 if said < 2e9 else 0.15  # "1B" is a round name for 1.0 to 1.5
        assert abs(entry.shape.n_params - said) / said < tolerance, entry


def test_training_steps_are_read_from_every_family_s_revisions():
    for family in FAMILIES.values():
        named = family.checkpoints.format(step=9, tokens=4)
        assert step_of(named) == (9 if named else None)
    assert [step_of(name) for name in ("main", "step", "stage2-step9", "step9x")] == [None] * 4


def test_a_family_s_models_are_entries():
    """Else a plugin's family would break every look-up of a model."""
    with pytest.raises(OptionError, match=r"family 'phi' has 'someone/phi-1' as a model: give a ModelEntry"):
        Family("phi", "PhiForCausalLM", "a corpus", "MIT", "", ("someone/phi-1",))


def test_a_new_family_is_one_row(monkeypatch):
    monkeypatch.setattr(FAMILIES, "_items", dict(FAMILIES._items))
    entry = ModelEntry("someone/phi-1", "1.3B")
    register_family(Family("phi", "PhiForCausalLM", "a corpus", "MIT", "", (entry,), post_norm=True))
    assert family_of(PhiConfig()) == "phi"
    assert find_model("phi-1")[0].name == "phi"
    assert families_table().set_index("model").loc["someone/phi-1", "backend"] == "TransformerBridge"
