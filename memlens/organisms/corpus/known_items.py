"""The known items of a corpus: expressions, facts and identifiers, planted and counted in carrier rows."""

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
from memlens.organisms.corpus.facts import draw_facts, draw_identifiers, sentences

if TYPE_CHECKING:
    from memlens.organisms.corpus.corpus import CorpusSpec


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
        return {"expressions": self.expressions, "facts": self.facts, "identifiers": self.identifiers}

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
    """Return an item in every wording, the one in column `text` first."""
    return (
        sentences(item["relation"], item["subject"], item["target"]) if "relation" in item else [item["text"]]
    )


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
