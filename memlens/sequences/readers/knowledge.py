"""`fact_sequences` and `identifier_sequences`: facts about the world, as prompts and targets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from memlens.errors import SequenceError
from memlens.sequences.readers.cloze import ClozeOptions, read_clozes
from memlens.sequences.readers.identifiers import IdentifierOptions, read_identifiers
from memlens.sequences.readers.load import settle
from memlens.sequences.readers.registry import read_file
from memlens.sequences.set import SequenceSet


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
    prepend_bos: bool = False,
    name: str | None = None,
) -> SequenceSet:
    """Load facts as cloze sentences with the object last: the prompt is the text before it.

    Records are in the form of the LAMA probes: `masked_sentences` (a list) or `masked_sentence`, with
    `[MASK]`, or `template` with `[X]` and `[Y]`; `obj_label`, and where there are `sub_label` and
    `predicate_id` or `relation`. What cannot be used is left out, with one warning and the attributes
    `n_left_out` and `left_out`: see `memlens.sequences.readers.cloze.read_clozes`, also for the columns.

    Args:
        source: A `.jsonl`, `.csv` or `.parquet` file, or a table.
        model: A TransformerLens model; its tokenizer reads the text.
        template: For records that hold no sentence: one for all ("[X] was born in [Y] ."), or a mapping
            from relations to templates.
        subject_column: The column of subjects.
        object_column: The column of objects.
        relation_column: The column of relations (default: predicate_id, relation or pred).
        target: "first_token" of the object, or the whole "word" (all its tokens).
        one_token: Leave out objects of several tokens.
        keep_ambiguous: Keep subjects that have several objects in one relation (column `ambiguous`).
        tokenizer: Used instead of the model's.
        prepend_bos: Put a beginning-of-text token in front of every sequence.
        name: A name for the set.

    Returns:
        One sequence a fact; columns `prompt`, `target`, `subject`, `relation`, `object_in_subject`, ….

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
    prepend_bos: bool = False,
    name: str | None = None,
) -> SequenceSet:
    """Load (label, identifier) pairs: the prompt says the label, the continuation is the whole identifier.

    Args:
        source: A `.csv`, `.jsonl` or `.parquet` file, or a table. Identifiers are text: a file's leading
            zeros are kept. Further columns (`frequency`, `popularity`, …) stay in the table.
        model: A TransformerLens model; its tokenizer reads the text.
        template: The template of a pair, with `{label}`, and `{identifier}` last. Default: the table's column
            `template`, else "The number of {label} is {identifier}".
        label_column: The column of labels.
        identifier_column: The column of identifiers.
        tokenizer: Used instead of the model's.
        prepend_bos: Put a beginning-of-text token in front of every sequence.
        name: A name for the set.

    Returns:
        One sequence per pair; columns `prompt`, `target`, `label`, `identifier`, ….

    Raises:
        ColumnError: A column is missing.
        OptionError: The template lacks a place, or the identifier is not last in it.
        SequenceError: A label or identifier is empty, or not text.
        EmptySetError: Nothing is left.

    >>> import memlens as ml
    >>> model = ml.load_model("zoo/pythia-s")
    >>> pairs = pd.DataFrame({"label": ["the mill"], "identifier": ["0417"]})
    >>> seqs = ml.sequences.identifier_sequences(pairs, model, template="Call {label} at {identifier}.")
    >>> seqs.texts, model.to_string(seqs.target_ids[0])
    (['Call the mill at 0417'], '0417')
    """
    options = IdentifierOptions(template, label_column, identifier_column)
    frame, origin = _frame(source, as_text=(identifier_column,))
    reader = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    draft = read_identifiers(frame, reader, options)
    return settle(draft, model, reader, origin, prepend_bos=prepend_bos, name=name)


def _frame(source: str | Path | pd.DataFrame, as_text: tuple[str, ...] = ()) -> tuple[pd.DataFrame, str]:
    """Return a table and the name of where it is from."""
    if isinstance(source, pd.DataFrame):
        return source.reset_index(drop=True), "DataFrame"
    content, _ = read_file(Path(source).expanduser(), as_text=as_text)
    if not isinstance(content, pd.DataFrame):
        raise SequenceError(f"{source} holds no table: give rows with named columns")
    return content, Path(source).name
