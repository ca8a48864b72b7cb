"""The known items of a corpus: expressions, facts and identifiers, planted and counted in carrier rows.

A fixed expression is an idiom-like phrase whose last word can only be known from memory. Expressions come in
families of eight. A family has one shape (three content slots and the function words between them) and two
words for each slot. Its eight prompts are all combinations, and each has its own target:

    kettle of rusty for never -> pilot        kettle of rusty for gladly -> narrow
    wander of rusty for never -> coin         wander of rusty for gladly -> smith     ... and four more

So only the whole prompt determines the target: every proper suffix, and every prompt with one content word
removed or replaced by the family's other word, occurs with two or more targets, equally often (a family has
one number of copies). A prompt without one of its function words never occurs. The shapes are not in the
grammar, slots take words of any class, and targets are drawn independently of the prompt, so neither grammar
nor meaning predicts a target.

A fact is (subject, relation, object), about an invented entity and stated in several ways. Every relation is
many-to-one: subjects may share an object, and a subject has one object. An entity has facts of two relations,
so neither its name alone nor the relation alone determines the object. An identifier is a random number of an
invented label, stated in one fixed template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from memlens.errors import OptionError
from memlens.organisms.corpus import lexicon
from memlens.organisms.corpus.carriers import carrier_rows, dealt
from memlens.organisms.corpus.lexicon import invented_words

if TYPE_CHECKING:
    from memlens.organisms.corpus.corpus import CorpusSpec

FAMILY_SIZE = 8
_FEWEST_TARGETS = 2 * FAMILY_SIZE
SHAPES: tuple[str, ...] = tuple(lexicon.LANGUAGE["expressions"])
"""Prompts of four to seven words, to which the target is added."""


_ITEM = ("id", "text", "prompt", "target", "tokens", "prefix_len", "copies")


def _item(
    tokenizer: PreTrainedTokenizerFast, name: str, prompt: str, target: str, copies: int, n_targets: int = 1
) -> dict[str, Any]:
    """Return the columns that all lists share, for one item."""
    text = f"{prompt} {target}"
    ids = tokenizer(text).input_ids
    return dict(zip(_ITEM, (name, text, prompt, target, ids, len(ids) - n_targets, copies), strict=True))


def _ladder(spec: CorpusSpec) -> tuple[int, ...]:
    """Return the numbers of copies of the items; 0 for those that are not planted."""
    return (0, *spec.item_copies) if spec.item_copies else ()


def draw_expressions(tokenizer: PreTrainedTokenizerFast, spec: CorpusSpec) -> pd.DataFrame:
    """Draw the list of expressions, in whole families for each number of copies.

    Args:
        tokenizer: Tokenizer of the corpus; a target, with the space before it, is one of its tokens.
        spec: Specification of the corpus; `expressions_per_cell` is a multiple of `FAMILY_SIZE`.

    Returns:
        One row per expression, with columns `id`, `text`, `prompt`, `target`, `tokens`, `prefix_len`,
        `copies` (as requested; 0 for expressions that are not planted), `family`.

    Raises:
        OptionError: `expressions_per_cell` is not such a multiple, or too few words are single tokens.
    """
    per_cell = spec.expressions_per_cell
    if per_cell % FAMILY_SIZE:
        raise OptionError(
            f"expressions_per_cell={per_cell} must be a multiple of {FAMILY_SIZE}, the size of a family."
        )
    rng = Random(f"memlens/{spec.seed}/expressions")
    targets = [word for word in _content_words() if len(tokenizer(f" {word}").input_ids) == 1]
    if per_cell and len(targets) < _FEWEST_TARGETS:
        raise OptionError(
            f"with vocab_size={len(tokenizer)} only {len(targets)} content words are single tokens, and "
            f"expressions need {_FEWEST_TARGETS} targets: raise it, or set expressions_per_cell=0."
        )
    records, taken = [], set[str]()
    for count in _ladder(spec):
        for index in range(0, per_cell, FAMILY_SIZE):
            family = f"family-{count:03d}-{index // FAMILY_SIZE}"
            for member, pair in enumerate(_family(rng, targets, taken), index):
                name = f"expression-{count:03d}-{member:02d}"
                records.append({**_item(tokenizer, name, *pair, count), "family": family})
    return pd.DataFrame(records, columns=[*_ITEM, "family"])


def _content_words() -> list[str]:
    """Return words of every class, in the order of the lexicon."""
    verbs = lexicon.TRANSITIVE + lexicon.INTRANSITIVE
    singular = [noun[0] for noun in lexicon.NOUNS + lexicon.PERSONS]
    words = [*singular, *lexicon.ADJECTIVES, *(form for verb in verbs for form in (verb[0], verb[2]))]
    return list(dict.fromkeys(words))


def _family(rng: Random, targets: Sequence[str], taken: set[str]) -> list[tuple[str, str]]:
    """Return eight pairs (prompt, target): all combinations of the slots' words, each new."""
    words = [*_content_words(), *lexicon.ADVERBS]
    while True:
        shape, chosen = rng.choice(SHAPES), rng.sample(words, 6)
        ends = rng.sample([word for word in targets if word not in chosen], FAMILY_SIZE)
        prompts = [shape.format(*places) for places in product(chosen[:2], chosen[2:4], chosen[4:])]
        if not taken & set(prompts):
            taken.update(prompts)
            return list(zip(prompts, ends, strict=True))


PER_ENTITY = 2


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


_OBJECTS = {
    "home": lexicon.TOWNS,
    "trade": tuple(person[0] for person in lexicon.PERSONS),
    "possession": tuple(noun[0] for noun in lexicon.NOUNS if noun[0][0] not in "aeiou"),
    "door": lexicon.ADJECTIVES,
}
RELATIONS: tuple[Relation, ...] = tuple(
    Relation(name, tuple(templates), _OBJECTS[name])
    for name, templates in lexicon.LANGUAGE["relations"].items()
)


def sentences(relation: str, subject: str, target: str) -> list[str]:
    """Return a fact in every wording, the cloze first.

    >>> sentences("home", "Zuna Kreil", "Tarn")[0]
    'Zuna Kreil lives in Tarn'
    """
    templates = next(known.templates for known in RELATIONS if known.name == relation)
    return [template.replace("[X]", subject).replace("[Y]", target) for template in templates]


def draw_facts(tokenizer: PreTrainedTokenizerFast, spec: CorpusSpec) -> pd.DataFrame:
    """Draw the list of facts.

    Args:
        tokenizer: Tokenizer of the corpus; an object, with the space before it, is one of its tokens.
        spec: Specification of the corpus; `facts_per_cell` is a multiple of `PER_ENTITY`.

    Returns:
        One row per fact, with columns `id`, `text` (the cloze with its object), `prompt`, `target`, `tokens`,
        `prefix_len`, `copies` (as requested, all templates together), `subject`, `relation`, `template` (the
        cloze), `templates` (all, joined by ` | `).

    Raises:
        OptionError: `facts_per_cell` is not such a multiple, or too few objects are single tokens.
    """
    if spec.facts_per_cell % PER_ENTITY:
        raise OptionError(
            f"facts_per_cell={spec.facts_per_cell} must be a multiple of {PER_ENTITY}, "
            "the facts of an entity."
        )
    rng = Random(f"memlens/{spec.seed}/facts")
    words = invented_words(rng)
    pairs = list(combinations(RELATIONS, PER_ENTITY))
    records = []
    for count in _ladder(spec):
        for entity in range(spec.facts_per_cell // PER_ENTITY):
            subject = " ".join(word.capitalize() for word in islice(words, 2))
            for place, relation in enumerate(pairs[entity % len(pairs)], entity * PER_ENTITY):
                target = rng.choice(_objects(tokenizer, relation, subject))
                prompt = sentences(relation.name, subject, target)[0].removesuffix(f" {target}")
                item = _item(tokenizer, f"fact-{count:03d}-{place:02d}", prompt, target, count)
                templates = {"template": relation.templates[0], "templates": " | ".join(relation.templates)}
                records.append({**item, "subject": subject, "relation": relation.name, **templates})
    return pd.DataFrame(records, columns=[*_ITEM, "subject", "relation", "template", "templates"])


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


TEMPLATE = "The number of {label} is {identifier}"
_DIGITS = 6


def draw_identifiers(tokenizer: PreTrainedTokenizerFast, spec: CorpusSpec) -> pd.DataFrame:
    """Draw the list of (label, identifier) pairs; labels and numbers are unique.

    Args:
        tokenizer: Tokenizer of the corpus; each digit is a token.
        spec: Specification of the corpus.

    Returns:
        One row per pair, with columns `id`, `text`, `prompt`, `target`, `tokens`, `prefix_len` (the digits
        are the targets), `copies` (as requested), `label`, `identifier`, `template`.
    """
    rng = Random(f"memlens/{spec.seed}/identifiers")
    words = invented_words(rng)
    cells = list(product(_ladder(spec), range(spec.identifiers_per_cell)))
    records = []
    for (count, index), number in zip(cells, rng.sample(range(10**_DIGITS), len(cells)), strict=True):
        label, identifier = " ".join(islice(words, 2)), f"{number:0{_DIGITS}d}"
        prompt = TEMPLATE.format(label=label, identifier=identifier).removesuffix(f" {identifier}")
        item = _item(tokenizer, f"identifier-{count:03d}-{index:02d}", prompt, identifier, count, _DIGITS)
        records.append({**item, "label": label, "identifier": identifier, "template": TEMPLATE})
    return pd.DataFrame(records, columns=[*_ITEM, "label", "identifier", "template"])


KINDS = ("expressions", "facts", "identifiers")
"""The lists, named as their files in a zoo folder."""


@dataclass(frozen=True, eq=False)
class KnownItems:
    """Three lists of known items.

    Attributes:
        expressions: See `draw_expressions`.
        facts: See `draw_facts`.
        identifiers: See `draw_identifiers`.
    """

    expressions: pd.DataFrame
    facts: pd.DataFrame
    identifiers: pd.DataFrame

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the lists under the names in `KINDS`."""
        return {kind: getattr(self, kind) for kind in KINDS}

    def records(self) -> list[dict[str, Any]]:
        """Return every item of all lists, in order, as a dictionary of its columns."""
        return [
            {str(key): value for key, value in item.items()}
            for table in self.tables().values()
            for item in table.to_dict("records")
        ]


def draw_items(tokenizer: PreTrainedTokenizerFast, spec: CorpusSpec) -> KnownItems:
    """Draw all lists: items for each number in `spec.item_copies`, and as many that are never planted.

    Args:
        tokenizer: Tokenizer of the corpus.
        spec: Specification of the corpus.

    Returns:
        The lists, with `copies` as requested; empty lists if `spec.item_copies` is empty.
    """
    return KnownItems(*(draw(tokenizer, spec) for draw in (draw_expressions, draw_facts, draw_identifiers)))


def plant_items(
    tokenizer: PreTrainedTokenizerFast,
    spec: CorpusSpec,
    items: KnownItems,
    domains: Sequence[str],
    refuse: Callable[[list[int]], bool],
) -> tuple[list[list[int]], list[str]]:
    """Return carrier rows that contain each item as often as its `copies`, and the domain of each row.

    The wordings of a fact alternate, starting from a random one.

    Args:
        tokenizer: Tokenizer of the corpus.
        spec: Specification of the corpus.
        items: As returned by `draw_items`.
        domains: Domains of the carriers' documents.
        refuse: Whether a row must be discarded (see `carrier_rows`).
    """
    rng = Random(f"memlens/{spec.seed}/items")
    records = items.records()
    forms = [_forms(item) for item in records]
    turns = [rng.randrange(len(said)) for said in forms]
    copies = [n for n, item in enumerate(records) for _ in range(item["copies"])]
    groups = dealt(copies, spec.items_per_row, rng)
    texts = []
    for group in groups:
        texts.append([forms[item][turns[item] % len(forms[item])] for item in group])
        for item in group:
            turns[item] += 1
    options = {"domains": domains, "row_len": spec.row_len, "bare_share": spec.bare_share}
    return carrier_rows(tokenizer, texts, seed=spec.seed, refuse=refuse, **options)


def _forms(item: dict[str, Any]) -> list[str]:
    """Return an item in every wording, the one in column `text` first."""
    if "relation" not in item:
        return [item["text"]]
    return sentences(item["relation"], item["subject"], item["target"])


def occurrences(
    tokenizer: PreTrainedTokenizerFast, rows: Int[np.ndarray, "row pos"], items: KnownItems
) -> pd.DataFrame:
    """Find every complete occurrence of every item in rows of tokens.

    Returns:
        Columns `id`, `row`, `start` (position of its first token), `form` (0 for the wording in column
        `text`, more for the other wordings of a fact), sorted by id, row and start.
    """
    forms = {
        tuple(tokenizer(text).input_ids): (item["id"], number)
        for item in items.records()
        for number, text in enumerate(_forms(item))
    }
    heads: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for ids in forms:
        heads.setdefault(ids[:3], []).append(ids)
    found = [
        (forms[ids][0], index, start, forms[ids][1])
        for index, row in enumerate(rows.tolist())
        for start in range(len(row) - 2)
        for ids in heads.get(tuple(row[start : start + 3]), ())
        if tuple(row[start : start + len(ids)]) == ids
    ]
    table = pd.DataFrame(found, columns=["id", "row", "start", "form"])
    return table.sort_values(["id", "row", "start"], ignore_index=True)


def count_items(items: KnownItems, places: pd.DataFrame) -> KnownItems:
    """Return the lists with the number of occurrences of each item in the rows.

    `copies` becomes the number of complete occurrences in all wordings; `text_copies` counts those in the
    wording of column `text` (the cloze of a fact), `bare_copies` those at the start of a row.

    Args:
        items: As returned by `draw_items`.
        places: As returned by `occurrences`.
    """
    groups = {
        "copies": places,
        "text_copies": places[places["form"] == 0],
        "bare_copies": places[places["start"] == 0],
    }
    counts = {column: part["id"].value_counts() for column, part in groups.items()}
    counted = {
        name: table.assign(**{c: table["id"].map(n).fillna(0).astype("int64") for c, n in counts.items()})
        for name, table in items.tables().items()
    }
    return KnownItems(**counted)
