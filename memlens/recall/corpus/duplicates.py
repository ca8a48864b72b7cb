"""How often tokens, n-grams and sequences occur in a corpus: the zoo's, one's own, or an infini-gram index.

All windows of one length are hashed at once with a few numpy passes; a window whose hash is wanted is then
compared token by token, so counts are exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Int
from tqdm.auto import tqdm

from memlens.errors import OptionError, SequenceError, SourceNotFoundError, check_option
from memlens.models.zoo import zoo_path
from memlens.sequences.set import SequenceSet

PARTS = ("continuation", "prefix", "sequence")

Corpus = np.ndarray | Iterable[Sequence[int] | np.ndarray]
"""Token ids: a one-dimensional array (one long text), a two-dimensional one (a document a row), or any
iterable of documents."""


@runtime_checkable
class NgramCounter(Protocol):
    """Something that counts n-grams by itself."""

    def count_ngrams(self, ngrams: Sequence[Sequence[int]], *, progress: bool = False) -> np.ndarray:
        """Return how often each n-gram occurs."""
        ...


_BLOCK = 2**20
"""Tokens that are hashed at a time."""

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it loses bits
_BETWEEN = -1  # between documents: in no n-gram


def count_duplicates(
    sequences: SequenceSet,
    corpus: Corpus | NgramCounter,
    *,
    parts: Sequence[str] = ("continuation", "sequence"),
    progress: bool = True,
) -> pd.DataFrame:
    """Count how often each sequence, or its continuation or prefix alone, occurs in a corpus.

    Exact matches of token ids, overlapping ones too, never across the border of two documents. The corpus is
    read once, in blocks, and may be larger than memory (a memory-mapped array, or a generator).

    Args:
        sequences: The set.
        corpus: Token ids of the same tokenizer: an array `[token]` or `[document, token]`, or an iterable of
            documents, each a list or an array of ids. Or a counter of its own, such as `InfiniGram`.
        parts: What is looked for, out of "continuation", "prefix" and "sequence" (both together).
        progress: Show a progress bar.

    Returns:
        One row per sequence: `id`, and `continuation_count`, … for each part.

    Raises:
        OptionError: No part, or an unknown one.
        SequenceError: A corpus that does not hold token ids.

    Source: ours.

    Example:
        >>> seqs = SequenceSet.from_tokens([[1, 2, 3], [4, 2, 3]], 1)
        >>> count_duplicates(seqs, [[9, 1, 2, 3], [2, 3, 2, 3]], progress=False)
          id  continuation_count  sequence_count
        0  0                   3               1
        1  1                   3               0
    """
    if not parts or isinstance(parts, str):
        raise OptionError(f"parts={parts!r}: give a list of parts, such as ['continuation']")
    for part in parts:
        check_option("part", part, PARTS)
    pairs = list(zip(sequences.rows(), sequences.prefix_len.tolist(), strict=True))
    halves = {
        "continuation": [row[p:] for row, p in pairs],
        "prefix": [row[:p] for row, p in pairs],
        "sequence": [row for row, _ in pairs],
    }
    wanted = [ngram for part in parts for ngram in halves[part]]
    if isinstance(corpus, NgramCounter):
        found = corpus.count_ngrams(wanted, progress=progress)
    else:
        found = count_ngrams(wanted, corpus, progress=progress)
    counts = found.reshape(len(parts), -1)
    columns = {f"{part}_count": column for part, column in zip(parts, counts, strict=True)}
    return pd.DataFrame({"id": sequences.ids, **columns})


def count_ngrams(
    ngrams: Sequence[Sequence[int]], corpus: Corpus, *, progress: bool = False
) -> Int[np.ndarray, "ngram"]:
    """Return how often each n-gram (of any length, 1 or more) occurs in a corpus; see `count_duplicates`."""
    lengths = np.array([len(ngram) for ngram in ngrams], dtype=np.int64)
    if (lengths < 1).any():
        raise SequenceError(f"n-gram {int((lengths < 1).argmax())} has no token: give one or more")
    counts = np.zeros(len(ngrams), dtype=np.int64)
    tables = [_Table(ngrams, np.flatnonzero(lengths == n)) for n in np.unique(lengths)]
    longest = int(lengths.max()) if len(lengths) else 1
    with tqdm(desc="searching", unit="token", unit_scale=True, disable=not progress) as bar:
        for block, n_starts in corpus_blocks(corpus, longest):
            for table in tables:
                table.count(block, n_starts, counts)
            bar.update(n_starts)
    return counts


def corpus_blocks(corpus: Corpus, overlap: int = 1) -> Iterator[tuple[Int[np.ndarray, "token"], int]]:
    """Yield the corpus in blocks: tokens with -1 between documents, and how many of them start a window.

    Each token starts a window in one block only; `overlap - 1` tokens of the next block follow it, so that
    windows of up to `overlap` tokens are whole.

    Raises:
        SequenceError: A corpus that does not hold token ids.
    """
    held = np.zeros(0, dtype=np.int64)
    for piece in _pieces(corpus):
        held = np.concatenate([held, piece])
        while len(held) >= _BLOCK + overlap:
            yield held[: _BLOCK + overlap - 1], _BLOCK
            held = held[_BLOCK:]
    if len(held):
        yield held, len(held)


def _pieces(corpus: Corpus) -> Iterator[np.ndarray]:
    """Yield a million tokens or so at a time, documents with the separators between them."""
    if isinstance(corpus, np.ndarray) and corpus.ndim == 1:
        for start in range(0, len(corpus), _BLOCK):
            yield _ids(corpus[start : start + _BLOCK])
        return
    between = np.array([_BETWEEN])
    waiting: list[np.ndarray] = []
    size = 0
    for document in corpus:
        ids = _ids(document)
        waiting += [ids, between]
        size += len(ids) + 1
        if size >= _BLOCK:
            yield np.concatenate(waiting)
            waiting, size = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _ids(document: Any) -> np.ndarray:
    ids = np.asarray(document)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu") or (ids.size and ids.min() < 0):
        raise SequenceError(
            f"the corpus has a document of type {ids.dtype} and shape {ids.shape}: give one-dimensional "
            "lists of token ids, none negative"
        )
    return ids.astype(np.int64)


class _Table:
    """The n-grams of one length, by hash."""

    def __init__(self, ngrams: Sequence[Sequence[int]], rows: Int[np.ndarray, "row"]) -> None:
        self.tokens, self.group = np.unique(
            np.array([ngrams[row] for row in rows], dtype=np.int64), axis=0, return_inverse=True
        )
        self.group = self.group.reshape(-1)
        self.rows = rows
        hashes = np.concatenate([_window_hashes(row, len(row)) for row in self.tokens])
        order = hashes.argsort(kind="stable")
        self.tokens, self.hashes = self.tokens[order], hashes[order]
        self.group = order.argsort()[self.group]

    def count(self, block: Int[np.ndarray, "token"], n_starts: int, counts: np.ndarray) -> None:
        """Add the occurrences that start in the first `n_starts` tokens of a block."""
        n = self.tokens.shape[1]
        hashes = _window_hashes(block, n)[:n_starts]
        place = np.searchsorted(self.hashes, hashes)
        place[place == len(self.hashes)] = 0
        starts = np.flatnonzero(self.hashes[place] == hashes)
        if not len(starts):
            return
        windows = np.lib.stride_tricks.sliding_window_view(block, n)[starts]
        found = np.zeros(len(self.tokens), dtype=np.int64)
        left = np.ones(len(starts), dtype=bool)
        candidate = place[starts]
        while left.any():  # equal hashes of different n-grams are adjacent
            same = left & (windows == self.tokens[candidate]).all(1)
            np.add.at(found, candidate[same], 1)
            following = np.minimum(candidate + 1, len(self.hashes) - 1)
            left &= ~same & (following > candidate) & (self.hashes[following] == self.hashes[candidate])
            candidate = following
        counts[self.rows] += found[self.group]


def _window_hashes(tokens: Int[np.ndarray, "token"], n: int) -> np.ndarray:
    """Return a hash modulo 2^64 of each window of n tokens: the polynomial in `_BASE` of the mixed ids.

    Windows double: that of 2m tokens is that of the first m, times base^m, plus that of the next m.
    """
    if len(tokens) < n:
        return np.zeros(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = (tokens + 2).astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(29)
        power, width = _BASE, 1
        piece = mixed
        whole: np.ndarray | None = None
        done = 0
        for bit in range(int(n).bit_length()):
            if n >> bit & 1:
                part = piece[done : len(tokens) - width + 1]
                # What is done so far precedes this part.
                whole = part if whole is None else whole[: len(part)] * power + part
                done += width
            if n >> (bit + 1):
                piece = piece[: len(piece) - width] * power + piece[width:]
                power, width = power * power, 2 * width
    assert whole is not None
    return whole[: len(tokens) - n + 1]


class InfiniGram:
    """An infini-gram index on this machine, as a corpus for `count_duplicates` and `token_counts`.

    Args:
        index_dir: The index's folder.
        eos_token_id: The end-of-text id of the tokenizer that the index was built with. Ids of sequences must
            be of that tokenizer, too: an index of another tokenizer counts nonsense.

    Raises:
        OptionError: The package `infini-gram` is not installed.
        SourceNotFoundError: There is no such folder.

    Source: arXiv 2401.17377 and its Python package.
    """

    def __init__(self, index_dir: str | Path, eos_token_id: int) -> None:
        try:
            from infini_gram.engine import InfiniGramEngine  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise OptionError(
                "counting in an infini-gram index needs the package infini-gram, which is not installed: "
                "run `pip install infini-gram`, or give the corpus as token ids"
            ) from None
        if not Path(index_dir).is_dir():
            raise SourceNotFoundError(f"there is no infini-gram index at {index_dir}: give its folder")
        self._engine = InfiniGramEngine(index_dir=str(index_dir), eos_token_id=eos_token_id)

    def count_ngrams(
        self, ngrams: Sequence[Sequence[int]], *, progress: bool = False
    ) -> Int[np.ndarray, "ngram"]:
        """Return how often each n-gram occurs in the index.

        Raises:
            SequenceError: The engine refuses an n-gram; the message has its words.
        """
        counts = np.zeros(len(ngrams), dtype=np.int64)
        for i, ngram in enumerate(tqdm(ngrams, desc="counting", unit="n-gram", disable=not progress)):
            answer = self._engine.count(input_ids=[int(token) for token in ngram])
            if "error" in answer:
                raise SequenceError(f"infini-gram cannot count n-gram {i}: {answer['error']}")
            counts[i] = answer["count"]
        return counts


def token_counts(
    corpus: str | InfiniGram | Corpus, *, vocab_size: int | None = None, progress: bool = True
) -> Int[np.ndarray, "vocab"]:
    """Return how often each token id occurs in a corpus, for `RecallScores.matched_controls` and the like.

    Args:
        corpus: "zoo" or "zoo/NAME" for what that model was trained on (one pass); token ids as for
            `count_duplicates`; or an `InfiniGram` index, which is asked for each id.
        vocab_size: Length of the answer; needed for an index. By default up to the largest id.
        progress: Show a progress bar.

    Raises:
        OptionError: An index without `vocab_size`.
        SequenceError: An id beyond `vocab_size`, or a corpus that does not hold token ids.
        SourceNotFoundError: The zoo has no such model, or it has no counts.

    Example:
        >>> token_counts([[1, 2, 2], [5]], progress=False).tolist()
        [0, 1, 2, 0, 0, 1]
        >>> token_counts("zoo").shape
        (1024,)
    """
    if isinstance(corpus, InfiniGram):
        if vocab_size is None:
            raise OptionError("vocab_size=None: an infini-gram index needs to be told how many ids to count")
        return corpus.count_ngrams([[token] for token in range(vocab_size)], progress=progress)
    counts = _zoo_counts(corpus) if isinstance(corpus, str) else _counted(corpus, progress)
    if vocab_size is None:
        return counts
    if len(counts) > vocab_size:
        raise SequenceError(f"the corpus holds the token id {len(counts) - 1}, but vocab_size={vocab_size}")
    return np.pad(counts, (0, vocab_size - len(counts)))


def _counted(corpus: Any, progress: bool) -> np.ndarray:
    counts = np.zeros(0, dtype=np.int64)
    with tqdm(desc="counting", unit="token", unit_scale=True, disable=not progress) as bar:
        for block, n_starts in corpus_blocks(corpus):
            ids = block[:n_starts]
            part = np.bincount(ids[ids >= 0])
            longer, shorter = (part, counts) if len(part) > len(counts) else (counts, part)
            longer[: len(shorter)] += shorter
            counts = longer
            bar.update(n_starts)
    return counts


def _zoo_counts(name: str) -> np.ndarray:
    if name != "zoo" and not name.startswith("zoo/"):
        raise SourceNotFoundError(f"corpus={name!r} is not a corpus: give 'zoo', 'zoo/NAME' or token ids")
    file = zoo_path("zoo/pythia-s" if name == "zoo" else name) / "training.json"
    if not file.exists():
        raise SourceNotFoundError(
            f"{file.parent} has no training.json, which holds the counts: train it again"
        )
    by_domain = json.loads(file.read_text())["corpus"]["token_counts"]
    return np.sum([np.array(counts, dtype=np.int64) for counts in by_domain.values()], axis=0)
