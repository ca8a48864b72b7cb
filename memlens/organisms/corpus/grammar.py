"""A probabilistic context-free grammar of templates, and the grammar of English-like sentences.

Symbols carry number and tense in their names (`NP_sg`, `VP_pl_past`), so agreement holds across relative
clauses of any length. Names bound for a whole document (`{hero}`, `{town}`) give structure across sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from memlens.organisms.corpus import lexicon

_SYMBOL = re.compile(r"<(\w+)>")
TENSES = ("present", "past")
_NUMBERS = ("sg", "pl")


@dataclass(frozen=True)
class Grammar:
    """Rules of a template grammar.

    Attributes:
        rules: For each symbol, its possible templates with their weights. `<SYMBOL>` in a template is
            expanded recursively, `{name}` is filled from the bindings of the document.
    """

    rules: Mapping[str, Sequence[tuple[float, str]]]

    def expand(self, template: str, rng: Random, bindings: Mapping[str, str] | None = None) -> str:
        """Return a random expansion of `template`.

        Args:
            template: Text with `<SYMBOL>` and `{name}` places.
            rng: The source of every choice.
            bindings: The values of `{name}` places.

        >>> Grammar({"N": [(1.0, "lamp")]}).expand("{who} has a <N>", Random(0), {"who": "Mara"})
        'Mara has a lamp'
        """
        text = _SYMBOL.sub(lambda match: self._choose(match[1], rng, bindings), template)
        return text.format_map(bindings) if bindings and "{" in text else text

    def _choose(self, symbol: str, rng: Random, bindings: Mapping[str, str] | None) -> str:
        options = self.rules[symbol]
        template = rng.choices([text for _, text in options], [weight for weight, _ in options])[0]
        return self.expand(template, rng, bindings)


def _equal(words: Iterable[str]) -> list[tuple[float, str]]:
    return [(1.0, word) for word in words]


def _nouns(number: str) -> dict[str, list[tuple[float, str]]]:
    form = _NUMBERS.index(number)
    return {
        f"THING_{number}": _equal(noun[form] for noun in lexicon.NOUNS),
        f"PERSON_{number}": _equal(noun[form] for noun in lexicon.PERSONS),
    }


def _verb_form(verb: tuple[str, str, str], number: str, tense: str) -> str:
    plural, singular, past = verb
    return past if tense == "past" else singular if number == "sg" else plural


def _verbs(number: str, tense: str) -> dict[str, list[tuple[float, str]]]:
    key = f"{number}_{tense}"
    groups = {"VT": lexicon.TRANSITIVE, "VI": lexicon.INTRANSITIVE, "VS": lexicon.SPEECH}
    rules = {
        f"{name}_{key}": _equal(_verb_form(v, number, tense) for v in verbs) for name, verbs in groups.items()
    }
    rules[f"BE_{key}"] = _equal(
        [{"sg_present": "is", "pl_present": "are", "sg_past": "was", "pl_past": "were"}[key]]
    )
    rules[f"VP_{key}"] = [
        (4.0, f"<VT_{key}> <OBJ_{tense}>"),
        (2.0, f"<VI_{key}> <WHERE>"),
        (1.0, f"<ADV> <VT_{key}> <OBJ_{tense}>"),
        (1.5, f"<BE_{key}> <ADJ>"),
        (0.7, f"<VS_{key}> that <CLAUSE_{tense}>"),
    ]
    rules[f"NP_{key}"] = [
        (3.0, f"the <ADJ> <PERSON_{number}>"),
        (3.0, f"the <PERSON_{number}> of <TOWN>"),
        (1.5, f"the <PERSON_{number}> who <VT_{key}> <OBJ_{tense}>"),
        (1.0, f"the <THING_{number}> that the <PERSON_sg> <VT_sg_{tense}>"),
    ]
    return rules


def _clauses(tense: str) -> dict[str, list[tuple[float, str]]]:
    subjects = [(1.0, f"<NP_{n}_{tense}> <VP_{n}_{tense}>") for n in _NUMBERS]
    objects = [
        (3.0, "the <ADJ> <THING_sg>"),
        (3.0, "<NUMBER> <ADJ> <THING_pl>"),
        (1.0, f"the <THING_sg> that <NAME> <VT_sg_{tense}>"),
        (1.0, "the <PERSON_pl>"),
    ]
    return {f"CLAUSE_{tense}": subjects, f"OBJ_{tense}": objects}


def sentence_grammar() -> Grammar:
    """Return the grammar of clauses: `CLAUSE_<tense>`, `VP_<number>_<tense>`, `OBJ_<tense>`, word classes.

    >>> sentence_grammar().expand("<BE_pl_past>", Random(0))
    'were'
    """
    rules: dict[str, list[tuple[float, str]]] = {
        "ADJ": _equal(lexicon.ADJECTIVES),
        "ADV": _equal(lexicon.ADVERBS),
        "NAME": _equal(lexicon.NAMES),
        "TOWN": _equal(lexicon.TOWNS),
        "SEASON": _equal(lexicon.SEASONS),
        "NUMBER": _equal(lexicon.NUMERALS),
        "WHERE": _equal(
            ["in <TOWN>", "near <TOWN>", "by the <THING_sg>", "under the <ADJ> <THING_sg>", "all day"]
        ),
    }
    for number in _NUMBERS:
        rules |= _nouns(number)
    for tense in TENSES:
        rules |= _clauses(tense)
        for number in _NUMBERS:
            rules |= _verbs(number, tense)
    return Grammar(rules)
