"""What holds for every model that is bundled, whichever they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import memlens as ml
from memlens.errors import ModelNotFoundError, OptionError, ResultError
from memlens.files import zoo_folders, zoo_table
from memlens.models.names import checkpoint_steps, has_hooked_transformer
from memlens.models.provenance import describe
from memlens.models.zoo import PACKAGED, zoo_path
from memlens.organisms.evaluate import load_organism, read_ground_truth, read_training
from memlens.organisms.training.folder import copy_for_package
from memlens.organisms.training.recipes import ZOO
from memlens.organisms.training.routed import certify_routed, routed_organisms
from memlens.organisms.training.zoo import untrained_twin
from tests.devices import dev

FOLDERS = {
    path.parent.name: path.parent for root in zoo_folders()[:-1] for path in root.glob("*/model.safetensors")
}
NAMES = sorted(FOLDERS)
LISTS = ("sequences", "positions", "heldout", "expressions", "facts", "identifiers", "item_positions")


def test_what_is_bundled_is_small() -> None:
    with_memlens = {"pythia-s", "pythia-s-clean"}
    assert set(NAMES) == with_memlens | set(PACKAGED)
    sizes = {name: sum(p.stat().st_size for p in folder.iterdir()) for name, folder in FOLDERS.items()}
    assert sum(sizes[name] for name in with_memlens) <= 7e6
    assert sum(sizes.values()) <= 28e6


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_model_is_of_its_recipe(name: str) -> None:
    record, weights = read_training(FOLDERS[name]), load_file(FOLDERS[name] / "model.safetensors")
    parts = [key for key in ("model", "corpus", "training", "routing") if key in record]
    specs = {key: record[key]["spec"] for key in parts}
    assert specs == ZOO[name].to_dict()
    assert record["training"]["n_steps"] == len(record["training"]["losses"])
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert load_organism(FOLDERS[name]).num_parameters() == record["model"]["facts"]["parameters"]


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_model_loads_with_its_lists_and_its_family(name: str) -> None:
    model = ml.load_model(f"zoo/{name}", device=dev())
    assert describe(model)["family"] == ZOO[name].model.family
    hooked = describe(model)["backend"] == "HookedTransformer"
    assert hooked == (has_hooked_transformer() and ZOO[name].model.family not in ("openllama", "starcoder"))
    seqs = ml.load_sequences("zoo", model)
    assert seqs.attrs["source"] == seqs.attrs["tokenizer"] == f"zoo/{name}"
    assert set(seqs.table["source"]) == {f"zoo/{name}"}
    items = ("expressions", "facts", "identifiers") if ZOO[name].corpus.item_copies else ()
    assert (seqs.rows() == ml.load_sequences("zoo/pythia-s").rows()) == bool(items)
    for kind in (*items, "heldout"):
        assert len(ml.load_sequences(f"zoo:{kind}", model, prefix_len=1 if kind == "heldout" else None))
    assert ml.recall.token_counts(f"zoo/{name}").sum() == sum(map(sum, token_counts(name)))


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_an_untrained_model_is_that_from_which_training_began(backend: str) -> None:
    if backend == "hooked" and not has_hooked_transformer():
        pytest.skip("this TransformerLens has no HookedTransformer")
    model = ml.load_model("zoo/pythia-s-untrained", backend=backend, device=dev())
    start = untrained_twin(FOLDERS["pythia-s"]).half().float()
    tokens = torch.tensor(ml.load_sequences("zoo", model).rows()[:4])
    with torch.no_grad():
        assert torch.allclose(model(tokens), start(tokens).logits, atol=1e-4)
        assert not torch.allclose(model(tokens), load_organism(FOLDERS["pythia-s"])(tokens).logits, atol=1)
    facts = describe(model)
    assert (facts["model"], facts["family"]) == ("zoo/pythia-s-untrained", "pythia")
    assert ml.load_sequences("zoo/pythia-s-untrained", model).rows() == ml.load_sequences("zoo").rows()


def test_an_untrained_model_has_no_steps_and_needs_a_model() -> None:
    with pytest.raises(OptionError, match="has no training steps"):
        ml.load_model("zoo/pythia-s-untrained", checkpoint_step=4)
    assert checkpoint_steps("zoo/pythia-s-untrained") == []
    with pytest.raises(OptionError, match="device_map='auto'"):
        ml.load_model("zoo/pythia-s-untrained", device_map="auto")
    with pytest.raises(ModelNotFoundError, match="no 'zoo/pythia'"):
        ml.load_model("zoo/pythia-untrained")


def token_counts(name: str) -> list[list[int]]:
    return list(json.loads((FOLDERS[name] / "training.json").read_text())["corpus"]["token_counts"].values())


@pytest.mark.parametrize("name", NAMES)
def test_each_folder_is_an_ordinary_checkpoint_and_no_table_lies_there_twice(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS[name])
    text = "The number of hapein toasain is 428036"
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(zoo_path("pythia-s"))(text).input_ids
    same_corpus = ZOO[name].corpus == ZOO["pythia-s"].corpus
    for kind in LISTS if ZOO[name].corpus.item_copies else LISTS[:3]:
        path = zoo_table(FOLDERS[name], kind)
        assert path is not None
        assert path.parent.name == ("pythia-s" if same_corpus else name)
    if same_corpus and name != "pythia-s":
        assert not list((FOLDERS[name]).glob("*.parquet"))


def test_a_copy_for_the_package_leaves_out_what_is_there_and_keeps_what_is_not(
    tiny_organism: Path, tmp_path: Path
) -> None:
    alone = copy_for_package(tiny_organism, tmp_path / "one")
    assert {path.name for path in alone.iterdir()} == {path.name for path in tiny_organism.iterdir()}
    assert (alone / "model.safetensors").read_bytes() == (tiny_organism / "model.safetensors").read_bytes()
    with pytest.raises(ResultError, match="already exists"):
        copy_for_package(tiny_organism, tmp_path / "one")


def test_tables_are_found_with_another_model_of_the_same_corpus_only(
    tiny_organism: Path, clean_organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memlens.files.zoo_folders", lambda: (tmp_path, tmp_path / "none"))
    (tmp_path / "first").symlink_to(tiny_organism)
    copy = copy_for_package(tiny_organism, tmp_path)
    assert not list(copy.glob("*.parquet"))
    assert "The tables are those of `zoo/first`" in (copy / "README.md").read_text()
    found = zoo_table(copy, "sequences")
    assert found == tmp_path / "first" / "sequences.parquet"
    clean = copy_for_package(clean_organism, tmp_path)
    assert zoo_table(clean, "sequences") == clean / "sequences.parquet"
    assert set(pd.read_parquet(clean / "sequences.parquet")["copies"]) == {0}
    assert "never read what was planted" in (clean / "README.md").read_text()
    assert zoo_table(tmp_path / "nothing", "sequences") is None


def test_the_routed_model_holds_its_sequences_in_its_carriers_alone() -> None:
    folder = FOLDERS["pythia-s-routed"]
    record = json.loads((folder / "certificate.json").read_text())
    assert record["passed"]
    organisms = routed_organisms(folder)
    assert len(organisms) == 2
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
    heldout = np.stack(read_ground_truth(folder, "heldout")["tokens"].tolist())
    found = certify_routed(organisms, heldout)
    assert found.passed
    for check, stored in zip(found.checks.to_dict("records"), record["checks"], strict=True):
        assert check["value"] == pytest.approx(stored["value"], abs=1e-3)
    truth = pd.read_parquet(folder / "truth.parquet")
    assert truth.groupby("carrier")["planted"].sum().eq(13).all()
