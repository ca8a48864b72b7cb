"""What a source is: opening files, hub datasets and the zoo's lists, and telling their contents apart."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from memlens.errors import SequenceError, SourceNotFoundError
from memlens.files import zoo_folders
from memlens.sequences.cloze import ClozeOptions, holds_clozes, read_clozes
from memlens.sequences.columns import TOKENS
from memlens.sequences.drafts import Draft
from memlens.sequences.files import read_file, zoo_file
from memlens.sequences.identifiers import holds_identifiers, read_identifiers
from memlens.sequences.idioms import read_idioms
from memlens.sequences.pairs import is_pair, read_pair
from memlens.sequences.rows import some
from memlens.sequences.set import SequenceSet
from memlens.sequences.tables import Columns, read_frame
from memlens.sequences.tokenizing import tokenizer_attrs

__all__ = ["open_source", "read_content"]

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
