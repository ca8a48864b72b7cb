"""`load_sequences`: one entry point for files, datasets, tables, tokenizer outputs, lists and arrays."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from huggingface_hub import constants
from torch import Tensor

from memlens.errors import FileFormatError, OptionError, SequenceError, SourceNotFoundError, check_option
from memlens.files import parsing
from memlens.models.bos import expects_bos
from memlens.models.names import hub_or_cache
from memlens.sequences.checks import check_sequences
from memlens.sequences.named import is_named
from memlens.sequences.readers.drafts import (
    TOKENS,
    Columns,
    Draft,
    PrependBos,
    assemble,
    check_ids,
    drop_eos,
    named,
    with_prefix,
    without_empty,
    without_short,
)
from memlens.sequences.readers.memmaps import MappedRows
from memlens.sequences.readers.registry import (
    FILES,
    FORMS,
    Opened,
    Request,
    accepting,
    open_source,
    register_source,
)
from memlens.sequences.readers.tables import read_frame
from memlens.sequences.set import SequenceSet, some

_log = logging.getLogger(__name__)


def load_sequences(
    source: Any,
    model: Any = None,
    *,
    prefix_len: int | Sequence[int] | np.ndarray | Tensor | str | None = None,
    max_targets: int | None = None,
    tokenizer: Any = None,
    prepend_bos: PrependBos = "auto",
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
    path: str | Path | None = None,
    sha256: str | None = None,
) -> SequenceSet:
    """Load sequences, tokenize them if they are text, and check that they fit the model.

    - `"x.npy"`: `[n, length]` integers, one tokenized sequence per row. The file is mapped, so that `limit`
      reads no more than it needs.
    - `"x.pt"`: such integers in a tensor, written by `torch.save`.
    - `"x.bin"`, with `"x.idx"` beside it: a tokenized corpus of Megatron-LM or GPT-NeoX, one sequence (mostly
      a document) per row; `max_targets` cuts long ones. Token ids without any header, as OLMo's training
      data, are opened by hand: `np.memmap(path, np.uint16, "r")[: n * length].reshape(n, length)`.
    - `("prefix.npy", "suffix.npy")`: two such files whose rows are the two halves of each sequence, such as
      `train_prefix.npy` and `train_suffix.npy` of the lm-extraction-benchmark.
    - `"x.txt"`: one text per line; blank lines are skipped.
    - `"x.jsonl"`, `"x.csv"`, `"x.parquet"`, a DataFrame, a Hugging Face dataset, a dictionary of columns (a
      tokenizer's output), a list of records: a column of token ids (without what a column `attention_mask`
      marks as padding); or prompts and continuations; or texts; or the idiom file (a column `idiom`); or
      cloze records in the form of the LAMA probes (see `fact_sequences`); or identifiers (columns `label`
      and `identifier`; see `identifier_sequences`).
    - `"hf:NAME"` or `"hf:NAME:SPLIT"`: `datasets.load_dataset(NAME, split=split)`, such as
      EleutherAI/pythia-memorized-evals.
    - `"NAMESPACE:NAME/PART"`, such as "pile:pythia-memorized-evals/deduped.70m": a public set that memlens
      knows by name, from the hub or from a local copy (`path`); `ml.sequences.named_sets()` lists them.
      `@REVISION` at the end pins a commit of the hub.
    - `"zoo"`, `"zoo/NAME"`: the planted sequences that come with a model of the zoo; `"zoo:LIST"`,
      `"zoo/NAME:LIST"`: another of its lists: `expressions`, `facts`, `identifiers`, or `heldout` (rows kept
      out of training in which no document ends).
    - A list or generator of strings, of lists of ids, or of pairs of a prompt and its continuation (two
      strings, or two lists of ids); a 2-D array or tensor; a `SequenceSet`.

    All other columns are kept in the table. Other packages add formats: see
    `memlens.sequences.readers.registry`.

    Args:
        source: See above.
        model: A TransformerLens model; its tokenizer encodes text, and the sequences are checked against
            its vocabulary and context.
        prefix_len: Number of tokens given to the model, one number for all or one per sequence. By default
            the source's own (a column `prefix_len`, or where the prompt ends), else 32. "half": the
            source's own, else half of each sequence, at most 32. "drawn": drawn uniformly from the positions
            inside each sequence, with `seed`.
        max_targets: Keep at most this many tokens of each continuation.
        tokenizer: Used instead of the model's.
        prepend_bos: Prepend a beginning-of-text token to every sequence that does not begin with one. It is
            part of the prefix, in addition to `prefix_len`. "auto": to text, where the model was trained so:
            never for the families of `memlens models` without one (Pythia, GPT-Neo, OLMo, StarCoder), else as
            the tokenizer does by itself. Token ids stay as they are. What disagrees is warned of.
        text_column: The column of texts (default: text, sequence, content or sentence).
        prompt_column: The column of prompts (default: prompt, prefix or context).
        continuation_column: The column of continuations (default: continuation, suffix, target or
            completion). See `memlens.sequences.tokenizing.split_points` for the boundary.
        tokens_column: The column of token ids (default: tokens, input_ids or token_ids).
        id_column: The column of names (default: id, uid, sequence_id or index). Repeated names get a suffix,
            with a warning.
        target: For the idiom file and cloze records: "first_token" of the last word, or the whole "word".
        on_eos: What to do if a continuation contains an end-of-text token: "raise" (needs the model), "drop"
            the sequence, or "keep" it.
        on_short: What to do if a sequence is not longer than its prefix: "raise" or "drop".
        split: The split of a Hugging Face dataset.
        limit: Read at most this many rows.
        name: A name for the set, kept in its attributes.
        check_tokenizer: Refuse a set made with another tokenizer (if the set records one).
        seed: For drawn prefix lengths.
        path: Folder or file with a local copy of a named set. Default: `<namespace>/<name>` in the folder
            that the environment variable `MEMLENS_DATA` names, if there is one, else the hub.
        sha256: Refuse a named set unless its rows, as read, have this checksum (the attribute `sha256` of the
            first loading, with the same `limit`).

    Returns:
        The set. Its attributes record source, tokenizer, `prepend_bos` and what was left out; of a named set
        also `license`, `cite`, `home`, `revision`, `sha256`, and whether a published checksum was compared.

    Raises:
        SourceNotFoundError: No such file, dataset, named set or zoo list.
        OptionError: `path` or `sha256` is given for a source that is not a named set.
        FileFormatError: A file's content does not fit its name.
        ColumnError: A column is missing.
        EmptySetError: Nothing is left.
        VocabularyError: A token id is negative or outside the vocabulary, or another tokenizer made the set.
        SequenceError: A sequence is too short, too long or contains an end-of-text token.

    >>> load_sequences([[3, 1, 4, 1, 5], [9, 2, 6]], prefix_len=2)
    SequenceSet(2 sequences, prefix 2, continuation 1-3 tokens, from list)
    """
    check_option("on_eos", on_eos, ["raise", "drop", "keep"])
    check_option("on_short", on_short, ["raise", "drop"])
    if isinstance(prepend_bos, str):
        check_option("prepend_bos", prepend_bos, ["auto"])
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if (path is not None or sha256 is not None) and not is_named(source):
        raise OptionError(
            f"path and sha256 are for named sets, and {str(source)[:80]!r} is none: leave them out."
        )
    columns = Columns(tokens_column, prompt_column, continuation_column, text_column, id_column)
    request = Request(model, tokenizer, split, limit, target, path, check_tokenizer)
    opened = open_source(source, request)
    if sha256 is not None and opened.attrs["sha256"] != sha256:
        raise FileFormatError(
            f"{opened.path}: the rows of {source} have the SHA-256 {opened.attrs['sha256']}, not {sha256}: "
            "they have changed, or another number of them was read"
        )
    if opened.columns is not None and columns == Columns(id=id_column):
        columns = replace(opened.columns, id=id_column)
    with nullcontext() if opened.path is None else parsing(opened.path):
        draft = _read(opened.content, columns, request)
        check_ids(draft, getattr(getattr(model, "cfg", None), "d_vocab", None), tokenizer)
        attrs = {**opened.attrs, **draft.attrs}
        return settle(
            with_prefix(replace(draft, attrs=attrs), prefix_len, seed),
            model,
            tokenizer,
            str(attrs.get("source", opened.origin)),
            prepend_bos=prepend_bos,
            name=name,
            max_targets=max_targets,
            id_column=columns.id,
            on_eos=on_eos,
            on_short=on_short,
            check_tokenizer=check_tokenizer,
        )


def _read(content: Any, columns: Columns, request: Request) -> Draft:
    """Return the sequences in a source's content, tokenized if they are text."""
    limit = request.limit
    content = as_frame_or_rows(content, limit)
    if not isinstance(content, pd.DataFrame):
        return Draft(content, None, pd.DataFrame(index=range(len(content))))
    frame = content if limit is None else content.head(limit)
    frame = frame.drop(columns=["__index_level_0__"], errors="ignore").reset_index(drop=True)
    if not (columns.tokens or columns.text or columns.prompt or any(name in frame for name in TOKENS)):
        read_form = accepting(FORMS, frame)
        if read_form is not None:
            draft = read_form(frame, request)
            if not isinstance(draft, Draft):
                raise SequenceError(
                    f"the reader of tables with the columns {', '.join(map(str, frame.columns))} returned "
                    f"{type(draft).__name__}: it must return a Draft."
                )
            return draft
    return read_frame(frame, columns, request.tokenizer)


def settle(
    draft: Draft,
    model: Any,
    tokenizer: Any,
    source: str,
    *,
    prepend_bos: PrependBos,
    name: str | None,
    max_targets: int | None = None,
    id_column: str | None = None,
    on_eos: str = "raise",
    on_short: str = "raise",
    check_tokenizer: bool = True,
) -> SequenceSet:
    """Make a set from a draft, and check that it fits the model; see `load_sequences` for the arguments."""
    draft = replace(draft, attrs={**draft.attrs, "source": source, "on_eos": on_eos})
    draft = named(without_short(without_empty(draft), on_short), id_column)
    seqs = assemble(draft, tokenizer, max_targets, prepend_bos, expects_bos(model, tokenizer))
    seqs = drop_eos(seqs, tokenizer) if on_eos == "drop" else seqs
    seqs = seqs.with_attrs(name=name) if name else seqs
    if model is None:
        return seqs
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
    _log.info("%s: %s", source, report)
    return seqs


@register_source("hf", lambda s: isinstance(s, str) and s.startswith("hf:"))
def _open_hub(source: str, request: Request) -> Opened:
    """Open "hf:NAME" or "hf:NAME:SPLIT"."""
    name, split = source.removeprefix("hf:"), request.split
    before, colon, after = name.rpartition(":")
    if colon and "/" not in after and "\\" not in after:
        name, split = before, after
    return Opened(open_dataset(name, split), source)


def open_dataset(name: str, split: str, *, config: str = "", revision: str = "") -> Any:
    """Return a split of a Hugging Face dataset, from the hub, its cache, or a folder.

    Args:
        name: Its name on the hub, or a folder.
        split: The split.
        config: The configuration; `""` for the default.
        revision: Commit, tag or branch on the hub; `""` for the newest.

    Raises:
        SourceNotFoundError: It cannot be loaded.
    """
    import datasets

    more: dict[str, Any] = {key: value for key, value in (("name", config), ("revision", revision)) if value}
    try:
        with hub_or_cache(name):
            return datasets.load_dataset(name, split=split, **more)
    except Exception as error:  # the client raises many kinds, from ConnectionError to ValueError
        if isinstance(error, ConnectionError) or "LocalEntryNotFound" in str(error):
            raise SourceNotFoundError(
                f"the dataset {name!r}, split {split!r}, is not in the cache, and {constants.ENDPOINT} could "
                "not be asked: there is no network, or it is switched off (HF_HUB_OFFLINE)"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SourceNotFoundError(
            f"the dataset {name!r}, split {split!r}, could not be loaded: {reason}"
        ) from error


@register_source("set", lambda s: isinstance(s, SequenceSet))
def _open_set(source: SequenceSet, _: Request) -> Opened:
    frame = source.table.assign(tokens=source.rows(), prefix_len=source.prefix_len.numpy())
    return Opened(frame, "SequenceSet", dict(source.attrs))


def as_frame_or_rows(content: Any, limit: int | None) -> pd.DataFrame | np.ndarray | list[list[int]]:
    """Return a table, or token ids without one: an array or a list of rows.

    Raises:
        SequenceError: The content is neither text nor token ids.
    """
    if isinstance(content, pd.DataFrame):
        return content
    if hasattr(content, "column_names") and hasattr(content, "features"):
        return _dataset_frame(content, limit)
    if isinstance(content, Mapping):
        return _mapping_frame(content)
    if isinstance(content, Tensor | np.ndarray) and getattr(content.dtype, "kind", "") not in ("U", "O"):
        return _integer_array(content)[:limit]
    if isinstance(content, MappedRows):
        return content[:limit].read()
    if isinstance(content, str | bytes | set | frozenset | io.IOBase) or not isinstance(content, Iterable):
        raise SequenceError(
            f"sequences cannot be read from a {type(content).__name__}: give a file, a dataset, a table, "
            "a list or an array"
        )
    return _listed(list(islice(content, limit)))


def _listed(rows: list[Any]) -> pd.DataFrame | list[list[int]]:
    """Return a list of texts, records, pairs of prompt and continuation, or lists of ids."""
    if rows and all(isinstance(row, str) for row in rows):
        names = [Path(row) for row in rows if "\n" not in row and len(row) < 4096]
        if len(names) == len(rows) and all(name.suffix.lower() in FILES for name in names):
            raise SequenceError(
                f"the list contains file names, {some(rows, 2)}: give one file at a time, or the two .npy "
                "files of prefixes and suffixes"
            )
        return pd.DataFrame({"text": [str(row) for row in rows]})
    if rows and all(isinstance(row, Mapping) for row in rows):
        return pd.DataFrame([dict(row) for row in rows])
    if rows and all(isinstance(row, list | tuple) and len(row) == 2 for row in rows):
        firsts, lasts = zip(*rows, strict=True)
        if all(isinstance(part, str) for part in (*firsts, *lasts)):
            return pd.DataFrame({"prompt": firsts, "continuation": lasts})
        if not any(_is_id(part) for part in (*firsts, *lasts)):
            prefixes, suffixes = _id_rows(list(firsts)), _id_rows(list(lasts))
            tokens = [a + b for a, b in zip(prefixes, suffixes, strict=True)]
            return pd.DataFrame({"tokens": tokens, "prefix_len": [len(row) for row in prefixes]})
    return _id_rows(rows)


def _dataset_frame(dataset: Any, limit: int | None) -> pd.DataFrame:
    if not hasattr(dataset, "select"):
        if limit is None:
            raise SequenceError("a streamed dataset has no end: give the number of rows to read with limit=")
        return pd.DataFrame(list(islice(dataset, limit)))
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    layout = getattr(dataset, "format", None) or {}
    if layout.get("type") == "custom":  # columns made on the fly, by set_transform or with_transform
        return _mapping_frame(dataset[:])
    return dataset.to_pandas()[layout.get("columns") or dataset.column_names]


def _mapping_frame(content: Mapping[str, Any]) -> pd.DataFrame:
    """Return a dictionary of columns, such as a tokenizer's output, as a table."""
    if not content or any(hasattr(part, "column_names") for part in content.values()):
        parts = f": choose one of its parts, {some(list(content))}" if content else ": it is empty"
        raise SequenceError(f"sequences cannot be read from a {type(content).__name__}{parts}")
    columns = {str(name): _column(str(name), values) for name, values in content.items()}
    if all(values and not isinstance(values[0], str | list) for values in columns.values()):
        columns = {name: [values] for name, values in columns.items()}  # one text, not a list of them
    sizes = {name: len(values) for name, values in columns.items()}
    if len(set(sizes.values())) > 1:
        raise SequenceError(f"the columns have different numbers of rows: {sizes}; give one value per row")
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})


def _column(name: str, values: Any) -> list[Any]:
    if isinstance(values, Tensor | np.ndarray):
        return values.tolist()
    if not isinstance(values, list | tuple | pd.Series):
        raise SequenceError(
            f"{name!r} is a {type(values).__name__}: give a dictionary of columns, each a list or an array"
        )
    return [row.tolist() if isinstance(row, Tensor | np.ndarray) else row for row in values]


def _integer_array(array: Tensor | np.ndarray) -> np.ndarray:
    array = array.detach().cpu().numpy() if isinstance(array, Tensor) else array
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise SequenceError(
            f"the array is {array.dtype} of shape {array.shape}: give [sequence, position] integers"
        )
    return array


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
