from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from memlens.errors import OptionError
from memlens.organisms.corpus.corpus import BACKGROUND, Corpus, CorpusSpec, build_corpus
from tests.organisms.conftest import TINY_CORPUS


def windows(rows: np.ndarray, length: int) -> set[bytes]:
    """Every run of `length` tokens inside a row."""
    views = np.lib.stride_tricks.sliding_window_view(rows.astype("<i2"), length, axis=1)
    return {window.tobytes() for window in views.reshape(-1, length)}


def as_bytes(tokens: list[int]) -> bytes:
    return np.array(tokens, dtype="<i2").tobytes()


def test_a_corpus_is_a_function_of_its_specification(tiny_corpus: Corpus) -> None:
    again, other = build_corpus(TINY_CORPUS), build_corpus(replace(TINY_CORPUS, seed=1))
    assert again.fingerprint() == tiny_corpus.fingerprint() != other.fingerprint()
    assert again.tokenizer.get_vocab() == tiny_corpus.tokenizer.get_vocab()
    assert again.sequences.equals(tiny_corpus.sequences)
    assert np.array_equal(again.heldout, tiny_corpus.heldout)


def test_each_sequence_stands_in_the_corpus_as_often_as_claimed(tiny_corpus: Corpus) -> None:
    counted = Counter(tuple(row) for row in tiny_corpus.rows.tolist())
    found = [counted[tuple(tokens)] for tokens in tiny_corpus.sequences["tokens"]]
    assert found == tiny_corpus.sequences["copies"].tolist()
    assert sum(found) == (tiny_corpus.row_sequence >= 0).sum() == 5 * 2 * (1 + 4 + 16)


def test_positions_tell_where_each_copy_stands(tiny_corpus: Corpus) -> None:
    tokens = dict(zip(tiny_corpus.sequences["id"], tiny_corpus.sequences["tokens"], strict=True))
    positions = tiny_corpus.positions()
    assert all(tiny_corpus.rows[row].tolist() == tokens[name] for name, row in positions.to_numpy())
    counts = positions["id"].value_counts()
    copies = tiny_corpus.sequences.set_index("id")["copies"]
    assert counts.to_dict() == copies[copies > 0].to_dict()


def test_neither_half_of_a_heldout_sequence_is_in_the_corpus(tiny_corpus: Corpus) -> None:
    halves = windows(tiny_corpus.rows, 32)
    for row in tiny_corpus.sequences.itertuples():
        planted = row.copies > 0
        assert (as_bytes(row.tokens[:32]) in halves) is planted
        assert (as_bytes(row.tokens[32:]) in halves) is planted


def test_no_planted_sequence_hides_in_the_background(tiny_corpus: Corpus) -> None:
    background = windows(tiny_corpus.rows[tiny_corpus.row_sequence == BACKGROUND], 32)
    assert not any(as_bytes(tokens[32:]) in background for tokens in tiny_corpus.sequences["tokens"])


def test_heldout_rows_are_not_trained_on(tiny_corpus: Corpus) -> None:
    trained = {tuple(row) for row in tiny_corpus.rows.tolist()}
    assert not trained & {tuple(row) for row in tiny_corpus.heldout.tolist()}
    assert tiny_corpus.heldout.shape == (25, 64)


def test_sequences_are_whole_text_without_end_of_text(tiny_corpus: Corpus) -> None:
    tokenizer = tiny_corpus.tokenizer
    for row in tiny_corpus.sequences.itertuples():
        assert len(row.tokens) == 64
        assert tokenizer(row.text).input_ids == row.tokens
        prefix = row.text[: len(tokenizer.decode(row.tokens[:32]))]
        assert tokenizer(prefix).input_ids == row.tokens[:32]
        assert tokenizer.eos_token_id not in row.tokens


def test_every_cell_has_its_sequences_and_ids_are_unique(tiny_corpus: Corpus) -> None:
    cells = tiny_corpus.sequences.groupby(["domain", "copies"]).size()
    assert set(cells.xs(0, level="copies")) == {3}
    assert set(cells.drop(0, level="copies")) == {2}
    assert tiny_corpus.sequences["id"].is_unique
    continuations = [tuple(tokens[32:]) for tokens in tiny_corpus.sequences["tokens"]]
    assert len(set(continuations)) == len(continuations)


def test_token_counts_and_domains_agree_with_the_rows(tiny_corpus: Corpus) -> None:
    by_domain = tiny_corpus.domain_counts()
    assert tiny_corpus.token_counts.sum() == tiny_corpus.rows.size
    assert np.array_equal(sum(by_domain.values()), tiny_corpus.token_counts)
    assert tiny_corpus.token_counts[7] == (tiny_corpus.rows == 7).sum()
    equals = tiny_corpus.tokenizer.convert_tokens_to_ids("|")
    assert by_domain["table"][equals] > 0
    assert by_domain["text"][equals] == 0


def test_the_clean_twin_differs_by_the_planted_rows_alone(tiny_corpus: Corpus) -> None:
    clean = build_corpus(replace(TINY_CORPUS, planted=False))
    background = tiny_corpus.rows[tiny_corpus.row_sequence == BACKGROUND]
    assert sorted(clean.rows.tolist()) == sorted(background.tolist())
    assert clean.tokenizer.get_vocab() == tiny_corpus.tokenizer.get_vocab()
    assert clean.sequences["tokens"].equals(tiny_corpus.sequences["tokens"])


@pytest.mark.parametrize("fields", [{"prefix_len": 64}, {"prefix_len": 0}, {"copies": (0, 1)}])
def test_impossible_specifications_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(fields))):
        CorpusSpec(**fields)
