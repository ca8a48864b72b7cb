"""Token frequencies and n-gram counts of a corpus: the zoo's, one's own, or an infini-gram index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm.auto import tqdm

from memlens.errors import OptionError, SequenceError, SourceNotFoundError
from memlens.models.zoo import zoo_path
from memlens.recall.corpus.duplicates import Corpus, corpus_blocks


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
