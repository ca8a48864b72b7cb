"""The words of the synthetic corpus: our own lists, grouped by part of speech, and invented words.

Verbs have three forms (plural present, singular present, past) and nouns two, so that number and tense can
agree throughout a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random


def _words(words: str) -> tuple[str, ...]:
    return tuple(words.split())


def _pairs(words: str) -> tuple[tuple[str, str], ...]:
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


FEMALE_NAMES = _words("Mara Elske Jorun Sanne Ilvy Petra Runa Dalia Wenda Orla Tilda Bryn Noor Vesna Hedda")
MALE_NAMES = _words("Tobin Aldo Kasper Bram Eskil Joost Milo Otto Rurik Stellan Tamas Ulf Viggo Anton Leif")
NAMES = FEMALE_NAMES + MALE_NAMES

TOWNS = _words(
    "Velden Harrow Ostby Kelmar Dunmere Tarn Brask Lowick Sandvig Eltham Norrby Pell Grava Wick Morven Asker"
)

SEASONS = ("spring", "summer", "autumn", "winter")

NOUNS = _pairs(
    "lantern kettle ladder basket anchor barrel bottle bridge bucket candle carpet chain clock cloak coin "
    "compass/compasses cup drum engine feather fence flute gate glove hammer harp hat helmet hook horn "
    "jar kite knot lamp letter lock map mirror needle net oar oven paddle page pillow pipe plate pot "
    "ribbon ring rope saddle sail shield shovel spoon stool stove table tent torch/torches tower trunk "
    "wagon wheel whistle window bell boat book boot box/boxes brush/brushes"
)

PERSONS = _pairs(
    "baker miller sailor weaver farmer teacher painter hunter smith clerk guard doctor singer tailor "
    "mason captain cook gardener judge pilot"
)

TRANSITIVE = _verbs(
    "mend/+ed carry/carried paint/+ed find/found hide/hid sell/sold buy/bought lose/lost keep/kept "
    "clean/+ed borrow/+ed break/broke lift/+ed watch/+ed trade/+d need/+ed want/+ed bring/brought "
    "steal/stole move/+d draw/drew wash/+ed follow/+ed admire/+d"
)

INTRANSITIVE = _verbs(
    "sleep/slept laugh/+ed wait/+ed sing/sang work/+ed rest/+ed wander/+ed smile/+d shout/+ed fall/fell "
    "return/+ed dance/+d"
)

SPEECH = _verbs("say/said think/thought hope/+d believe/+d know/knew claim/+ed")

ADJECTIVES = _words(
    "old copper silver wooden heavy tiny broken bright dusty round narrow golden painted rusty blue red "
    "green white black hollow cracked polished cheap rare strange quiet warm cold smooth plain crooked "
    "famous"
)

NUMERALS = _words("two three four five six seven eight nine ten twelve")

ADVERBS = _words("slowly quietly often rarely gladly soon again never always twice")

IDENTIFIERS = _words(
    "total count price rate index value items names rows limit offset width height score level start end "
    "size key result cache queue buffer weight delta"
)

_ONSETS = _words("b br d dr f fl g gr h j k kl kr l m n p pl qu r s sk st t tr v w z")
_VOWELS = _words("a e i o u ai ei oa")
_CODAS = ["", "", "l", "n", "r", "s", "m", "x", "nd", "rk", "lt"]


def lexicon_words() -> frozenset[str]:
    """Return every word of the lexicon in lower case, names and towns included.

    >>> {"mara", "lantern", "lanterns", "mended"} <= lexicon_words()
    True
    """
    plain = (NAMES, TOWNS, SEASONS, ADJECTIVES, NUMERALS)
    words = {word for group in (*plain, ADVERBS, IDENTIFIERS) for word in group}
    formed = (NOUNS, PERSONS, TRANSITIVE, INTRANSITIVE, SPEECH)
    words |= {form for group in formed for forms in group for form in forms}
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
    return rng.choice(_ONSETS) + rng.choice(_VOWELS)
