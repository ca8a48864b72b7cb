"""Atomic writing of files, JSON, and the folders of the zoo."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from memlens.errors import MemlensError, PathError, WriteError


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
            ended = writer is not None and writer[1] == _machine() and not _runs(int(writer[2]))
            if ended or file.stat().st_mtime < time.time() - 86_400:
                shutil.rmtree(file) if file.is_dir() else file.unlink()


def _writer() -> str:
    return f"{_machine()}-{os.getpid()}"


def _machine() -> str:
    return re.sub(r"\W", "_", platform.node())[:40] or "unnamed"


def _runs(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 ends a process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def zoo_folders() -> tuple[Path, Path]:
    """Return the folders that are searched for models of the zoo: bundled ones, then those trained on demand.

    The second is `$MEMLENS_CACHE/zoo`, or `~/.cache/memlens/zoo`; it need not exist.
    """
    bundled = Path(__file__).parent / "models" / "zoo"
    root = os.environ.get("MEMLENS_CACHE")
    return bundled, (expanded(root) if root else Path.home() / ".cache" / "memlens") / "zoo"


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
        corpus = json.loads((folder / "training.json").read_text(encoding="utf-8"))["corpus"]
        return corpus["spec"], corpus["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
