"""`fact_sequences` and `identifier_sequences`: facts about the world, as prompts and targets.

A template states an identifier (such as a person's number), and the continuation is the whole identifier.
Identifiers are text: leading zeros are kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import OptionError, SequenceError
from memlens.files import expanded, parsing
from memlens.sequences.readers.cloze import ClozeOptions, read_clozes
from memlens.sequences.readers.drafts import ID, Draft, PrependBos, find_column, leave_out
from memlens.sequences.readers.load import settle
from memlens.sequences.readers.registry import Request, read_file, register_form
from memlens.sequences.readers.tables import texts_of
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import Tokenizer, encode_answers


def fact_sequences(
    source: str | Path | pd.DataFrame,
    model: Any = None,
    *,
    template: str | Mapping[str, str] | None = None,
    subject_column: str = "sub_label",
    object_column: str = "obj_label",
    relation_column: str | None = None,
    target: str = "first_token",
    one_token: bool = False,
    keep_ambiguous: bool = False,
    tokenizer: Any = None,
    prepend_bos: PrependBos = "auto",
    name: str | None = None,
) -> SequenceSet:
    """Load facts as cloze sentences with the object last: the prompt is the text before it.

    Records have the form of the LAMA probes: `masked_sentences` (a list) or `masked_sentence`, with
    `[MASK]`, or `template` with `[X]` and `[Y]`; `obj_label`; optionally `sub_label` and `predicate_id` or
    `relation`. Unusable records are left out, with one warning and the attributes `n_left_out` and
    `left_out`; see `memlens.sequences.readers.cloze.read_clozes`, which also describes the columns.

    Args:
        source: A `.jsonl`, `.csv` or `.parquet` file, or a table.
        model: A TransformerLens model; its tokenizer encodes the text.
        template: For records without a sentence: one template for all ("[X] was born in [Y] ."), or a
            mapping from relations to templates.
        subject_column: The column of subjects.
        object_column: The column of objects.
        relation_column: The column of relations (default: predicate_id, relation or pred).
        target: "first_token" of the object, or the whole "word" (all its tokens).
        one_token: Leave out objects of several tokens.
        keep_ambiguous: Keep subjects that have several objects in one relation (column `ambiguous`).
        tokenizer: Used instead of the model's.
        prepend_bos: Whether every sequence begins with a beginning-of-text token; see `load_sequences`.
        name: A name for the set.

    Returns:
        One sequence per fact; columns `prompt`, `target`, `subject`, `relation`, `object_in_subject`, ….

    Raises:
        ColumnError: A column is missing.
        SequenceError: A sentence or object is not text.
        EmptySetError: Nothing is left.

    >>> import memlens as ml
    >>> model = ml.load_model("zoo/pythia-s")
    >>> rows = [{"sub_label": "Mara", "obj_label": "Tarn"}, {"sub_label": "Otto", "obj_label": "Pell"}]
    >>> facts = ml.sequences.fact_sequences(pd.DataFrame(rows), model, template="[X] lives in [Y] .")
    >>> facts.table[["prompt", "target"]].values.tolist()
    [['Mara lives in', 'Tarn'], ['Otto lives in', 'Pell']]
    """
    options = ClozeOptions(
        target, one_token, keep_ambiguous, template, subject_column, object_column, relation_column
    )
    frame, origin = _frame(source)
    reader = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    with nullcontext() if isinstance(source, pd.DataFrame) else parsing(source):
        draft = read_clozes(frame, reader, options)
        return settle(draft, model, reader, origin, prepend_bos=prepend_bos, name=name)


def identifier_sequences(
    source: str | Path | pd.DataFrame,
    model: Any = None,
    *,
    template: str | None = None,
    label_column: str = "label",
    identifier_column: str = "identifier",
    tokenizer: Any = None,
    prepend_bos: PrependBos = "auto",
    name: str | None = None,
) -> SequenceSet:
    """Load (label, identifier) pairs: the prompt contains the label, the continuation is the identifier.

    Pairs that repeat, and labels with several identifiers under one template, are left out with one warning.

    Args:
        source: A `.csv`, `.jsonl` or `.parquet` file, or a table. Further columns (`frequency`,
            `popularity`, …) stay in the table.
        model: A TransformerLens model; its tokenizer encodes the text.
        template: The template of a pair, with `{label}`, and `{identifier}` last. Default: the table's column
            `template`, else "The number of {label} is {identifier}". Where no space is before
            `{identifier}`, as in "GO:{identifier}", the text has none.
        label_column: The column of labels.
        identifier_column: The column of identifiers.
        tokenizer: Used instead of the model's.
        prepend_bos: Whether every sequence begins with a beginning-of-text token; see `load_sequences`.
        name: A name for the set.

    Returns:
        One sequence per pair; columns `text`, `prompt`, `target` (the identifier), `label`, `identifier`, ….

    Raises:
        ColumnError: A column is missing.
        OptionError: A template lacks one of the two, or the identifier is not last in it.
        SequenceError: A label is empty, or an identifier is empty or neither text nor a whole number.
        EmptySetError: Nothing is left.

    >>> import memlens as ml
    >>> model = ml.load_model("zoo/pythia-s")
    >>> pairs = pd.DataFrame({"label": ["the mill"], "identifier": ["0417"]})
    >>> seqs = ml.sequences.identifier_sequences(pairs, model, template="Call {label} at {identifier}.")
    >>> seqs.texts, model.to_string(seqs.target_ids[0])
    (['Call the mill at 0417'], '0417')
    """
    frame, origin = _frame(source, as_text=(identifier_column,))
    reader = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    with nullcontext() if isinstance(source, pd.DataFrame) else parsing(source):
        draft = _read_identifiers(_pairs(frame, template, label_column, identifier_column), reader)
        return settle(draft, model, reader, origin, prepend_bos=prepend_bos, name=name)


def _frame(source: str | Path | pd.DataFrame, as_text: tuple[str, ...] = ()) -> tuple[pd.DataFrame, str]:
    """Return a table and the name of its source."""
    if isinstance(source, pd.DataFrame):
        return source.reset_index(drop=True), "DataFrame"
    content, _ = read_file(expanded(source), as_text=as_text)
    if not isinstance(content, pd.DataFrame):
        raise SequenceError(f"{source} holds no table: give rows with named columns")
    return content, Path(source).name


IDENTIFIER_TEMPLATE = "The number of {label} is {identifier}"
"""The default template of a pair."""

_TEMPLATE = re.compile(r"(?s)(.*\S)(\s*)\{identifier\}\W*")


@register_form("identifiers", lambda frame: "label" in frame and "identifier" in frame)
def _open_identifiers(frame: pd.DataFrame, request: Request) -> Draft:
    return _read_identifiers(_pairs(frame, None, "label", "identifier"), request.tokenizer)


def _read_identifiers(table: pd.DataFrame, tokenizer: Tokenizer) -> Draft:
    several = table.groupby("prompt")["target"].transform("nunique").to_numpy() > 1
    reasons = {
        "repeated": table.duplicated(["prompt", "target"]).to_numpy(),
        "with several identifiers for their label": several,
    }
    table, attrs = leave_out(table, reasons, "pairs")
    rows, prefix_len = encode_answers(tokenizer, table["prompt"].tolist(), table["text"].tolist())
    return Draft(rows, prefix_len, table, attrs, from_text=True)


def _pairs(frame: pd.DataFrame, template: str | None, label_column: str, number_column: str) -> pd.DataFrame:
    """Return the table with `text`, `prompt`, `target`, `label`, `identifier` and `template`."""
    for name in (label_column, number_column):
        find_column(frame, name, ())
    labels = [label.strip() for label in texts_of(frame, label_column)]
    identifiers = [_text(value, row) for row, value in enumerate(frame[number_column].tolist())]
    for row, label in enumerate(labels):
        if not label:
            raise SequenceError(f"row {row} has an empty label: give each identifier one, or leave it out")
    own = texts_of(frame, "template") if "template" in frame and template is None else None
    templates = own or [IDENTIFIER_TEMPLATE if template is None else template] * len(frame)
    leads = [_lead(text) for text in templates]
    prompts = [lead.replace("{label}", label) for (lead, _), label in zip(leads, labels, strict=True)]
    given = [label_column, number_column, "text", "prompt", "target", "template"]
    table = frame.drop(columns=given, errors="ignore").reset_index(drop=True)
    table = table.assign(
        text=[a + space + b for a, (_, space), b in zip(prompts, leads, identifiers, strict=True)],
        prompt=prompts,
        target=identifiers,
        label=labels,
        identifier=identifiers,
        template=templates,
    )
    has_ids = any(name in table for name in ID)
    return table if has_ids else table.assign(id=[str(row) for row in range(len(table))])


def _lead(template: str) -> tuple[str, str]:
    """Return a template's text before the identifier, and the space between them if there is any."""
    found = _TEMPLATE.fullmatch(template)
    if found is None or "{label}" not in found[1]:
        raise OptionError(
            f"the template {template!r} does not contain a label and then its identifier: write it like "
            f"{IDENTIFIER_TEMPLATE!r}, with the identifier last"
        )
    return found[1], " " if found[2] else ""


def _text(value: Any, row: int) -> str:
    """Return an identifier as text: text unchanged, whole numbers in digits."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise SequenceError(f"row {row} has the identifier {value!r}: give text or a whole number")
