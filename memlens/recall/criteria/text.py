"""The sub-scores that need no reference: lexical leaks, common targets, counts in a corpus, baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from memlens.errors import SequenceError
from memlens.recall.corpus.duplicates import Corpus, NgramCounter, count_ngrams
from memlens.recall.criteria.ngrams import NgramReference
from memlens.recall.criteria.references import target_rows
from memlens.sequences.readers.tables import need_tokenizer
from memlens.sequences.tokenizing import Tokenizer, encode
from memlens.sequences.words import bare_word, is_stop_word, stem

BASELINES = ("unigram_prob", "bigram_prob", "trigram_prob", "pmi")


def text_columns(
    frame: pd.DataFrame, counts: Mapping[str, float] | None, embeddings: Any, common_zipf: float
) -> dict[str, np.ndarray]:
    """Return the columns of leaks and of common targets (see `score_criteria`)."""
    prompts = [prompt.split() for prompt in frame["prompt"]]
    targets = frame["target"].tolist()
    leaks = [_leak(words, target) for words, target in zip(prompts, targets, strict=True)]
    similarity, similar = _similar(prompts, targets, embeddings)
    frequency = _per_million(targets, counts)
    zipf = np.log10(np.maximum(np.nan_to_num(frequency), 1e-9)) + 3
    return {
        "lexical_leak": np.array([bool(word) for word in leaks], dtype=bool),
        "leak_word": np.array(leaks, dtype=object),
        "max_similarity": similarity,
        "similar_word": similar,
        "common_target": np.array([is_stop_word(t) for t in targets], dtype=bool) | (zipf >= common_zipf),
        "target_frequency": frequency,
    }


def corpus_columns(
    frame: pd.DataFrame,
    corpus: Corpus | NgramCounter | None,
    tokenizer: Tokenizer | None,
    ngrams: NgramReference | None,
    progress: bool,
) -> dict[str, np.ndarray]:
    """Return the columns of counts and of baselines; NaN where there is nothing to count in."""
    prompts, targets = frame["prompt"].tolist(), frame["target"].tolist()
    columns = {name: np.full(len(frame), np.nan) for name in ("corpus_share", "corpus_count", *BASELINES)}
    if corpus is not None:
        both, alone = _corpus_counts(prompts, targets, corpus, need_tokenizer(tokenizer), progress)
        with np.errstate(invalid="ignore"):
            columns |= {"corpus_share": both / alone, "corpus_count": alone.astype(float)}
    return columns if ngrams is None else columns | ngrams.baselines(prompts, targets)


def _leak(words: Sequence[str], target: str) -> str:
    """Return the word of the prompt that is a form of the target, or an empty string."""
    return next((word for word in words if stem(word) == stem(target)), "")


def _per_million(targets: Sequence[str], counts: Mapping[str, float] | None) -> np.ndarray:
    if counts is None:
        return np.full(len(targets), np.nan)
    merged: dict[str, float] = {}
    for word, count in counts.items():
        merged[bare_word(word)] = merged.get(bare_word(word), 0.0) + count
    return 1e6 * np.array([merged.get(bare_word(t), 0.0) for t in targets]) / sum(merged.values())


def _corpus_counts(
    prompts: Sequence[str],
    targets: Sequence[str],
    corpus: Corpus | NgramCounter,
    tokenizer: Tokenizer,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Return how often prompt and target, and the prompt alone, occur in the corpus.

    Both at the beginning of a text and after a space, which many tokenizers tell apart.
    """
    wanted: list[tuple[int, ...]] = []
    owners: list[int] = []
    n = len(prompts)
    for lead in ("", " "):
        led = [lead + prompt for prompt in prompts]
        rows, prefix_len = target_rows(tokenizer, led, targets)
        halves = [row[:length] for row, length in zip(rows, prefix_len, strict=True)]
        wanted += [tuple(row) for row in (*rows, *halves)]
        owners += range(2 * n)
    unique = sorted({(owner, ngram) for owner, ngram in zip(owners, wanted, strict=True) if ngram})
    ngrams = [ngram for _, ngram in unique]
    found = (
        corpus.count_ngrams(ngrams, progress=progress)
        if isinstance(corpus, NgramCounter)
        else count_ngrams(ngrams, corpus, progress=progress)
    )
    totals = np.bincount([owner for owner, _ in unique], found, 2 * n)
    return totals[:n], totals[n:]


def _similar(
    prompts: Sequence[Sequence[str]], targets: Sequence[str], embeddings: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest cosine of the target with a word of the prompt, and that word."""
    best, words = np.full(len(targets), np.nan), np.full(len(targets), "", dtype=object)
    if embeddings is None:
        return best, words
    needed = sorted({bare_word(w) for row in prompts for w in row} | {bare_word(t) for t in targets})
    vectors = _unit_vectors(needed, embeddings)
    for i, (row, target) in enumerate(zip(prompts, targets, strict=True)):
        wanted = vectors.get(bare_word(target))
        known = [word for word in row if bare_word(word) in vectors]
        if wanted is not None and known:
            cosines = [float(vectors[bare_word(word)] @ wanted) for word in known]
            best[i] = max(cosines)
            words[i] = known[int(np.argmax(cosines))]
    return best, words


def _unit_vectors(words: Sequence[str], embeddings: Any) -> dict[str, np.ndarray]:
    vectors = _of_model(words, embeddings) if hasattr(embeddings, "W_E") else _of_mapping(words, embeddings)
    shapes = {vector.shape for vector in vectors.values()}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise SequenceError(f"embeddings have vectors of the shapes {sorted(shapes)}: give lines of numbers")
    norms = {word: float(np.linalg.norm(vector)) for word, vector in vectors.items()}
    return {word: vector / norms[word] for word, vector in vectors.items() if norms[word] > 0}


def _of_mapping(words: Sequence[str], embeddings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {word: np.asarray(embeddings[word], dtype=float) for word in words if word in embeddings}


def _of_model(words: Sequence[str], model: Any) -> dict[str, np.ndarray]:
    """Average a word's token embeddings, without what they have in common.

    The mean over the vocabulary and the first principal direction are taken away ("all but the top", Mu and
    Viswanath, arXiv 1702.01417, with one direction): the latter says mostly how frequent a token is, and
    makes all frequent words alike.
    """
    matrix = _without_top(model.W_E.detach().float().cpu().numpy())
    rows = encode(need_tokenizer(model.tokenizer), [f" {word}" for word in words])
    return {word: matrix[row].mean(0).astype(float) for word, row in zip(words, rows, strict=True) if row}


def _without_top(matrix: Float[np.ndarray, "vocab dim"]) -> Float[np.ndarray, "vocab dim"]:
    from scipy.sparse.linalg import svds

    matrix = matrix - matrix.mean(0)
    start = np.ones(min(matrix.shape), dtype=matrix.dtype)  # else the solver draws one at random
    found: Any = svds(matrix, k=1, v0=start)
    direction = found[2][0]
    return matrix - np.outer(matrix @ direction, direction)
