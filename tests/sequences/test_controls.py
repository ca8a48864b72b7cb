from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memlens.errors import OptionError, SequenceError
from memlens.sequences.corrupt import KINDS, corrupt
from memlens.sequences.set import SequenceSet

quick = settings(deadline=None, max_examples=30)


def some_set(n: int = 8, length: int = 12, prefix: int = 7, *, seed: int = 0, n_ids: int = 50) -> SequenceSet:
    tokens = np.random.default_rng(seed).integers(0, n_ids, (n, length))
    return SequenceSet.from_tokens(tokens, prefix, table=pd.DataFrame({"text": ["x"] * n}))


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(seed=st.integers(0, 1000), n_ids=st.integers(3, 40))
def test_only_the_prefix_changes_and_every_prefix_does(kind: str, seed: int, n_ids: int) -> None:
    seqs = some_set(seed=seed, n_ids=n_ids)
    assume(all(len(set(row[:7])) > 1 for row in seqs.rows()))
    assume(len({tuple(row[:7]) for row in seqs.rows()}) == len(seqs))
    other = corrupt(seqs, kind, seed=seed)
    assert torch.equal(other.target_ids, seqs.target_ids)
    assert torch.equal(other.prefix_len, seqs.prefix_len)
    assert torch.equal(other.mask, seqs.mask)
    assert other.ids == seqs.ids
    changed = other.tokens != seqs.tokens
    assert changed.any(-1).all()
    assert other.table["corrupted_positions"].tolist() == [row.nonzero()[:, 0].tolist() for row in changed]
    assert torch.equal(corrupt(seqs, kind, seed=seed).tokens, other.tokens)
    assert other.attrs["corruption"] == kind
    assert "text" not in other.table
    assert other.table["clean_text"].tolist() == ["x"] * len(seqs)


def test_seeds_differ() -> None:
    seqs = some_set()
    for kind in KINDS:
        assert not torch.equal(corrupt(seqs, kind, seed=1).tokens, corrupt(seqs, kind, seed=2).tokens)


@quick
@given(st.integers(1, 7), st.integers(0, 100))
def test_exactly_n_tokens_are_replaced_by_tokens_of_the_set(n_tokens: int, seed: int) -> None:
    seqs = some_set()
    other = corrupt(seqs, n_tokens=n_tokens, seed=seed)
    assert (other.tokens != seqs.tokens).sum(-1).tolist() == [n_tokens] * len(seqs)
    assert set(other.tokens.flatten().tolist()) <= set(seqs.tokens.flatten().tolist())


def test_replacements_follow_the_set_s_unigram_distribution() -> None:
    rows = [[0, 1, 1]] * 1000 + [[0, 2, 2]] * 500 + [[0, 3, 0]] * 500
    seqs = SequenceSet.from_tokens(rows, 1)
    drawn = Counter(corrupt(seqs, positions=[0], seed=3).tokens[:, 0].tolist())
    # Without token 0: 2000 ones, 1000 twos, 500 threes.
    assert set(drawn) == {1, 2, 3}
    shares = np.array([drawn[1], drawn[2], drawn[3]]) / 2000
    assert np.abs(shares - np.array([4, 2, 1]) / 7).max() < 0.04


def test_positions_count_from_either_end_of_the_prefix() -> None:
    seqs = SequenceSet.from_tokens([[1, 2, 3, 4, 5], [6, 7, 8]], [4, 2])
    assert corrupt(seqs, positions=[-1, 0]).table["corrupted_positions"].tolist() == [[0, 3], [0, 1]]


def test_a_shuffled_prefix_has_the_same_tokens() -> None:
    seqs = some_set(n_ids=4)
    other = corrupt(seqs, "shuffle_prefix", seed=5)
    for before, after in zip(seqs.rows(), other.rows(), strict=True):
        assert Counter(before[:7]) == Counter(after[:7])


@quick
@given(st.integers(0, 50))
def test_prefixes_are_exchanged_one_to_one_and_never_for_an_equal_one(seed: int) -> None:
    rows = [[1, 1, 9]] * 3 + [[2, 2, 9]] * 2 + [[3, 3, 9]] + [[4, 5, 6, 9], [6, 5, 4, 9]]
    seqs = SequenceSet.from_tokens(rows, [2] * 6 + [3] * 2)
    other = corrupt(seqs, "other_sequence", seed=seed)
    pairs = list(zip(seqs.rows(), other.rows(), strict=True))
    assert Counter(tuple(a[:-1]) for a, _ in pairs) == Counter(tuple(b[:-1]) for _, b in pairs)
    assert all(a[:-1] != b[:-1] for a, b in pairs)


def test_the_token_in_front_stays() -> None:
    rows = [[99, 1, 2, 3, 4], [99, 5, 6, 7, 8]]
    seqs = SequenceSet.from_tokens(rows, 4, attrs={"prepend_bos": True})
    for kind in KINDS:
        assert corrupt(seqs, kind, n_tokens=3).tokens[:, 0].tolist() == [99, 99]
    with pytest.raises(SequenceError, match="position 0 is not"):
        corrupt(seqs, positions=[0])


@pytest.mark.parametrize(
    ("rows", "kind", "options", "words"),
    [
        ([[1, 2, 3]], "replace_token", {"n_tokens": 3}, "row 0 has a prefix of 2 .*n_tokens=3"),
        ([[1, 2, 3]], "replace_token", {"n_tokens": 0}, "n_tokens=0"),
        ([[1, 2, 3]], "replace_token", {"positions": [2]}, "position 2 is not in the prefix of row 0"),
        ([[1, 1, 1]], "replace_token", {}, "fewer than two different"),
        ([[1, 2, 3], [4, 4, 3]], "shuffle_prefix", {}, "row 1"),
        ([[1, 2, 3]], "other_sequence", {}, "rows 0 have a prefix of 2"),
        ([[1, 2, 3], [1, 2, 4]], "other_sequence", {}, "prefix of 2"),
    ],
)
def test_what_cannot_be_corrupted_is_said(rows, kind, options, words) -> None:
    with pytest.raises(SequenceError, match=words):
        corrupt(SequenceSet.from_tokens(rows, 2), kind, **options)


def test_unknown_kind() -> None:
    with pytest.raises(OptionError, match="replace_token"):
        corrupt(some_set(), "replace_tokens")
