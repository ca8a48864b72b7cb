"""Claims: which process works on which part, where several share a folder.

A claim is a file ``.claims/PART.GENERATION`` that its owner created (`O_EXCL`, which one process alone can
do, on a network file system too) and touches every 15 seconds. It is dead if its process has ended, as far as
that can be seen from here, or if it was not touched for two minutes *while this process watched it*: clocks
of different machines are never compared, so they may differ. A dead claim is retaken by creating the next
generation, so of two that try it one wins, and nothing is moved or deleted under a living owner.

Claims only save work. Whether a part is done is told by its own file alone; if two processes nevertheless do
one part (the owner was suspended for minutes), they write the same file.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from memlens.errors import MemlensError
from memlens.files import json_text, made_folder, parsed_json, process_runs, writing

BEAT = 15.0
"""Seconds from one touch of a claim to the next."""
STALE = 120.0
"""Seconds without a touch after which a claim is dead."""
_FOLDER = ".claims"


@dataclass(frozen=True)
class Claim:
    """A claim as a file shows it.

    Attributes:
        part: Name of the part.
        generation: How often a dead claim on it was retaken.
        owner: Host, process and time; empty while the file is being written.
        touched: Time of the last touch, in nanoseconds of the file system's clock.
    """

    part: str
    generation: int
    owner: dict[str, object]
    touched: int

    def __str__(self) -> str:
        if not self.owner:
            return "another process"
        return f"process {self.owner['process']} on {self.owner['host']} since {self.owner['time']}"

    @property
    def has_ended(self) -> bool:
        """Whether the owner is known to have ended; only processes of this machine can be looked up."""
        process = self.owner.get("process")
        here = self.owner.get("host") == platform.node() and self.owner.get("space") == _space()
        return here and isinstance(process, int) and not process_runs(process)


class Claims:
    """The claims on the parts in a folder, seen by one process; a context manager that releases its own.

    Args:
        folder: The folder of the run.

    Raises:
        WriteError: The folder cannot be written to.
    """

    folder: Path

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder) / _FOLDER
        self._own: dict[str, Path] = {}
        self._touched: set[Path] = set()
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, int], tuple[int, float]] = {}
        self._moved: set[tuple[str, int]] = set()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        for part in list(self._own):
            self.release(part)
        with suppress(OSError):  # others still work there, or it was never made
            self.folder.rmdir()

    def of(self, part: str) -> Claim | None:
        """Return the claim that stands on a part; None if there is none."""
        return self.standing([part]).get(part)

    def standing(self, parts: Iterable[str]) -> dict[str, Claim]:
        """Return the claims that stand on some parts; a dead one is noticed by looking again and again."""
        generations = self._generations()
        found = {part: self._read(part, generations[part]) for part in parts if part in generations}
        return {part: claim for part, claim in found.items() if claim is not None}

    def _generations(self) -> dict[str, int]:
        """The latest generation of each part that has claims."""
        latest: dict[str, int] = {}
        with suppress(FileNotFoundError), os.scandir(self.folder) as files:
            for file in files:
                part, _, number = file.name.rpartition(".")
                if number.isdecimal():
                    latest[part] = max(int(number), latest.get(part, 0))
        return latest

    def _read(self, part: str, generation: int) -> Claim | None:
        path = self._path(part, generation)
        try:
            touched, text = path.stat().st_mtime_ns, path.read_bytes()
        except FileNotFoundError:
            return None
        owner: dict[str, object] = {}
        with suppress(ValueError, MemlensError):  # its owner has not written it yet
            owner = parsed_json(text, dict[str, object])
        before, _ = self._seen.setdefault((part, generation), (touched, time.monotonic()))
        if before != touched:
            self._moved.add((part, generation))
            self._seen[part, generation] = touched, time.monotonic()
        return Claim(part, generation, owner, touched)

    def is_dead(self, claim: Claim) -> bool:
        """Whether the owner of a claim is known to have ended, or did not touch it for `STALE` seconds."""
        _, since = self._seen[claim.part, claim.generation]
        return claim.has_ended or time.monotonic() - since > STALE

    def is_alive(self, claim: Claim) -> bool:
        """Whether this process has seen the owner of a claim touch it, and not long ago."""
        return (claim.part, claim.generation) in self._moved and not self.is_dead(claim)

    def take(self, part: str, *, lost: int | None = None) -> bool:
        """Claim a part, and touch the claim from now on; False if another process has it.

        Args:
            part: Name of the part.
            lost: The generation of a claim that is known to be dead.

        Raises:
            WriteError: The folder cannot be written to.
        """
        claim = self.of(part)
        if claim is not None and not self.is_dead(claim) and claim.generation != lost:
            return False
        path = self._path(part, 0 if claim is None else claim.generation + 1)
        about = {
            "host": platform.node(),
            "process": os.getpid(),
            "space": _space(),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        if not self._create(path, json_text(about)):
            return False
        self._own[part] = path
        self.touch_too(path)
        return True

    def touch_too(self, path: Path) -> None:
        """Touch a file from now on, to show that this process runs."""
        with self._lock:
            self._touched.add(path)
            if self._thread is None:
                self._thread = threading.Thread(target=self._touch, name="memlens claims", daemon=True)
                self._thread.start()

    def _create(self, path: Path, text: str) -> bool:
        """Create a claim's file; False if it is there."""
        made_folder(self.folder)
        with writing(path):
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            except FileNotFoundError:  # another process removed the empty folder
                return self._create(path, text)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
        return True

    def release(self, part: str) -> None:
        """Remove an own claim, and the dead ones that it replaced."""
        path = self._own.pop(part)
        with self._lock:
            self._touched.discard(path)
        self._remove(part, int(path.suffix[1:]))

    def clear(self, parts: Collection[str], done: Callable[[str], bool]) -> None:
        """Remove the claims on parts that are done: an owner that was killed just then has left them.

        Args:
            parts: The names of the parts.
            done: Whether a part, given its name, is done.
        """
        for part, generation in self._generations().items():
            if part in parts and part not in self._own and done(part):
                self._remove(part, generation)

    def _remove(self, part: str, latest: int) -> None:
        for generation in range(latest + 1):
            with suppress(OSError):
                self._path(part, generation).unlink()

    @contextmanager
    def taking(self, part: str, *, lost: int | None = None) -> Iterator[bool]:
        """Claim a part for the time of a `with` statement; gives whether that succeeded."""
        taken = self.take(part, lost=lost)
        try:
            yield taken
        finally:
            if taken:
                self.release(part)

    def _path(self, part: str, generation: int) -> Path:
        return self.folder / f"{part}.{generation}"

    def _touch(self) -> None:
        while not self._ended.wait(BEAT):
            with self._lock:
                paths = list(self._touched)
                if not paths:
                    self._thread = None
                    return
            for path in paths:
                with suppress(OSError):  # released meanwhile, or the file server is away for a moment
                    os.utime(path)


def _space() -> str:
    """The space in which process numbers count: a container has its own, whatever its host is called."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
