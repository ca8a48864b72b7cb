"""Parts of a run on the workers of an executor: anything with the interface of `concurrent.futures.Executor`.

The work is packed once into a file of the run's folder (`memlens.store.carrying`); what is submitted is the
name of that file, its digest and the name of a part. A worker reads the file once, loads models by their
recipes, and for each part claims it, does it, and writes its file. The driver only waits, and submits again
what was lost together with its worker.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from memlens.errors import WorkerError
from memlens.files import reason_of, scratch_path, write_atomically
from memlens.store.carrying import packed, unpacked
from memlens.store.claims import Claims

_LOG = logging.getLogger(__name__)
_TRIES = 3
"""How often a part may be lost with its worker."""
_POLL = 2.0
"""Seconds between looks at parts that another run has claimed."""


class Job(Protocol):
    """Work in parts on a folder that all workers share.

    A part is a pure function of the job and its name to one file.

    Attributes:
        folder: The folder.
    """

    folder: Path

    def done(self, part: str) -> bool:
        """Whether a part's file is there."""
        ...

    def work(self, part: str) -> Any:
        """Do a part, write its file, and return what else the driver needs: something small."""
        ...


@dataclass(frozen=True)
class _Outcome:
    """What became of a part that was submitted.

    Attributes:
        value: What `Job.work` returned; None where another run has claimed the part, or it was done already.
        claimed: Whether another run has claimed it.
        error: What `Job.work` raised.
    """

    value: Any = None
    claimed: bool = False
    error: BaseException | None = None


_OPENED: dict[str, tuple[Job, Claims]] = {}
"""The job that this worker has opened, by its digest."""
_OPENING = threading.Lock()


def work_on(path: str, digest: str, part: str, lost: int | None) -> _Outcome:
    """Do one part in a worker.

    Args:
        path: The file of the packed job.
        digest: Its digest: a file with other contents is not unpacked.
        part: Name of the part.
        lost: The generation of a claim on it that is known to be dead.
    """
    try:
        job, claims = _opened(path, digest)
        if job.done(part):
            return _Outcome()
        with claims.taking(part, lost=lost) as mine:
            if not mine:
                return _Outcome(claimed=True)
            return _Outcome() if job.done(part) else _Outcome(job.work(part))
    except Exception as error:
        return _Outcome(error=_plain(error))


def _opened(path: str, digest: str) -> tuple[Job, Claims]:
    with _OPENING:
        if digest not in _OPENED:
            content = Path(path).read_bytes()
            if _digest(content) != digest:
                raise WorkerError(f"{path} is not what the driver wrote: it was changed since.")
            _OPENED.clear()
            job: Job = unpacked(content)
            _OPENED[digest] = job, Claims(job.folder)
        return _OPENED[digest]


def _plain(error: BaseException) -> BaseException:
    """An error that reaches the driver: itself where it can be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return WorkerError(reason_of(error))
    return error


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def run_parts(
    executor: Any,
    job: Job,
    parts: Sequence[str],
    *,
    on_done: Callable[[str, Any], object] = lambda part, value: None,
) -> None:
    """Do the parts of a job that are not done on the workers of an executor.

    A part that was lost with its worker is submitted again, three times in all. Where the executor itself
    breaks, as a `ProcessPoolExecutor` does when one of its processes dies, the remaining parts are done in
    this process.

    Args:
        executor: Of `concurrent.futures`, of `dask.distributed` (`client.get_executor()`), or with their
            interface.
        job: The job.
        parts: All parts.
        on_done: Called in this process with each finished part and what `Job.work` returned (None if another
            run did it).

    Raises:
        WorkerError: The job cannot be sent to workers, before anything starts; or a part was lost too often,
            after all others were done.
        MemlensError: What a part raised; the finished ones are kept.
    """
    if not callable(getattr(executor, "submit", None)):
        raise WorkerError(
            f"executor={executor!r} has no submit(): give an executor of concurrent.futures, or "
            "client.get_executor() of a dask.distributed client."
        )
    content = packed(job)
    with _written(job.folder, content) as path, Claims(job.folder) as claims:
        claims.touch_too(path)
        driver = _Driver(executor, job, claims, (str(path.absolute()), _digest(content)), on_done)
        try:
            driver.run([part for part in parts if not job.done(part)])
            claims.clear(set(parts), job.done)
        finally:
            driver.cancel()


@contextmanager
def _written(folder: Path, content: bytes) -> Iterator[Path]:
    """Write a packed job for the time of a run; what a killed driver leaves is removed by the next run."""
    path = scratch_path(folder / "job")
    write_atomically(path, content)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


class _Driver:
    """Submits parts and watches what becomes of them."""

    def __init__(
        self,
        executor: Any,
        job: Job,
        claims: Claims,
        file: tuple[str, str],
        on_done: Callable[[str, Any], object],
    ) -> None:
        self.executor, self.job, self.claims, self.file, self.on_done = executor, job, claims, file, on_done
        self.ended: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self.pending: dict[str, Any] = {}
        self.elsewhere: set[str] = set()
        self.lost: Counter[str] = Counter()
        self.given_up: dict[str, str] = {}
        self.left: dict[str, None] = {}

    def run(self, parts: Sequence[str]) -> None:
        self.left = dict.fromkeys(parts)
        try:
            for part in parts:
                self.submit(part)
            while self.pending or self.elsewhere:
                try:
                    part, future = self.ended.get(timeout=_POLL)
                except Empty:
                    self.look_elsewhere()
                    continue
                self.settle(part, future)
        except BrokenExecutor as error:
            self.finish_here(error)
        if self.given_up:
            name, reason = next(iter(self.given_up.items()))
            raise WorkerError(
                f"{len(self.given_up)} parts were lost {_TRIES} times each with their workers, such as "
                f"{name} ({reason}): look into the workers' logs (often memory), then run it again; "
                f"the other parts are kept. All that are missing: {', '.join(self.given_up)}."
            )

    def submit(self, part: str, lost: int | None = None) -> None:
        future = self.executor.submit(work_on, *self.file, part, lost)
        self.pending[part] = future
        future.add_done_callback(lambda ended: self.ended.put((part, ended)))

    def settle(self, part: str, future: Any) -> None:
        """Take note of what became of a part."""
        del self.pending[part]
        try:
            outcome: _Outcome = future.result()
        except BrokenExecutor:
            self.pending[part] = future
            raise
        except BaseException as error:
            # The worker died, or could not even begin; CancelledError is not an Exception.
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            self.lose(part, reason_of(error))
            return
        if outcome.error is not None:
            raise outcome.error
        if outcome.claimed:
            self.elsewhere.add(part)
        else:
            self.end(part, outcome.value)

    def end(self, part: str, value: Any) -> None:
        del self.left[part]
        self.on_done(part, value)

    def lose(self, part: str, reason: str) -> None:
        self.lost[part] += 1
        if self.lost[part] >= _TRIES:
            self.given_up[part] = reason
            return
        _LOG.warning("%s was lost with its worker (%s) and is submitted again", part, reason)
        self.submit(part)

    def look_elsewhere(self) -> None:
        """See what became of the parts that others had claimed."""
        standing = self.claims.standing(self.elsewhere)
        for part in list(self.elsewhere):
            claim = standing.get(part)
            if self.job.done(part):
                self.elsewhere.discard(part)
                self.end(part, None)
            elif claim is None or self.claims.is_dead(claim):
                self.elsewhere.discard(part)
                self.submit(part, None if claim is None else claim.generation)

    def finish_here(self, error: BaseException) -> None:
        """Do in this process what is left when the executor is broken; last, what its workers were at."""
        while not self.ended.empty():
            part, future = self.ended.get()
            if not future.cancelled() and future.exception() is None:
                self.settle(part, future)
        for part in [part for part in self.left if self.job.done(part)]:
            self.end(part, None)
        _LOG.warning(
            "the executor is broken (%s): the remaining %d parts are done in this process; to have workers "
            "again, stop, and make the same call with a new executor",
            reason_of(error),
            len(self.left),
        )
        begun = self.claims.standing(self.left)
        while self.left:
            for part in sorted(self.left, key=lambda name: name in begun):
                with self.claims.taking(part) as mine:
                    if mine:
                        self.end(part, None if self.job.done(part) else self.job.work(part))
            if self.left:
                time.sleep(_POLL)

    def cancel(self) -> None:
        for future in self.pending.values():
            future.cancel()
