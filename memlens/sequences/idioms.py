"""The idiom file (IdioMem): idioms whose last word is to be recalled from the others.

Source: Haviv et al., "Understanding Transformer Memorization Recall Through Idioms", arXiv 2210.03588,
section 2. The prompt is all but the last word; the target is the last word's first token (as in the
study) or the whole word. Rows are keyed by prompt and target: the released file has 852 rows and 850 ids.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd

from memlens.errors import SequenceError, check_option
from memlens.sequences.drafts import Draft
from memlens.sequences.rows import some
from memlens.sequences.tables import need_tokenizer, texts_of
from memlens.sequences.tokenizing import Tokenizer, encode, first_word_token, split_points

__all__ = ["DEFINITIONS", "read_idioms"]

DEFINITIONS = frozenset(
    {
        "a person who really talks too much",
        "be happy when a person leaves",
        "for a very long time",
        "having to start all over again",
        "in an extremely blissful state",
        "make a bad situation even worse",
        "savings set aside for future use",
        "virtually impossible to find",
    }
)
"""Rows of the released file that are dictionary definitions, not idioms."""

_FLAGS = ("hard_to_guess", "prompt_comp_ind", "similarity_ind")


def read_idioms(frame: pd.DataFrame, tokenizer: Tokenizer, *, target: str = "first_token") -> Draft:
    """Return the sequences of an idiom table, every flag kept, its defects marked and warned of.

    The columns added are `prompt`, `target` (the last word), `n_words`, `text`, `source_id` (the id in the
    file; `id` is made unique), `definition` (one of `DEFINITIONS`) and `shared_prompt` (another idiom has
    the same prompt, so that more than one target is right).

    Args:
        frame: One row an idiom; column `idiom`, and what else there is.
        tokenizer: The model's.
        target: "first_token": the sequence ends with the first token of the last word (with its leading
            space where the tokenizer keeps it with the word); "word": with the whole word.

    Raises:
        SequenceError: An idiom has fewer than two words.
        OptionError: `target` is unknown.
    """
    check_option("target", target, ["first_token", "word"])
    table = _without_repeats(_with_words(frame))
    _warn_of_defects(table)
    rows = encode(need_tokenizer(tokenizer), table["text"].tolist())
    starts = split_points(tokenizer, table["prompt"].tolist(), rows)
    prefix_len = [first_word_token(tokenizer, row, s) for row, s in zip(rows, starts, strict=True)]
    if target == "first_token":
        rows = [row[: start + 1] for row, start in zip(rows, prefix_len, strict=True)]
    return Draft(rows, np.array(prefix_len, dtype=np.int64), table, {"target": target})


def _with_words(frame: pd.DataFrame) -> pd.DataFrame:
    idioms = [text.strip() for text in texts_of(frame, "idiom")]
    for row, idiom in enumerate(idioms):
        if " " not in idiom:
            raise SequenceError(f"row {row} holds the idiom {idiom!r}: give at least two words")
    pairs = [idiom.rsplit(" ", 1) for idiom in idioms]
    table = frame.drop(columns=["idiom", "text"], errors="ignore").reset_index(drop=True)
    if "id" in table:
        table["source_id"] = table["id"].astype(str)
    return table.assign(
        text=idioms,
        prompt=[prompt.rstrip() for prompt, _ in pairs],
        target=[word for _, word in pairs],
        n_words=[len(idiom.split()) for idiom in idioms],
        definition=[idiom in DEFINITIONS for idiom in idioms],
    )


def _without_repeats(table: pd.DataFrame) -> pd.DataFrame:
    repeated = table.duplicated(["prompt", "target"])
    if repeated.any():
        texts = table.loc[repeated, "text"].tolist()
        warnings.warn(
            f"{len(texts)} idioms stand in the file again and are left out: {some(texts)}", stacklevel=5
        )
    table = table.iloc[np.flatnonzero(~repeated)].reset_index(drop=True)
    return table.assign(shared_prompt=table["prompt"].duplicated(keep=False))


def _warn_of_defects(table: pd.DataFrame) -> None:
    found = table.loc[table["definition"], "text"].tolist()
    if found:
        warnings.warn(
            f"{len(found)} rows are dictionary definitions, not idioms (column 'definition'): "
            f"{some(found, 8)}",
            stacklevel=5,
        )
    if set(_FLAGS) <= set(table):
        hard, predictable, similar = (table[flag].astype(bool) for flag in _FLAGS)
        wrong = table.loc[hard != ~(predictable | similar), "text"].tolist()
        if wrong:
            warnings.warn(
                f"{len(wrong)} rows contradict hard_to_guess = not (prompt_comp_ind or similarity_ind): "
                f"{some(wrong)}",
                stacklevel=5,
            )
