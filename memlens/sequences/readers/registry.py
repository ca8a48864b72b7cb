"""What sequences can be read from: sources, file formats and known tables, registered where they are defined.

A module of another package registers its own readers in the same way, if it is named in the entry-point group
`memlens.plugins`:

    @register_file(".fasta")
    def read_fasta(path, as_text):
        return [line for line in path.read_text().splitlines() if not line.startswith(">")], {}
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from memlens.errors import FileFormatError, OptionError, SequenceError, SourceNotFoundError, near_matches
from memlens.files import expanded, parsing
from memlens.registry import Registry
from memlens.sequences.named import looks_named, no_such_set
from memlens.sequences.readers.drafts import Columns, Draft

_LOG = logging.getLogger(__name__)
_MODULES = ["memlens.sequences.readers"]


T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """The arguments of `load_sequences` that readers need."""

    model: Any = None
    tokenizer: Any = None
    split: str = "train"
    limit: int | None = None
    target: str = "first_token"
    path: str | Path | None = None
    check_tokenizer: bool = True


@dataclass(frozen=True)
class Opened:
    """A source's content: a table, token ids, a list or a dataset.

    Attributes:
        content: In any form that `load_sequences` takes in memory.
        origin: The name of the source, recorded with the set.
        attrs: What the source says about the set.
        path: The file or files, as errors name them; None for what was in memory.
        columns: The columns that contain the sequences; None: look for the usual names.
    """

    content: Any
    origin: str
    attrs: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    columns: Columns | None = None


OpenSource = Callable[[Any, Request], Opened]

ReadFile = Callable[[Path, Sequence[str]], tuple[Any, dict[str, Any]]]
"""From a path, and the columns that are text even if they look like numbers, to the content, in any form that
`load_sequences` takes in memory, and a dictionary, whose entry `attrs` is recorded with the set."""

ReadForm = Callable[[pd.DataFrame, Request], Draft]

SOURCES: Registry[tuple[Callable[[Any], bool], OpenSource]] = Registry("source", modules=_MODULES)
"""By name: whether a source has this form, and what opens it."""
FILES: Registry[ReadFile] = Registry("file format", modules=_MODULES)
"""By suffix, in lower case."""
FORMS: Registry[tuple[Callable[[pd.DataFrame], bool], ReadForm]] = Registry("form of table", modules=_MODULES)
"""By name: whether a table has this form's columns, and what reads it."""


def register_source(name: str, accepts: Callable[[Any], bool]) -> Callable[[OpenSource], OpenSource]:
    """Register the decorated function as the one that opens sources of one form."""
    return lambda fn: SOURCES.add(name, (accepts, fn))[1]


def register_file(suffix: str) -> Callable[[ReadFile], ReadFile]:
    """Register the decorated function as the reader of files with a suffix, such as ".csv".

    Raises:
        OptionError: The suffix is not a dot and what follows the last dot of a name, or it is taken.
    """
    if Path(f"name{suffix}").suffix != suffix:
        raise OptionError(
            f"no file name ends in the suffix {suffix!r}: give one dot and an ending, such as '.csv'."
        )
    return lambda fn: FILES.add(suffix.lower(), fn)


def register_form(name: str, accepts: Callable[[pd.DataFrame], bool]) -> Callable[[ReadForm], ReadForm]:
    """Register the decorated function as the reader of tables with certain columns, but no token ids."""
    return lambda fn: FORMS.add(name, (accepts, fn))[1]


def accepting(readers: Registry[tuple[Callable[[Any], bool], T]], content: Any) -> T | None:
    """Return the first reader that accepts a source or table; one that fails at this is passed over."""
    for name in readers:
        accepts, reader = readers[name]
        try:
            accepted = accepts(content)
        except Exception as error:
            _LOG.warning(
                "the %s %r cannot say what it reads: %s: %s",
                readers.what, name, type(error).__name__, error,
            )  # fmt: skip
            continue
        if accepted:
            return reader
    return None


def open_source(source: Any, request: Request) -> Opened:
    """Return the content of a source, what it says about itself, and its name.

    Raises:
        SourceNotFoundError: The source has the form of a named set's name, and there is no such namespace.
    """
    open_it = accepting(SOURCES, source)
    if open_it is not None:
        opened = open_it(source, request)
        if not isinstance(opened, Opened):
            raise SequenceError(
                f"the function that opens {source!r} returned {type(opened).__name__}: it must return "
                "Opened(content, origin)."
            )
        return opened
    if isinstance(source, str) and looks_named(source) and not expanded(source).exists():
        raise no_such_set(source)
    if isinstance(source, str | Path):
        content, settings = read_file(expanded(source))
        with parsing(source):
            return Opened(content, Path(source).name, {**settings.get("attrs", {})}, str(source))
    return Opened(source, type(source).__name__)


def read_file(path: Path, as_text: Sequence[str] = ("identifier", "secret")) -> tuple[Any, dict[str, Any]]:
    """Return a file's content (an array, a list or a table), and memlens' settings if it has any.

    Args:
        path: The file.
        as_text: Columns that are text even if they look like numbers, in formats without types.

    Raises:
        SourceNotFoundError: There is no such file.
        FileFormatError: The suffix is unknown, or the content does not fit it.
    """
    if path.suffix.lower() not in FILES:
        raise FileFormatError(
            f"{path}: the suffix {path.suffix!r} is not known; use one of "
            f"{', '.join(sorted(FILES))}, or give texts as a list"
        )
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise SourceNotFoundError(f"there is no file {path}.{near_matches(path.name, siblings)}")
    with parsing(path):
        found: Any = FILES[path.suffix.lower()](path, as_text)
    match found:
        case (content, {**settings}) if isinstance(settings.get("attrs", {}), Mapping):
            return content, settings
        case _:
            raise FileFormatError(
                f"{path}: the reader of {path.suffix} files returned {type(found).__name__}: it must return "
                "a pair of the content and a dictionary, whose entry 'attrs' may hold facts about the set."
            )
