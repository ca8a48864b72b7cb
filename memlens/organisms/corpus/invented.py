"""Invented words: names that stand in no list of the lexicon, made of syllables."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from memlens.organisms.corpus import lexicon


def _list(parts: str) -> list[str]:
    return parts.split()


_ONSETS = _list("b br d dr f fl g gr h j k kl kr l m n p pl qu r s sk st t tr v w z")
_VOWELS = _list("a e i o u ai ei oa")
_CODAS = ["", "", "l", "n", "r", "s", "m", "x", "nd", "rk", "lt"]


def lexicon_words() -> frozenset[str]:
    """Return every word of the lexicon in lower case, names and towns included.

    >>> {"mara", "lantern", "lanterns", "mended"} <= lexicon_words()
    True
    """
    plain = (lexicon.NAMES, lexicon.TOWNS, lexicon.SEASONS, lexicon.ADJECTIVES, lexicon.NUMERALS)
    words = {word for group in (*plain, lexicon.ADVERBS, lexicon.IDENTIFIERS) for word in group}
    formed = (lexicon.NOUNS, lexicon.PERSONS, lexicon.TRANSITIVE, lexicon.INTRANSITIVE, lexicon.SPEECH)
    words |= {form for group in formed for forms in group for form in forms}
    return frozenset(word.lower() for word in words)


def invented_words(rng: Random) -> Iterator[str]:
    """Yield words of two syllables without end, no word twice and none that is or holds one of the lexicon.

    Args:
        rng: the source of every choice.

    >>> words = invented_words(Random(0))
    >>> len({next(words) for _ in range(50)})
    50
    """
    known, seen = lexicon_words(), set[str]()
    while True:
        word = _syllable(rng) + _syllable(rng) + rng.choice(_CODAS)
        if word in seen or not 5 <= len(word) <= 8 or any(old in word for old in known):
            continue
        seen.add(word)
        yield word


def _syllable(rng: Random) -> str:
    return rng.choice(_ONSETS) + rng.choice(_VOWELS)
