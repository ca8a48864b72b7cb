"""How often tokens, n-grams and sequences occur in a corpus: the zoo's, your own, or an infini-gram index.

All windows of one length are hashed at once with a few numpy passes; windows with the hash of a wanted n-gram
are then compared token by token, so counts are exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Int
from tqdm.auto import tqdm

from memlens.errors import OptionError, SequenceError, SourceNotFoundError, check_option
from memlens.files import parsed_json, parsing
from memlens.models.zoo import zoo_path
from memlens.sequences.set import SequenceSet

PARTS = ("continuation", "prefix", "sequence")

Corpus = np.ndarray | Iterable[Sequence[int] | np.ndarray]
"""Token ids: a one-dimensional array (one long text), a two-dimensional one (one document per row), or any
iterable of documents."""


@runtime_checkable
class NgramCounter(Protocol):
    """An object that counts n-grams itself, such as an index."""

    def count_ngrams(self, ngrams: Sequence[Sequence[int]], *, progress: bool = False) -> np.ndarray:
        """Return how often each n-gram occurs."""
        ...


_BLOCK = 2**20
"""Tokens hashed at a time."""

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it loses bits
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_BETWEEN = -1  # between documents: in no n-gram


def count_duplicates(
    sequences: SequenceSet,
    corpus: Corpus | NgramCounter,
    *,
    parts: Sequence[str] = ("continuation", "sequence"),
    progress: bool = True,
) -> pd.DataFrame:
    """Count how often each sequence, or its continuation or prefix alone, occurs in a corpus.

    Matches are exact in token ids and may overlap, but never cross the border between two documents. The
    corpus is read once, in blocks, and may be larger than memory (a memory-mapped array, or a generator).

    Args:
        sequences: The set.
        corpus: Token ids of the same tokenizer: an array `[token]` or `[document, token]`, or an iterable of
            documents, each a list or an array of ids. Or an `NgramCounter`, such as `InfiniGram`.
        parts: What to count: "continuation", "prefix", "sequence" (both together).
        progress: Show a progress bar.

    Returns:
        One row per sequence: `id`, and `continuation_count`, … for each part.

    Raises:
        OptionError: No part, or an unknown one.
        SequenceError: A corpus that does not consist of token ids.

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
    prefixes, continuations = sequences.halves()
    ngrams = {"continuation": continuations, "prefix": prefixes, "sequence": sequences.rows()}
    wanted = [ngram for part in parts for ngram in ngrams[part]]
    counts = count_ngrams(wanted, corpus, progress=progress).reshape(len(parts), -1)
    columns = {f"{part}_count": column for part, column in zip(parts, counts, strict=True)}
    return pd.DataFrame({"id": sequences.ids, **columns})


def count_ngrams(
    ngrams: Sequence[Sequence[int]], corpus: Corpus | NgramCounter, *, progress: bool = False
) -> Int[np.ndarray, "ngram"]:
    """Return how often each n-gram (of any length, 1 or more) occurs in a corpus; see `count_duplicates`."""
    if isinstance(corpus, NgramCounter):
        return corpus.count_ngrams(ngrams, progress=progress)
    wanted: dict[int, set[bytes]] = {}
    names = [np.array(ngram, dtype=np.int64).tobytes() for ngram in ngrams]
    for i, (ngram, name) in enumerate(zip(ngrams, names, strict=True)):
        if not len(ngram):
            raise SequenceError(f"n-gram {i} has no token: give one or more")
        wanted.setdefault(len(ngram), set()).add(name)
    hashes = {n: _hashes_of(found, n) for n, found in wanted.items()}
    counts: Counter[bytes] = Counter()
    with tqdm(desc="searching", unit="token", unit_scale=True, disable=not progress) as bar:
        for block, n_starts in corpus_blocks(corpus, max(wanted, default=1)):
            for n, known in hashes.items():
                starts = np.flatnonzero(pd.Series(_window_hashes(block, n)[:n_starts]).isin(known))
                if len(starts):
                    windows = np.lib.stride_tricks.sliding_window_view(block, n)[starts]
                    found, times = np.unique(windows, axis=0, return_counts=True)
                    counts.update(dict(zip(map(bytes, found), times.tolist(), strict=True)))
            bar.update(n_starts)
    return np.array([counts[name] for name in names], dtype=np.int64)


def _hashes_of(names: Iterable[bytes], n: int) -> np.ndarray:
    return np.concatenate([_window_hashes(np.frombuffer(name, np.int64), n) for name in names])


def corpus_blocks(corpus: Corpus, overlap: int = 1) -> Iterator[tuple[Int[np.ndarray, "token"], int]]:
    """Yield the corpus in blocks: tokens with -1 between documents, and how many of them start a window.

    Each token starts a window in one block only; a block ends with the first `overlap - 1` tokens of the next
    one, so that windows of up to `overlap` tokens are complete.

    Raises:
        SequenceError: A corpus that does not consist of token ids.
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
    """Yield about a million tokens at a time, with separators between documents."""
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


def _window_hashes(tokens: Int[np.ndarray, "token"], n: int) -> np.ndarray:
    """Return a hash modulo 2^64 of each window of n tokens: the polynomial in `_BASE` of the mixed ids.

    A window's hash is a difference of two prefix sums over its first power: an odd base has an inverse.
    """
    if len(tokens) < n:
        return np.zeros(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = (tokens + 2).astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(29)
        powers, inverses = (np.cumprod(np.full(len(tokens), base)) for base in (_BASE, _INVERSE))
        sums = np.cumsum(np.append(np.uint64(0), mixed * powers))
        return (sums[n:] - sums[:-n]) * inverses[: len(tokens) - n + 1]


class InfiniGram:
    """An infini-gram index on this machine, as a corpus for `count_duplicates` and `token_counts`.

    Args:
        index_dir: The index's folder.
        eos_token_id: The end-of-text id of the tokenizer that the index was built with. The sequences must
            come from the same tokenizer, or the counts are meaningless.

    Raises:
        OptionError: The package `infini-gram` is not installed.
        SourceNotFoundError: There is no such folder.

    Source: arXiv 2401.17377 and its Python package.

    Example:
        >>> import memlens as ml
        >>> index = ml.recall.InfiniGram("index", eos_token_id=0)  # a folder of theirs  # doctest: +SKIP
        >>> ml.recall.count_duplicates(ml.load_sequences("zoo"), index)  # doctest: +SKIP
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
            SequenceError: The engine refuses an n-gram; the message quotes it.
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
        corpus: "zoo" or "zoo/NAME" for that model's training corpus (one pass); token ids as for
            `count_duplicates`; or an `InfiniGram` index, which is queried for each id.
        vocab_size: Length of the result; needed for an index. By default the largest id plus 1.
        progress: Show a progress bar.

    Raises:
        OptionError: An index without `vocab_size`.
        SequenceError: An id beyond `vocab_size`, or a corpus that does not consist of token ids.
        SourceNotFoundError: The zoo has no such model, or it has no counts.

    Example:
        >>> token_counts([[1, 2, 2], [5]], progress=False).tolist()
        [0, 1, 2, 0, 0, 1]
        >>> token_counts("zoo").shape
        (1024,)
    """
    if isinstance(corpus, InfiniGram):
        if vocab_size is None:
            raise OptionError("vocab_size=None: give the number of ids to count in an infini-gram index")
        return corpus.count_ngrams([[token] for token in range(vocab_size)], progress=progress)
    counts = _zoo_counts(corpus) if isinstance(corpus, str) else _counted(corpus, progress)
    if vocab_size is None:
        return counts
    if len(counts) > vocab_size:
        raise SequenceError(
            f"the corpus contains the token id {len(counts) - 1}, but vocab_size={vocab_size}"
        )
    return np.pad(counts, (0, vocab_size - len(counts)))


def _counted(corpus: Any, progress: bool) -> np.ndarray:
    counts = np.zeros(0, dtype=np.int64)
    with tqdm(desc="counting", unit="token", unit_scale=True, disable=not progress) as bar:
        for block, n_starts in corpus_blocks(corpus):
            ids = block[:n_starts]
            part = np.bincount(ids[ids >= 0], minlength=len(counts))
            part[: len(counts)] += counts
            counts = part
            bar.update(n_starts)
    return counts


def _zoo_counts(name: str) -> np.ndarray:
    if name != "zoo" and not name.startswith("zoo/"):
        raise SourceNotFoundError(f"corpus={name!r} is not a corpus: give 'zoo', 'zoo/NAME' or token ids")
    file = zoo_path("zoo/pythia-s" if name == "zoo" else name) / "training.json"
    if not file.exists():
        raise SourceNotFoundError(
            f"{file.parent} has no training.json with the counts: train the model again"
        )
    with parsing(file, advice="train the model again"):
        by_domain = parsed_json(file.read_text(encoding="utf-8"))["corpus"]["token_counts"]
        counts = np.array([*by_domain.values()], dtype=np.int64)
        if counts.ndim != 2:
            raise ValueError(f"its token_counts have the shape {counts.shape}")
        return counts.sum(0)
