"""The idiom file (IdioMem): idioms whose last word is to be recalled from the words before it.

Source: Haviv et al., "Understanding Transformer Memorization Recall Through Idioms", arXiv 2210.03588,
section 2. The prompt is everything before the last word; the target is the last word's first token (as in
the study) or the whole word. Prompt and target identify a row: the released file has 852 rows and 850 ids.
"""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd

from memlens.errors import ColumnError, SequenceError, check_option
from memlens.sequences.readers.drafts import Draft
from memlens.sequences.readers.registry import Request, register_form
from memlens.sequences.readers.tables import texts_of
from memlens.sequences.set import SequenceSet, some
from memlens.sequences.tokenizing import Tokenizer, encode_answers
from memlens.sequences.words import bare_word, is_stop_word

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

DEFECTS = {
    "definition": "a dictionary definition, not an idiom",
    "stop_word_prompt": "every word before the last is a stop word, which the study's own rule excludes",
    "shared_prompt": "another row has the same prompt, so more than one target is correct",
    "repeated_id": "another row of the file has the same id",
    "shared_ending": "another row has the same last three words: a near duplicate",
    "placeholder": "contains a placeholder word (someone's, one's, something)",
    "contradiction": "hard_to_guess is not the opposite of (prompt_comp_ind or similarity_ind)",
}
"""What can be wrong with a row of the idiom file: the column that marks it, and why it matters."""

_PLACEHOLDERS = {
    *("someone", "someone's", "somebody", "somebody's", "something", "something's", "one's", "oneself")
}
_FLAGS = ("hard_to_guess", "prompt_comp_ind", "similarity_ind")


@register_form("idioms", lambda frame: "idiom" in frame)
def _open_idioms(frame: pd.DataFrame, request: Request) -> Draft:
    return read_idioms(frame, request.tokenizer, target=request.target)


def read_idioms(frame: pd.DataFrame, tokenizer: Tokenizer, *, target: str = "first_token") -> Draft:
    """Return the sequences of an idiom table, with all its flags; defects are marked, with a warning.

    The columns added are `prompt`, `target` (the last word), `n_words`, `text`, `source_id` (the id in the
    file; `id` is made unique), and one for each of `DEFECTS` (see `idiom_defects`).

    Args:
        frame: One row per idiom: the column `idiom`, and any others.
        tokenizer: The model's tokenizer.
        target: "first_token": the sequence ends with the first token of the last word (with its leading
            space, if the tokenizer keeps it with the word); "word": with the whole word.

    Raises:
        SequenceError: An idiom has fewer than two words.
        OptionError: `target` is unknown.
    """
    check_option("target", target, ["first_token", "word"])
    table = _without_repeats(_with_words(frame))
    _warn_of_defects(table)
    rows, prefix_len = encode_answers(tokenizer, table["prompt"].tolist(), table["text"].tolist())
    if target == "first_token":
        rows = [row[: start + 1] for row, start in zip(rows, prefix_len, strict=True)]
    return Draft(rows, prefix_len, table, {"target": target}, from_text=True)


def idiom_defects(sequences: SequenceSet | pd.DataFrame) -> pd.DataFrame:
    """Return what is wrong with the rows of an idiom file, one row per defect.

    Args:
        sequences: What `load_sequences` returned for such a file, or its table.

    Returns:
        `row` (in the set), `id`, `text`, `defect` (a key of `DEFECTS`) and `why`, sorted by defect, then row.

    Raises:
        ColumnError: The set was not read from an idiom file.

    Source: ours, for the data file of arXiv 2210.03588.

    Example:
        >>> import pandas as pd
        >>> import memlens as ml
        >>> table = pd.DataFrame({"idiom": ["kick the bucket", "kick the bottle", "break the ice"]})
        >>> seqs = ml.load_sequences(table, ml.load_model("zoo/pythia-xs"))
        >>> set(ml.sequences.idiom_defects(seqs).columns) >= {"row", "text", "defect", "why"}
        True
    """
    table = sequences.table if isinstance(sequences, SequenceSet) else sequences
    missing = [name for name in DEFECTS if name not in table]
    if missing:
        raise ColumnError(
            f"the table has no column {missing[0]!r}: read the idiom file with memlens.load_sequences"
        )
    rows = table[["id", "text"]].reset_index(drop=True).rename_axis("row").reset_index()
    marked = [
        rows[table[defect].to_numpy(dtype=bool)].assign(defect=defect, why=why)
        for defect, why in DEFECTS.items()
    ]
    return pd.concat(marked, ignore_index=True)


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
    )


def _with_defects(table: pd.DataFrame) -> pd.DataFrame:
    words = [text.split() for text in table["text"]]
    endings = pd.Series([" ".join(row[-3:]).lower() for row in words], dtype=object)
    source_ids = table["source_id"] if "source_id" in table else pd.Series(range(len(table)))
    contradicts = np.zeros(len(table), dtype=bool)
    if set(_FLAGS) <= set(table):
        hard, predictable, similar = (table[flag].to_numpy().astype(bool) for flag in _FLAGS)
        contradicts = hard == (predictable | similar)
    return table.assign(
        definition=[text in DEFINITIONS for text in table["text"]],
        stop_word_prompt=[all(_all_stop(word) for word in row[:-1]) for row in words],
        shared_prompt=table["prompt"].duplicated(keep=False),
        repeated_id=source_ids.duplicated(keep=False).to_numpy(),
        shared_ending=endings.duplicated(keep=False).to_numpy(),
        placeholder=[not _PLACEHOLDERS.isdisjoint(map(bare_word, row)) for row in words],
        contradiction=contradicts,
    )


def _all_stop(word: str) -> bool:
    """Punctuation next to a word is a token of its own, and not a stop word."""
    return is_stop_word(word) and bare_word(word) == word.lower().replace("’", "'")


def _without_repeats(table: pd.DataFrame) -> pd.DataFrame:
    repeated = table.duplicated(["prompt", "target"])
    if repeated.any():
        texts = table.loc[repeated, "text"].tolist()
        warnings.warn(f"{len(texts)} repeated idioms are left out: {some(texts)}", stacklevel=6)
    return _with_defects(table.loc[~repeated].reset_index(drop=True))


_WARNED = (
    ("definition", "are dictionary definitions, not idioms (column 'definition')", 8),
    ("contradiction", "contradict hard_to_guess = not (prompt_comp_ind or similarity_ind)", 5),
    ("stop_word_prompt", "have only stop words before the target (column 'stop_word_prompt')", 5),
)
"""Defects that cause a warning: column, what is wrong with the rows, how many of them are named."""


def _warn_of_defects(table: pd.DataFrame) -> None:
    for column, what, shown in _WARNED:
        found = table.loc[table[column], "text"].tolist()
        if found:
            warnings.warn(f"{len(found)} rows {what}: {some(found, shown)}", stacklevel=6)
