"""A probabilistic context-free grammar of templates, and the grammar of English-like sentences.

Symbols carry number and tense in their names (`NP_sg`, `VP_pl_past`), so agreement holds across relative
clauses of any length. Names bound for a whole document (`{hero}`, `{town}`) give structure across sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
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


def sentence_grammar() -> Grammar:
    """Return the grammar of `language.yaml` with its word classes, for every number and tense.

    >>> sentence_grammar().expand("<BE_pl_past>", Random(0))
    'were'
    """
    words: dict[str, Iterable[str]] = {
        "ADJ": lexicon.ADJECTIVES,
        "ADV": lexicon.ADVERBS,
        "NAME": lexicon.NAMES,
        "TOWN": lexicon.TOWNS,
        "SEASON": lexicon.SEASONS,
        "NUMBER": lexicon.NUMERALS,
    }
    verbs = {"VT": lexicon.TRANSITIVE, "VI": lexicon.INTRANSITIVE, "VS": lexicon.SPEECH}
    rules: dict[str, list[tuple[float, str]]] = {}
    for (form, number), tense in product(enumerate(_NUMBERS), TENSES):
        words[f"THING_{number}"] = [noun[form] for noun in lexicon.NOUNS]
        words[f"PERSON_{number}"] = [noun[form] for noun in lexicon.PERSONS]
        for name, of_class in verbs.items():
            words[f"{name}_{number}_{tense}"] = [_verb_form(verb, number, tense) for verb in of_class]
        for symbol, templates in lexicon.LANGUAGE["grammar"].items():
            at = {"number": number, "tense": tense}
            rules[symbol.format(**at)] = [(weight, t.format(**at)) for t, weight in templates.items()]
    return Grammar(rules | {symbol: [(1.0, word) for word in group] for symbol, group in words.items()})


def _verb_form(verb: tuple[str, str, str], number: str, tense: str) -> str:
    plural, singular, past = verb
    return past if tense == "past" else singular if number == "sg" else plural
