"""The words of the synthetic corpus, grouped by part of speech, and invented words.

The words are in `language.yaml`. Verbs have three forms (plural present, singular present, past) and nouns
two, so that number and tense can agree throughout a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import yaml

LANGUAGE: Mapping[str, Any] = yaml.safe_load(
    Path(__file__).with_name("language.yaml").read_text(encoding="utf-8")
)
"""The content of `language.yaml`: words, grammar and templates."""


def _nouns(words: str) -> tuple[tuple[str, str], ...]:
    """`"lamp box/boxes"` → `(("lamp", "lamps"), ("box", "boxes"))`."""
    return tuple((w.split("/")[0], w.split("/")[1]) if "/" in w else (w, w + "s") for w in words.split())


def _verbs(words: str) -> tuple[tuple[str, str, str], ...]:
    """`"mend/+ed take/took"` → plural, singular and past; `+` appends to the plural."""
    forms = []
    for word in words.split():
        plural, past = word.split("/")
        singular = plural[:-1] + "ies" if plural[-1] == "y" and plural[-2] not in "aeou" else plural + "s"
        singular = plural + "es" if plural.endswith(("ch", "sh", "ss")) else singular
        forms.append((plural, singular, plural + past[1:] if past[0] == "+" else past))
    return tuple(forms)


_WORDS: dict[str, tuple[str, ...]] = {name: tuple(w.split()) for name, w in LANGUAGE["words"].items()}

FEMALE_NAMES, MALE_NAMES = _WORDS["female_names"], _WORDS["male_names"]
NAMES = FEMALE_NAMES + MALE_NAMES
TOWNS, SEASONS, ADJECTIVES = _WORDS["towns"], _WORDS["seasons"], _WORDS["adjectives"]
NUMERALS, ADVERBS, IDENTIFIERS = _WORDS["numerals"], _WORDS["adverbs"], _WORDS["identifiers"]
NOUNS, PERSONS = _nouns(LANGUAGE["nouns"]["things"]), _nouns(LANGUAGE["nouns"]["persons"])
TRANSITIVE, INTRANSITIVE, SPEECH = (
    _verbs(LANGUAGE["verbs"][name]) for name in ("transitive", "intransitive", "speech")
)
_CODAS = ["", "", "l", "n", "r", "s", "m", "x", "nd", "rk", "lt"]


def lexicon_words() -> frozenset[str]:
    """Return every word of the lexicon in lower case, names and towns included.

    >>> {"mara", "lantern", "lanterns", "mended"} <= lexicon_words()
    True
    """
    plain = (NAMES, TOWNS, SEASONS, ADJECTIVES, NUMERALS, ADVERBS, IDENTIFIERS)
    formed = (NOUNS, PERSONS, TRANSITIVE, INTRANSITIVE, SPEECH)
    words = {word for group in (*plain, *(forms for group in formed for forms in group)) for word in group}
    return frozenset(word.lower() for word in words)


def invented_words(rng: Random) -> Iterator[str]:
    """Yield words of two syllables endlessly, without repeats and without any that contain a lexicon word.

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
    return rng.choice(_WORDS["onsets"]) + rng.choice(_WORDS["vowels"])
