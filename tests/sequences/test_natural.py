"""Prompts cut from running text: as long as asked, none twice, beginning with words."""

from __future__ import annotations

from typing import Any

import pytest

import memlens as ml
from memlens.errors import EmptySetError, OptionError

ROWS = [list(range(10 * row, 10 * row + 10)) for row in range(4)]


def text() -> ml.SequenceSet:
    return ml.SequenceSet.from_tokens(ROWS, 1)


def like(*lengths: int) -> ml.SequenceSet:
    return ml.SequenceSet.from_tokens([[0] * (n + 1) for n in lengths], list(lengths))


def test_every_control_is_a_piece_of_the_text_of_the_asked_length() -> None:
    found = ml.sequences.natural_controls(text(), like(2, 5, 2, 9))
    assert found.prefix_len.tolist() == [2, 5, 2, 9]
    assert (found.n_targets == 1).all()
    for row, own in zip(found.rows(), found.table.itertuples(), strict=True):
        assert row == ROWS[own.text_row][own.start : own.start + len(row)]
    assert len(set(found.ids)) == 4


def test_seed_decides_and_n_repeats_the_lengths() -> None:
    a, b, c = (ml.sequences.natural_controls(text(), like(2, 3), n=6, seed=s) for s in (0, 0, 1))
    assert a.prefix_len.tolist() == [2, 3, 2, 3, 2, 3]
    assert a.rows() == b.rows() != c.rows()


def test_too_little_text_is_said() -> None:
    with pytest.warns(UserWarning, match="only 4 of 5 controls"):
        found = ml.sequences.natural_controls(text(), like(9), n=5)
    assert len(found) == 4
    with pytest.raises(EmptySetError, match="prompt of 10 tokens"):
        ml.sequences.natural_controls(text(), like(10, 12))
    with pytest.raises(OptionError, match="n=0"):
        ml.sequences.natural_controls(text(), like(2), n=0)


def test_with_a_tokenizer_prompts_and_targets_begin_with_words() -> None:
    model: Any = ml.load_model("zoo/pythia-s")
    rows = [model.tokenizer(t)["input_ids"] for t in ("Mara keeps the old lantern in Velden.", "x1 = 25 + 3")]
    found = ml.sequences.natural_controls(
        ml.SequenceSet.from_tokens(rows, 1), like(2, 2), tokenizer=model.tokenizer, n=2
    )
    for row, own in zip(found.rows(), found.table.itertuples(), strict=True):
        first, target = (model.tokenizer.decode([row[i]]) for i in (0, -1))
        assert first.startswith(" ")
        assert first.strip()[0].isalpha()
        assert target.startswith(" ")
        assert own.target.startswith(target.strip())
        assert own.target in ["Mara", "keeps", "the", "old", "lantern", "in", "Velden"]
        assert own.text.strip().startswith(own.prompt)
