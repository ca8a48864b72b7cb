"""Every question that `score_criteria` puts to a reference: prompts with parts cut, swapped or put before."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from zlib import crc32

import numpy as np
import pandas as pd

from memlens.sequences.words import bare_word

Edit = tuple[int, str, int, str, str, str]
"""Row of the set, kind, number within the kind, the word touched, its replacement, the prompt."""

COLUMNS = ["row", "kind", "index", "word", "replacement", "prompt"]


def make_edits(
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    max_suffix: int,
    swaps: Swaps,
    contexts: Mapping[str, Sequence[str]],
) -> pd.DataFrame:
    """Return one row per question: `row`, `kind`, `index`, `word`, `replacement`, `prompt`, `target`.

    Kinds: "full" (the prompt itself), "suffix" (`index` is how many last words are kept), "deletion" and
    "substitution" (`index` is the word's place, from 0), and the names of `contexts` (`index` is the
    lead-in's place). A prompt of one word has no parts, so no suffix, deletion or substitution.
    """
    edits: list[Edit] = []
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        words = prompt.split()
        edits.append((row, "full", 0, "", "", prompt))
        if len(words) > 1:
            edits += _suffixes(row, words, max_suffix)
            edits += _deletions(row, words)
            edits += _substitutions(row, words, target, swaps)
        edits += _leads(row, prompt, contexts)
    frame = pd.DataFrame(edits, columns=COLUMNS)
    return frame.assign(target=np.array(targets, dtype=object)[frame["row"].to_numpy(dtype=int)])


def _suffixes(row: int, words: Sequence[str], longest: int) -> Iterator[Edit]:
    for k in range(1, min(len(words) - 1, longest) + 1):
        yield row, "suffix", k, "", "", " ".join(words[-k:])


def _deletions(row: int, words: Sequence[str]) -> Iterator[Edit]:
    for i, word in enumerate(words):
        yield row, "deletion", i, word, "", " ".join([*words[:i], *words[i + 1 :]])


def _substitutions(row: int, words: Sequence[str], target: str, swaps: Swaps) -> Iterator[Edit]:
    for i, word in enumerate(words):
        for other in swaps.of(word, i, [*words, target]):
            yield row, "substitution", i, word, other, " ".join([*words[:i], other, *words[i + 1 :]])


def _leads(row: int, prompt: str, contexts: Mapping[str, Sequence[str]]) -> Iterator[Edit]:
    for kind, leads in contexts.items():
        for i, lead in enumerate(leads):
            gap = "" if lead[-1:].isspace() else " "
            yield row, kind, i, "", lead, f"{lead}{gap}{prompt}"


def word_counts(texts: Sequence[str]) -> Counter[str]:
    """Return how often each word occurs in the texts, in lower case and without punctuation."""
    return Counter(bare_word(word) for text in texts for word in text.split())


class Swaps:
    """Words of like frequency to put in a word's place.

    The words are ranked by how often they occur; a word's substitutes are drawn from the `pool` above and
    the `pool` below it that do not occur in the sequence. What is drawn depends on the seed, the sequence
    and the word's place, not on the other sequences' order. Punctuation and capitals are the old word's.

    Args:
        counts: How often each word occurs.
        pool: How many words above and below are candidates.
        n: How many substitutes each word gets.
        seed: Decides between candidates.
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
        """Return the substitutes of the word at a place of a sequence; fewer where there are too few."""
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
