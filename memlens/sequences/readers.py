"""`load_sequences`: one door for every form in which people keep sequences."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from memlens.errors import SequenceError, SourceNotFoundError, check_option
from memlens.sequences.checks import check_sequences, eos_mask
from memlens.sequences.files import read_file, zoo_file
from memlens.sequences.idioms import read_idioms
from memlens.sequences.rows import some, unique_ids
from memlens.sequences.set import SequenceSet
from memlens.sequences.tables import ID, Columns, Draft, find_column, read_frame
from memlens.sequences.tokenizing import bos_id, tokenizer_attrs

__all__ = ["DEFAULT_PREFIX_LEN", "load_sequences"]

DEFAULT_PREFIX_LEN = 32
"""Tokens given to the model where nothing else says: the 32 + 32 of published lists."""

_log = logging.getLogger(__name__)


def load_sequences(
    source: Any,
    model: Any = None,
    *,
    prefix_len: int | Sequence[int] | np.ndarray | Tensor | None = None,
    max_targets: int | None = None,
    tokenizer: Any = None,
    prepend_bos: bool = False,
    text_column: str | None = None,
    prompt_column: str | None = None,
    continuation_column: str | None = None,
    tokens_column: str | None = None,
    id_column: str | None = None,
    target: str = "first_token",
    on_eos: str = "raise",
    on_short: str = "raise",
    split: str = "train",
    limit: int | None = None,
    name: str | None = None,
    check_tokenizer: bool = True,
) -> SequenceSet:
    """Load sequences, tokenize them if they are text, and check that they fit the model.

    | source | what is read |
    |---|---|
    | `"x.npy"` | `[n, length]` integers, one tokenized sequence a row |
    | `"x.jsonl"`, `"x.csv"`, `"x.parquet"`, a DataFrame, a Hugging Face dataset | a column of token ids, else `prompt` and `continuation`, else `text`; an `idiom` column is read as the idiom file |
    | `"hf:NAME"` | `datasets.load_dataset(NAME, split=split)`, such as EleutherAI/pythia-memorized-evals |
    | `"zoo"`, `"zoo/NAME"` | the list of planted sequences shipped with a model of the zoo |
    | a list of strings, a list of lists of ids, a 2-D array or tensor, a `SequenceSet` | as it is |

    All other columns are kept in the table.

    Args:
        source: See above.
        model: A TransformerLens model; its tokenizer reads text, and its vocabulary and context are what
            the sequences are checked against.
        prefix_len: Tokens given to the model: one number or one a sequence. By default the source's own
            (a column `prefix_len`, or where the prompt ends), else 32.
        max_targets: Keep only the first so many tokens of each continuation.
        tokenizer: Instead of the model's.
        prepend_bos: Put a beginning-of-text token in front of every sequence; it counts to the prefix,
            on top of `prefix_len`. Training windows have none, so the default is not to.
        text_column: The column of texts (default: text, sequence, content or sentence).
        prompt_column: The column of prompts (default: prompt, prefix or context).
        continuation_column: The column of continuations (default: continuation, suffix, target or
            completion). The boundary is set by `memlens.sequences.tokenizing.split_points`.
        tokens_column: The column of token ids (default: tokens, input_ids or token_ids).
        id_column: The column of names (default: id, uid, sequence_id or index). Names that repeat are told
            apart by a suffix, with a warning.
        target: For the idiom file: "first_token" of the last word, or the whole "word".
        on_eos: A continuation holds an end-of-text token: "raise", "drop" the sequence, or "keep" it.
        on_short: A sequence is not longer than its prefix: "raise" or "drop".
        split: The split of a Hugging Face dataset.
        limit: Read only the first so many rows.
        name: A name for the set, kept in its attributes.
        check_tokenizer: Refuse a set that another tokenizer made (where the set records one).

    Returns:
        The set. Its attributes record source, tokenizer, `prepend_bos` and what was left out.

    Raises:
        SourceNotFoundError: No such file, dataset or zoo list.
        FileFormatError: A file is not what its name says.
        ColumnError: A column is missing.
        EmptySetError: Nothing is left.
        VocabularyError: A token id is outside the vocabulary, or another tokenizer made the set.
        SequenceError: A sequence is too short, too long or holds an end-of-text token.

    >>> load_sequences([[3, 1, 4, 1, 5], [9, 2, 6]], prefix_len=2)
    SequenceSet(2 sequences, prefix 2, continuation 1-3 tokens, from list)
    """
    check_option("on_eos", on_eos, ["raise", "drop", "keep"])
    check_option("on_short", on_short, ["raise", "drop"])
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    columns = Columns(tokens_column, prompt_column, continuation_column, text_column, id_column)
    content, attrs, origin = _open(source, model, split, limit)
    draft = _read(content, columns, tokenizer, target, limit)
    attrs = {**attrs, **draft.attrs, "source": attrs.get("source", origin), "on_eos": on_eos}
    draft = _with_prefix(replace(draft, attrs=attrs), prefix_len)
    draft = _named(_without_short(_without_empty(draft), on_short), columns.id)
    seqs = _assemble(draft, tokenizer, max_targets, prepend_bos)
    seqs = seqs.with_attrs(name=name) if name else seqs
    if model is None:
        return _drop_eos(seqs, tokenizer, on_eos) if on_eos == "drop" else seqs
    seqs = _drop_eos(seqs, tokenizer, on_eos)
    report = check_sequences(
        seqs, model, on_eos="raise" if on_eos == "raise" else "keep", check_tokenizer=check_tokenizer
    )
    if report.duplicates:
        warnings.warn(
            f"{origin}: {len(report.duplicates)} sequences repeat an earlier one: {some(report.duplicates)}",
            stacklevel=2,
        )
    _log.info("%s: %s", origin, report)
    return seqs


def _open(source: Any, model: Any, split: str, limit: int | None) -> tuple[Any, dict[str, Any], str]:
    """Return the content, the attributes it carries, and the source's name."""
    if isinstance(source, str) and (source == "zoo" or source.startswith("zoo/")):
        name = _zoo_name(source, model)
        content, settings = read_file(zoo_file(name))
        return content, settings.get("attrs", {}), name
    if isinstance(source, str) and source.startswith("hf:"):
        return _hub_dataset(source.removeprefix("hf:"), split), {}, source
    if isinstance(source, str | Path):
        content, settings = read_file(Path(source).expanduser())
        return content, settings.get("attrs", {}), Path(source).name
    if isinstance(source, SequenceSet):
        frame = source.table.assign(tokens=source.rows(), prefix_len=source.prefix_len.numpy())
        return frame, dict(source.attrs), "SequenceSet"
    return source, {}, type(source).__name__


def _zoo_name(source: str, model: Any) -> str:
    """Return "zoo/NAME"; for a bare "zoo" the model's own list where it is of the zoo."""
    if source != "zoo":
        return source
    path = str(getattr(getattr(model, "tokenizer", None), "name_or_path", ""))
    parts = Path(path).parts
    return f"zoo/{parts[-1]}" if "zoo" in parts[:-1] else DEFAULT_ZOO


DEFAULT_ZOO = "zoo/pythia-s"
"""The list that a bare "zoo" means where the model does not tell."""


def _hub_dataset(name: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the client raises many kinds, from ConnectionError to ValueError
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SourceNotFoundError(
            f"the dataset {name!r}, split {split!r}, could not be loaded: {reason}"
        ) from error


def _read(content: Any, columns: Columns, tokenizer: Any, target: str, limit: int | None) -> Draft:
    content = _as_frame_or_rows(content, limit)
    if isinstance(content, pd.DataFrame):
        frame = content if limit is None else content.head(limit)
        frame = frame.drop(columns=["__index_level_0__"], errors="ignore").reset_index(drop=True)
        named = columns.tokens or columns.text or columns.prompt
        if "idiom" in frame and not named:
            return read_idioms(frame, tokenizer, target=target)
        return read_frame(frame, columns, tokenizer)
    rows = content if limit is None else content[:limit]
    return Draft(rows, None, pd.DataFrame(index=range(len(rows))))


def _as_frame_or_rows(content: Any, limit: int | None) -> pd.DataFrame | np.ndarray | list[Any]:
    if isinstance(content, pd.DataFrame):
        return content
    if hasattr(content, "column_names") and hasattr(content, "features"):
        return _dataset_frame(content, limit)
    if isinstance(content, dict) or not hasattr(content, "__len__"):
        raise SequenceError(f"sequences cannot be read from a {type(content).__name__}{_splits(content)}")
    if isinstance(content, Tensor | np.ndarray) and not _is_text(content):
        return _integer_array(content)
    rows = list(content)
    if rows and all(isinstance(row, str) for row in rows):
        return pd.DataFrame({"text": [str(row) for row in rows]})
    return _id_rows(rows)


def _is_text(content: Any) -> bool:
    return isinstance(content, np.ndarray) and content.dtype.kind in "UO"


def _dataset_frame(dataset: Any, limit: int | None) -> pd.DataFrame:
    if not hasattr(dataset, "to_pandas"):
        if limit is None:
            raise SequenceError("a streamed dataset has no end: say how many rows to read with limit=")
        return pd.DataFrame(list(islice(dataset, limit)))
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    return dataset.to_pandas()


def _splits(content: Any) -> str:
    if isinstance(content, dict) and content:
        return f": choose one of its parts, {some(list(content))}"
    return ": give a file, a dataset, a table, a list or an array"


def _integer_array(array: Tensor | np.ndarray) -> np.ndarray:
    array = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise SequenceError(
            f"the array is {array.dtype} of shape {array.shape}: give [sequence, position] integers"
        )
    return array.astype(np.int64)


def _id_rows(rows: list[Any]) -> list[list[int]]:
    lists = [row.tolist() if isinstance(row, Tensor | np.ndarray) else row for row in rows]
    for number, row in enumerate(lists):
        if not isinstance(row, list | tuple) or not all(_is_id(token) for token in row):
            raise SequenceError(
                f"row {number} is {str(row)[:40]!r}: give a list of strings or of lists of token ids"
            )
    return [[int(token) for token in row] for row in lists]


def _is_id(token: object) -> bool:
    return isinstance(token, int | np.integer) and not isinstance(token, bool)


def _with_prefix(draft: Draft, prefix_len: Any) -> Draft:
    """Settle each row's prefix length: the caller's, else the source's, else the default."""
    n = len(draft.rows)
    if prefix_len is None:
        own = draft.prefix_len if draft.prefix_len is not None else DEFAULT_PREFIX_LEN
        return replace(draft, prefix_len=np.broadcast_to(own, (n,)))
    given = np.asarray(prefix_len)
    if given.dtype.kind not in "iu" or (given.ndim and given.shape != (n,)):
        raise SequenceError(
            f"prefix_len={prefix_len!r} does not fit: give one whole number, or one for each of {n} sequences"
        )
    return replace(draft, prefix_len=np.broadcast_to(given.astype(np.int64), (n,)))


def _kept(draft: Draft, keep: np.ndarray) -> Draft:
    if keep.all():
        return draft
    rows = (
        draft.rows[keep]
        if isinstance(draft.rows, np.ndarray)
        else [r for r, k in zip(draft.rows, keep, strict=True) if k]
    )
    prefix_len = None if draft.prefix_len is None else draft.prefix_len[keep]
    return replace(draft, rows=rows, prefix_len=prefix_len, table=draft.table[keep].reset_index(drop=True))


def _without_empty(draft: Draft) -> Draft:
    lengths = np.array([len(row) for row in draft.rows], dtype=np.int64)
    empty = np.flatnonzero(lengths == 0)
    if not len(empty):
        return replace(draft, table=draft.table.assign(**{_ROW: np.arange(len(lengths))}))
    warnings.warn(f"{len(empty)} rows are empty and are left out: rows {some(empty.tolist())}", stacklevel=3)
    attrs = {**draft.attrs, "empty_rows": " ".join(map(str, empty))}
    table = draft.table.assign(**{_ROW: np.arange(len(lengths))})
    return _kept(replace(draft, attrs=attrs, table=table), lengths > 0)


_ROW = "__source_row__"


def _without_short(draft: Draft, on_short: str) -> Draft:
    assert draft.prefix_len is not None
    lengths = np.array([len(row) for row in draft.rows], dtype=np.int64)
    short = lengths <= draft.prefix_len
    source_rows = draft.table[_ROW].to_numpy()
    draft = replace(draft, table=draft.table.drop(columns=[_ROW]))
    if not short.any():
        return draft
    if on_short == "raise":
        first = int(np.flatnonzero(short)[0])
        raise SequenceError(
            f"{int(short.sum())} sequences are not longer than their prefix, the first is row {source_rows[first]} "
            f"with {lengths[first]} tokens and prefix_len={draft.prefix_len[first]}: choose a smaller prefix_len, "
            "or leave them out with on_short='drop'"
        )
    return _kept(replace(draft, attrs={**draft.attrs, "n_dropped_short": int(short.sum())}), ~short)


def _named(draft: Draft, id_column: str | None) -> Draft:
    column = find_column(draft.table, id_column, ID)
    if column is None:
        return draft
    names = draft.table[column].tolist()
    ids = unique_ids(names)
    if ids != list(map(str, names)):
        repeated = draft.table[column][draft.table[column].duplicated()].unique().tolist()
        warnings.warn(
            f"{len(names)} rows have {len(set(names))} ids; {some(repeated)} stand for more than one "
            "sequence and are told apart by a suffix",
            stacklevel=3,
        )
    table = draft.table.drop(columns=["id"], errors="ignore")
    table.insert(0, "id", ids)
    return replace(draft, table=table)


def _assemble(draft: Draft, tokenizer: Any, max_targets: int | None, prepend_bos: bool) -> SequenceSet:
    assert draft.prefix_len is not None
    if max_targets is not None and max_targets < 1:
        raise SequenceError(f"max_targets={max_targets}: keep at least one token of each continuation")
    rows, prefix_len, table, attrs = draft.rows, draft.prefix_len, draft.table, dict(draft.attrs)
    cut = False
    if max_targets is not None:
        limits = prefix_len + max_targets
        cut = any(len(row) > end for row, end in zip(rows, limits, strict=True))
        rows = [list(row[:end]) for row, end in zip(rows, limits, strict=True)]
        attrs["max_targets"] = max_targets
    if tokenizer is not None:
        if "text" not in table or cut:
            table = table.assign(text=tokenizer.batch_decode([list(row) for row in rows]))
        attrs = {**tokenizer_attrs(tokenizer), **attrs}
    if prepend_bos:
        first = bos_id(tokenizer)
        rows, prefix_len = [[first, *row] for row in rows], prefix_len + 1
    attrs["prepend_bos"] = bool(prepend_bos or attrs.get("prepend_bos", False))
    return SequenceSet.from_tokens(rows, prefix_len, table=table, attrs=attrs)


def _drop_eos(seqs: SequenceSet, tokenizer: Any, on_eos: str) -> SequenceSet:
    dropped = eos_mask(seqs, getattr(tokenizer, "eos_token_id", None)) if on_eos == "drop" else None
    if dropped is None or not dropped.any():
        return seqs
    return seqs[~dropped].with_attrs(n_dropped_eos=int(dropped.sum()))
