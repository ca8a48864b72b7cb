"""Named lists of the zoo: "zoo", "zoo/NAME", "zoo:LIST" and "zoo/NAME:LIST"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from memlens.errors import SourceNotFoundError, check_option, near_matches
from memlens.files import zoo_folders, zoo_table
from memlens.sequences.readers.registry import Opened, Request, read_file, register_source
from memlens.sequences.tokenizing import tokenizer_attrs

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
