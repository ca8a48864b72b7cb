"""Public sets by name: "pile:pythia-memorized-evals/deduped.70m", from the hub or from a local copy.

See `memlens.sequences.named` for the sets and where a local copy is looked for.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Hashable, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import pandas as pd

from memlens.errors import ColumnError, FileFormatError, SequenceError, SourceNotFoundError, VocabularyError
from memlens.files import exact_json, expanded, parsed_json, parsing
from memlens.models.families import family_of
from memlens.sequences.named import (
    DATA_FOLDER,
    Chosen,
    NamedSet,
    data_folder,
    find_named,
    is_named,
    local_files,
)
from memlens.sequences.readers.drafts import LONGEST_TEXT, Columns, listing
from memlens.sequences.readers.load import as_frame_or_rows, open_dataset
from memlens.sequences.readers.registry import FILES, Opened, Request, read_file, register_source
from memlens.sequences.readers.sources import json_lines, read_pair
from memlens.sequences.readers.tables import texts_of

_COLUMNS = {
    "tokens": Columns(tokens="tokens"),
    "pairs": Columns(tokens="tokens"),
    "tensor": Columns(tokens="tokens"),
    "texts": Columns(text="text"),
    "prompts": Columns(prompt="prompt", continuation="continuation"),
}
"""The columns that a kind of set is read from; the other kinds are known by theirs."""

_LOCAL = f"give a copy of {{}} with path=, or have it at {{}} in the folder that ${DATA_FOLDER} names"


@register_source("named", is_named)
def _open_named(source: str, request: Request) -> Opened:
    chosen = find_named(source)
    entry, part = chosen.entry, chosen.part
    _check_model(chosen, request)
    content, files, where = _content(chosen, request)
    with parsing(where):
        frame = _frame(content, request.limit)
        frame = _with_copies(frame, chosen)
        attrs = {
            "source": str(chosen),
            "license": entry.license or "not known",
            "cite": entry.cite,
            "home": entry.home,
            "revision": chosen.revision if not files else "",
            "sha256": rows_digest(frame),
            "published_checksum": _published(chosen, files),
            **({"made_with": part.model} if part.model else {}),
            **({"tokenizer": entry.tokenizer, "vocab_size": entry.vocab_size} if entry.tokenizer else {}),
        }
        frame = _prepared(frame, entry)
        if part.rows is not None and request.limit is None and len(frame) != part.rows:
            warnings.warn(
                f"{where} has {len(frame):,} rows, and {chosen} is known to have {part.rows:,}: "
                "make sure that the copy is whole",
                stacklevel=4,
            )
    return Opened(frame, str(chosen), attrs, where, _COLUMNS.get(entry.kind))


def _check_model(chosen: Chosen, request: Request) -> None:
    """Refuse ids of another tokenizer, and warn of a model that was not trained on the set.

    Raises:
        VocabularyError: The set has token ids, and the model's tokenizer has another number of entries.
    """
    entry, tokenizer, model = chosen.entry, request.tokenizer, request.model
    size = getattr(tokenizer, "vocab_size", None)
    if request.check_tokenizer and entry.vocab_size and size is not None and size != entry.vocab_size:
        raise VocabularyError(
            f"{chosen} has token ids of {entry.tokenizer} ({entry.vocab_size} entries), and the tokenizer "
            f"given has {size} entries: use a model of {' or '.join(entry.families)}, or decode the set first"
        )
    if model is None or not entry.families:
        return
    named = str(getattr(getattr(model, "cfg", None), "model_name", "") or "")
    named = named or str(getattr(tokenizer, "name_or_path", "") or "")
    family = family_of(model, name=named)
    if family not in entry.families:
        warnings.warn(
            f"{chosen} was in the training data of {', '.join(entry.families)}, and this model is of "
            f"{family}: use it as a control, or see `memlens data show` for the models it was made for",
            stacklevel=5,
        )


def _content(chosen: Chosen, request: Request) -> tuple[Any, list[Path], str]:
    """Return what the set holds, the files that were read (none from the hub), and where it is.

    Raises:
        SourceNotFoundError: There is no copy here, and it is not on the hub or cannot be loaded.
    """
    entry, name = chosen.entry, chosen.entry.name.replace(":", "/")
    place = expanded(request.path) if request.path is not None else data_folder(entry)
    config, split = (text.format(part=chosen.part.name) for text in (entry.config, entry.split))
    if place is None:
        if not entry.hub:
            raise SourceNotFoundError(
                f"{chosen} is not on the Hugging Face hub: {entry.get} ({entry.home}), and "
                f"{_LOCAL.format(_listed_files(chosen), name)}"
            )
        try:
            content = open_dataset(entry.hub, split, config=config, revision=chosen.revision)
        except SourceNotFoundError as error:
            local = _LOCAL.format(_listed_files(chosen), name)
            raise SourceNotFoundError(f"{error}; without the hub, {local}") from error
        return content, [], f"{entry.hub}, split {split!r}"
    if not place.exists():
        raise SourceNotFoundError(f"there is no {place}: give the folder or file with a copy of {chosen}")
    files = [place] if place.is_file() else local_files(place, chosen)
    if files:
        return _read_files(files, chosen), files, " + ".join(map(str, files[:2]))
    if not entry.hub:
        raise SourceNotFoundError(
            f"{place} holds no copy of {chosen}: expected {', '.join(chosen.files)} in it"
        )
    return open_dataset(str(place), split, config=config), [place], f"{place}, split {split!r}"


def _listed_files(chosen: Chosen) -> str:
    return " and ".join(chosen.files) if chosen.files else f"the dataset {chosen.entry.hub}"


def _read_files(files: Sequence[Path], chosen: Chosen) -> Any:
    """Return the content of a local copy.

    Raises:
        SourceNotFoundError: A set of two files is given as one.
    """
    entry = chosen.entry
    if entry.kind == "pairs":
        if len(files) != 2:
            raise SourceNotFoundError(
                f"{chosen} is two files: give the folder of {' and '.join(chosen.files)}"
            )
        return read_pair(*files)
    if entry.kind == "tensor" or entry.header:
        (file,) = files
        return read_file(file)[0] if entry.kind == "tensor" else _read_headless(file, entry)
    contents = [_read_table(file) for file in files]
    if chosen.part.templates:
        templates = _templates(files[0], chosen.part.templates)
        contents = [
            frame if file.stem not in templates else _sentences(frame).assign(template=templates[file.stem])
            for file, frame in zip(files, contents, strict=True)
        ]
    return pd.concat(contents, ignore_index=True) if len(contents) > 1 else contents[0]


def _read_table(file: Path) -> Any:
    """Return the rows of a file; `.json` and compressed lines are read by `datasets`."""
    if file.suffix.lower() in FILES:
        return read_file(file)[0]
    if file.suffix.lower() not in (".json", ".gz"):
        raise FileFormatError(
            f"{file}: give a folder, or a file of {', '.join(sorted(FILES))}, .json or .jsonl.gz"
        )
    import datasets

    with parsing(file):
        return datasets.load_dataset("json", data_files=str(file), split="train")


def _read_headless(file: Path, entry: NamedSet) -> pd.DataFrame:
    with parsing(file):
        with file.open(encoding="utf-8-sig") as lines:
            n_columns = lines.readline(LONGEST_TEXT).count(";") + 1
        if not 2 <= n_columns <= len(entry.header):
            known = ", ".join(entry.header)
            raise FileFormatError(
                f"{file} begins with {n_columns} columns between semicolons: expected {known}"
            )
        names = list(entry.header[:n_columns])
        kinds: dict[Hashable, Any] = dict.fromkeys(("id", "label", "prediction"), object)
        return pd.read_csv(file, sep=";", header=None, names=names, dtype=kinds, keep_default_na=False)


def _templates(file: Path, pattern: str) -> dict[str, str]:
    """Return the templates by relation of a file near the set's own; none if it is not there."""
    name = Path(pattern).name
    found = next((folder / name for folder in file.parents[:2] if (folder / name).is_file()), None)
    if found is None:
        raise SourceNotFoundError(
            f"there is no {name} beside {file.parent}: the templates of its facts are in it"
        )
    with parsing(found):
        return {str(row["relation"]): str(row["template"]) for _, row in json_lines(found)}


def _sentences(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the facts without the sentences that they were found in: the template states them."""
    return frame.drop(columns=["masked_sentence", "masked_sentences", "evidences"], errors="ignore")


def _frame(content: Any, limit: int | None) -> pd.DataFrame:
    content = as_frame_or_rows(content, limit)
    if not isinstance(content, pd.DataFrame):
        content = pd.DataFrame({"tokens": [list(map(int, row)) for row in content]})
    frame = content if limit is None else content.head(limit)
    return frame.drop(columns=["__index_level_0__"], errors="ignore").reset_index(drop=True)


def _with_copies(frame: pd.DataFrame, chosen: Chosen) -> pd.DataFrame:
    """Return the table with the column `copies`: how often the training data have the row."""
    if chosen.part.copies is not None:
        _need(frame, ["label"], chosen)
        return frame.assign(copies=frame["label"].astype(np.int64) * chosen.part.copies)
    name = chosen.entry.copies
    if not name:
        return frame
    if "meta" in frame:  # the same in all layouts: JSON
        frame = frame.assign(meta=[m if isinstance(m, str) else exact_json(m) for m in frame["meta"]])
    if name in frame:
        counts = frame[name].tolist()
    else:
        _need(frame, ["meta"], chosen)
        counts = [parsed_json(text, dict[str, Any]).get(name) for text in frame["meta"]]
    for row, count in enumerate(counts):
        if not isinstance(count, int | np.integer) or count < 0:
            raise SequenceError(f"row {row} has {name}={count!r}: expected the number of its copies")
    return frame.assign(copies=np.array(counts, dtype=np.int64))


def _prepared(frame: pd.DataFrame, entry: NamedSet) -> pd.DataFrame:
    """Return the table with the columns that its kind is read from; the others are kept."""
    if entry.kind == "texts":
        _need(frame, [entry.text], entry)
        frame = frame.assign(text=frame[entry.text])
    if entry.kind == "prompts":
        prompts = _filled(frame, entry.prompt, entry)
        answers = _filled(frame, entry.continuation, entry) if entry.continuation else None
        frame = frame.assign(prompt=prompts, continuation=answers or _rest(frame, prompts, entry))
    if entry.kind == "identifiers":
        _need(frame, ["id", "label"], entry)
        numbers = [name.rpartition(":")[2] for name in texts_of(frame, "id")]
        frame = frame.assign(identifier=numbers, template=entry.template)
    if entry.prefix_len is not None and "prefix_len" not in frame:
        frame = frame.assign(prefix_len=entry.prefix_len)
    return frame


def _filled(frame: pd.DataFrame, pattern: str, entry: NamedSet) -> list[str]:
    names = [name for _, name, _, _ in Formatter().parse(pattern) if name]
    _need(frame, names, entry)
    columns = {name: texts_of(frame, name) for name in names}
    return [
        pattern.format(**dict(zip(names, row, strict=True))) for row in zip(*columns.values(), strict=True)
    ]


def _rest(frame: pd.DataFrame, prompts: Sequence[str], entry: NamedSet) -> list[str]:
    """Return what follows each prompt in the column of prompt and continuation."""
    _need(frame, [entry.whole], entry)
    wholes = texts_of(frame, entry.whole)
    for row, (whole, prompt) in enumerate(zip(wholes, prompts, strict=True)):
        if not whole.startswith(prompt):
            raise SequenceError(f"row {row} of column {entry.whole!r} does not begin with its prompt")
    return [whole[len(prompt) :] for whole, prompt in zip(wholes, prompts, strict=True)]


def _need(frame: pd.DataFrame, names: Sequence[str], what: NamedSet | Chosen) -> None:
    if missing := [name for name in names if name not in frame]:
        title = what.name if isinstance(what, NamedSet) else what
        raise ColumnError(f"{title} should have a column {missing[0]!r}, but {listing(frame)}")


def _published(chosen: Chosen, files: Sequence[Path]) -> str:
    """Return how the copy compares with the published checksum: "md5 agrees", "not compared" or "none".

    Raises:
        FileFormatError: It differs.
    """
    if not chosen.part.md5:
        return "none"
    names = [name.format(part=chosen.part.name).rpartition("/")[2] for name in chosen.entry.md5_files]
    arrays = [files[0].parent / name for name in names]
    if not all(path.is_file() for path in arrays):
        return "not compared"
    ids = np.concatenate([np.asarray(read_file(path)[0]) for path in arrays], axis=1).astype(np.uint16)
    found = hashlib.md5(ids.tobytes(), usedforsecurity=False).hexdigest()
    if found != chosen.part.md5:
        raise FileFormatError(
            f"{' + '.join(names)} in {files[0].parent} have the MD5 {found}, and {chosen} was published with "
            f"{chosen.part.md5}: build or copy them again"
        )
    return "md5 agrees"


def rows_digest(frame: pd.DataFrame) -> str:
    """Return the SHA-256 of a table's rows, as they were read: one line of JSON per row, with sorted keys.

    >>> rows_digest(pd.DataFrame({"text": ["a"]}))[:16] == rows_digest(pd.DataFrame({"text": ["b"]}))[:16]
    False
    """
    digest, names = hashlib.sha256(), sorted(map(str, frame.columns))
    columns = [frame[name].tolist() for name in names]
    for row in zip(*columns, strict=True):
        line = json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, default=_plain)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
