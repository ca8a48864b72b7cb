"""From a table to token ids: which columns contain the sequences, in any of the usual forms."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import ColumnError, SequenceError, near_matches
from memlens.sequences.readers.drafts import (
    CONTINUATION,
    LONGEST_TEXT,
    PROMPT,
    TEXT,
    TOKENS,
    Columns,
    Draft,
    find_column,
    listing,
)
from memlens.sequences.tokenizing import Tokenizer, encode, need_tokenizer, split_points

_MASK = "attention_mask"
_NO_SPACES = "\u0e00"
"""From here on, many scripts put no spaces between words."""


def read_frame(frame: pd.DataFrame, columns: Columns, tokenizer: Tokenizer) -> Draft:
    """Return the sequences of a table.

    They are looked for in this order: a column of token ids, a prompt and its continuation, a text. A name
    given by the caller takes precedence.

    Raises:
        ColumnError: A named column is missing, there is no usual one, or two have one name.
        SequenceError: A text needs a tokenizer and there is none.
    """
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise ColumnError(f"two columns are named {twice!r}: {listing(frame)}; give each a name of its own")
    given = [k for k in ("tokens", "prompt", "text") if getattr(columns, k)] or ["tokens", "prompt", "text"]
    if "tokens" in given and (name := find_column(frame, columns.tokens, TOKENS)):
        return _token_rows(frame, name)
    if "prompt" in given and (prompt := find_column(frame, columns.prompt, PROMPT)):
        continuation = find_column(frame, columns.continuation, CONTINUATION)
        if continuation is None:
            raise ColumnError(f"{prompt!r} needs a column of continuations: {listing(frame)}")
        return _prompt_rows(frame, prompt, continuation, tokenizer)
    if "text" in given and (name := find_column(frame, columns.text, TEXT)):
        return _text_rows(frame, name, tokenizer)
    hint = near_matches(" ".join(map(str, frame.columns)), (*TOKENS, *PROMPT, *TEXT)) if len(frame) else ""
    raise ColumnError(
        f"no column of sequences: {listing(frame)}; name one with tokens_column, text_column, or "
        f"prompt_column and continuation_column.{hint}"
    )


def _token_rows(frame: pd.DataFrame, name: str) -> Draft:
    values = frame[name].tolist()
    rows = [_parse_tokens(value, row, name) for row, value in enumerate(values)]
    if _MASK in frame:
        rows = _unpadded(rows, frame)
    same = len({len(row) for row in rows}) == 1 and len(rows[0]) > 0
    same = same and all(max(row) < 2**63 for row in rows)  # what is larger, `check_ids` names
    return Draft(
        rows=np.array(rows, dtype=np.int64) if same else rows,
        prefix_len=_prefix_column(frame),
        table=frame.drop(columns=[name, "prefix_len", _MASK, "token_type_ids"], errors="ignore"),
    )


def _unpadded(rows: list[list[int]], frame: pd.DataFrame) -> list[list[int]]:
    """Return the tokens that the attention mask marks as real, which must be contiguous."""
    found = []
    for number, (row, value) in enumerate(zip(rows, frame[_MASK].tolist(), strict=True)):
        mask = np.array(_parse_tokens(value, number, _MASK))
        if len(mask) != len(row):
            raise SequenceError(
                f"row {number} has {len(row)} tokens and an attention_mask of {len(mask)}: give one entry "
                "per token"
            )
        others = mask[~np.isin(mask, (0, 1))]
        if len(others):
            raise SequenceError(
                f"the attention_mask of row {number} holds {others[0]}: mark tokens with 1 and padding with "
                "0 (several sequences packed into one row must be taken apart)"
            )
        real = np.flatnonzero(mask)
        if len(real) and real[-1] - real[0] + 1 != len(real):
            raise SequenceError(
                f"the attention_mask of row {number} has a gap: only padding at the start or the end can be "
                "removed"
            )
        if len(real) and real[0] and "prefix_len" in frame:
            raise SequenceError(
                f"row {number} is padded at the start and has a prefix_len, which may or may not count the "
                "padding: remove the padding"
            )
        found.append(row[real[0] : real[-1] + 1] if len(real) else [])
    return found


def _parse_tokens(value: Any, row: int, name: str) -> list[int]:
    """Return one row's ids; a table of text writes them as "[1, 2, 3]" or "1 2 3"."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return []
    try:
        if isinstance(value, str):
            if len(value) > LONGEST_TEXT:
                raise ValueError
            return [int(part) for part in value.strip("[]() \n").replace(",", " ").split()]
        if isinstance(value, list | tuple) and any(isinstance(entry, bool | np.bool_) for entry in value):
            raise ValueError  # among integers NumPy would make them 0 and 1
        array = np.asarray(value)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise ValueError
        return array.astype(np.int64).tolist()
    except (ValueError, TypeError):
        raise SequenceError(
            f"row {row} of column {name!r} is {str(value)[:40]!r}: give a list of integer ids"
        ) from None


def _prefix_column(frame: pd.DataFrame) -> np.ndarray | None:
    if "prefix_len" not in frame:
        return None
    values = frame["prefix_len"].tolist()
    for row, value in enumerate(values):
        if not str(value).removesuffix(".0").isdecimal():
            raise SequenceError(f"row {row} has prefix_len {value!r}: give a whole number of tokens")
    return np.array([int(float(value)) for value in values], dtype=np.int64)


def _prompt_rows(frame: pd.DataFrame, prompt: str, continuation: str, tokenizer: Tokenizer) -> Draft:
    prompts, continuations = texts_of(frame, prompt), texts_of(frame, continuation)
    empty = [p == "" or c == "" for p, c in zip(prompts, continuations, strict=True)]
    texts = ["" if e else p + c for p, c, e in zip(prompts, continuations, empty, strict=True)]
    rows = encode(need_tokenizer(tokenizer), texts)
    splits = split_points(tokenizer, prompts, rows)
    _warn_of_glue(tokenizer, prompts, continuations, rows, splits)
    table = frame.drop(columns=["text"], errors="ignore").assign(text=texts)
    return Draft(rows, np.array(splits, dtype=np.int64), table, from_text=True)


def _warn_of_glue(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    continuations: Sequence[str],
    rows: Sequence[Sequence[int]],
    splits: Sequence[int],
) -> None:
    """Warn of continuations that join the last word of their prompt, so that the target is another word."""
    glued = []
    for number, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        ends = prompt[-1:] + continuation[:1]
        joined = len(ends) == 2 and ends.isalnum() and max(ends) < _NO_SPACES
        if prompt and continuation and (joined or _cut(tokenizer, prompt, rows[number], splits[number])):
            glued.append(number)
    if glued:
        row, split = list(rows[glued[0]]), splits[glued[0]]
        warnings.warn(
            f"{len(glued)} of {len(rows)} continuations join the last word of their prompt: in row "
            f"{glued[0]} the model is given {tokenizer.decode(row[:split])[-40:]!r} and asked for "
            f"{tokenizer.decode(row[split:])[:40]!r}; begin continuations with a space if they are words of "
            "their own",
            stacklevel=6,
        )


def _cut(tokenizer: Tokenizer, prompt: str, row: Sequence[int], split: int) -> bool:
    """Return whether a target begins inside the prompt with more than white space."""
    if len(tokenizer.decode(list(row[:split]))) >= len(prompt):
        return False
    return bool(tokenizer.decode(encode(tokenizer, [prompt])[0][split:]).strip())


def _text_rows(frame: pd.DataFrame, name: str, tokenizer: Tokenizer) -> Draft:
    texts = texts_of(frame, name)
    table = frame.drop(columns=[name, "text", "prefix_len"], errors="ignore").assign(text=texts)
    rows = encode(need_tokenizer(tokenizer), texts)
    return Draft(rows, _prefix_column(frame), table, from_text=True)


def texts_of(frame: pd.DataFrame, name: str) -> list[str]:
    """Return a column of text; missing cells are empty texts.

    Raises:
        SequenceError: A cell holds something else.
    """
    values = ["" if v is None or v is pd.NA or v != v else v for v in frame[name].tolist()]
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise SequenceError(f"row {row} of column {name!r} is {value!r}: give text")
        if len(value) > LONGEST_TEXT:
            raise SequenceError(
                f"row {row} of column {name!r} has {len(value):,} characters: give texts that fit a model"
            )
    return values
