"""Public sets of sequences, by name: where they are, how they are read, and what they were made for.

The facts are in `named.yaml`; no data come with memlens. `load_sequences` reads a set by its name, such as
"pile:pythia-memorized-evals/deduped.70m", through `memlens.sequences.readers.named`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import yaml

from memlens.errors import OptionError, SourceNotFoundError, check_option, near_matches
from memlens.files import expanded
from memlens.registry import Registry

DATA_FOLDER = "MEMLENS_DATA"
"""Environment variable: a folder with local copies, in `<namespace>/<name>`."""

Kind = Literal["tokens", "pairs", "tensor", "texts", "prompts", "clozes", "identifiers", "idioms"]
"""How the rows of a set are read: token ids in a column, in two `.npy` files or in a tensor; a column of
text; prompt and continuation made of columns; or a table that `load_sequences` knows by its columns."""


@dataclass(frozen=True)
class Part:
    """A part of a named set: a split, a configuration or a file.

    Attributes:
        name: Its name.
        rows: Number of rows; None where it is not known.
        model: Hub name of the model whose memories they are, or `""`.
        files: Patterns of its files in the authors' layout.
        templates: A file of templates by relation, for files that have none.
        copies: How often the training data has the rows with label 1.
        md5: Published checksum of the token ids.
    """

    name: str
    rows: int | None = None
    model: str = ""
    files: tuple[str, ...] = ()
    templates: str = ""
    copies: int | None = None
    md5: str = ""


_NAME = re.compile(r"(?P<name>[a-z][a-z0-9]+:[\w.-]+)(?:/(?P<part>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class NamedSet:
    """A public set of sequences. What is not known is empty.

    Attributes:
        name: `"namespace:name"`.
        title: What it is, in a few words.
        made_for: The question that it was made for.
        kind: How its rows are read.
        parts: Its parts.
        cite: Key of the paper, see `memlens.report.bibliography`.
        home: Its page.
        license: As stated by its authors.
        get: How a copy is made, where it is not on the Hugging Face hub.
        families: Families of the models that have seen it in training; empty for none in particular.
        tokenizer: What made its token ids; `""` for text.
        vocab_size: Entries of that tokenizer.
        hub: Name of the dataset on the Hugging Face hub.
        config: Its configuration there, with `{part}` for the part's name.
        split: Its split there, likewise.
        revision: The commit that is read; `""` for the newest.
        files: Patterns of the files of every part in the authors' layout, with `{part}`.
        md5_files: The arrays whose joined columns have the published checksum.
        header: Names of the columns of files without a header, which are separated by semicolons.
        prefix_len: Tokens given to the model by default.
        text: The column of text, where it is not one of the usual names.
        prompt: The prompt, with columns in braces.
        continuation: The continuation, likewise.
        whole: The column of prompt and continuation together, instead of `continuation`.
        template: The template of identifiers.
        copies: The column, or the entry of the column `meta`, that counts insertions into the training data.

    Raises:
        OptionError: The name is not `"namespace:name"`, the kind is unknown, or there are no parts.
    """

    name: str
    title: str
    made_for: str
    kind: Kind
    parts: tuple[Part, ...]
    cite: str
    home: str
    license: str = ""
    get: str = ""
    families: tuple[str, ...] = ()
    tokenizer: str = ""
    vocab_size: int | None = None
    hub: str = ""
    config: str = ""
    split: str = "{part}"
    revision: str = ""
    files: tuple[str, ...] = ()
    md5_files: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    prefix_len: int | None = None
    text: str = "text"
    prompt: str = ""
    continuation: str = ""
    whole: str = ""
    template: str = ""
    copies: str = ""

    def __post_init__(self) -> None:
        found = _NAME.fullmatch(self.name)
        if found is None or found["name"] != self.name:
            raise OptionError(
                "its name is not NAMESPACE:NAME (a namespace of two letters or more), as in 'pile:counts'."
            )
        check_option("kind", self.kind, get_args(Kind))
        if not self.parts:
            raise OptionError("it has no parts: name one at least, such as `parts: {train: {}}`.")

    @property
    def checksum(self) -> str:
        """What is known beforehand about the content: `"md5"`, `"revision"`, or `""`."""
        return "md5" if any(part.md5 for part in self.parts) else "revision" if self.revision else ""


@dataclass(frozen=True)
class Chosen:
    """A part of a named set, at a revision of the dataset on the hub (`""` for the newest)."""

    entry: NamedSet
    part: Part
    revision: str

    def __str__(self) -> str:
        alone = len(self.entry.parts) == 1
        return self.entry.name if alone else f"{self.entry.name}/{self.part.name}"

    @property
    def files(self) -> list[str]:
        """Patterns of the part's files in the authors' layout."""
        return [name.format(part=self.part.name) for name in self.part.files or self.entry.files]


def _part(name: str, facts: dict[str, Any] | None) -> Part:
    facts = facts or {}
    return Part(name, **{**facts, "files": tuple(facts.get("files", ()))})


def _named_set(name: str, facts: dict[str, Any]) -> NamedSet:
    lists = {key: tuple(facts[key]) for key in ("families", "files", "md5_files", "header") if key in facts}
    parts = tuple(_part(part, entry) for part, entry in facts["parts"].items())
    return NamedSet(name, **{**facts, **lists, "parts": parts})


_FILE = resources.files("memlens.sequences").joinpath("named.yaml")
NAMED_SETS: Registry[NamedSet] = Registry("set of sequences", of=NamedSet)
"""The sets of memlens (`named.yaml`) and its plugins, by name."""


def register_named_sets(text: str) -> None:
    """Register sets that are described in YAML, as those of memlens are in `named.yaml`.

    Args:
        text: A mapping of names to the fields of `NamedSet`; `parts` maps names to the fields of `Part`.

    Raises:
        OptionError: The text is not such YAML, a field is missing or unknown, or a set of this name is
            registered already.
    """
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OptionError(f"the sets are not described in YAML: {error}") from error
    if not isinstance(found, dict):
        raise OptionError("the sets are not described: give YAML with the fields of each by its name.")
    for name, facts in found.items():
        try:
            made = _named_set(name, facts)
        except (TypeError, KeyError, AttributeError, OptionError) as error:
            said = f"the field {error} is missing" if isinstance(error, KeyError) else error
            raise OptionError(f"the set {name!r} cannot be registered: {said}") from error
        NAMED_SETS.add(name, made)


register_named_sets(_FILE.read_text(encoding="utf-8"))


def is_named(source: object) -> bool:
    """Return whether a source has the form of a named set's name, in a namespace that there is.

    >>> is_named("hubble:passages_wikipedia/train"), is_named("hubble.jsonl"), is_named("zoo:facts")
    (True, False, False)
    """
    if not isinstance(source, str) or ":" not in source:
        return False
    return source.partition(":")[0] in {name.partition(":")[0] for name in NAMED_SETS}


def find_named(source: str) -> Chosen:
    """Return the part of a set that a name means: `"NAMESPACE:NAME/PART@REVISION"`.

    The part may be left out if there is only one, and the revision always.

    Raises:
        SourceNotFoundError: There is no such set or part; the message lists similar ones.

    >>> chosen = find_named("unlearning:tofu/forget10")
    >>> chosen.entry.hub, chosen.part.rows
    ('locuslab/TOFU', 400)
    """
    entry, found = _parsed(source)
    names = [part.name for part in entry.parts]
    wanted = found["part"] or (names[0] if len(names) == 1 else "")
    if wanted not in names:
        missing = f"{entry.name!r} has no part {wanted!r}" if wanted else f"{entry.name!r} has several parts"
        raise SourceNotFoundError(
            f"{missing}: choose {entry.name}/PART from {', '.join(names)}.{near_matches(wanted, names)}"
        )
    return Chosen(entry, entry.parts[names.index(wanted)], found["revision"] or entry.revision)


def find_set(source: str) -> NamedSet:
    """Return the set that a name means, with or without one of its parts.

    Raises:
        SourceNotFoundError: There is no such set or part; the message lists similar ones.
    """
    entry, found = _parsed(source)
    return find_named(source).entry if found["part"] else entry


def _parsed(source: str) -> tuple[NamedSet, re.Match[str]]:
    """Return the set that a name means, and the parts of the name."""
    found = _NAME.fullmatch(source)
    if found is None or found["name"] not in NAMED_SETS:
        raise no_such_set(source)
    return NAMED_SETS[found["name"]], found


def no_such_set(source: str) -> SourceNotFoundError:
    """Return the error for a name that no set has, with similar names."""
    wanted = source.partition("/")[0].partition("@")[0]
    space, _, name = wanted.rpartition(":")
    there = [known for known in NAMED_SETS if known.partition(":")[0] == (space or name)]
    close = [known for known in NAMED_SETS if near_matches(name, [known.partition(":")[2]])]
    hint = near_matches(wanted, NAMED_SETS) or near_matches(f"{space}:{name}", close or there)
    if not hint and there:
        hint = f" In {space or name!r} there are {', '.join(there)}."
    return SourceNotFoundError(
        f"no set of sequences is called {wanted!r}: `memlens data list` lists the names.{hint}"
    )


def looks_named(source: str) -> bool:
    """Return whether text that is no file could be meant as the name of a set.

    >>> looks_named("hubbel:passages_wikipedia/train"), looks_named("C:data.npy")
    (True, False)
    """
    return _NAME.fullmatch(source) is not None


def data_folder(entry: NamedSet) -> Path | None:
    """Return the folder of a set's local copy in `$MEMLENS_DATA`, or None if there is none.

    Raises:
        SourceNotFoundError: `$MEMLENS_DATA` is not a folder.
    """
    root = os.environ.get(DATA_FOLDER)
    if not root:
        return None
    if not expanded(root).is_dir():
        raise SourceNotFoundError(
            f"${DATA_FOLDER} is {root!r}, which is not a folder: correct it, or unset it."
        )
    folder = expanded(root).joinpath(*entry.name.split(":"))
    return folder if folder.exists() else None


def local_files(folder: Path, chosen: Chosen) -> list[Path]:
    """Return the part's files in a folder, which may hold the authors' layout from any level on.

    Returns:
        One file per pattern, several for a pattern with `*`; empty if any pattern has none.
    """
    found = [_matching(folder, pattern) for pattern in chosen.files]
    return [file for files in found for file in files] if all(found) else []


def _matching(folder: Path, pattern: str) -> list[Path]:
    for tail in _tails(pattern):
        if files := sorted(file for file in folder.glob(tail) if file.is_file()):
            return files
    return []


def _tails(pattern: str) -> Iterator[str]:
    """Yield a path without its first folder, its first two, …, itself first; `*` alone matches too much."""
    parts = pattern.split("/")
    for start in range(len(parts)):
        if not parts[start].startswith("*."):
            yield "/".join(parts[start:])


def named_sets() -> pd.DataFrame:
    """Return one row per public set that `load_sequences` knows by name: what `memlens data list` prints.

    Columns: `name`; `title`; `parts` (names, in order); `rows` (of all parts together; None where they are
    not all known); `models` (number of models whose memories its parts are); `families` (of the models that
    have seen it in training, `""` for none in particular); `kind` (how it is read); `license` (`""` if not
    known); `checksum` (what is known beforehand: `"md5"` of the ids, a pinned `"revision"`, or `""`); `hub`
    (the dataset on the Hugging Face hub, `""` if it is elsewhere); `home`; `cite` (key of the paper);
    `made_for`.

    >>> table = named_sets().set_index("name")
    >>> table.loc["pile:pythia-memorized-evals", ["families", "license", "hub"]].tolist()
    ['pythia', 'MIT', 'EleutherAI/pythia-memorized-evals']
    """

    def row(entry: NamedSet) -> dict[str, Any]:
        rows = [part.rows for part in entry.parts]
        return {
            "name": entry.name,
            "title": entry.title,
            "parts": [part.name for part in entry.parts],
            "rows": sum(n for n in rows if n is not None) if None not in rows else None,
            "models": len({part.model for part in entry.parts} - {""}),
            "families": ", ".join(entry.families),
            "kind": entry.kind,
            "license": entry.license,
            "checksum": entry.checksum,
            "hub": entry.hub,
            "home": entry.home,
            "cite": entry.cite,
            "made_for": entry.made_for,
        }

    rows = [row(entry) for entry in NAMED_SETS.values()]
    return pd.DataFrame(rows).assign(rows=pd.Series([entry["rows"] for entry in rows], dtype=object))
