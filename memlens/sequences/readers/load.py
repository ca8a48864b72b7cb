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
from memlens.files import zoo_folders
from memlens.sequences.checks import check_sequences
from memlens.sequences.readers.cloze import ClozeOptions, holds_clozes, read_clozes
from memlens.sequences.readers.columns import TOKENS, Columns
from memlens.sequences.readers.drafts import (
    Draft,
    assemble,
    drop_eos,
    named,
    with_prefix,
    without_empty,
    without_short,
)
from memlens.sequences.readers.files import is_pair, read_file, read_pair, zoo_file
from memlens.sequences.readers.identifiers import holds_identifiers, read_identifiers
from memlens.sequences.readers.idioms import read_idioms
from memlens.sequences.readers.tables import read_frame
from memlens.sequences.rows import some
from memlens.sequences.set import SequenceSet
from memlens.sequences.tokenizing import tokenizer_attrs

DEFAULT_ZOO = "zoo/pythia-s"
"""The list that a bare "zoo" means where the model does not tell."""

_ZOO_END = 0
"""The end-of-text token of every tokenizer of the zoo."""


def open_source(source: Any, model: Any, split: str, limit: int | None) -> tuple[Any, dict[str, Any], str]:
    """Return the content, the attributes it carries, and the source's name."""
    if isinstance(source, str) and (source == "zoo" or source.startswith(("zoo/", "zoo:"))):
        return _zoo_list(source, model)
    if isinstance(source, str) and source.startswith("hf:"):
        return _hub_dataset(source.removeprefix("hf:"), split), {}, source
    if is_pair(source):
        return read_pair(*source), {}, " + ".join(Path(part).name for part in source)
    if isinstance(source, str | Path):
        content, settings = read_file(Path(source).expanduser())
        return content, settings.get("attrs", {}), Path(source).name
    if isinstance(source, SequenceSet):
        frame = source.table.assign(tokens=source.rows(), prefix_len=source.prefix_len.numpy())
        return frame, dict(source.attrs), "SequenceSet"
    return source, {}, type(source).__name__


def _zoo_list(source: str, model: Any) -> tuple[Any, dict[str, Any], str]:
    """Open a list of the zoo: "zoo", "zoo/NAME", "zoo:LIST" or "zoo/NAME:LIST"."""
    model_name, colon, kind = source.partition(":")
    name = _zoo_name(model_name, model)
    path = zoo_file(name, kind) if colon else zoo_file(name)
    content, settings = read_file(path)
    if kind == "heldout":
        content = _heldout(content)
    if "source" in content:  # the file may lie with another model of the same corpus
        content = content.assign(source=name)
    origin = f"{name}:{kind}" if kind not in ("", "sequences") else name
    return content, {**_tokenizer_of(_zoo_folder(name)), **settings.get("attrs", {})}, origin


def _heldout(frame: pd.DataFrame) -> pd.DataFrame:
    """Return rows kept out of training as sequences; those in which a document ends are left out."""
    numbers = frame.groupby("domain").cumcount()
    ids = [f"heldout-{domain}-{n:03d}" for domain, n in zip(frame["domain"], numbers, strict=True)]
    whole = [_ZOO_END not in row for row in frame["tokens"]]
    return frame.assign(id=ids, copies=0).loc[whole].reset_index(drop=True)


def _zoo_name(source: str, model: Any) -> str:
    """Return "zoo/NAME"; for a bare "zoo" the model's own list where it is of the zoo."""
    if source != "zoo":
        return source
    folder = Path(str(getattr(getattr(model, "tokenizer", None), "name_or_path", "")))
    return f"zoo/{folder.name}" if folder.parent in zoo_folders() else DEFAULT_ZOO


def _zoo_folder(name: str) -> Path:
    folders = [root / name.removeprefix("zoo/").removesuffix("-untrained") for root in zoo_folders()]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _tokenizer_of(folder: Path) -> dict[str, Any]:
    """Return what identifies the tokenizer of a zoo model, so that its list is refused for other models."""
    if not (folder / "tokenizer.json").is_file():
        return {}
    from transformers import AutoTokenizer

    return {**tokenizer_attrs(AutoTokenizer.from_pretrained(folder)), "tokenizer": f"zoo/{folder.name}"}


def _hub_dataset(name: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the client raises many kinds, from ConnectionError to ValueError
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SourceNotFoundError(
            f"the dataset {name!r}, split {split!r}, could not be loaded: {reason}"
        ) from error


def read_content(content: Any, columns: Columns, tokenizer: Any, target: str, limit: int | None) -> Draft:
    """Return the sequences in what `open_source` gave, tokenized where they are text."""
    content = _as_frame_or_rows(content, limit)
    if isinstance(content, pd.DataFrame):
        frame = content if limit is None else content.head(limit)
        frame = frame.drop(columns=["__index_level_0__"], errors="ignore").reset_index(drop=True)
        named = columns.tokens or columns.text or columns.prompt
        if not named and (known := _known_form(frame, tokenizer, target)):
            return known
        return read_frame(frame, columns, tokenizer)
    rows = content if limit is None else content[:limit]
    return Draft(rows, None, pd.DataFrame(index=range(len(rows))))


def _known_form(frame: pd.DataFrame, tokenizer: Any, target: str) -> Draft | None:
    """Return the sequences of a table whose columns are those of a known file, else None."""
    if "idiom" in frame:
        return read_idioms(frame, tokenizer, target=target)
    if any(name in frame for name in TOKENS):
        return None
    if holds_clozes(frame):
        return read_clozes(frame, tokenizer, ClozeOptions(target=target))
    return read_identifiers(frame, tokenizer) if holds_identifiers(frame) else None


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
    if not hasattr(dataset, "select"):
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


_log = logging.getLogger(__name__)


def load_sequences(
    source: Any,
    model: Any = None,
    *,
    prefix_len: int | Sequence[int] | np.ndarray | Tensor | str | None = None,
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
    seed: int = 0,
) -> SequenceSet:
    """Load sequences, tokenize them if they are text, and check that they fit the model.

    - `"x.npy"`: `[n, length]` integers, one tokenized sequence a row.
    - `("prefix.npy", "suffix.npy")`: two such files, row by row the two halves of a sequence, as the
      lm-extraction-benchmark's `train_prefix.npy` and `train_suffix.npy`.
    - `"x.jsonl"`, `"x.csv"`, `"x.parquet"`, a DataFrame, a Hugging Face dataset: a column of token ids; or
      prompts and continuations; or texts; or the idiom file (a column `idiom`); or cloze records in the form
      of the LAMA probes (see `fact_sequences`); or identifiers (columns `label` and `identifier`; see
      `identifier_sequences`).
    - `"hf:NAME"`: `datasets.load_dataset(NAME, split=split)`, such as EleutherAI/pythia-memorized-evals.
    - `"zoo"`, `"zoo/NAME"`: the list of planted sequences that is shipped with a model of the zoo;
      `"zoo:LIST"`, `"zoo/NAME:LIST"`: another of its lists: `expressions`, `facts`, `identifiers`, or
      `heldout` (rows kept out of training in which no document ends).
    - A list of strings, a list of lists of ids, a 2-D array or tensor, a `SequenceSet`.

    All other columns are kept in the table.

    Args:
        source: See above.
        model: A TransformerLens model; its tokenizer reads text, and its vocabulary and context are what
            the sequences are checked against.
        prefix_len: Tokens given to the model: one number or one a sequence. By default the source's own
            (a column `prefix_len`, or where the prompt ends), else 32. "drawn": a place inside each
            sequence, drawn with `seed`, all places alike.
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
        target: For the idiom file and cloze records: "first_token" of the last word, or the whole "word".
        on_eos: A continuation holds an end-of-text token: "raise" (needs the model), "drop" the sequence, or
            "keep" it.
        on_short: A sequence is not longer than its prefix: "raise" or "drop".
        split: The split of a Hugging Face dataset.
        limit: Read only the first so many rows.
        name: A name for the set, kept in its attributes.
        check_tokenizer: Refuse a set that another tokenizer made (where the set records one).
        seed: Of drawn prefix lengths.

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
    content, attrs, origin = open_source(source, model, split, limit)
    draft = read_content(content, columns, tokenizer, target, limit)
    attrs = {**attrs, **draft.attrs, "source": attrs.get("source", origin), "on_eos": on_eos}
    draft = with_prefix(replace(draft, attrs=attrs), prefix_len, seed)
    draft = named(without_short(without_empty(draft), on_short), columns.id)
    seqs = assemble(draft, tokenizer, max_targets, prepend_bos)
    seqs = drop_eos(seqs, tokenizer) if on_eos == "drop" else seqs
    seqs = seqs.with_attrs(name=name) if name else seqs
    if model is not None:
        _check(seqs, model, tokenizer, on_eos=on_eos, check_tokenizer=check_tokenizer)
    return seqs


def settle(
    draft: Draft, model: Any, tokenizer: Any, source: str, *, prepend_bos: bool, name: str | None
) -> SequenceSet:
    """Make a set of a draft that knows its prefix lengths, and check that it fits the model.

    Args:
        draft: As a reader gives it.
        model: A TransformerLens model, or None.
        tokenizer: What made the draft.
        source: Where it is from.
        prepend_bos: Put a beginning-of-text token in front.
        name: A name for the set, or None.
    """
    attrs = {**draft.attrs, "source": source, "on_eos": "raise", **({"name": name} if name else {})}
    draft = without_short(without_empty(replace(draft, attrs=attrs)), "raise")
    seqs = assemble(named(draft, None), tokenizer, None, prepend_bos)
    if model is not None:
        _check(seqs, model, tokenizer, on_eos="raise", check_tokenizer=True)
    return seqs


def _check(seqs: SequenceSet, model: Any, tokenizer: Any, *, on_eos: str, check_tokenizer: bool) -> None:
    report = check_sequences(
        seqs,
        model,
        eos_token_id=getattr(tokenizer, "eos_token_id", None),
        on_eos="raise" if on_eos == "raise" else "keep",
        check_tokenizer=check_tokenizer,
    )
    if report.duplicates:
        warnings.warn(
            f"{len(report.duplicates)} sequences repeat an earlier one: {some(report.duplicates)}",
            stacklevel=3,
        )
    _log.info("%s: %s", seqs.attrs.get("source"), report)
