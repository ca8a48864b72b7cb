"""Facts about invented entities, each stated in several ways, and identifiers of invented labels.

A fact is (subject, relation, object). Every relation is many-to-one: subjects may share an object, and a
subject has one object. An entity has facts of two relations, so neither its name alone nor the relation alone
determines the object. An identifier is a random number, stated in one fixed template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from random import Random

import pandas as pd
from transformers import PreTrainedTokenizerFast

from memlens.errors import OptionError
from memlens.organisms.corpus import lexicon
from memlens.organisms.corpus.lexicon import invented_words

PER_ENTITY = 2
_ITEM = ("id", "text", "prompt", "target", "tokens", "prefix_len", "copies")


@dataclass(frozen=True)
class Relation:
    """A kind of fact.

    Attributes:
        name: Its name in the column `relation`.
        templates: Sentences without their full stop, with `[X]` for the subject and `[Y]` for the object; the
            first is the cloze, which ends with the object.
        objects: Possible values of `[Y]`.
    """

    name: str
    templates: tuple[str, ...]
    objects: tuple[str, ...]


_THINGS = tuple(noun[0] for noun in lexicon.NOUNS if noun[0][0] not in "aeiou")

RELATIONS: tuple[Relation, ...] = (
    Relation(
        "home",
        ("[X] lives in [Y]", "The house of [X] is in [Y]", "In [Y] you will meet [X]"),
        lexicon.TOWNS,
    ),
    Relation(
        "trade",
        ("[X] works as a [Y]", "The trade of [X] is that of a [Y]", "As a [Y] you may ask [X]"),
        tuple(person[0] for person in lexicon.PERSONS),
    ),
    Relation(
        "possession",
        ("[X] carries a [Y]", "In the bag of [X] is a [Y]", "This [Y] belongs to [X]"),
        _THINGS,
    ),
    Relation(
        "door",
        ("[X] has a door that is [Y]", "The door of [X] is [Y]", "How [Y] is the door of [X]"),
        lexicon.ADJECTIVES,
    ),
)


def sentences(relation: str, subject: str, target: str) -> list[str]:
    """Return a fact in every wording, the cloze first.

    >>> sentences("home", "Zuna Kreil", "Tarn")[0]
    'Zuna Kreil lives in Tarn'
    """
    templates = next(known.templates for known in RELATIONS if known.name == relation)
    return [template.replace("[X]", subject).replace("[Y]", target) for template in templates]


def draw_facts(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, copies: Sequence[int], per_cell: int
) -> pd.DataFrame:
    """Draw the list of facts.

    Args:
        tokenizer: Tokenizer of the corpus; an object, with the space before it, is one of its tokens.
        seed: Seed of the corpus.
        copies: Numbers of copies to plant; 0 for facts that are not planted.
        per_cell: Facts for each number of copies, a multiple of `PER_ENTITY`.

    Returns:
        One row per fact, with columns `id`, `text` (the cloze with its object), `prompt`, `target`, `tokens`,
        `prefix_len`, `copies` (as requested, all templates together), `subject`, `relation`, `template` (the
        cloze), `templates` (all, joined by ` | `).

    Raises:
        OptionError: `per_cell` is not a multiple of `PER_ENTITY`, or too few objects are single tokens.
    """
    if per_cell % PER_ENTITY:
        raise OptionError(
            f"facts_per_cell={per_cell} must be a multiple of {PER_ENTITY}, the facts of an entity."
        )
    rng = Random(f"memlens/{seed}/facts")
    words = invented_words(rng)
    pairs = list(combinations(RELATIONS, PER_ENTITY))
    records = []
    for count in copies:
        for entity in range(per_cell // PER_ENTITY):
            subject = " ".join(word.capitalize() for word in islice(words, 2))
            for place, relation in enumerate(pairs[entity % len(pairs)]):
                name = f"fact-{count:03d}-{entity * PER_ENTITY + place:02d}"
                objects = _objects(tokenizer, relation, subject)
                records.append((name, subject, relation, rng.choice(objects), count))
    columns = [*_ITEM, "subject", "relation", "template", "templates"]
    return pd.DataFrame([_record(tokenizer, *record) for record in records], columns=columns)


def _objects(tokenizer: PreTrainedTokenizerFast, relation: Relation, subject: str) -> list[str]:
    objects = [
        word
        for word in relation.objects
        if len(tokenizer(f" {word}").input_ids) == 1 and word.lower() not in subject.lower()
    ]
    if len(objects) < 2:
        raise OptionError(
            f"with vocab_size={len(tokenizer)} only {len(objects)} objects of the relation {relation.name!r} "
            "are single tokens: raise it, or set facts_per_cell=0."
        )
    return objects


def _record(
    tokenizer: PreTrainedTokenizerFast, name: str, subject: str, relation: Relation, target: str, count: int
) -> tuple[object, ...]:
    """Return a fact as a row of the list."""
    text = sentences(relation.name, subject, target)[0]
    prompt, ids = text.removesuffix(f" {target}"), tokenizer(text).input_ids
    template, templates = relation.templates[0], " | ".join(relation.templates)
    row = (name, text, prompt, target, ids, len(ids) - 1, count)
    return (*row, subject, relation.name, template, templates)


TEMPLATE = "The number of {label} is {identifier}"
_DIGITS = 6


def draw_identifiers(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, copies: Sequence[int], per_cell: int
) -> pd.DataFrame:
    """Draw the list of (label, identifier) pairs; labels and numbers are unique.

    Args:
        tokenizer: Tokenizer of the corpus; each digit is a token.
        seed: Seed of the corpus.
        copies: Numbers of copies to plant; 0 for pairs that are not planted.
        per_cell: Pairs for each number of copies.

    Returns:
        One row per pair, with columns `id`, `text`, `prompt`, `target`, `tokens`, `prefix_len` (the digits
        are the targets), `copies` (as requested), `label`, `identifier`, `template`.
    """
    rng = Random(f"memlens/{seed}/identifiers")
    words = invented_words(rng)
    names = [f"identifier-{count:03d}-{index:02d}" for count in copies for index in range(per_cell)]
    numbers = [f"{number:0{_DIGITS}d}" for number in rng.sample(range(10**_DIGITS), len(names))]
    counts = [count for count in copies for _ in range(per_cell)]
    records = []
    for name, number, count in zip(names, numbers, counts, strict=True):
        label = " ".join(islice(words, 2))
        text = TEMPLATE.format(label=label, identifier=number)
        ids = tokenizer(text).input_ids
        prompt = text.removesuffix(f" {number}")
        records.append((name, text, prompt, number, ids, len(ids) - _DIGITS, count, label, number, TEMPLATE))
    return pd.DataFrame(records, columns=[*_ITEM, "label", "identifier", "template"])
