"""The model that is shipped does what its card says."""

from __future__ import annotations

import json
import re

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr

from memlens.models.zoo import zoo_path
from memlens.organisms.card import curve_table, loss_table
from memlens.organisms.corpus import Corpus, CorpusSpec, build_corpus
from memlens.organisms.evaluate import evaluate_zoo_model, language_losses, load_organism
from memlens.organisms.zoo import ZOO

FOLDER = zoo_path("pythia-s")
RECORD = json.loads((FOLDER / "training.json").read_text())


def numbers(text: str) -> list[list[float]]:
    """The numbers of each line of a text's Markdown tables, in order; the planted example is no such line."""
    lines = [
        line for line in text.split("## What it memorized")[-1].splitlines() if re.match(r"\| .*\d\.\d", line)
    ]
    return [[float(number) for number in re.findall(r"\d+(?:\.\d+)?", line)] for line in lines]


@pytest.fixture(scope="module")
def curve() -> pd.DataFrame:
    return evaluate_zoo_model(FOLDER)


@pytest.fixture(scope="module")
def losses() -> pd.DataFrame:
    return language_losses(FOLDER)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus(CorpusSpec.from_dict(RECORD["corpus"]["spec"]))


def test_memorization_rises_with_copies_from_none_to_all(curve: pd.DataFrame) -> None:
    total = curve[curve["domain"] == "all"].set_index("copies")["exact_match"]
    assert list(total.index) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert total[0] <= 0.05
    assert total[1] <= 0.05
    assert total[256] >= 0.9
    assert spearmanr(total.index, total).statistic > 0.9


def test_every_domain_is_recalled_when_planted_often(curve: pd.DataFrame) -> None:
    often = curve[(curve["copies"] == 256) & (curve["domain"] != "all")]
    assert (often["exact_match"] >= 0.8).all()
    assert set(often["n"]) == {6}


def test_the_language_part_generalizes(losses: pd.DataFrame) -> None:
    assert (losses["heldout_loss"] < 0.6 * losses["unigram_entropy"]).all()


def test_the_card_says_what_evaluation_finds(curve: pd.DataFrame, losses: pd.DataFrame) -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    printed, measured = numbers(card), numbers(curve_table(curve) + "\n" + loss_table(losses))
    assert [row[0] for row in printed] == [row[0] for row in measured]
    for shown, found in zip(printed, measured, strict=True):
        assert shown == pytest.approx(found, abs=0.015)  # two decimals, and another machine's rounding


def test_the_card_tells_corpus_seed_and_list() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    sequences = pd.read_parquet(FOLDER / "sequences.parquet")
    assert card.startswith("---\nlicense: mit\n")
    assert f"{RECORD['corpus']['n_rows']:,} windows" in card
    assert f"{sequences['copies'].sum():,}\nplanted copies" in card
    assert RECORD["command"] in card
    assert any(text.rstrip("\n") in card for text in sequences.loc[sequences["copies"] == 256, "text"])


def test_the_record_is_of_the_recipe_and_its_corpus_can_be_made_again(corpus: Corpus) -> None:
    specs = {key: RECORD[key]["spec"] for key in ("model", "corpus", "training")}
    assert specs == ZOO["pythia-s"].to_dict()
    assert corpus.fingerprint() == RECORD["corpus"]["fingerprint"]
    counts = {domain: counts.tolist() for domain, counts in corpus.domain_counts().items()}
    assert counts == RECORD["corpus"]["token_counts"]


def test_the_lists_are_those_of_the_corpus(corpus: Corpus) -> None:
    sequences = pd.read_parquet(FOLDER / "sequences.parquet")
    assert [list(tokens) for tokens in sequences["tokens"]] == corpus.sequences["tokens"].tolist()
    assert sequences["copies"].tolist() == corpus.sequences["copies"].tolist()
    assert pd.read_parquet(FOLDER / "positions.parquet").equals(corpus.positions())
    assert pd.read_parquet(FOLDER / "heldout.parquet")["domain"].tolist() == corpus.heldout_domains


def test_the_weights_are_small_finite_float16() -> None:
    weights = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert sum(tensor.numel() for tensor in weights.values()) == load_organism(FOLDER).num_parameters()
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4_000_000
