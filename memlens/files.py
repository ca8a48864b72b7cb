"""Atomic writing of files, reading of files that may be damaged, JSON, YAML, and the folders of the zoo."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import yaml
from pydantic import TypeAdapter

from memlens.errors import FileFormatError, MemlensError, PathError, WriteError


def expanded(path: str | Path) -> Path:
    """Return a path with `~` replaced by the home folder; `~x` stays where there is no user x.

    Raises:
        PathError: No file can have this path, or it cannot be looked up.
    """
    found = Path(os.path.expanduser(path))
    with reading(found):
        if "\0" in str(found):
            raise OSError("it holds a NUL")
        found.exists()
    return found


def made_folder(path: str | Path) -> Path:
    """Make a folder where there is none, and return its path with `~` replaced.

    Raises:
        WriteError: It cannot be made.
    """
    found = expanded(path)
    with _errors(WriteError, f"The folder {found} cannot be made", "give another one"):
        found.mkdir(parents=True, exist_ok=True)
    return found


def reading(path: str | Path) -> AbstractContextManager[None]:
    """Turn an `OSError` of the body, which reads `path`, into a `PathError` with the path."""
    return _errors(PathError, f"{path} cannot be read", "check the path and its permissions")


def writing(path: str | Path) -> AbstractContextManager[None]:
    """Turn an `OSError` of the body, which writes `path`, into a `WriteError` with the path."""
    return _errors(WriteError, f"{path} cannot be written", "free space, or give another folder")


@contextmanager
def _errors(kind: type[PathError], what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except MemlensError:
        raise
    except OSError as error:
        raised = kind(f"{what} ({error.strerror or error}): {advice}.")
        raised.errno = error.errno
        raise raised from error


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Put a file's name in front of the message of an error of memlens that lacks it."""
    try:
        yield
    except MemlensError as error:
        if Path(path).name not in str(error):
            error.args = (f"{path}: {error}",)
        raise


@contextmanager
def parsing(
    path: str | Path, kind: type[MemlensError] = FileFormatError, advice: str = "copy or make it again"
) -> Iterator[None]:
    """Turn whatever the content of a file leads the body to into one error of memlens that names the file.

    Parsers fail on damaged or hostile files with nearly any exception, those written in Rust also with a
    panic, which is not an `Exception`. The body should only read and check the file.

    Args:
        path: The file; several are named as in "a.npy + b.npy".
        kind: The class of the error. An error of memlens keeps its own class, and gets the file's name where
            its message lacks it; an `OSError` of the system becomes a `PathError`.
        advice: What to do.

    Raises:
        MemlensError: Of the class `kind`, or as above. A lack of memory stays a `MemoryError`.

    Example:
        >>> with parsing("a.json"):  # doctest: +ELLIPSIS
        ...     json.loads("{")
        Traceback (most recent call last):
        memlens.errors.FileFormatError: a.json is damaged, or is not what its name says (...): copy or ...
    """
    try:
        with naming(path):
            yield
    except (MemlensError, MemoryError):
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            with reading(path):
                raise
        raise kind(
            f"{path} is damaged, or is not what its name says ({reason_of(error)}): {advice}."
        ) from error


def is_failure(error: BaseException) -> bool:
    """Return whether an exception is the failure of a library: any `Exception`, or a panic of one in Rust."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def reason_of(error: BaseException) -> str:
    """Return an exception's class and the beginning of its message, on one line."""
    said = " ".join(str(error).split())[:200].rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def read_json(
    path: str | Path, schema: Any = dict[str, Any], kind: type[MemlensError] = FileFormatError
) -> Any:
    """Return the value in a JSON file.

    Args:
        path: The file.
        schema: The type that the value must have, as pydantic checks it; an object with any content by
            default. It is checked only: what it does not name is kept.
        kind: The class of the error.

    Raises:
        MemlensError: Of the class `kind`: it is not JSON of this type, or is nested deeper than any file of
            memlens.
        PathError: It cannot be read.
    """
    with parsing(path, kind):
        return parsed_json(Path(path).read_text(encoding="utf-8"), schema)


def parsed_json(text: str | bytes, schema: Any = Any, *, unique: bool = False) -> Any:
    """Return the value of a JSON text, of the type that `schema` says (see `read_json`).

    Args:
        text: The text.
        schema: The type that the value must have.
        unique: Whether a key that an object has twice is an error; by default the last one counts.

    Raises:
        ValueError: It is not JSON of this type, or is nested more than 100 deep.
        RecursionError: It is nested even deeper.
    """
    value = json.loads(text, object_pairs_hook=_once if unique else None)
    brackets = (
        text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    )
    if brackets > _DEEPEST:
        _check_extent(value)
    if schema is not Any:
        TypeAdapter(schema).validate_python(value)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
    return found


def parsed_exact(text: str | bytes, schema: Any = Any) -> Any:
    """Return the value that `exact_json` was given; arguments and errors as of `parsed_json`."""
    return _restored(parsed_json(text, schema))


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return (
            float(value[_FLOAT]) if value.keys() == {_FLOAT} else {k: _restored(v) for k, v in value.items()}
        )
    return [_restored(entry) for entry in value] if isinstance(value, list) else value


def read_yaml(path: str | Path) -> dict[Any, Any]:
    """Return the mapping in a YAML file; an empty one for an empty file.

    Raises:
        FileFormatError: It is not YAML, not a mapping, or is far larger with its aliases than without.
        PathError: It cannot be read.
    """
    with parsing(path):
        if (size := Path(path).stat().st_size) > _LARGEST_YAML:
            raise FileFormatError(f"{path} has {size:,} bytes: it is not a file of options.")
        text = Path(path).read_text(encoding="utf-8")
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise FileFormatError(f"{path} is not YAML: {str(error).splitlines()[0]}.") from error
        content = {} if content is None else content
        if not isinstance(content, dict):
            raise FileFormatError(
                f"{path} holds a {type(content).__name__}: give a mapping of option to value."
            )
        _check_extent(content, most=20 * len(text))
    return content


_DEEPEST, _LARGEST_YAML = 100, 2**18


def _check_extent(value: Any, most: int | None = None) -> None:
    """Raise `ValueError` for a value that is nested too deep, or has more than `most` values in it."""
    found, waiting = 0, [(value, 1)]
    while waiting:
        part, depth = waiting.pop()
        found += 1
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
        if most is not None and found > most + 1:
            raise ValueError("its aliases repeat values too often")
        if isinstance(part, (dict, list, tuple)):
            waiting += [(entry, depth + 1) for entry in (part.values() if isinstance(part, dict) else part)]


_ADVICE = "free space, or give another path; what stood there before is unchanged"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a new file next to `path` to write to, which replaces `path` atomically at the end.

    If the body raises, the new file is removed and an existing file at `path` is unchanged. Missing parent
    folders are created, and the file has the permissions of any new file.

    Args:
        path: The file to make or replace.

    Yields:
        An empty file in the same folder, so that the last step is a rename and not a copy.

    Raises:
        WriteError: An `OSError` on the way, also in the body: no space, no permission, or not a path.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "a" / "note.txt") as part:
        ...         _ = part.write_text("whole")
        ...     [file.name for file in (Path(folder) / "a").iterdir()]
        ['note.txt']
    """
    path = expanded(path)
    with _errors(WriteError, f"{path} cannot be written", _ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{_writer()}.", suffix=".part")
        os.close(handle)
        part = Path(name)
        try:
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # else a rename may outlive a power failure and the content not
            part.chmod(0o666 & ~_umask())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


_WHOLE = ".whole"


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder for new files of `folder`; at the end they take their places together.

    Until the last of them is complete, those that stand there stay. A process that is killed while the new
    ones are moved leaves this to `finish_replacing`. Other files in the folder stay.

    Args:
        folder: Made if there is none.

    Yields:
        A folder inside of it, for files that are each written by `replacing`.

    Raises:
        WriteError: As `replacing` does.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing_files(folder) as part:
        ...         _ = write_atomically(part / "a", b"1"), write_atomically(part / "b", b"2")
        ...     sorted(file.name for file in Path(folder).iterdir())
        ['a', 'b']
    """
    folder = made_folder(folder)
    remove_leftovers(folder)
    finish_replacing(folder)
    with _errors(WriteError, f"{folder} cannot be written", _ADVICE):
        part = Path(tempfile.mkdtemp(dir=folder, prefix=f".files.{_writer()}.", suffix=".part"))
        try:
            yield part
            os.replace(part, folder / _WHOLE)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    finish_replacing(folder)


def finish_replacing(folder: str | Path) -> Path:
    """Return a folder after moving the files of a `replacing_files` that was killed at its end."""
    folder = expanded(folder)
    whole = folder / _WHOLE
    if whole.is_dir():
        with _errors(WriteError, f"The files in {whole} cannot be moved to {folder}", "move them yourself"):
            for file in [*whole.iterdir()]:
                with suppress(FileNotFoundError):  # another process was faster
                    os.replace(file, folder / file.name)
            with suppress(FileNotFoundError):
                whole.rmdir()
    return folder


def scratch_path(path: str | Path) -> Path:
    """Return a path for a file that `remove_leftovers` removes once this process has ended."""
    path = expanded(path)
    return path.with_name(f".{path.name}.{_writer()}.{time.time_ns():x}.part")


def write_atomically(path: str | Path, content: bytes | memoryview) -> Path:
    """Write `content` to `path`, whole or not at all (see `replacing`), and return the path."""
    with replacing(path) as part:
        part.write_bytes(content)
    return expanded(path)


def write_json(path: str | Path, value: object, *, indent: int | None = 1) -> Path:
    """Write a value as JSON (see `json_text`), whole or not at all, and return the path."""
    return write_atomically(path, json_text(value, indent=indent).encode("utf-8", errors="backslashreplace"))


def json_text(value: object, *, indent: int | None = None) -> str:
    """Return a value as strictly valid JSON.

    NaN and infinity, which JSON does not have, become null; NumPy's numbers and arrays become Python's; any
    other object becomes text. Without `indent`, nothing is spent on spaces.

    Example:
        >>> json_text({"estimate": 0.5, "interval": (float("nan"), float("inf"))})
        '{"estimate":0.5,"interval":[null,null]}'
    """
    separators = (",", ":") if indent is None else None
    return json.dumps(
        _plain(value), ensure_ascii=False, allow_nan=False, indent=indent, separators=separators
    )


def plain_tensors(path: str | Path, *, otherwise: str) -> Any:
    """Return what `torch.save` wrote, of tensors and plain containers only.

    Args:
        path: The file.
        otherwise: What is wrong where it is neither, for the message.

    Raises:
        FileFormatError: It holds other Python objects, which are not read, or is no such file.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise FileFormatError(
            f"{path} cannot be read as plain tensors, and other Python objects are not read from files: "
            f"{otherwise}"
        ) from error


def exact_json(
    value: object, *, indent: int | None = None, sort_keys: bool = False, default: Callable[[Any], Any] = str
) -> str:
    """Return a value as strictly valid JSON in ASCII that keeps NaN and infinity, for `parsed_exact`.

    These are written as objects with one entry. NumPy's numbers and arrays become Python's.

    Args:
        value: The value.
        indent: As of `json.dumps`.
        sort_keys: Whether keys are sorted, so that equal values have equal texts.
        default: What any other object becomes.

    Example:
        >>> exact_json({"least": float("-inf")}), parsed_exact(exact_json({"least": float("-inf")}))
        ('{"least": {"__float__": "-inf"}}', {'least': -inf})
    """
    marked = _marked(value)
    return json.dumps(marked, allow_nan=False, indent=indent, sort_keys=sort_keys, default=default)


_FLOAT = "__float__"


def _marked(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: str(float(value))}
    if isinstance(value, Mapping):
        return {key: _marked(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_marked(entry) for entry in value]
    return _marked(value.tolist()) if isinstance(value, (np.generic, np.ndarray)) else value


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files that processes killed in `replacing` or `replacing_files` left in a folder.

    Files of running processes, and files of other machines that were modified within a day, are kept.
    """
    for file in Path(folder).glob(".*.part"):
        writer = re.search(r"\.(\w+)-(\d+)\.[^.]+\.part$", file.name)
        with suppress(OSError):
            ended = writer is not None and writer[1] == _machine() and not process_runs(int(writer[2]))
            if ended or file.stat().st_mtime < time.time() - 86_400:
                shutil.rmtree(file) if file.is_dir() else file.unlink()


def _writer() -> str:
    return f"{_machine()}-{os.getpid()}"


def _machine() -> str:
    return re.sub(r"\W", "_", platform.node())[:40] or "unnamed"


def process_runs(process: int) -> bool:
    """Return whether a process of this machine runs, given its number."""
    if os.name != "posix":  # elsewhere signal 0 ends a process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def cache_folder() -> Path:
    """Return the folder of what memlens can make again: `$MEMLENS_CACHE`, or `~/.cache/memlens`."""
    root = os.environ.get("MEMLENS_CACHE")
    return expanded(root) if root else Path.home() / ".cache" / "memlens"


def zoo_folders() -> tuple[Path, ...]:
    """Return the folders that are searched for models of the zoo, in order.

    The first is in this package, the last has the models trained on demand: `zoo` in `cache_folder()`, which
    need not exist. Between them is that of the package `memlens-zoo`, if installed.
    """
    bundled = [Path(__file__).parent / "models" / "zoo"]
    if (package := find_spec("memlens_zoo")) is not None and package.origin is not None:
        bundled.append(Path(package.origin).parent)
    return *bundled, cache_folder() / "zoo"


def zoo_table(folder: str | Path, name: str) -> Path | None:
    """Return a table of a zoo model's ground truth: in its own folder, or with another model of its corpus.

    Models of one corpus have the same ground truth, so the bundled ones have it once.

    Args:
        folder: Of the model.
        name: Of the table, such as "sequences".

    Returns:
        The parquet file; None where there is none.

    Example:
        >>> zoo_table(zoo_folders()[0] / "pythia-s", "sequences").name
        'sequences.parquet'
    """
    own = Path(folder) / f"{name}.parquet"
    if own.is_file():
        return own
    corpus = _zoo_corpus_of(Path(folder))
    others = (path for root in zoo_folders() for path in sorted(root.glob(f"*/{name}.parquet")))
    same = (path for path in others if corpus is not None and _zoo_corpus_of(path.parent) == corpus)
    return next(same, None)


def _zoo_corpus_of(folder: Path) -> tuple[Any, Any] | None:
    """The specification of a zoo model's corpus and the hash of its rows; None if they are not recorded."""
    try:
        corpus = read_json(folder / "training.json")["corpus"]
        return corpus["spec"], corpus["fingerprint"]
    except (MemlensError, KeyError, TypeError):
        return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
