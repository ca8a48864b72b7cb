"""Facts as cloze sentences: records whose last word, the object, is masked (the LAMA probes' form).

A record holds a sentence with `[MASK]` (columns `masked_sentences` or `masked_sentence`), or a template with
`[X]` for the subject and `[Y]` for the object (column `template`), and the object (`obj_label`). Only records
whose object is last can be asked of a causal model: the prompt is the text before the mask.

Format: Petroni et al., "Language Models as Knowledge Bases?", arXiv 1909.01066. The filters are ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import ColumnError, SequenceError, check_option
from memlens.sequences.readers.drafts import Draft, leave_out, listing
from memlens.sequences.readers.registry import Request, register_form
from memlens.sequences.readers.tables import need_tokenizer, texts_of
from memlens.sequences.set import unique_ids
from memlens.sequences.tokenizing import Tokenizer, encode, first_word_token, split_points

_MASK = "[MASK]"
_SENTENCES = ("masked_sentences", "masked_sentence")
_RELATIONS = ("predicate_id", "relation", "pred")
_NAMES = ("id", "uuid")


@dataclass(frozen=True)
class ClozeOptions:
    """How cloze records are read: the arguments of `fact_sequences`."""

    target: str = "first_token"
    one_token: bool = False
    keep_ambiguous: bool = False
    template: str | Mapping[str, str] | None = None
    subject_column: str = "sub_label"
    object_column: str = "obj_label"
    relation_column: str | None = None

    def __post_init__(self) -> None:
        check_option("target", self.target, ["first_token", "word"])


def holds_clozes(frame: pd.DataFrame) -> bool:
    """Tell whether a table's columns are those of cloze records."""
    templated = "template" in frame and "sub_label" in frame
    return "obj_label" in frame and (templated or any(name in frame for name in _SENTENCES))


@register_form("clozes", holds_clozes)
def _open_clozes(frame: pd.DataFrame, request: Request) -> Draft:
    return read_clozes(frame, request.tokenizer, ClozeOptions(target=request.target))


def read_clozes(frame: pd.DataFrame, tokenizer: Tokenizer, options: ClozeOptions | None = None) -> Draft:
    """Return the sequences of a table of cloze records, what cannot be used left out with one warning.

    Left out, each under the first reason that holds: no object; no mask or several; object not last; nothing
    before the object; repeated; several objects for one subject and relation, or for one prompt; object of
    several tokens (if asked). The columns added are `text`, `prompt`, `target` (the object), `subject`,
    `relation`, `ambiguous`, `object_in_subject` (the object's string is part of the subject's, whatever the
    case), `n_target_tokens` and `one_token`. Columns of lists are dropped.

    Args:
        frame: One row per record; a list of masked sentences gives a row each.
        tokenizer: The model's.
        options: See `ClozeOptions`.

    Raises:
        ColumnError: A column is missing.
        SequenceError: A sentence or object is not text.
        EmptySetError: Nothing is left.
    """
    options = options or ClozeOptions()
    table, masks = _with_prompts(_sentences(frame, options), options)
    ambiguous = _ambiguous(table)
    table = _tokenized(table.assign(ambiguous=ambiguous), need_tokenizer(tokenizer))
    reasons = {
        **masks,
        "repeated": table.duplicated(["prompt", "target"]).to_numpy(),
        "with several objects": ambiguous & (not options.keep_ambiguous),
        "with an object of several tokens": ~table["one_token"].to_numpy() & options.one_token,
    }
    table, attrs = leave_out(table, reasons, "cloze sentences")
    rows, prefix_len = table["tokens"].tolist(), table["prefix_len"].to_numpy(dtype=np.int64)
    if options.target == "first_token":
        rows = [row[: start + 1] for row, start in zip(rows, prefix_len.tolist(), strict=True)]
    table = table.drop(columns=["tokens", "prefix_len"])
    return Draft(rows, prefix_len, table, {**attrs, "target": options.target, "one_token": options.one_token})


def _sentences(frame: pd.DataFrame, options: ClozeOptions) -> pd.DataFrame:
    """Return one row per sentence: `sentence`, `subject`, `relation`, `target`, and the plain columns."""
    if options.object_column not in frame:
        raise ColumnError(f"there is no column {options.object_column!r} of objects: {listing(frame)}")
    names = (options.relation_column,) if options.relation_column else _RELATIONS
    relation = next((name for name in names if name in frame), None)
    if options.relation_column and relation is None:
        raise ColumnError(f"there is no column {options.relation_column!r} of relations: {listing(frame)}")
    table = pd.DataFrame(
        {
            "subject": _texts(frame, options.subject_column),
            "relation": _texts(frame, relation),
            "target": [text.strip() for text in texts_of(frame, options.object_column)],
        }
    )
    kept = [name for name in frame if not any(map(_is_nested, frame[name])) and name not in (*_NAMES, *table)]
    table = pd.concat([table, frame[kept].reset_index(drop=True)], axis=1)
    table = table.drop(columns=["text", "prompt", "tokens", "prefix_len", *_SENTENCES], errors="ignore")
    sentences = _masked(frame, table, options)
    counts = [len(found) for found in sentences]
    name = next((name for name in _NAMES if name in frame), None)
    ids = [str(value) for value in frame[name]] if name else [str(row) for row in range(len(frame))]
    table = table.iloc[np.repeat(np.arange(len(table)), counts)].reset_index(drop=True)
    table.insert(0, "id", unique_ids([value for value, n in zip(ids, counts, strict=True) for _ in range(n)]))
    return table.assign(sentence=[sentence for found in sentences for sentence in found])


def _texts(frame: pd.DataFrame, name: str | None) -> list[str]:
    return texts_of(frame, name) if name is not None and name in frame else [""] * len(frame)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | tuple | dict | np.ndarray)


def _masked(frame: pd.DataFrame, table: pd.DataFrame, options: ClozeOptions) -> list[list[str]]:
    """Return the masked sentences of each record; a template is filled with the record's subject."""
    templates = _templates(frame, table, options)
    if templates is not None:
        pairs = zip(templates, table["subject"], strict=True)
        return [[template.replace("[X]", subject).replace("[Y]", _MASK)] for template, subject in pairs]
    column = next((name for name in _SENTENCES if name in frame), None)
    if column is None:
        raise ColumnError(
            f"no column of masked sentences or templates: {listing(frame)}; give one with template="
        )
    return [_as_list(value, row, column) for row, value in enumerate(frame[column].tolist())]


def _templates(frame: pd.DataFrame, table: pd.DataFrame, options: ClozeOptions) -> list[str] | None:
    """Return each record's template: the caller's, else the file's, else None."""
    if isinstance(options.template, str):
        return [options.template] * len(frame)
    if options.template is not None:
        missing = sorted(set(table["relation"]) - set(options.template))
        if missing:
            raise SequenceError(
                f"template= has none for the relation {missing[0]!r}: add it, or leave it out"
            )
        return [options.template[relation] for relation in table["relation"]]
    if "template" in frame and not any(name in frame for name in _SENTENCES):
        return texts_of(frame, "template")
    return None


def _as_list(value: Any, row: int, column: str) -> list[str]:
    """Return one record's sentences; a table of text holds a list as JSON."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = [value]  # a sentence that begins with its mask
    sentences = [value] if isinstance(value, str) else list(value) if _is_nested(value) else None
    if sentences is None or not all(isinstance(sentence, str) for sentence in sentences):
        raise SequenceError(
            f"row {row} of column {column!r} is {str(value)[:40]!r}: give text or a list of it"
        )
    return sentences


def _with_prompts(table: pd.DataFrame, options: ClozeOptions) -> tuple[pd.DataFrame, dict[str, list[bool]]]:
    """Return the table with `prompt`, `text` and `object_in_subject`, and the reasons against each row."""
    sentences, targets = table["sentence"].tolist(), table["target"].tolist()
    parts = [sentence.split(_MASK) for sentence in sentences]
    prompts = [part[0].rstrip() for part in parts]
    pairs = zip(table["subject"], targets, strict=True)
    texts = [f"{prompt} {target}".strip() for prompt, target in zip(prompts, targets, strict=True)]
    reasons = {
        "without an object": [not target for target in targets],
        "without exactly one mask": [len(part) != 2 for part in parts],
        "with words after the object": [re.search(r"\w", "".join(part[1:])) is not None for part in parts],
        "with nothing before the object": [not prompt for prompt in prompts],
    }
    leaks = [bool(target) and target.casefold() in subject.casefold() for subject, target in pairs]
    table = table.drop(columns=["sentence"])
    return table.assign(text=texts, prompt=prompts, object_in_subject=leaks), reasons


def _ambiguous(table: pd.DataFrame) -> np.ndarray:
    """Tell the rows whose subject and relation, or whose prompt, have several objects in the table."""
    targets = table["target"].str.casefold()
    named = (table["subject"] != "") & (table["relation"] != "")
    pairs = targets.groupby([table["subject"], table["relation"]]).transform("nunique") > 1
    prompts = targets.groupby(table["prompt"]).transform("nunique") > 1
    return ((pairs & named) | (prompts & (table["prompt"] != ""))).to_numpy()


def _tokenized(table: pd.DataFrame, tokenizer: Tokenizer) -> pd.DataFrame:
    """Return the table with `tokens`, `prefix_len` (where the object begins) and the object's length."""
    rows = encode(tokenizer, table["text"].tolist())
    starts = split_points(tokenizer, table["prompt"].tolist(), rows)
    prefix_len = [first_word_token(tokenizer, row, start) for row, start in zip(rows, starts, strict=True)]
    counts = np.array([len(row) - start for row, start in zip(rows, prefix_len, strict=True)], dtype=np.int64)
    return table.assign(tokens=rows, prefix_len=prefix_len, n_target_tokens=counts, one_token=counts == 1)
