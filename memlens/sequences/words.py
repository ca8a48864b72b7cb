"""English words: stop words, words without their punctuation, and plain stems.

A few simple rules, without a dictionary or a tagger, for English only.
"""

from __future__ import annotations

from string import punctuation

_LIST = """
a about above across after afterwards again against all almost alone along already also although always am
among amongst an and another any anyhow anyone anything anyway anywhere are around as at back be became
because become becomes becoming been before beforehand behind being below beside besides between beyond both
but by ca call can cannot could did do does doing done down during each eight either eleven else elsewhere
empty enough even ever every everyone everything everywhere except few fifteen fifty first five for former
formerly forty four from front full further get give go had has have he hence her here hereafter hereby
herein hers herself him himself his how however hundred i if in indeed into is it its itself just keep last
latter least less made make many may me meanwhile might mine more moreover most mostly move much must my
myself name namely neither never nevertheless next nine no nobody none nor not nothing now nowhere of off
often on once one only onto or other others otherwise our ours ourselves out over own part per perhaps
please put quite rather re really regarding same say see seem seemed seems several she should show side
since six sixty so some somehow someone something sometime sometimes somewhere still such take ten than that
the their theirs them themselves then thence there thereafter thereby therefore these they third this those
though three through throughout thus to together too top toward towards twelve twenty two under unless until
up upon us used using various very via was we well were what whatever when whence whenever where whereas
whereby wherein wherever whether which while who whoever whole whom whose why will with within without would
yet you your yours yourself yourselves
"""

STOP_WORDS = frozenset(_LIST.split())
"""Words that English stop lists have in common: function words, numerals and a few bare verbs."""

_CLITICS = ("n't", "'d", "'ll", "'m", "'re", "'s", "'ve")


def bare_word(word: str, *, lowercase: bool = True) -> str:
    """Return a word without the punctuation around it, by default in lower case.

    >>> bare_word("“Straw’s,”"), bare_word("(Paris)", lowercase=False), bare_word("--")
    ("straw's", 'Paris', '--')
    """
    plain = word.replace("’", "'")
    bare = plain.strip(punctuation + "“”‘…–—") or plain
    return bare.lower() if lowercase else bare


def is_stop_word(word: str) -> bool:
    """Return whether a word is on the stop list, alone or before a clitic ("he's", "don't").

    >>> [is_stop_word(word) for word in ("The", "he's", "bucket", "bucket's")]
    [True, True, False, False]
    """
    bare = bare_word(word)
    if bare in STOP_WORDS:
        return True
    clitic = next((c for c in _CLITICS if bare.endswith(c)), None)
    return clitic is not None and bare.removesuffix(clitic) in STOP_WORDS


def stem(word: str) -> str:
    """Return a word without its regular inflection: plural, possessive, -ed, -ing, and a final e.

    A rule of thumb, not a lemma: irregular forms (gave, goats and sheep, better) keep their own stems, and
    some unrelated words get the same one. At least three letters with a vowel must remain.

    >>> [stem(word) for word in ("halts", "parties", "running", "makes", "making", "bygones", "ring")]
    ['halt', 'party', 'run', 'mak', 'mak', 'bygon', 'ring']
    """
    base = bare_word(word).removesuffix("'s").removesuffix("'")
    if len(base) <= 3:
        return base
    word = _without_verb_ending(_singular(base))
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def _without_verb_ending(word: str) -> str:
    if word.endswith("ied") and len(word) > 4:
        return word[:-3] + "y"
    ending = next((e for e in ("ing", "ed") if word.endswith(e)), None)
    if ending is None:
        return word
    base = word.removesuffix(ending)
    if len(base) < 3 or not set(base) & set("aeiouy"):
        return word
    doubled = base[-1] == base[-2] and base[-1] not in "lsz"
    return base[:-1] if doubled else base
