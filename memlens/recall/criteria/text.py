"""Prompts and targets as text: the edited prompts for references, and the sub-scores without references.

Edited prompts have parts cut, replaced or prepended; the sub-scores are lexical leaks, common targets, counts
in a corpus and baselines.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
from jaxtyping import Float

from memlens.errors import SequenceError
from memlens.recall.corpus.duplicates import Corpus, NgramCounter, count_ngrams
from memlens.recall.criteria.ngrams import NgramReference
from memlens.recall.criteria.references import target_rows
from memlens.sequences.tokenizing import Tokenizer, encode, need_tokenizer
from memlens.sequences.words import bare_word, is_stop_word, stem

Edit = tuple[int, str, int, str, str, str]
"""Row of the set, kind, number within the kind, the word edited, its replacement, the prompt."""

COLUMNS = ["row", "kind", "index", "word", "replacement", "prompt"]


def make_edits(
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    max_suffix: int,
    swaps: Swaps,
    contexts: Mapping[str, Sequence[str]],
) -> pd.DataFrame:
    """Return one row per edited prompt: `row`, `kind`, `index`, `word`, `replacement`, `prompt`, `target`.

    Kinds: "full" (the prompt itself), "suffix" (`index` is the number of last words kept), "deletion" and
    "substitution" (`index` is the word's place, from 0), and the names of `contexts` (`index` is the
    lead-in's place). A prompt of one word has no parts, so no suffix, deletion or substitution.
    """
    edits: list[Edit] = []
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        words = prompt.split()
        edits.append((row, "full", 0, "", "", prompt))
        if len(words) > 1:
            longest = min(len(words) - 1, max_suffix)
            edits += [(row, "suffix", k, "", "", " ".join(words[-k:])) for k in range(1, longest + 1)]
            around = [(i, word, words[:i], words[i + 1 :]) for i, word in enumerate(words)]
            edits += [(row, "deletion", i, w, "", " ".join([*a, *b])) for i, w, a, b in around]
            edits += [
                (row, "substitution", i, word, other, " ".join([*before, other, *after]))
                for i, word, before, after in around
                for other in swaps.of(word, i, [*words, target])
            ]
        edits += _leads(row, prompt, contexts)
    frame = pd.DataFrame(edits, columns=COLUMNS)
    return frame.assign(target=np.array(targets, dtype=object)[frame["row"].to_numpy(dtype=int)])


def _leads(row: int, prompt: str, contexts: Mapping[str, Sequence[str]]) -> Iterator[Edit]:
    for kind, leads in contexts.items():
        for i, lead in enumerate(leads):
            gap = "" if lead[-1:].isspace() else " "
            yield row, kind, i, "", lead, f"{lead}{gap}{prompt}"


def word_counts(texts: Sequence[str]) -> Counter[str]:
    """Return how often each word occurs in the texts, in lower case and without punctuation."""
    return Counter(bare_word(word) for text in texts for word in text.split())


class Swaps:
    """Substitutes for words, of similar frequency.

    The words are ranked by how often they occur; a word's substitutes are drawn from the `pool` above and
    the `pool` below it that do not occur in the sequence. The draw depends on the seed, the sequence and the
    word's place, not on the other sequences. Substitutes take the word's punctuation and capitals.

    Args:
        counts: How often each word occurs.
        pool: Number of candidates above and below.
        n: Number of substitutes for each word.
        seed: Seed of the draw.
    """

    def __init__(self, counts: Mapping[str, float], *, pool: int, n: int, seed: int) -> None:
        merged: Counter[str] = Counter()
        for word, count in counts.items():
            if (bare := bare_word(word)).replace("'", "").replace("-", "").isalpha():
                merged[bare] += count  # pyright: ignore[reportArgumentType]
        self._counts = merged
        self._ranked = sorted((count, crc32(word.encode()), word) for word, count in merged.items())
        self._pool, self._n, self._seed = pool, n, seed

    def of(self, word: str, place: int, sequence: Sequence[str]) -> list[str]:
        """Return up to `n` substitutes of the word at a place of a sequence."""
        bare = bare_word(word)
        at = bisect_left(self._ranked, (self._counts[bare], crc32(bare.encode()), bare))
        taken = {bare_word(other) for other in sequence}
        near = self._ranked[max(0, at - self._pool) : at + self._pool + 1]
        candidates = [other for *_, other in near if other not in taken]
        text = " ".join(sequence).encode()
        order = np.random.default_rng([self._seed, crc32(text), place]).permutation(len(candidates))
        return [_dressed(candidates[i], word) for i in order[: self._n]]


def _dressed(word: str, like: str) -> str:
    """Return a word with the capitals and the punctuation of another."""
    core = bare_word(like, lowercase=False)
    if core.isupper() and len(core) > 1:
        word = word.upper()
    elif core[:1].isupper():
        word = word[:1].upper() + word[1:]
    return like.replace("’", "'").replace(core, word, 1)


BASELINES = ("unigram_prob", "bigram_prob", "trigram_prob", "pmi")


def text_columns(
    frame: pd.DataFrame, counts: Mapping[str, float] | None, embeddings: Any, common_zipf: float
) -> dict[str, np.ndarray]:
    """Return the columns of leaks and of common targets (see `score_criteria`)."""
    prompts = [prompt.split() for prompt in frame["prompt"]]
    targets = frame["target"].tolist()
    pairs = zip(prompts, map(stem, targets), strict=True)
    leaks = [next((word for word in words if stem(word) == form), "") for words, form in pairs]
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
    """Return the columns of counts and of baselines; NaN without a corpus or n-grams."""
    prompts, targets = frame["prompt"].tolist(), frame["target"].tolist()
    columns = {name: np.full(len(frame), np.nan) for name in ("corpus_share", "corpus_count", *BASELINES)}
    if corpus is not None:
        both, alone = _corpus_counts(prompts, targets, corpus, need_tokenizer(tokenizer), progress)
        with np.errstate(invalid="ignore"):
            columns |= {"corpus_share": both / alone, "corpus_count": alone.astype(float)}
    return columns if ngrams is None else columns | ngrams.baselines(prompts, targets)


def _per_million(targets: Sequence[str], counts: Mapping[str, float] | None) -> np.ndarray:
    if counts is None:
        return np.full(len(targets), np.nan)
    merged: Counter[str] = Counter()
    for word, count in counts.items():
        merged[bare_word(word)] += count  # pyright: ignore[reportArgumentType]
    return 1e6 * np.array([float(merged[bare_word(t)]) for t in targets]) / sum(merged.values())


def _corpus_counts(
    prompts: Sequence[str],
    targets: Sequence[str],
    corpus: Corpus | NgramCounter,
    tokenizer: Tokenizer,
    progress: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Return how often prompt and target, and the prompt alone, occur in the corpus.

    Both at the beginning of a text and after a space, which many tokenizers encode differently.
    """
    n, wanted = len(prompts), set[tuple[int, tuple[int, ...]]]()
    for lead in ("", " "):
        rows, prefix_len = target_rows(tokenizer, [lead + prompt for prompt in prompts], targets)
        halves = [row[:length] for row, length in zip(rows, prefix_len, strict=True)]
        wanted |= {(i, tuple(ngram)) for i, ngram in enumerate([*rows, *halves]) if ngram}
    owners, ngrams = zip(*sorted(wanted), strict=True)
    totals = np.bincount(owners, count_ngrams(ngrams, corpus, progress=progress), 2 * n)
    return totals[:n], totals[n:]


def _similar(
    prompts: Sequence[Sequence[str]], targets: Sequence[str], embeddings: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest cosine between the target and a word of the prompt, and that word."""
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
    if hasattr(embeddings, "W_E"):
        vectors = _of_model(words, embeddings)
    else:
        vectors = {word: np.asarray(embeddings[word], dtype=float) for word in words if word in embeddings}
    shapes = {vector.shape for vector in vectors.values()}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise SequenceError(f"embeddings have vectors of the shapes {sorted(shapes)}: give 1-D vectors")
    norms = {word: float(np.linalg.norm(vector)) for word, vector in vectors.items()}
    return {word: vector / norms[word] for word, vector in vectors.items() if norms[word] > 0}


def _of_model(words: Sequence[str], model: Any) -> dict[str, np.ndarray]:
    """Average a word's token embeddings, without what all of them share.

    The mean over the vocabulary and the first principal direction are removed ("all but the top", Mu and
    Viswanath, arXiv 1702.01417, with one direction): the latter mostly encodes how frequent a token is, and
    makes all frequent words similar.
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
