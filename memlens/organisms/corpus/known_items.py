"""The known items of a corpus: expressions, facts, identifiers; planted in carrier rows and counted there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from memlens.organisms.corpus.carriers import carrier_rows, dealt
from memlens.organisms.corpus.expressions import draw_expressions
from memlens.organisms.corpus.facts import draw_facts, sentences
from memlens.organisms.corpus.identifiers import draw_identifiers

if TYPE_CHECKING:
    from memlens.organisms.corpus.corpus import CorpusSpec


KINDS = ("expressions", "facts", "identifiers")
"""The lists, as their files in a zoo folder are named."""


@dataclass(frozen=True, eq=False)
class KnownItems:
    """Three lists of known items.

    Attributes:
        expressions: see `draw_expressions`.
        facts: see `draw_facts`.
        identifiers: see `draw_identifiers`.
    """

    expressions: pd.DataFrame
    facts: pd.DataFrame
    identifiers: pd.DataFrame

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return the lists by the names of `KINDS`."""
        return {"expressions": self.expressions, "facts": self.facts, "identifiers": self.identifiers}

    def records(self) -> list[dict[str, Any]]:
        """Return every item of all lists, in order, as a dictionary of its columns."""
        return [
            {str(key): value for key, value in item.items()}
            for table in self.tables().values()
            for item in table.to_dict("records")
        ]


def draw_items(tokenizer: PreTrainedTokenizerFast, spec: CorpusSpec) -> KnownItems:
    """Draw all lists: for each of `spec.item_copies` its items, and as many that are never planted.

    Args:
        tokenizer: of the corpus.
        spec: of the corpus.

    Returns:
        The lists, with `copies` as asked for; empty ones where `spec.item_copies` is empty.
    """
    copies = (0, *spec.item_copies) if spec.item_copies else ()
    return KnownItems(
        draw_expressions(tokenizer, seed=spec.seed, copies=copies, per_cell=spec.expressions_per_cell),
        draw_facts(tokenizer, seed=spec.seed, copies=copies, per_cell=spec.facts_per_cell),
        draw_identifiers(tokenizer, seed=spec.seed, copies=copies, per_cell=spec.identifiers_per_cell),
    )


def plant_items(
    tokenizer: PreTrainedTokenizerFast,
    spec: CorpusSpec,
    items: KnownItems,
    domains: Sequence[str],
    refuse: Callable[[list[int]], bool],
) -> tuple[list[list[int]], list[str]]:
    """Return the carrier rows that say each item as often as its `copies`, and the domain of each row.

    The ways of saying a fact take turns, from a first one that is drawn.

    Args:
        tokenizer: of the corpus.
        spec: of the corpus.
        items: as `draw_items` gives them.
        domains: of the carriers' documents.
        refuse: tells rows that may not be (see `carrier_rows`).
    """
    rng = Random(f"memlens/{spec.seed}/items")
    records = items.records()
    forms, counts = [_forms(item) for item in records], [item["copies"] for item in records]
    turns = [rng.randrange(len(said)) for said in forms]
    groups = dealt([n for n, count in enumerate(counts) for _ in range(count)], spec.items_per_row, rng)
    texts = []
    for group in groups:
        texts.append([forms[item][turns[item] % len(forms[item])] for item in group])
        for item in group:
            turns[item] += 1
    options = {"domains": domains, "row_len": spec.row_len, "bare_share": spec.bare_share}
    return carrier_rows(tokenizer, texts, seed=spec.seed, refuse=refuse, **options)


def _forms(item: dict[str, Any]) -> list[str]:
    """Return an item in every way it is said, the one of column `text` first."""
    return (
        sentences(item["relation"], item["subject"], item["target"]) if "relation" in item else [item["text"]]
    )


def occurrences(
    tokenizer: PreTrainedTokenizerFast, rows: Int[np.ndarray, "row pos"], items: KnownItems
) -> pd.DataFrame:
    """Find every complete occurrence of every item in rows of tokens.

    Returns:
        Columns `id`, `row`, `start` (position of its first token), `form` (0: as in column `text`; others are
        the further ways of saying a fact); sorted by id, row and start.
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
    """Return the lists with what was measured: how often each item stands in the rows.

    `copies` becomes the number of complete occurrences, in all forms; `text_copies` is of those in the form
    of column `text` (the cloze of a fact), `bare_copies` of those at the very start of a row.

    Args:
        items: as `draw_items` gives them.
        places: as `occurrences` gives them.
    """
    groups = {
        "copies": places,
        "text_copies": places[places["form"] == 0],
        "bare_copies": places[places["start"] == 0],
    }
    counted = {
        name: table.assign(
            **{
                column: table["id"].map(part["id"].value_counts()).fillna(0).astype("int64")
                for column, part in groups.items()
            }
        )
        for name, table in items.tables().items()
    }
    return KnownItems(**counted)
