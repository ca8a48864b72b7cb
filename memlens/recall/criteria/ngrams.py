"""`NgramReference`: a back-off n-gram predictor counted from a corpus, over words or tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from memlens.errors import EmptySetError, OptionError
from memlens.recall.corpus.duplicates import Corpus, corpus_blocks
from memlens.recall.criteria.references import Answers, target_rows
from memlens.sequences.tokenizing import Tokenizer, encode
from memlens.sequences.words import bare_word

_UNKNOWN = -1


class NgramReference:
    r"""A predictor that knows only the n-grams of one corpus: a reference for `score_criteria`.

    Witten-Bell interpolation: with c(h, w) the count of w after history h, c(h) its sum over w, and T(h) the
    number of different w that follow h,

    .. math:: p(w|h) = \frac{c(h, w) + T(h)\,p(w|h')}{c(h) + T(h)},

    where h' is h without its first word; p(w|h) = p(w|h') if nothing follows h in the corpus. Single words
    back off to 1 / (V + 1) with V the size of the vocabulary; all unknown words together have the last share.
    The distribution has no parameter. The prediction is the most likely word; a tie is not a prediction.

    Args:
        corpus: Texts; or, with a tokenizer, also token ids: an array `[token]` or `[row, pos]`, or lists of
            ids. N-grams never cross the border between two texts or rows.
        order: Length of the longest n-gram; the history has `order - 1` words.
        tokenizer: Count tokens of this tokenizer. Without it, words are counted: text between white space,
            without the punctuation around it.
        lowercase: Convert words to lower case; tokens stay as they are.
        name: Its name in results; "4-gram of 120 words" by default.

    Raises:
        OptionError: An order below 1.
        EmptySetError: The corpus has no words.

    Source: Witten and Bell (1991), "The zero-frequency problem", method C, interpolated.

    Example:
        >>> reference = NgramReference(["kick the bucket", "fill the glass", "break the glass"], order=3)
        >>> reference.predict(["kick the", "the", "fill a"])
        ['bucket', 'glass', 'the']
        >>> reference.probability(["kick the"], ["bucket"]).round(3)
        array([0.625])
    """

    name: str

    def __init__(
        self,
        corpus: Corpus | Iterable[str],
        *,
        order: int = 4,
        tokenizer: Tokenizer | None = None,
        lowercase: bool = True,
        name: str | None = None,
    ) -> None:
        if order < 1:
            raise OptionError(f"order={order}: an n-gram has at least one word")
        self.order = order
        self.tokenizer = tokenizer
        self._word = partial(bare_word, lowercase=lowercase)
        self._ids: dict[str, int] = {}
        tokens = np.concatenate([np.zeros(0, np.int64), *self._blocks(corpus)])
        if not (tokens >= 0).any():
            raise EmptySetError("the corpus of an NgramReference has no words: give texts or token ids")
        self._unigrams = np.bincount(tokens[tokens >= 0])
        self._levels = _count(tokens, order, len(self._unigrams))
        unit = "words" if tokenizer is None else "tokens"
        self.name = name or f"{order}-gram of {int(self._unigrams.sum())} {unit}"

    def predict(self, texts: Sequence[str]) -> list[str]:
        """Return the most likely word (or token, as text) after each text; of several, the first."""
        histories = [self._history(text) for text in texts]
        best = [int(self._distribution(history, self.order)[:-1].argmax()) for history in histories]
        if self.tokenizer is not None:
            return [self.tokenizer.decode([token]) for token in best]
        words = list(self._ids)
        return [words[i] for i in best]

    def probability(
        self, texts: Sequence[str], targets: Sequence[str], *, order: int | None = None
    ) -> Float[np.ndarray, "text"]:
        """Return the probability of each target (its first token) after its text.

        Args:
            texts: The prompts.
            targets: The words that follow.
            order: Longest n-gram used; 1 gives the word's smoothed share of the corpus. By default the
                reference's own.

        Raises:
            OptionError: An order below 1 or above the reference's own.
        """
        used = self.order if order is None else order
        if not 1 <= used <= self.order:
            raise OptionError(f"order={used}: this reference counted n-grams of 1 to {self.order} words")
        return self._score(texts, targets, used)[0]

    def answer(self, prompts: Sequence[str], targets: Sequence[str], **_: Any) -> Answers:
        """See `Reference.answer`; there is nothing to batch."""
        probability, top1 = self._score(prompts, targets, self.order)
        return Answers(top1, np.log(probability), 0)

    def baselines(self, prompts: Sequence[str], targets: Sequence[str]) -> dict[str, np.ndarray]:
        """Return `unigram_prob`, `bigram_prob`, `trigram_prob`, and `pmi` in nats; NaN beyond the order.

        The pointwise mutual information of the last word before the target and the target is
        log p(target | last) - log p(target), both smoothed as above, so that it is finite.
        """
        columns = {
            f"{name}_prob": self.probability(prompts, targets, order=n)
            if n <= self.order
            else np.full(len(prompts), np.nan)
            for n, name in enumerate(("unigram", "bigram", "trigram"), 1)
        }
        return {**columns, "pmi": np.log(columns["bigram_prob"] / columns["unigram_prob"])}

    def _score(
        self, prompts: Sequence[str], targets: Sequence[str], order: int
    ) -> tuple[np.ndarray, np.ndarray]:
        histories, ids = self._questions(prompts, targets)
        probability, top1 = np.zeros((2, len(ids)))
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, history in enumerate(histories):
            groups.setdefault(_known_end(history, order - 1), []).append(i)
        for history, rows in groups.items():
            p = self._distribution(history, order)
            best = p.max()
            probability[rows] = p[ids[rows]]
            top1[rows] = (p[ids[rows]] == best) & ((p == best).sum() == 1) & (ids[rows] != len(p) - 1)
        return probability, top1

    def _questions(
        self, prompts: Sequence[str], targets: Sequence[str]
    ) -> tuple[list[list[int]], Int[np.ndarray, "prompt"]]:
        """Return what precedes each target, and the target's id; unknown words get the last id."""
        if self.tokenizer is not None:
            rows, prefix_len = target_rows(self.tokenizer, prompts, targets)
            ids = [row[n] for row, n in zip(rows, prefix_len, strict=True)]
            histories = [self._known(row[:n]) for row, n in zip(rows, prefix_len, strict=True)]
        else:
            histories = [self._history(prompt) for prompt in prompts]
            ids = [self._ids.get(self._word(target), _UNKNOWN) for target in targets]
        known = np.array(self._known(ids), dtype=np.int64)
        return histories, np.where(known == _UNKNOWN, len(self._unigrams), known)

    def _history(self, text: str) -> list[int]:
        if self.tokenizer is not None:
            return self._known(encode(self.tokenizer, [text])[0])
        return [self._ids.get(self._word(word), _UNKNOWN) for word in text.split()]

    def _known(self, ids: Sequence[int]) -> list[int]:
        size = len(self._unigrams)
        return [i if 0 <= i < size and self._unigrams[i] else _UNKNOWN for i in ids]

    def _blocks(self, corpus: Any) -> Iterable[np.ndarray]:
        rows: Any = corpus if isinstance(corpus, np.ndarray) else list(corpus)
        if len(rows) and isinstance(rows[0], str):
            rows = self._texts(rows)
        for block, n_starts in corpus_blocks(rows):
            yield block[:n_starts]

    def _texts(self, texts: Sequence[str]) -> list[list[int]]:
        if self.tokenizer is not None:
            return encode(self.tokenizer, texts)
        return [[self._ids.setdefault(self._word(w), len(self._ids)) for w in text.split()] for text in texts]

    def _distribution(self, history: Sequence[int], order: int) -> Float[np.ndarray, "word"]:
        """Return p over the vocabulary and, in the last place, all unknown words."""
        seen, total = int((self._unigrams > 0).sum()), int(self._unigrams.sum())
        floor = np.append(self._unigrams > 0, True) / (seen + 1)
        p = (np.append(self._unigrams, 0) + seen * floor) / (total + seen)
        end = _known_end(history, order - 1)
        for n in range(1, len(end) + 1):
            words, counts = self._continuations(end[-n:])
            if len(words):
                p *= len(words) / (counts.sum() + len(words))
                p[words] += counts / (counts.sum() + len(words))
        return p

    def _continuations(self, history: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the words that follow a history in the corpus, and how often each does."""
        size, gram = len(self._unigrams), history[0]
        for level, word in enumerate(history[1:]):
            keys = self._levels[level][0]
            place = int(np.searchsorted(keys, gram * size + word))
            if place == len(keys) or keys[place] != gram * size + word:
                return np.zeros(0, np.int64), np.zeros(0, np.int64)
            gram = place
        keys, counts = self._levels[len(history) - 1]
        start, stop = np.searchsorted(keys, [gram * size, (gram + 1) * size])
        return keys[start:stop] - gram * size, counts[start:stop]


def _known_end(history: Sequence[int], longest: int) -> tuple[int, ...]:
    """Return those of the last `longest` words that follow the last unknown one."""
    end = list(history[-longest:]) if longest else []
    while _UNKNOWN in end:
        end = end[end.index(_UNKNOWN) + 1 :]
    return tuple(end)


def _count(tokens: np.ndarray, order: int, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return for n = 2 … order the n-grams' keys, sorted, and their counts.

    The key of an n-gram is (place of its first n-1 words among the (n-1)-grams) · size + its last word, so
    that the continuations of a history are adjacent.
    """
    levels, grams = [], tokens
    for n in range(2, order + 1):
        before, last = grams[: len(tokens) - n + 1], tokens[n - 1 :]
        inside = (before >= 0) & (last >= 0)
        keys, places, counts = np.unique(
            before[inside] * size + last[inside], return_inverse=True, return_counts=True
        )
        grams = np.full(len(before), _UNKNOWN)
        grams[inside] = places.reshape(-1)
        levels.append((keys, counts))
    return levels
