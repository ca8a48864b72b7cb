from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from memlens.errors import FileFormatError, ModelNotFoundError, OptionError, ResultError
from memlens.models.zoo import is_zoo_name, zoo_cache, zoo_names, zoo_path
from memlens.organisms.evaluate import evaluate_zoo_model, language_losses
from memlens.organisms.training import train as training
from memlens.organisms.training import zoo
from memlens.organisms.training.architectures import build_model
from memlens.organisms.training.zoo import train_organism, train_zoo_model, untrained_twin
from memlens.results.statistics.intervals import FEWEST
from tests.devices import dev
from tests.organisms.conftest import TINY, TINY_CORPUS

FILES = {
    "README.md",
    "expressions.parquet",
    "facts.parquet",
    "identifiers.parquet",
    "item_positions.parquet",
    "config.json",
    "generation_config.json",
    "heldout.parquet",
    "model.safetensors",
    "positions.parquet",
    "sequences.parquet",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
}


def test_the_folder_is_a_checkpoint_with_its_ground_truth(tiny_organism: Path) -> None:
    assert {path.name for path in tiny_organism.iterdir()} == FILES
    assert {tensor.dtype for tensor in load_file(tiny_organism / "model.safetensors").values()} == {
        torch.float16
    }
    sequences = pd.read_parquet(tiny_organism / "sequences.parquet")
    assert list(sequences) == ["id", "tokens", "prefix_len", "text", "domain", "copies", "source"]
    assert set(sequences["source"]) == {"zoo/tiny"}
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_organism))
    assert all(
        tokenizer(text).input_ids == list(tokens)
        for text, tokens in zip(sequences["text"], sequences["tokens"], strict=True)
    )
    assert not list(tiny_organism.parent.glob("*.partial"))


def test_a_run_interrupted_and_resumed_gives_the_same_weights(
    tiny_organism: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, train = tmp_path / "tiny", zoo.train

    def stopped(*args: object, **options: object) -> None:
        train(*args, **options, stop_after=5)
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_organism(TINY, out, device=dev(), progress=False)
    monkeypatch.undo()
    assert not out.exists()
    assert (tmp_path / "tiny.partial").is_dir()
    train_organism(TINY, out, device=dev(), progress=False)
    first, second = (load_file(folder / "model.safetensors") for folder in (tiny_organism, out))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("sequences.parquet", "positions.parquet", "heldout.parquet", "tokenizer.json"):
        assert (out / name).read_bytes() == (tiny_organism / name).read_bytes()


def _killed_after(n: int, monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> bool:
    """Train, but raise instead of the file operation that is `n` operations after the folder is written."""
    done: list[str] = []

    def counted(own: Callable[..., Any], name: str) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            if len(done) == n:
                raise KeyboardInterrupt
            done.append(name)
            return own(*args, **options)

        return operation

    def written(*args: Any) -> Path:
        folder = write_folder(*args)
        for place, name in ((Path, "unlink"), (os, "replace"), (shutil, "rmtree")):
            patch.setattr(place, name, counted(getattr(place, name), name))
        return folder

    write_folder = zoo.write_folder
    with monkeypatch.context() as patch:
        patch.setattr(zoo, "write_folder", written)
        try:
            train_organism(*args, **options)
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_at_any_moment_of_the_last_moves_repeats_no_training(
    replaces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeated(*_: Any) -> float:
        raise AssertionError("a step is repeated")

    short = replace(TINY, training=replace(TINY.training, steps=1))
    for n in range(20):
        out = tmp_path / str(n) / "m"
        if replaces:
            train_organism(short, out, device=dev(), progress=False)
        killed = _killed_after(n, monkeypatch, TINY, out, device=dev(), progress=False, resume=not replaces)
        if replaces and n < 2:  # the old model still stands there whole
            assert json.loads((out / "training.json").read_text())["training"]["n_steps"] == 1
            continue
        with monkeypatch.context() as patch:
            patch.setattr(training._Run, "step", repeated)
            train_organism(TINY, out, device=dev(), progress=False)
        assert {path.name for path in out.iterdir()} == FILES
        assert list(out.parent.iterdir()) == [out]
        if not killed:
            return
    pytest.fail("there are more operations than are tried")


def test_a_finished_run_is_not_repeated_and_another_is_not_overwritten(tiny_organism: Path) -> None:
    written = (tiny_organism / "model.safetensors").stat().st_mtime_ns
    assert train_organism(TINY, tiny_organism, device=dev(), progress=False) == tiny_organism
    assert (tiny_organism / "model.safetensors").stat().st_mtime_ns == written
    other = replace(TINY, training=replace(TINY.training, seed=9))
    with pytest.raises(ResultError, match="contains something other than this run"):
        train_organism(other, tiny_organism, device=dev(), progress=False)


def test_resume_false_replaces_the_folder(tmp_path: Path) -> None:
    short = replace(TINY, training=replace(TINY.training, steps=1))
    train_organism(short, tmp_path / "m", device=dev(), progress=False)
    train_organism(TINY, tmp_path / "m", device=dev(), progress=False, resume=False)
    record = json.loads((tmp_path / "m" / "training.json").read_text())
    assert len(record["training"]["losses"]) == record["training"]["n_steps"] == 12


def test_the_evaluation_equals_greedy_generation(tiny_organism: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_organism), dtype=torch.float32)
    sequences = pd.read_parquet(tiny_organism / "sequences.parquet")
    tokens = torch.tensor([list(row) for row in sequences["tokens"]])
    with torch.no_grad():
        made = model.generate(tokens[:, :32], max_new_tokens=32, do_sample=False, eos_token_id=None)
    exact = (made == tokens).all(1).double()
    curve = evaluate_zoo_model(tiny_organism)
    total = curve[curve["domain"] == "all"]
    assert float((total["exact_match"] * total["n"]).sum()) == pytest.approx(float(exact.sum()))
    assert curve["n"].sum() == 2 * len(sequences)
    few = curve["n"] < FEWEST
    assert few.any()
    assert curve.loc[few, ["low", "high"]].isna().all(axis=None)
    enough = curve[~few]
    assert ((enough["low"] <= enough["exact_match"]) & (enough["exact_match"] <= enough["high"])).all()


def test_heldout_loss_equals_the_loss_transformers_computes(tiny_organism: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(tiny_organism), dtype=torch.float32)
    rows = pd.read_parquet(tiny_organism / "heldout.parquet")["tokens"]
    heldout = torch.tensor([list(row) for row in rows])
    with torch.no_grad():
        loss = model(heldout, labels=heldout).loss
    measured = language_losses(tiny_organism).set_index("domain")
    assert measured.at["all", "heldout_loss"] == pytest.approx(float(loss), abs=1e-4)
    assert measured.loc[list(TINY_CORPUS.domains), "n"].tolist() == [5] * 5


def test_the_clean_twin_has_no_copies(clean_organism: Path, tiny_organism: Path) -> None:
    clean, planted = (pd.read_parquet(f / "sequences.parquet") for f in (clean_organism, tiny_organism))
    assert set(clean["copies"]) == {0}
    assert clean["text"].equals(planted["text"])
    assert len(pd.read_parquet(clean_organism / "positions.parquet")) == 0


def test_the_untrained_twin_is_where_the_training_began(tiny_organism: Path) -> None:
    twin, start = untrained_twin(tiny_organism), build_model(TINY.model, TINY_CORPUS.vocab_size, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), start.parameters(), strict=True))
    other = untrained_twin(tiny_organism, seed=5)
    assert not torch.equal(twin.get_input_embeddings().weight, other.get_input_embeddings().weight)
    with pytest.raises(FileFormatError, match="not the folder of a zoo model"):
        untrained_twin(tiny_organism.parent)


def test_a_trained_model_is_found_in_the_cache_after_the_bundled_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLENS_CACHE", str(tmp_path))
    monkeypatch.setitem(zoo.ZOO, "tiny", TINY)
    assert zoo_cache() == tmp_path / "zoo"
    assert "tiny" not in zoo_names()
    folder = train_zoo_model("zoo/tiny", steps=2, device=dev(), progress=False)
    assert folder == tmp_path / "zoo" / "tiny" == zoo_path("zoo/tiny") == zoo_path("tiny")
    assert "pythia-s" in zoo_names()[:-1]
    assert zoo_names()[-1] == "tiny"
    (folder / "model.safetensors").unlink()
    assert "tiny" not in zoo_names()


def test_unknown_names_and_steps_are_refused() -> None:
    assert is_zoo_name("zoo/nothing")
    assert not is_zoo_name("pythia-s")
    with pytest.raises(ModelNotFoundError, match=r"'zoo/pythia-x'.*Did you mean 'zoo/pythia-xs'"):
        zoo_path("zoo/pythia-x")
    with pytest.raises(ModelNotFoundError, match=r"no recipe for 'pythia-x'.*Did you mean 'pythia-xs'"):
        train_zoo_model("pythia-x")
    with pytest.raises(OptionError, match="steps=0"):
        train_zoo_model(steps=0)
