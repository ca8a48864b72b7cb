"""What sequences can be read from: sources, file formats and known tables, registered where they are defined.

A module of another package registers its own in the same way, when it is named in the entry-point group
`memlens.plugins`:

    @register_file(".fasta", "a FASTA file")
    def read_fasta(path, as_text):
        return [line for line in path.read_text().splitlines() if not line.startswith(">")], {}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from memlens.errors import FileFormatError, SourceNotFoundError, near_matches
from memlens.registry import Registry
from memlens.sequences.readers.drafts import Draft

_MODULES = ["memlens.sequences.readers"]


@dataclass(frozen=True)
class Request:
    """What a caller of `load_sequences` asks for, as far as readers need it."""

    model: Any = None
    tokenizer: Any = None
    split: str = "train"
    limit: int | None = None
    target: str = "first_token"


@dataclass(frozen=True)
class Opened:
    """A source's content: a table, token ids, a list or a dataset.

    Attributes:
        content: Of any form that `load_sequences` takes in memory.
        origin: The name of the source, recorded with the set.
        attrs: What the source says of the set.
    """

    content: Any
    origin: str
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A form of source that is opened before it is read.

    Attributes:
        what: What it is called in errors.
        accepts: Whether a source is of this form.
        open: Opens it.
    """

    what: str
    accepts: Callable[[Any], bool]
    open: Callable[[Any, Request], Opened]


ReadFile = Callable[[Path, Sequence[str]], tuple[Any, dict[str, Any]]]
"""From a path, and the columns that are text even if they look like numbers, to content and settings."""


@dataclass(frozen=True)
class FileFormat:
    """A file format.

    Attributes:
        what: What it is called in errors.
        read: Reads a file.
    """

    what: str
    read: ReadFile


@dataclass(frozen=True)
class Form:
    """A table that is recognized by its columns.

    Attributes:
        accepts: Whether a table has these columns.
        read: Makes sequences of it.
    """

    accepts: Callable[[pd.DataFrame], bool]
    read: Callable[[pd.DataFrame, Request], Draft]


SOURCES: Registry[Source] = Registry("source", modules=_MODULES)
FILES: Registry[FileFormat] = Registry("file format", modules=_MODULES)
"""By suffix, in lower case."""
FORMS: Registry[Form] = Registry("form of table", modules=_MODULES)


def register_source(
    name: str, what: str, accepts: Callable[[Any], bool]
) -> Callable[[Callable[[Any, Request], Opened]], Callable[[Any, Request], Opened]]:
    """Register the decorated function as the opener of one form of source."""
    return lambda fn: SOURCES.add(name, Source(what, accepts, fn)).open


def register_file(suffix: str, what: str) -> Callable[[ReadFile], ReadFile]:
    """Register the decorated function as the reader of files with a suffix, such as ".csv"."""
    return lambda fn: FILES.add(suffix.lower(), FileFormat(what, fn)).read


def register_form(
    name: str, accepts: Callable[[pd.DataFrame], bool]
) -> Callable[[Callable[[pd.DataFrame, Request], Draft]], Callable[[pd.DataFrame, Request], Draft]]:
    """Register the decorated function as the reader of tables with certain columns, but no token ids."""
    return lambda fn: FORMS.add(name, Form(accepts, fn)).read


def open_source(source: Any, request: Request) -> Opened:
    """Return the content of a source, what it says of itself, and its name."""
    for known in SOURCES.values():
        if known.accepts(source):
            return known.open(source, request)
    if isinstance(source, str | Path):
        content, settings = read_file(Path(source).expanduser())
        return Opened(content, Path(source).name, settings.get("attrs", {}))
    return Opened(source, type(source).__name__)


def read_file(path: Path, as_text: Sequence[str] = ("identifier",)) -> tuple[Any, dict[str, Any]]:
    """Return a file's content (an array, a list or a table) and memlens' settings if it holds any.

    Args:
        path: The file.
        as_text: Columns that are text even if they look like numbers, in formats without types.

    Raises:
        SourceNotFoundError: There is no such file.
        FileFormatError: The suffix is unknown, or the content is not what the suffix says.
    """
    if path.suffix.lower() not in FILES:
        raise FileFormatError(
            f"{path}: the suffix {path.suffix!r} is not known; use one of {', '.join(FILES)}, or give texts "
            "as a list"
        )
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise SourceNotFoundError(f"there is no file {path}.{near_matches(path.name, siblings)}")
    return FILES[path.suffix.lower()].read(path, as_text)
