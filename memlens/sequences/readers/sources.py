"""What files (`.npy`, `.pt`, `.jsonl`, `.csv`, `.txt`, `.parquet`) and lists of the zoo hold, untokenized."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path, PureWindowsPath
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch

from memlens.errors import FileFormatError, SequenceError, SourceNotFoundError, check_option, near_matches
from memlens.files import expanded, parsed_json, parsing, plain_tensors, reading, zoo_folders, zoo_table
from memlens.sequences.parquet import read_table
from memlens.sequences.readers.drafts import LONGEST_TEXT
from memlens.sequences.readers.registry import Opened, Request, read_file, register_file, register_source
from memlens.sequences.tokenizing import tokenizer_attrs


@register_file(".npy")
def _read_npy(path: Path, _: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
    array = load_array(path, mmap_mode="c")
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        what = f"{array.dtype} of shape {array.shape}"
        raise FileFormatError(f"{path} contains {what}: sequences are a two-dimensional array of integers")
    return array, {}


def load_array(path: Path, mmap_mode: Literal["r", "c"] | None = None) -> np.ndarray:
    """Return the array in a `.npy` file, or raise `FileFormatError` if it contains anything else."""
    try:
        np.load(path, mmap_mode="r", allow_pickle=False)  # fails if the header claims more than there is
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive")
    except (ValueError, TypeError, EOFError, OSError, BadZipFile) as error:
        raise FileFormatError(
            f"{path} is not a .npy file of numbers: {error} (open token ids without a header, as "
            "OLMo's, with numpy.memmap)"
        ) from error
    return array


@register_file(".pt")
def _read_tensor(path: Path, _: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the token ids that `torch.save` wrote: one tensor, no other Python objects."""
    tensor = plain_tensors(path, otherwise="it is damaged, or holds no token ids")
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2 or tensor.is_floating_point():
        shape = f" of {tensor.dtype}, {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else ""
        raise FileFormatError(
            f"{path} contains a {type(tensor).__name__}{shape}: sequences are a two-dimensional tensor of "
            "integers"
        )
    return tensor.numpy(), {}


@register_file(".jsonl")
def _read_jsonl(path: Path, _: Sequence[str]) -> tuple[list[Any] | pd.DataFrame, dict[str, Any]]:
    values = [value for _, value in json_lines(path)]
    kinds = {type(v) for v in values}
    if kinds == {dict}:
        check_keys(values, path)
        return pd.DataFrame(values), {}
    if kinds in ({str}, {list}, set()):
        return values, {}
    names = ", ".join(sorted(k.__name__ for k in kinds))
    raise FileFormatError(
        f"{path} mixes lines of the kinds {names}: use objects, strings or lists of ids only"
    )


_MOST_COLUMNS = 4096


def check_keys(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Refuse objects whose keys differ so much that their table would be nearly all empty cells."""
    keys: set[str] = set()
    filled = 0
    for number, row in enumerate(rows, 1):
        keys |= row.keys()
        filled += len(row)
        if len(keys) > _MOST_COLUMNS or len(keys) * number > max(10**7, 100 * filled):
            raise FileFormatError(
                f"{path} has {len(keys)} different keys in {number} lines: give every line the same keys"
            )


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place ("FILE, line 3") and the value of each line of JSON in a file; blank lines are skipped.

    Raises:
        FileFormatError: The file is not UTF-8 text, or a line is not JSON.
    """
    for place, line in text_lines(path):
        try:
            yield place, parsed_json(line, unique=True)
        except json.JSONDecodeError as error:
            raise FileFormatError(
                f"{place} is not JSON: {error.msg} at column {error.colno} of {line[:40]!r}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{place} cannot be read: {error}") from error


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place ("FILE, line 3") and the text of each line with its end; blank lines are skipped.

    Raises:
        FileFormatError: The file is not UTF-8 text, or a line is too long to be a sequence.
    """
    with reading(path), path.open(encoding="utf-8-sig", newline="\n") as file:
        for number in count(1):
            place = f"{path}, line {number}"
            try:
                line = file.readline(LONGEST_TEXT)
            except UnicodeDecodeError as error:
                raise FileFormatError(
                    f"{path} is not UTF-8 text: byte {error.start} cannot be read"
                ) from error
            if not line:
                return
            if len(line) == LONGEST_TEXT:
                raise FileFormatError(
                    f"{place} has over {LONGEST_TEXT:,} characters: give one sequence per line"
                )
            if line.strip():
                yield place, line


@register_file(".txt")
def _read_txt(path: Path, _: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    return [line.rstrip("\r\n") for _, line in text_lines(path)], {}


@register_file(".csv")
def _read_csv(path: Path, as_text: Sequence[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:  # pandas takes minutes for 200,000 columns
            if file.readline(LONGEST_TEXT).count(",") >= _MOST_COLUMNS:
                raise FileFormatError(f"{path} has over {_MOST_COLUMNS} columns: is it a table of sequences?")
            file.seek(0)
            header = next(filter(None, csv.reader(file)), [])
        twice = [name for i, name in enumerate(header) if name in header[:i]]
        if twice:  # which pandas would rename
            raise FileFormatError(f"{path} has two columns {twice[0]!r}: give each a name of its own")
        # Texts such as "NA" and "null" are texts, so only empty cells count as missing.
        kinds: dict[Hashable, Any] = dict.fromkeys(as_text, object)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows with more fields than the header
            frame = pd.read_csv(
                path, keep_default_na=False, encoding="utf-8-sig", dtype=kinds, index_col=False
            )
        return frame, {}
    except pd.errors.EmptyDataError:
        return pd.DataFrame(), {}
    except pd.errors.ParserWarning as error:
        raise FileFormatError(
            f"{path} has rows with more fields than its first line names: put texts with commas in quotes"
        ) from error
    except (UnicodeDecodeError, pd.errors.ParserError, csv.Error) as error:
        raise FileFormatError(f"{path} is not a comma-separated table of UTF-8 text: {error}") from error


@register_file(".parquet")
def _read_parquet(path: Path, _: Sequence[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    return read_table(path)


def is_pair(source: Any) -> bool:
    """Return whether a source is a tuple or list of two `.npy` files.

    >>> is_pair(("train_prefix.npy", "train_suffix.npy")), is_pair(("a text", "another"))
    (True, False)
    """
    return (
        isinstance(source, tuple | list)
        and len(source) == 2
        and all(isinstance(part, str | Path) and Path(part).suffix.lower() == ".npy" for part in source)
    )


@register_source("pair", is_pair)
def _open_pair(source: Sequence[str | Path], _: Request) -> Opened:
    both = " + ".join(Path(part).name for part in source)
    return Opened(read_pair(*source), both, path=both)


def read_pair(prefix_path: str | Path, suffix_path: str | Path) -> pd.DataFrame:
    """Return the columns `tokens` (both joined) and `prefix_len`, one row per pair.

    Args:
        prefix_path: `[n, prefix]` integers.
        suffix_path: `[n, suffix]` integers, in the same order.

    Raises:
        SourceNotFoundError: One of the files is missing.
        FileFormatError: A file does not contain a two-dimensional array of integers, or has no columns.
        SequenceError: The arrays have different numbers of rows.
    """
    paths = [expanded(path) for path in (prefix_path, suffix_path)]
    prefix, suffix = (read_file(path)[0].astype(np.int64) for path in paths)
    for path, array in zip(paths, (prefix, suffix), strict=True):
        if not array.shape[1]:
            raise FileFormatError(f"{path} has shape {array.shape}: give at least one token per row")
    if len(prefix) != len(suffix):
        raise SequenceError(
            f"{paths[0].name} has {len(prefix)} rows and {paths[1].name} has {len(suffix)}: row by row they "
            "are the two halves of one sequence, so give files of one list"
        )
    rows = np.concatenate([prefix, suffix], axis=1)
    return pd.DataFrame({"tokens": rows.tolist(), "prefix_len": prefix.shape[1]})


ZOO_LISTS = ("sequences", "expressions", "facts", "identifiers", "heldout")
"""The lists of sequences that the folder of a zoo model may have; the first has the planted sequences."""

DEFAULT_ZOO = "zoo/pythia-s"
"""The list that "zoo" means if the model is not from the zoo."""

_ZOO_END = 0
"""The end-of-text token of every tokenizer of the zoo."""


def _is_zoo(source: Any) -> bool:
    return isinstance(source, str) and (source == "zoo" or source.startswith(("zoo/", "zoo:")))


@register_source("zoo", _is_zoo)
def _open_zoo(source: str, request: Request) -> Opened:
    model_name, colon, kind = source.partition(":")
    name = _zoo_name(model_name, request.model)
    path = zoo_file(name, kind) if colon else zoo_file(name)
    content, settings = read_file(path)
    with parsing(path, advice="train the model again"):
        if kind == "heldout":
            content = _heldout(content)
        if "source" in content:  # the file may be that of another model of the same corpus
            content = content.assign(source=name)
        attrs = {**settings.get("attrs", {})}
    origin = f"{name}:{kind}" if kind not in ("", "sequences") else name
    return Opened(content, origin, {**_tokenizer_of(name), **attrs}, str(path))


def zoo_file(name: str, kind: str = "sequences") -> Path:
    """Return the file of a zoo model's list, or of another model's of the same corpus.

    Args:
        name: Such as "zoo/pythia-s".
        kind: One of `ZOO_LISTS`.

    Raises:
        OptionError: There is no such kind of list.
        SourceNotFoundError: There is no such model, or it lacks the list.
    """
    check_option("the zoo's list", kind, ZOO_LISTS)
    for folder in _zoo_folders(name):
        if path := zoo_table(folder, kind):
            return path
        if there := [known for known in ZOO_LISTS if zoo_table(folder, known)]:
            raise SourceNotFoundError(
                f"{name!r} was trained without a list of {kind}, it has {', '.join(there)}: train it again "
                "with `memlens zoo train`, or take another model's."
            )
    found = (p.parent.name for folder in zoo_folders() for p in folder.glob("*/sequences.parquet"))
    known = sorted({f"zoo/{found_name}" for found_name in found})
    listing = f"the zoo has {', '.join(known)}" if known else "the zoo of this installation is empty"
    raise SourceNotFoundError(f"no planted sequences for {name!r}: {listing}.{near_matches(name, known)}")


def _heldout(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows kept out of training as sequences, except those in which a document ends."""
    numbers = frame.groupby("domain").cumcount()
    ids = [f"heldout-{domain}-{n:03d}" for domain, n in zip(frame["domain"], numbers, strict=True)]
    whole = [_ZOO_END not in row for row in frame["tokens"]]
    return frame.assign(id=ids, copies=0).loc[whole].reset_index(drop=True)


def _zoo_name(source: str, model: Any) -> str:
    """Return "zoo/NAME"; for "zoo" alone the name of the model, if it is from the zoo."""
    if source != "zoo":
        return source
    folder = Path(str(getattr(getattr(model, "tokenizer", None), "name_or_path", "")))
    return f"zoo/{folder.name}" if folder.parent in zoo_folders() else DEFAULT_ZOO


def _zoo_folders(name: str) -> list[Path]:
    """Return where a zoo model may be; nowhere for what is not a folder's name, such as "zoo/../a"."""
    short = name.removeprefix("zoo/").removesuffix("-untrained")
    is_name = short not in ("", "..") and PureWindowsPath(short).name == short
    return [root / short for root in zoo_folders()] if is_name else []


def _tokenizer_of(name: str) -> dict[str, Any]:
    """Return what identifies the tokenizer of a zoo model, so that its list is refused for other models."""
    folder = next((path for path in _zoo_folders(name) if (path / "tokenizer.json").is_file()), None)
    if folder is None:
        return {}
    from transformers import AutoTokenizer

    with parsing(f"{folder / 'tokenizer.json'} + tokenizer_config.json", advice="train the model again"):
        return {**tokenizer_attrs(AutoTokenizer.from_pretrained(folder)), "tokenizer": f"zoo/{folder.name}"}
