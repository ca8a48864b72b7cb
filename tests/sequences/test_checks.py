from __future__ import annotations

import pytest

from memlens.errors import EmptySetError, OptionError, SequenceError, VocabularyError
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from tests.sequences.vocabularies import model_with
from tests.tiny import tiny_tokenizer


def test_the_report_counts_what_is_there() -> None:
    seqs = SequenceSet.from_tokens(
        [[1, 2, 3], [4, 5, 6, 7], [1, 2, 3], [1, 2, 3]], [1, 2, 1, 2], attrs={"empty_rows": "4 7"}
    )
    report = check_sequences(seqs, d_vocab=8, n_ctx=4)
    assert (report.n_sequences, report.n_tokens) == (4, 13)
    assert (report.lengths, report.prefix_lens) == ((3, 4), (1, 2))
    assert report.duplicates == ("2",)
    assert report.empty_rows == (4, 7)
    assert report.checked_vocabulary == 8
    text = str(report)
    assert "4 sequences, 13 tokens (length 3-4, prefix 1-2)" in text
    assert "1 repeat an earlier one: '2'" in text
    assert "2 empty rows were left out: 4, 7" in text


def test_rows_that_differ_only_in_padding_or_prefix_are_no_duplicates() -> None:
    seqs = SequenceSet.from_tokens([[1, 2], [1, 2, 0], [1, 2, 0]], [1, 1, 2])
    assert check_sequences(seqs).duplicates == ()


def test_the_first_and_last_ids_of_a_vocabulary_are_inside() -> None:
    seqs = SequenceSet.from_tokens([[0, 9]], 1)
    assert check_sequences(seqs, d_vocab=10).n_sequences == 1
    with pytest.raises(VocabularyError, match=r"row 0, position 1 holds the token id 9, .*9 entries"):
        check_sequences(seqs, d_vocab=9)


def test_a_sequence_may_fill_the_context() -> None:
    seqs = SequenceSet.from_tokens([[1, 2, 3], [1, 2, 3, 4]], 1)
    assert check_sequences(seqs, n_ctx=4).lengths == (3, 4)
    with pytest.raises(SequenceError, match="row 1 has 4 tokens, but the model's context holds 3"):
        check_sequences(seqs, n_ctx=3)


def test_end_of_text_counts_among_targets_only() -> None:
    seqs = SequenceSet.from_tokens([[9, 1, 2], [1, 9, 2], [1, 2, 8]], [1, 1, 2])
    assert check_sequences(seqs, eos_token_id=9, on_eos="keep").eos_rows == ("1",)
    assert check_sequences(seqs, eos_token_id=[8, 9], on_eos="keep").eos_rows == ("1", "2")
    with pytest.raises(SequenceError, match=r"2 sequences .* rows 1, 2"):
        check_sequences(seqs, eos_token_id={8, 9})
    with pytest.raises(OptionError, match="on_eos='drop'"):
        check_sequences(seqs, on_eos="drop")


def test_padding_is_not_an_end_of_text_token() -> None:
    seqs = SequenceSet.from_tokens([[1, 2, 3], [1, 2]], 1)
    assert check_sequences(seqs, eos_token_id=0).eos_rows == ()


def test_empty_sets_are_refused_by_name() -> None:
    empty = SequenceSet.from_tokens([[1, 2]], 1, attrs={"source": "x.npy"})[[]]
    with pytest.raises(EmptySetError, match=r"no sequences in x\.npy"):
        check_sequences(empty)


def test_limits_are_taken_from_the_model() -> None:
    model = model_with(tiny_tokenizer(), n_ctx=3, d_vocab=50)
    with pytest.raises(VocabularyError, match="50 entries"):
        check_sequences(SequenceSet.from_tokens([[1, 60]], 1), model)
    with pytest.raises(SequenceError, match="holds 3"):
        check_sequences(SequenceSet.from_tokens([[1, 2, 3, 4]], 1), model)
    with pytest.raises(SequenceError, match="end-of-text"):
        check_sequences(SequenceSet.from_tokens([[1, 2, 100]], 1), model, d_vocab=101)


def test_a_recorded_vocabulary_of_another_size_is_warned_of() -> None:
    seqs = SequenceSet.from_tokens([[1, 2]], 1, attrs={"tokenizer": "old", "vocab_size": 77})
    with pytest.warns(UserWarning, match=r"the tokenizer old \(77 entries\), the model has"):
        check_sequences(seqs, model_with(tiny_tokenizer()))
