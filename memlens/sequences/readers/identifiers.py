"""Identifiers: (label, identifier) pairs, such as a name and a number, said by a template.

The continuation is the whole identifier. Identifiers are text: leading zeros are kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import ColumnError, OptionError, SequenceError, near_matches
from memlens.sequences.readers.columns import ID, listing
from memlens.sequences.readers.drafts import Draft, leave_out
from memlens.sequences.readers.registry import Request, register_form
from memlens.sequences.readers.tables import need_tokenizer, texts_of
from memlens.sequences.tokenizing import Tokenizer, encode, first_word_token, split_points

IDENTIFIER_TEMPLATE = "The number of {label} is {identifier}"
"""The default template of a pair."""

_TEMPLATE = re.compile(r"(?s)(.*\S)\s*\{identifier\}\W*")


@dataclass(frozen=True)
class IdentifierOptions:
    """How identifiers are read.

    Attributes:
        template: The template of a pair, with `{label}` and then `{identifier}`, the latter last. None: the
            table's column `template`, else `IDENTIFIER_TEMPLATE`.
        label_column: The column of labels.
        identifier_column: The column of identifiers.

    Raises:
        OptionError: The template lacks a place, or the identifier is not last in it.
    """

    template: str | None = None
    label_column: str = "label"
    identifier_column: str = "identifier"

    def __post_init__(self) -> None:
        if self.template is not None:
            _lead(self.template)


def holds_identifiers(frame: pd.DataFrame) -> bool:
    """Tell whether a table's columns are those of identifiers."""
    return "label" in frame and "identifier" in frame


@register_form("identifiers", holds_identifiers)
def _open_identifiers(frame: pd.DataFrame, request: Request) -> Draft:
    return read_identifiers(frame, request.tokenizer)


def read_identifiers(
    frame: pd.DataFrame, tokenizer: Tokenizer, options: IdentifierOptions | None = None
) -> Draft:
    """Return the sequences of a table of identifiers.

    Pairs that repeat, and labels with several identifiers under one template, are left out with one warning.
    The columns added are `text`, `prompt`, `target` (the identifier), `label` and `identifier`; all others
    (`frequency`, `popularity`, …) are kept.

    Args:
        frame: One row per pair.
        tokenizer: The model's.
        options: See `IdentifierOptions`.

    Raises:
        ColumnError: A column is missing.
        OptionError: A template lacks a place, or the identifier is not last in it.
        SequenceError: A label is empty, or an identifier is empty or no text or whole number.
        EmptySetError: Nothing is left.
    """
    options = options or IdentifierOptions()
    table = _pairs(frame, options)
    several = table.groupby("prompt")["target"].transform("nunique").to_numpy() > 1
    reasons = {
        "repeated": table.duplicated(["prompt", "target"]).to_numpy(),
        "with several identifiers for their label": several,
    }
    table, attrs = leave_out(table, reasons, "pairs")
    rows = encode(need_tokenizer(tokenizer), table["text"].tolist())
    starts = split_points(tokenizer, table["prompt"].tolist(), rows)
    prefix_len = [first_word_token(tokenizer, row, start) for row, start in zip(rows, starts, strict=True)]
    return Draft(rows, np.array(prefix_len, dtype=np.int64), table, attrs)


def _pairs(frame: pd.DataFrame, options: IdentifierOptions) -> pd.DataFrame:
    for name in (options.label_column, options.identifier_column):
        if name not in frame:
            hint = near_matches(name, map(str, frame.columns))
            raise ColumnError(f"there is no column {name!r}: {listing(frame)}.{hint}")
    labels = [label.strip() for label in texts_of(frame, options.label_column)]
    identifiers = [_text(value, row) for row, value in enumerate(frame[options.identifier_column].tolist())]
    for row, label in enumerate(labels):
        if not label:
            raise SequenceError(f"row {row} has an empty label: give each identifier one, or leave it out")
    own = texts_of(frame, "template") if "template" in frame and options.template is None else None
    templates = own or [options.template or IDENTIFIER_TEMPLATE] * len(frame)
    prompts = [_lead(text).replace("{label}", label) for text, label in zip(templates, labels, strict=True)]
    given = [options.label_column, options.identifier_column, "text", "prompt", "target", "template"]
    table = frame.drop(columns=given, errors="ignore").reset_index(drop=True)
    table = table.assign(
        text=[f"{prompt} {number}" for prompt, number in zip(prompts, identifiers, strict=True)],
        prompt=prompts,
        target=identifiers,
        label=labels,
        identifier=identifiers,
        template=templates,
    )
    return (
        table
        if any(name in table for name in ID)
        else table.assign(id=[str(row) for row in range(len(table))])
    )


def _lead(template: str) -> str:
    """Return a template's text before the identifier."""
    found = _TEMPLATE.fullmatch(template)
    if found is None or "{label}" not in found[1]:
        raise OptionError(
            f"the template {template!r} does not say a label and then its identifier: write it like "
            f"{IDENTIFIER_TEMPLATE!r}, with the identifier last"
        )
    return found[1]


def _text(value: Any, row: int) -> str:
    """Return an identifier as text: text as it is, whole numbers in digits."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise SequenceError(f"row {row} has the identifier {value!r}: give text or a whole number")
