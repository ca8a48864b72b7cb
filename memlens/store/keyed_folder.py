"""A folder that resumes: one manifest that identifies the run, and one file for each finished part.

The manifest is JSON: a format tag (``"memlens sweep 2"``), the version of memlens that wrote it, ``about``
(what identifies the run, name by name) and what else the run needs to continue. Everything is written whole
or not at all, so a run that was stopped at any moment continues with the parts that are missing.

    folder = KeyedFolder(out, "sweep", about, version=2)
    seal = folder.seal("part-0.npz", arrays)        # stored inside the part
    folder.check("part-0.npz", arrays, seal)        # when the part is read

A store whose manifest grows with its parts uses `read_manifest` and `write_manifest` alone
(`memlens.studies.comparative.store`).
"""

from __future__ import annotations

import hashlib
import io
import logging
import reprlib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np

from memlens.errors import MemlensError, OtherRunError, ResultError
from memlens.files import (
    exact_json,
    expanded,
    parsed_json,
    parsing,
    read_json,
    remove_leftovers,
    write_atomically,
)
from memlens.store.fingerprint import fingerprint

_LOG = logging.getLogger(__name__)
_MOST_CHANGES = 3
"""How many settings an error names."""
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = 100


class KeyedFolder:
    """The folder of one run, new or to be continued.

    Args:
        folder: The folder; created if it is missing.
        what: What the run is called in its format tag and in errors, such as "sweep".
        about: What identifies the run: names, as errors give them, and plain values.
        version: The version of the format.
        parts: Pattern of the parts' file names.
        content: Further content of a new manifest; a run that continues keeps what it began with.
        described: Settings of the run, such as the name of a donor. They do not identify it; the error for
            another run names those that differ, with both values.

    Attributes:
        path: The folder.
        manifest: The path of its manifest.
        key: A digest of `about`.
        content: The further content that the run began with.

    Raises:
        OtherRunError: The folder belongs to another run, or another version of memlens wrote it.
        ResultError: The manifest is damaged, or parts are there without one.
    """

    path: Path
    manifest: Path
    key: str
    content: dict[str, Any]

    def __init__(
        self,
        folder: str | Path,
        what: str,
        about: Mapping[str, Any],
        *,
        version: int,
        parts: str,
        content: Mapping[str, Any] | None = None,
        described: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = expanded(folder)
        self.manifest = self.path / "manifest.json"
        self.what = what
        about = parsed_json(exact_json(dict(about), default=_refused))
        words = parsed_json(exact_json(dict(described or {})))
        self.key = _digest(about)
        remove_leftovers(self.path)
        if self._is_begun(parts):
            found = read_manifest(self.manifest, what, version)
            self._compare(found.pop("about", {}), about, found.pop("described", {}), words)
            self.content = found
        else:
            self.content = dict(content or {})
            more = {"described": words} if words else {}
            write_manifest(self.manifest, what, version, {"about": about, **more, **self.content})

    def _is_begun(self, parts: str) -> bool:
        if self.manifest.exists():
            if self.manifest.stat().st_size:
                return True
            _LOG.warning("%s is empty and is written anew", self.manifest)
        elif self.path.is_dir() and any(self.path.glob(parts)):
            raise ResultError(
                f"{self.path} is not empty and holds no manifest.json of a {self.what}: give a new folder."
            )
        return False

    def _compare(
        self,
        then: Mapping[str, Any],
        now: Mapping[str, Any],
        described_then: Mapping[str, Any],
        described_now: Mapping[str, Any],
    ) -> None:
        other = [name for name in {**now, **then} if then.get(name) != now.get(name)]
        if other:
            changes = _changes(described_then, described_now) if described_then and described_now else []
            raise OtherRunError(
                f"{self.manifest} belongs to another {self.what} (different: "
                f"{'; '.join([', '.join(other), *changes[:_MOST_CHANGES]])}): give another folder, or delete "
                "this one."
            )

    def seal(self, name: str, content: Any) -> str:
        """Return what a part stores, so that no other, moved or edited part is mistaken for it.

        Args:
            name: Of the part's file.
            content: Arrays, tensors and plain values.
        """
        return fingerprint([self.key, name, content])

    def check(self, name: str, content: Any, seal: object) -> None:
        """Check that a part is the one that this run wrote under this name.

        Raises:
            ResultError: It is not.
        """
        if str(seal) != self.seal(name, content):
            raise ResultError(
                f"{self.path / name} does not belong to {self.manifest}: it is a part of another "
                f"{self.what}, or was moved or edited; delete it and run again."
            )

    @contextmanager
    def parsing(self, name: str) -> Iterator[None]:
        """Turn whatever a part leads the body to, which reads it, into a `ResultError` that names it."""
        advice = "delete it and run again; the other parts are kept"
        try:
            with parsing(self.path / name, ResultError, advice):
                yield
        except ResultError:
            raise
        except MemlensError as error:
            raise ResultError(f"{self.path / name} is damaged ({error}): {advice}.") from error


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of a `.npz` file.

    Unlike `numpy.load`, it allocates no more than the file holds, whatever an array's header claims.

    Raises:
        ValueError: It is not such a file, holds objects, or its members unpack to over 200 times their size.
    """
    found: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.file_size > max(2**28, 200 * member.compress_size):
                raise ValueError(f"{member.filename} would unpack to {member.file_size / 2**30:.1f} GiB")
            raw = io.BytesIO(archive.read(member))
            read_header = _HEADERS[np.lib.format.read_magic(raw)]
            shape, by_column, dtype = read_header(raw)
            values = np.frombuffer(raw.getbuffer(), dtype, offset=raw.tell())
            found[member.filename.removesuffix(".npy")] = values.reshape(
                shape, order="F" if by_column else "C"
            ).copy()
    return found


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def write_manifest(path: Path, what: str, version: int, content: Mapping[str, Any]) -> None:
    """Write a manifest: its format tag, the version of memlens, and a digest that shows later edits."""
    full = {"format": f"memlens {what} {version}", "memlens": installed("memlens"), **content}
    full = parsed_json(exact_json(full))
    write_atomically(path, exact_json({**full, "digest": _digest(full)}, indent=1).encode())


def read_manifest(path: Path, what: str, version: int) -> dict[str, Any]:
    """Return the content of a manifest.

    Raises:
        OtherRunError: Another version of memlens wrote it; the message says which.
        ResultError: It is missing, damaged or was edited, or is not the manifest of a `what`.
    """
    with parsing(path, ResultError, "give another folder"):
        found = read_json(path, kind=ResultError)
        tag = str(found.pop("format"))
    name, _, number = tag.rpartition(" ")
    if name != f"memlens {what}" or not number.isdecimal():
        raise ResultError(
            f"{path} is not the manifest of a {what} (its format is {tag!r}): give another folder."
        )
    wrote = found.pop("memlens", None)
    if int(number) != version:
        raise OtherRunError(
            f"{path} was written by memlens {wrote or '0.1.0 or earlier'} in the format {tag!r}, which this "
            f"version (format {version}) cannot continue: give another folder, or delete this one."
        )
    digest = found.pop("digest", None)
    if digest != _digest({"format": tag, "memlens": wrote, **found}):
        raise ResultError(f"{path} was edited: give another folder, or delete this one.")
    return found


def _changes(then: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """Return the settings that differ, each with its value then and now.

    >>> _changes({"mode": "donor", "donor": {"model": "a"}}, {"mode": "donor", "donor": {"model": "b"}})
    ["donor model was 'a' and is 'b'"]
    """
    found = []
    for name in {**then, **now}:
        old, new = then.get(name), now.get(name)
        words = f"{where} {name}".strip().replace("_", " ")
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changes(old, new, words)
        elif old != new:
            found.append(f"{words} was {_SHOWN.repr(old)} and is {_SHOWN.repr(new)}")
    return found


def _refused(value: object) -> object:
    raise TypeError(f"what identifies a run may not hold a {type(value).__name__}")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(exact_json(content, sort_keys=True).encode(), digest_size=16).hexdigest()
