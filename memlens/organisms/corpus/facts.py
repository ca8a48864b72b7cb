"""Facts about invented entities: (subject, relation, object), each said in several ways.

Every relation is N-1: many subjects may share an object, a subject has one. An entity has facts of two
relations, so neither its name alone nor the relation alone tells the object.
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
from memlens.organisms.corpus.invented import invented_words

PER_ENTITY = 2


@dataclass(frozen=True)
class Relation:
    """A kind of fact.

    Attributes:
        name: as it stands in the column `relation`.
        templates: sentences without their full stop, `[X]` for the subject and `[Y]` for the object; the
            first is the cloze, and the object is last in it.
        objects: what may fill `[Y]`.
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
    """Return a fact in every way it is said, the cloze first.

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
        tokenizer: of the corpus; an object is one of its tokens, with the space in front.
        seed: of the corpus.
        copies: how often they are to be planted, 0 for those that are not.
        per_cell: facts for each number of copies, a multiple of `PER_ENTITY`.

    Returns:
        Columns `id`, `text` (the cloze with its object), `prompt`, `target`, `tokens`, `prefix_len`, `copies`
        (as asked for, all templates together), `subject`, `relation`, `template` (the cloze), `templates`
        (all, with ` | ` between); one row a fact.

    Raises:
        OptionError: `per_cell` is no multiple of `PER_ENTITY`, or too few objects are one token.
    """
    if per_cell % PER_ENTITY:
        raise OptionError(
            f"facts_per_cell={per_cell}: give a multiple of {PER_ENTITY}, the facts of an entity."
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
    return pd.DataFrame([_record(tokenizer, *record) for record in records], columns=list(_COLUMNS))


def _objects(tokenizer: PreTrainedTokenizerFast, relation: Relation, subject: str) -> list[str]:
    objects = [
        word
        for word in relation.objects
        if len(tokenizer(f" {word}").input_ids) == 1 and word.lower() not in subject.lower()
    ]
    if len(objects) < 2:
        raise OptionError(
            f"vocab_size={len(tokenizer)} leaves {len(objects)} objects of one token for the relation "
            f"{relation.name!r}: raise it, or set facts_per_cell=0."
        )
    return objects


_COLUMNS = (
    "id",
    "text",
    "prompt",
    "target",
    "tokens",
    "prefix_len",
    "copies",
    "subject",
    "relation",
    "template",
    "templates",
)


def _record(
    tokenizer: PreTrainedTokenizerFast, name: str, subject: str, relation: Relation, target: str, count: int
) -> tuple[object, ...]:
    """Return a fact as a row of `_COLUMNS`."""
    text = sentences(relation.name, subject, target)[0]
    prompt, ids = text.removesuffix(f" {target}"), tokenizer(text).input_ids
    template, templates = relation.templates[0], " | ".join(relation.templates)
    row = (name, text, prompt, target, ids, len(ids) - 1, count)
    return (*row, subject, relation.name, template, templates)
