from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memlens.organisms.corpus.corpus import Corpus, CorpusSpec, build_corpus
from memlens.organisms.training.architectures import ModelSpec
from memlens.organisms.training.recipes import OrganismSpec
from memlens.organisms.training.train import TrainSpec
from memlens.organisms.training.zoo import train_organism
from tests.devices import dev

TINY_CORPUS = CorpusSpec(
    copies=(1, 4, 16),
    per_cell=2,
    n_heldout=3,
    background_rows=60,
    heldout_rows=5,
    vocab_size=1024,
    tokenizer_documents=100,
    item_copies=(1, 3, 12),
    expressions_per_cell=8,
    facts_per_cell=4,
    identifiers_per_cell=3,
)
TINY = OrganismSpec(
    "tiny",
    model=ModelSpec(d_model=32, n_layers=2, n_heads=2),
    corpus=TINY_CORPUS,
    training=TrainSpec(steps=12, batch_size=8),
)


@pytest.fixture(scope="session", autouse=True)
def _corpora_kept(corpora_kept: None) -> None:
    """Every tiny organism reads the same corpus or its clean twin."""


@pytest.fixture(scope="session")
def tiny_corpus() -> Corpus:
    return build_corpus(TINY_CORPUS)


@pytest.fixture(scope="session")
def tiny_organism(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny organism after twelve steps."""
    return train_organism(TINY, tmp_path_factory.mktemp("organism") / "tiny", device=dev(), progress=False)


@pytest.fixture(scope="session")
def clean_organism(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny organism's twin on the corpus without the planted rows."""
    spec = replace(TINY, name="tiny-clean", corpus=replace(TINY_CORPUS, planted=False))
    return train_organism(spec, tmp_path_factory.mktemp("organism") / "clean", device=dev(), progress=False)
