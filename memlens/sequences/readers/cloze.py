"""Facts as cloze sentences: records whose last word, the object, is masked (the form of the LAMA probes).

A record has a sentence with `[MASK]` (columns `masked_sentences` or `masked_sentence`), or a template with
`[X]` for the subject and `[Y]` for the object (column `template`), and the object (`obj_label`). A causal
model can only be asked for an object that comes last: the prompt is the text before the mask.

Format: Petroni et al., "Language Models as Knowledge Bases?", arXiv 1909.01066. The filters are ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import ColumnError, SequenceError, check_option
from memlens.sequences.readers.drafts import Draft, leave_out, listing
from memlens.sequences.readers.registry import Request, register_form
from memlens.sequences.readers.tables import texts_of
from memlens.sequences.set import unique_ids
from memlens.sequences.tokenizing import Tokenizer, encode_answers

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


def _holds_clozes(frame: pd.DataFrame) -> bool:
    templated = "template" in frame and "sub_label" in frame
    return "obj_label" in frame and (templated or any(name in frame for name in _SENTENCES))


@register_form("clozes", _holds_clozes)
def _open_clozes(frame: pd.DataFrame, request: Request) -> Draft:
    return read_clozes(frame, request.tokenizer, ClozeOptions(target=request.target))


def read_clozes(frame: pd.DataFrame, tokenizer: Tokenizer, options: ClozeOptions) -> Draft:
    """Return the sequences of a table of cloze records; unusable ones are left out, with one warning.

    A record is left out for the first of these reasons that applies: it has no object; no mask or several;
    the object is not last; nothing is before the object; it is repeated; there are several objects for one
    subject and relation, or for one prompt; the object has several tokens (optional). The columns added are
    `text`, `prompt`, `target` (the object), `subject`, `relation`, `ambiguous`, `object_in_subject` (the
    object's string is part of the subject's, ignoring case), `n_target_tokens` and `one_token`. Columns of
    lists are dropped.

    Args:
        frame: One row per record; a list of masked sentences gives one row per sentence.
        tokenizer: The model's tokenizer.
        options: See `ClozeOptions`.

    Raises:
        ColumnError: A column is missing.
        SequenceError: A sentence or object is not text.
        EmptySetError: Nothing is left.
    """
    table, reasons = _with_prompts(_sentences(frame, options))
    tokens, starts = encode_answers(tokenizer, table["prompt"].tolist(), table["text"].tolist())
    n_targets = np.array(list(map(len, tokens)), dtype=np.int64) - starts
    table = table.assign(
        ambiguous=_ambiguous(table),
        n_target_tokens=n_targets,
        one_token=n_targets == 1,
        tokens=tokens,
        prefix_len=starts,
    )
    reasons |= {
        "repeated": table.duplicated(["prompt", "target"]).to_numpy(),
        "with several objects": table["ambiguous"].to_numpy() & (not options.keep_ambiguous),
        "with an object of several tokens": (n_targets != 1) & options.one_token,
    }
    table, attrs = leave_out(table, reasons, "cloze sentences")
    rows, prefix_len = table.pop("tokens").tolist(), table.pop("prefix_len").to_numpy(dtype=np.int64)
    if options.target == "first_token":
        rows = [row[: start + 1] for row, start in zip(rows, prefix_len, strict=True)]
    attrs = {**attrs, "target": options.target, "one_token": options.one_token}
    return Draft(rows, prefix_len, table, attrs, from_text=True)


def _sentences(frame: pd.DataFrame, options: ClozeOptions) -> pd.DataFrame:
    """Return one row per sentence: `sentence`, `subject`, `relation`, `target` and the other columns."""
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
    name = next((name for name in _NAMES if name in frame), None)
    table.insert(0, "id", list(frame[name]) if name else range(len(frame)))
    table = table.assign(sentence=_masked(frame, table, options)).explode("sentence", ignore_index=True)
    table = table.dropna(subset="sentence").reset_index(drop=True)  # records with an empty list of sentences
    return table.assign(id=unique_ids(table["id"].tolist()))


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
                f"template= has none for the relation {missing[0]!r}: add one, or leave its records out"
            )
        return [options.template[relation] for relation in table["relation"]]
    if "template" in frame and not any(name in frame for name in _SENTENCES):
        return texts_of(frame, "template")
    return None


def _as_list(value: Any, row: int, column: str) -> list[str]:
    """Return one record's sentences; a table of text writes a list as JSON."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(json.JSONDecodeError):  # a sentence may begin with its mask
            value = json.loads(value)
    sentences: list[Any] = [value] if isinstance(value, str) else list(value) if _is_nested(value) else [None]
    if not all(isinstance(sentence, str) for sentence in sentences):
        raise SequenceError(
            f"row {row} of column {column!r} is {str(value)[:40]!r}: give text or a list of texts"
        )
    return sentences


def _with_prompts(table: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, list[bool] | np.ndarray]]:
    """Return the table with `prompt`, `text` and `object_in_subject`, and the reasons against each row."""
    parts, targets = [sentence.split(_MASK) for sentence in table.pop("sentence")], table["target"].tolist()
    prompts = [part[0].rstrip() for part in parts]
    reasons: dict[str, list[bool] | np.ndarray] = {
        "without an object": [not target for target in targets],
        "without exactly one mask": [len(part) != 2 for part in parts],
        "with words after the object": [re.search(r"\w", "".join(part[1:])) is not None for part in parts],
        "with nothing before the object": [not prompt for prompt in prompts],
    }
    pairs = zip(table["subject"], targets, strict=True)
    leaks = [bool(target) and target.casefold() in subject.casefold() for subject, target in pairs]
    texts = [f"{prompt} {target}".strip() for prompt, target in zip(prompts, targets, strict=True)]
    return table.assign(text=texts, prompt=prompts, object_in_subject=leaks), reasons


def _ambiguous(table: pd.DataFrame) -> np.ndarray:
    """Return True for rows whose subject and relation, or whose prompt, have several objects."""
    targets = table["target"].str.casefold()
    named = (table["subject"] != "") & (table["relation"] != "")
    pairs = targets.groupby([table["subject"], table["relation"]]).transform("nunique") > 1
    prompts = targets.groupby(table["prompt"]).transform("nunique") > 1
    return ((pairs & named) | (prompts & (table["prompt"] != ""))).to_numpy()
