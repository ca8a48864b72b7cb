"""Documents of words: free text and dialogue."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from memlens.organisms.corpus import lexicon
from memlens.organisms.corpus.grammar import TENSES, sentence_grammar

_GRAMMAR = sentence_grammar()

_OPENINGS = (
    "In {season} {hero} came to {town} with the <ADJ> <THING_sg>.",
    "{hero} lived in {town} with {friend}, the <ADJ> <PERSON_sg>.",
    "Every {season} {hero} and {friend} met in {town}.",
)
_BODY = {
    "present": (
        "{Pronoun} <VP_sg_present>.",
        "{hero} <VP_sg_present> while {friend} <VP_sg_present>.",
        "When <CLAUSE_present>, {pronoun} <VI_sg_present>.",
        "<CLAUSE_present>, but {hero} <VP_sg_present>.",
        "{friend} gives {hero} <NUMBER> <ADJ> <THING_pl>.",
    ),
    "past": (
        "{Pronoun} <VP_sg_past>.",
        "{hero} <VP_sg_past> while {friend} <VP_sg_past>.",
        "When <CLAUSE_past>, {pronoun} <VI_sg_past>.",
        "<CLAUSE_past>, but {hero} <VP_sg_past>.",
        "{friend} gave {hero} <NUMBER> <ADJ> <THING_pl>.",
    ),
}
_EXCHANGES = (
    (
        "Have you seen the <ADJ> {thing}?",
        (
            "No, but the <PERSON_sg> of <TOWN> has <NUMBER> <THING_pl>.",
            "Yes, <NAME> <VT_sg_past> the {thing}.",
        ),
    ),
    (
        "Who <VT_sg_past> <OBJ_past>?",
        ("It was <NAME>, the <PERSON_sg>.", "I believe that <NAME> did, in <TOWN>."),
    ),
    (
        "How many <THING_pl> do you need?",
        ("I need <NUMBER>, and <NUMBER> <ADJ> <THING_pl>.", "Only <NUMBER>, for the <PERSON_pl> of <TOWN>."),
    ),
    (
        "Where did <NAME> go?",
        ("To <TOWN>, with the <ADJ> <THING_sg>.", "<NAME> says that <CLAUSE_present>."),
    ),
    (
        "I hope that <CLAUSE_present>.",
        ("So do I, {first}.", "Why? <NAME> <VP_sg_present>."),
    ),
)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def story_bindings(rng: Random) -> dict[str, str]:
    """Draw who a story is about: `hero` with the pronoun, `friend`, `town` and `season`.

    Args:
        rng: the source of every choice.

    >>> story_bindings(Random(0))["pronoun"] in ("he", "she")
    True
    """
    female = rng.random() < 0.5
    hero = rng.choice(lexicon.FEMALE_NAMES if female else lexicon.MALE_NAMES)
    friend = rng.choice(lexicon.NAMES)
    pronoun = "she" if female else "he"
    return {
        "hero": hero,
        "friend": friend,
        "town": rng.choice(lexicon.TOWNS),
        "season": rng.choice(lexicon.SEASONS),
        "pronoun": pronoun,
        "Pronoun": pronoun.capitalize(),
    }


def story_sentence(template: str, rng: Random, bindings: Mapping[str, str]) -> str:
    """Return an expansion of a template of `memlens.organisms.corpus.grammar.sentence_grammar`.

    Args:
        template: with `<SYMBOL>` and `{name}` places.
        rng: the source of every choice.
        bindings: the values of `{name}` places.

    >>> story_sentence("{hero} <BE_sg_past> here.", Random(0), {"hero": "Mara"})
    'Mara was here.'
    """
    return _GRAMMAR.expand(template, rng, bindings)


def text_document(rng: Random) -> str:
    """Return a short story: one hero, one friend, one town, one tense throughout.

    Args:
        rng: the source of every choice.

    >>> text_document(Random(0)) == text_document(Random(0))
    True
    """
    bindings = story_bindings(rng)
    body = _BODY[rng.choice(TENSES)]
    templates = [rng.choice(_OPENINGS), *(rng.choice(body) for _ in range(rng.randint(6, 10)))]
    ending = "At last {hero} left {town} in {season}." if rng.random() < 0.5 else "{hero} stayed in {town}."
    return " ".join(_capital(_GRAMMAR.expand(t, rng, bindings)) for t in [*templates, ending]) + "\n"


def dialogue_document(rng: Random) -> str:
    r"""Return a talk of two persons who take turns; an object asked for is named again in the answer.

    Args:
        rng: the source of every choice.

    >>> dialogue_document(Random(0)).count("\n") >= 8
    True
    """
    first, second = rng.sample(lexicon.NAMES, 2)
    lines = []
    for _ in range(rng.randint(4, 6)):
        question, answers = rng.choice(_EXCHANGES)
        bindings = {"first": first, "thing": rng.choice(lexicon.NOUNS)[0]}
        for speaker, template in ((first, question), (second, rng.choice(answers))):
            lines.append(f"{speaker}: {_capital(_GRAMMAR.expand(template, rng, bindings))}\n")
    return "".join(lines)
