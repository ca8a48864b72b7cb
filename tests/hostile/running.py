"""Reads hostile files in processes with limits of memory and time, and counts what happens.

python -m tests.hostile                    # every file
python -m tests.hostile --sample 20        # 20 files of each reader
python -m tests.hostile --readers sweep    # one reader; --verbose shows each other exception
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from memlens.errors import MemlensError
from tests.hostile.mutations import RAN, Content, variants
from tests.hostile.readers import READERS, Reader

SECONDS, GIGABYTES = 20, 4
_MOST = 250
"""Variants of one file: those of long JSON documents are many, and much alike."""
OUTCOMES = (
    "read",
    "refused by name",
    "refused without the name",
    "other exception",
    "over 20 s",
    "over 4 GB",
    "code ran",
)
GOOD = OUTCOMES[:2]


@dataclass(frozen=True)
class Case:
    """One hostile file.

    Attributes:
        reader: What reads it.
        file: Its path in the reader's folder.
        name: Of the variant.
        content: What to write, or what makes the file.
    """

    reader: Reader
    file: str
    name: str
    content: Content

    def __str__(self) -> str:
        return f"{self.reader.name}: {self.file}: {self.name}"


@dataclass(frozen=True)
class Outcome:
    """What reading a file led to: one of `OUTCOMES`, and what was raised."""

    case: str
    reader: str
    kind: str
    said: str
    seconds: float


class Valid:
    """The readers' valid files, in a folder of each, made once; and that they are read."""

    def __init__(self, root: Path, readers: Sequence[Reader] = READERS) -> None:
        self.root, self.readers = root, readers
        for reader in readers:
            folder = self.folder(reader)
            folder.mkdir(parents=True)
            with _quiet():
                reader.make(folder)
                copy = Path(shutil.copytree(folder, root / "copy"))
                reader.read(copy)
                shutil.rmtree(copy)

    def folder(self, reader: Reader) -> Path:
        return self.root / reader.name.replace(" ", "-")

    def cases(self, sample: int | None = None) -> Iterator[Case]:
        """Yield the variants of every file; of each reader `sample` at most, the same ones each time."""
        for reader in self.readers:
            folder = self.folder(reader)
            rng, found = random.Random(reader.name), []
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                every = variants(path.name, path.read_bytes(), f"{reader.name}/{path.name}")
                file = str(path.relative_to(folder))
                found += [Case(reader, file, *each) for each in rng.sample(every, min(_MOST, len(every)))]
            many = round(reader.share * len(found)) if sample is None else round(reader.share**0.5 * sample)
            yield from rng.sample(found, min(many, len(found)))


def attempt(case: Case, valid: Path, place: Path) -> tuple[str, str]:
    """Read one file, in a copy of its reader's folder, and return the outcome and what was raised."""
    folder = Path(shutil.copytree(valid, place / "case"))
    try:
        file = folder / case.file
        file.unlink()
        case.content(file) if callable(case.content) else file.write_bytes(case.content)
        return _outcome(case, folder)
    finally:
        shutil.rmtree(folder)


def _outcome(case: Case, folder: Path) -> tuple[str, str]:
    os.environ.pop(RAN, None)
    try:
        with _quiet():
            case.reader.read(folder)
        kind, said = "read", ""
    except MemlensError as error:
        named = Path(case.file).name in str(error)
        kind, said = GOOD[1] if named else OUTCOMES[2], f"{type(error).__name__}: {error}"
        kind = _memory(error) or kind
    except BaseException as error:  # a panic of a library in Rust is not an Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        at = traceback.extract_tb(error.__traceback__)
        own = next((f for f in reversed(at) if "/memlens/" in f.filename), at[-1])
        said = f"{type(error).__name__}: {str(error)[:150]} [{Path(own.filename).name}:{own.lineno}]"
        kind = _memory(error) or "other exception"
    return ("code ran", said) if RAN in os.environ else (kind, said)


def _memory(error: BaseException | None) -> str | None:
    """Return the outcome if anything in a chain of exceptions was a lack of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "bad_alloc" in str(error):
            return "over 4 GB"
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)


def _serve(pipe: Connection, cases: Sequence[Case], valid: Valid) -> None:
    """Read the cases whose numbers come through the pipe; a panic's message is not worth a line each."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + GIGABYTES * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as place:
        while (number := pipe.recv()) is not None:
            case, begun = cases[number], time.process_time()
            found = attempt(case, valid.folder(case.reader), Path(place))
            pipe.send((*found, time.process_time() - begun))


class _Worker:
    def __init__(self, cases: Sequence[Case], valid: Valid) -> None:
        context = multiprocessing.get_context("fork")  # what is imported here need not be imported again
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, cases, valid), daemon=True)
        self.process.start()
        theirs.close()
        self.number, self.since = -1, (0.0, 0.0)

    def give(self, number: int | None) -> None:
        self.number, self.since = -1 if number is None else number, self._used()
        self.pipe.send(number)

    @property
    def seconds(self) -> float:
        """What the present case has taken of the processor, or a tenth of the time it waited."""
        return max(now - before for now, before in zip(self._used(), self.since, strict=True))

    def _used(self) -> tuple[float, float]:
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            ticks = int(fields[11]) + int(fields[12])
            return ticks / os.sysconf("SC_CLK_TCK"), time.monotonic() / 10
        return 0.0, time.monotonic() / 10


def outcomes(cases: Sequence[Case], valid: Valid, processes: int = 2) -> list[Outcome]:
    """Read every case and return what happened, in their order."""
    waiting, found = iter(range(len(cases))), dict[int, Outcome]()
    workers = [_Worker(cases, valid) for _ in range(min(processes, len(cases)))]

    def done(worker: _Worker, kind: str, said: str, seconds: float) -> None:
        case = cases[worker.number]
        kind = "over 20 s" if seconds > SECONDS and kind in GOOD else kind
        found[worker.number] = Outcome(str(case), case.reader.name, kind, said, seconds)

    def next_for(worker: _Worker) -> None:
        number = next(waiting, None)
        worker.give(number)
        if number is None:
            workers.remove(worker)
            worker.process.join(10)

    for worker in [*workers]:
        next_for(worker)
    while workers:
        ready = wait([worker.pipe for worker in workers], timeout=1)
        for worker in [*workers]:
            late = worker.seconds > SECONDS + 5
            try:
                if worker.pipe in ready:
                    done(worker, *worker.pipe.recv())
                    next_for(worker)
                    continue
            except (EOFError, ConnectionError):
                done(worker, "other exception", "the process died", worker.seconds)
                late = True
            if late:
                if worker.number not in found:
                    done(worker, "over 20 s", "stopped", worker.seconds)
                worker.process.kill()
                worker.process.join()
                workers[workers.index(worker)] = fresh = _Worker(cases, valid)
                next_for(fresh)
    return [found[number] for number in range(len(cases))]


def table(found: Iterable[Outcome]) -> str:
    """Return the counts as a table in Markdown: one row per reader, one column per outcome."""
    counts = Counter((each.reader, each.kind) for each in found)
    readers = [reader.name for reader in READERS if any(name == reader.name for name, _ in counts)]
    lines = ["| reader | " + " | ".join(OUTCOMES) + " |", "|---|" + "---:|" * len(OUTCOMES)]
    lines += [f"| {r} | " + " | ".join(str(counts[r, kind]) for kind in OUTCOMES) + " |" for r in readers]
    totals = [str(sum(counts[r, kind] for r in readers)) for kind in OUTCOMES]
    return "\n".join([*lines, "| **all** | " + " | ".join(totals) + " |"])


def main(args: Sequence[str] | None = None) -> None:
    """Print the table, and with --verbose every file that was neither read nor refused by its name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, help="files of each reader")
    parser.add_argument("--readers", nargs="*", help="names of readers")
    parser.add_argument("--verbose", action="store_true")
    given: Any = parser.parse_args(args)
    chosen = [reader for reader in READERS if given.readers is None or reader.name in given.readers]
    with tempfile.TemporaryDirectory() as root:
        valid = Valid(Path(root), chosen)
        cases = [*valid.cases(given.sample)]
        found = outcomes(cases, valid)
    for each in found if given.verbose else ():
        if each.kind not in GOOD:
            sys.stdout.write(f"{each.kind} | {each.case} | {each.said[:400]}\n")
    sys.stdout.write(f"{table(found)}\n{len(found)} files, {sum(e.seconds for e in found):.0f} s\n")
