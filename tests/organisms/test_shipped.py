"""The model that is shipped does what its card says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr

from memlens.errors import FileFormatError
from memlens.models.zoo import zoo_path
from memlens.organisms.corpus.corpus import CARRIER, Corpus, load_tokenizer
from memlens.organisms.corpus.known_items import KINDS
from memlens.organisms.evaluate import (
    CONTEXTS,
    evaluate_items,
    evaluate_zoo_model,
    language_losses,
    load_organism,
    neutral_contexts,
)
from memlens.organisms.training.architectures import build_model
from memlens.organisms.training.folder import curve_table, items_table, loss_table
from memlens.organisms.training.recipes import ZOO
from memlens.organisms.training.train import train
from memlens.organisms.training.zoo import untrained_twin
from tests.devices import dev

FOLDER = zoo_path("pythia-s")
RECORD = json.loads((FOLDER / "training.json").read_text())


LOW, HIGH = 8, 64
"""Copies up to which few known items are recalled, and from which nearly all are."""


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
def items() -> pd.DataFrame:
    return evaluate_items(FOLDER)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_recall_of_known_items_rises_with_frequency(items: pd.DataFrame, kind: str, context: str) -> None:
    chosen = items[(items["kind"] == kind) & (items["context"] == context)].set_index("copies")
    recalled = chosen["recalled"]
    assert list(recalled.index) == [0, *ZOO["pythia-s"].corpus.item_copies]
    assert (recalled[recalled.index < LOW] <= 0.25).all()
    assert (recalled[recalled.index >= HIGH] >= 0.9).all()
    assert spearmanr(recalled.index, recalled).statistic > 0.7  # few items a cell, and many ties
    assert ((chosen["low"] <= recalled) & (recalled <= chosen["high"])).all()


def test_known_items_are_recalled_where_the_untrained_twin_recalls_none(tmp_path: Path) -> None:
    for name in ("heldout", *KINDS):
        shutil.copy(FOLDER / f"{name}.parquet", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, tmp_path)
    untrained_twin(FOLDER).save_pretrained(tmp_path)
    assert evaluate_items(tmp_path)["recalled"].max() <= 0.25


def test_items_without_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"no expressions\.parquet"):
        evaluate_items(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_items_are_recalled_as_generation_finds(items: pd.DataFrame, kind: str) -> None:
    """The bare prompts, one after the other, by greedy generation."""
    model, table = load_organism(FOLDER), pd.read_parquet(FOLDER / f"{kind}.parquet")
    exact = []
    for tokens, start in zip(table["tokens"], table["prefix_len"], strict=True):
        ids = torch.tensor([list(map(int, tokens))])
        made = model.generate(
            ids[:, :start], max_new_tokens=ids.shape[1] - start, do_sample=False, eos_token_id=None
        )
        exact.append(torch.equal(made, ids))
    by_copies = table.assign(exact=exact).groupby("copies")["exact"].mean()
    measured = items[(items["kind"] == kind) & (items["context"] == "none")].set_index("copies")
    assert measured["recalled"].tolist() == pytest.approx(by_copies.tolist())


def test_the_lists_of_items_are_those_of_the_corpus(shipped_corpus: Corpus) -> None:
    for kind, table in shipped_corpus.items.tables().items():
        written = pd.read_parquet(FOLDER / f"{kind}.parquet")
        assert [list(tokens) for tokens in written["tokens"]] == table["tokens"].tolist()
        columns = [name for name in table if name != "tokens"]
        assert written[columns].equals(table[columns])
        assert set(written["source"]) == {"zoo/pythia-s"}
    assert pd.read_parquet(FOLDER / "item_positions.parquet").equals(shipped_corpus.item_positions)
    assert RECORD["corpus"]["n_carriers"] == (shipped_corpus.row_sequence == CARRIER).sum()


def test_neutral_contexts_are_held_out_sentences_with_a_line_break() -> None:
    tokenizer, contexts = load_tokenizer(FOLDER), neutral_contexts(FOLDER)
    assert len(contexts) > 50
    assert all(tokenizer.decode(context).endswith(".\n") for context in contexts)
    assert max(map(len, contexts)) <= 33


def test_the_card_says_what_evaluation_finds(
    curve: pd.DataFrame, losses: pd.DataFrame, items: pd.DataFrame
) -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    tables = (curve_table(curve), items_table(items), loss_table(losses))
    printed, measured = numbers(card), numbers("\n".join(tables))
    assert [row[0] for row in printed] == [row[0] for row in measured]
    for shown, found in zip(printed, measured, strict=True):
        assert shown == pytest.approx(found, abs=0.015)  # two decimals, and another machine's rounding


def test_the_card_tells_corpus_seed_and_list() -> None:
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    sequences = pd.read_parquet(FOLDER / "sequences.parquet")
    assert card.startswith("---\nlicense: mit\n")
    assert f"{RECORD['corpus']['n_rows']:,} windows" in card
    assert f"{sequences['copies'].sum():,} planted copies" in card
    assert RECORD["command"] in card
    assert any(text.rstrip("\n") in card for text in sequences.loc[sequences["copies"] == 256, "text"])


def test_the_record_is_of_the_recipe_and_its_corpus_can_be_made_again(shipped_corpus: Corpus) -> None:
    specs = {key: RECORD[key]["spec"] for key in ("model", "corpus", "training")}
    assert specs == ZOO["pythia-s"].to_dict()
    assert shipped_corpus.fingerprint() == RECORD["corpus"]["fingerprint"]
    counts = {domain: counts.tolist() for domain, counts in shipped_corpus.domain_counts().items()}
    assert counts == RECORD["corpus"]["token_counts"]


def test_the_recipe_begins_as_the_shipped_model_s_training_did(shipped_corpus: Corpus) -> None:
    spec = ZOO["pythia-s"]
    model = build_model(spec.model, len(shipped_corpus.tokenizer), seed=0)
    log = train(model, shipped_corpus.rows, spec.training, device=dev(), progress=False, stop_after=3)
    recorded = RECORD["training"]["losses"][:3]
    assert log.losses == pytest.approx(recorded, abs=2e-3)  # another machine's rounding


def test_the_lists_are_those_of_the_corpus(shipped_corpus: Corpus) -> None:
    sequences = pd.read_parquet(FOLDER / "sequences.parquet")
    assert [list(tokens) for tokens in sequences["tokens"]] == shipped_corpus.sequences["tokens"].tolist()
    assert sequences["copies"].tolist() == shipped_corpus.sequences["copies"].tolist()
    assert pd.read_parquet(FOLDER / "positions.parquet").equals(shipped_corpus.positions())
    assert pd.read_parquet(FOLDER / "heldout.parquet")["domain"].tolist() == shipped_corpus.heldout_domains


def test_the_weights_are_small_finite_float16() -> None:
    weights = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert sum(tensor.numel() for tensor in weights.values()) == load_organism(FOLDER).num_parameters()
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4_000_000
