"""What `.npy`, `.jsonl`, `.csv` and `.parquet` files and the zoo's lists hold, before any tokenizing."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import FileFormatError, SequenceError, SourceNotFoundError, check_option, near_matches
from memlens.files import zoo_folders, zoo_table
from memlens.sequences.parquet import read_table
from memlens.sequences.readers.registry import Opened, Request, read_file, register_file, register_source
from memlens.sequences.tokenizing import tokenizer_attrs


@register_file(".npy", "a NumPy array")
def _read_npy(path: Path, _: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FileFormatError(f"{path} is not a .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        what = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise FileFormatError(f"{path} holds {what}: sequences are a two-dimensional array of integers")
    return array, {}


@register_file(".jsonl", "JSON lines")
def _read_jsonl(path: Path, _: Sequence[str]) -> tuple[list[Any] | pd.DataFrame, dict[str, Any]]:
    values = [value for _, value in json_lines(path)]
    kinds = {type(v) for v in values}
    if kinds == {dict}:
        return pd.DataFrame(values), {}
    if kinds in ({str}, {list}, set()):
        return values, {}
    names = ", ".join(sorted(k.__name__ for k in kinds))
    raise FileFormatError(
        f"{path} mixes lines of the kinds {names}: use objects, strings or lists of ids only"
    )


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place ("FILE, line 3") and the value of each line of JSON in a file; blank lines are skipped.

    Raises:
        FileFormatError: The file is not UTF-8 text, or a line is not JSON.
    """
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from error
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        try:
            if line.strip():
                yield place, json.loads(line)
        except json.JSONDecodeError as error:
            raise FileFormatError(
                f"{place} is not JSON: {error.msg} at column {error.colno} of {line[:40]!r}"
            ) from error


@register_file(".csv", "a comma-separated table")
def _read_csv(path: Path, as_text: Sequence[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    try:
        # Texts such as "NA" and "null" are texts, so only empty cells count as missing.
        kinds: dict[Hashable, Any] = dict.fromkeys(as_text, object)
        return pd.read_csv(path, keep_default_na=False, encoding="utf-8-sig", dtype=kinds), {}
    except pd.errors.EmptyDataError:
        return pd.DataFrame(), {}
    except (UnicodeDecodeError, pd.errors.ParserError) as error:
        raise FileFormatError(f"{path} is not a comma-separated table of UTF-8 text: {error}") from error


@register_file(".parquet", "a parquet file")
def _read_parquet(path: Path, _: Sequence[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    return read_table(path)


def is_pair(source: Any) -> bool:
    """Whether a source is a tuple or list of two `.npy` files.

    >>> is_pair(("train_prefix.npy", "train_suffix.npy")), is_pair(("a text", "another"))
    (True, False)
    """
    return (
        isinstance(source, tuple | list)
        and len(source) == 2
        and all(isinstance(part, str | Path) and Path(part).suffix.lower() == ".npy" for part in source)
    )


@register_source("pair", "two .npy files, of prefixes and of suffixes", is_pair)
def _open_pair(source: Sequence[str | Path], _: Request) -> Opened:
    return Opened(read_pair(*source), " + ".join(Path(part).name for part in source))


def read_pair(prefix_path: str | Path, suffix_path: str | Path) -> pd.DataFrame:
    """Return the columns `tokens` (both joined) and `prefix_len`, one row per pair.

    Args:
        prefix_path: `[n, prefix]` integers.
        suffix_path: `[n, suffix]` integers, in the same order.

    Raises:
        SourceNotFoundError: One of the files is missing.
        FileFormatError: A file holds no two-dimensional array of integers, or one without columns.
        SequenceError: The arrays have different numbers of rows.
    """
    paths = [Path(path).expanduser() for path in (prefix_path, suffix_path)]
    prefix, suffix = (_read(path) for path in paths)
    if len(prefix) != len(suffix):
        raise SequenceError(
            f"{paths[0].name} has {len(prefix)} rows and {paths[1].name} has {len(suffix)}: row by row they "
            "are the two halves of one sequence, so give files of one list"
        )
    rows = np.concatenate([prefix.astype(np.int64), suffix.astype(np.int64)], axis=1)
    return pd.DataFrame({"tokens": rows.tolist(), "prefix_len": prefix.shape[1]})


def _read(path: Path) -> np.ndarray:
    array, _ = read_file(path)
    if not array.shape[1]:
        raise FileFormatError(f"{path} has shape {array.shape}: give at least one token per row")
    return array


ZOO_LISTS = ("sequences", "expressions", "facts", "identifiers", "heldout")
"""The lists of sequences that the folder of a zoo model may hold; the first is that of planted sequences."""

DEFAULT_ZOO = "zoo/pythia-s"
"""The list that a bare "zoo" means if the model does not tell."""

_ZOO_END = 0
"""The end-of-text token of every tokenizer of the zoo."""


def _is_zoo(source: Any) -> bool:
    return isinstance(source, str) and (source == "zoo" or source.startswith(("zoo/", "zoo:")))


@register_source("zoo", "a list of the zoo", _is_zoo)
def _open_zoo(source: str, request: Request) -> Opened:
    model_name, colon, kind = source.partition(":")
    name = _zoo_name(model_name, request.model)
    path = zoo_file(name, kind) if colon else zoo_file(name)
    content, settings = read_file(path)
    if kind == "heldout":
        content = _heldout(content)
    if "source" in content:  # the file may lie with another model of the same corpus
        content = content.assign(source=name)
    origin = f"{name}:{kind}" if kind not in ("", "sequences") else name
    return Opened(content, origin, {**_tokenizer_of(_zoo_folder(name)), **settings.get("attrs", {})})


def zoo_file(name: str, kind: str = "sequences") -> Path:
    """Return a list of a zoo model: shipped with it or with another of its corpus, or made on demand.

    Args:
        name: "zoo/pythia-s", for instance.
        kind: Which list, one of `ZOO_LISTS`.

    Raises:
        OptionError: There is no such kind of list.
        SourceNotFoundError: There is no such model, or it lacks the list.
    """
    check_option("the zoo's list", kind, ZOO_LISTS)
    short = name.removeprefix("zoo/").removesuffix("-untrained")
    for folder in (root / short for root in zoo_folders()):
        path = zoo_table(folder, kind)
        if path is not None:
            return path
        there = [known for known in ZOO_LISTS if zoo_table(folder, known)]
        if there:
            raise SourceNotFoundError(
                f"{name!r} has no list of {kind}, it has {', '.join(there)}: it was trained without; train "
                "it again with `memlens zoo train`, or take another model's."
            )
    found = (p.parent.name for folder in zoo_folders() for p in folder.glob("*/sequences.parquet"))
    known = sorted({f"zoo/{found_name}" for found_name in found})
    listing = f"the zoo has {', '.join(known)}" if known else "the zoo of this installation is empty"
    raise SourceNotFoundError(f"no planted sequences for {name!r}: {listing}.{near_matches(name, known)}")


def _heldout(frame: pd.DataFrame) -> pd.DataFrame:
    """Return rows kept out of training as sequences, without those in which a document ends."""
    numbers = frame.groupby("domain").cumcount()
    ids = [f"heldout-{domain}-{n:03d}" for domain, n in zip(frame["domain"], numbers, strict=True)]
    whole = [_ZOO_END not in row for row in frame["tokens"]]
    return frame.assign(id=ids, copies=0).loc[whole].reset_index(drop=True)


def _zoo_name(source: str, model: Any) -> str:
    """Return "zoo/NAME"; for a bare "zoo" the model's own list if it is of the zoo."""
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
