"""Shares, claims and workers one step at a time, with clocks and executors of the test's own."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError, Future
from pathlib import Path
from typing import Any

import pytest

from memlens.errors import OptionError, UnfinishedError, WorkerError
from memlens.store import claims as claims_module
from memlens.store import executors as module
from memlens.store.carrying import packed, unpacked
from memlens.store.claims import Claim, Claims
from memlens.store.executors import run_parts, work_on
from memlens.store.sharing import check_finished, do_share, parse_part


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("0/1", (0, 1)), ("3/16", (3, 16)), ("15/16", (15, 16)), (" 3 / 16 ", (3, 16)), ((0, 2), (0, 2)),
        ((1, 2), (1, 2)), ("auto", None),
    ],
)  # fmt: skip
def test_parts_are_given_as_text_or_numbers(part: Any, expected: tuple[int, int] | None) -> None:
    assert parse_part(part) == expected


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("", "is not clear: give I/N with I from 0 to N - 1, as in 2/8, or auto"), ("1", "is not clear"),
        ("1/2/3", "is not clear"), ("a/2", "is not clear"), ("1/b", "is not clear"), ((1,), "is not clear"),
        ((1, 2, 3), "is not clear"), ("all", "is not clear"), ((0, -2), "is not clear"),
        ("2/2", r"is out of range: of 2 parts there are 0/2 to 1/2\."),
        ("0/0", r"is out of range: of 0 parts there are 0/0 to 0/0\."),
        ((5, 3), "is out of range: of 3 parts there are 0/3 to 2/3"),
    ],
)  # fmt: skip
def test_other_parts_are_refused(part: Any, words: str) -> None:
    with pytest.raises(OptionError, match=f"^part={re.escape(repr(part))} {words}"):
        parse_part(part)


def slurm(**values: Any) -> dict[str, str]:
    return {f"SLURM_ARRAY_TASK_{name.upper()}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (slurm(id=0, count=4), (0, 4)), (slurm(id=3, count=4), (3, 4)), (slurm(id=5, count=4, min=2), (3, 4)),
        (slurm(id=8, count=4, min=2, step=2), (3, 4)), (slurm(id=1, count=2, step=0), (1, 2)),
        (slurm(id=1, count=2, min="", step=""), (1, 2)), (slurm(id=1, count=2, step="x"), (1, 2)),
    ],
)  # fmt: skip
def test_places_in_a_job_array(
    array: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parse_part("slurm", array) == expected
    for name, value in array.items():
        monkeypatch.setenv(name, value)
    if "SLURM_ARRAY_TASK_MIN" not in array:
        monkeypatch.delenv("SLURM_ARRAY_TASK_MIN", raising=False)
    assert parse_part("slurm") == expected


@pytest.mark.parametrize(
    ("array", "words"),
    [
        ({}, r"needs a job array, and SLURM_ARRAY_TASK_ID is '': start it by sbatch --array=0-15, or"),
        (slurm(id=1), "SLURM_ARRAY_TASK_COUNT is ''"), (slurm(id="x", count=2), "SLURM_ARRAY_TASK_ID is 'x'"),
        (slurm(id=1, count=2, min="y"), "SLURM_ARRAY_TASK_MIN is 'y'"),
        (slurm(id=4, count=4), r"has gaps \(SLURM_ARRAY_TASK_ID=4 with 4 tasks from 0\)"),
        (slurm(id=1, count=4, min=2), "has gaps .* from 2"), (slurm(id=3, count=4, step=2), "has gaps"),
    ],
)  # fmt: skip
def test_job_arrays_with_gaps_and_none_are_refused(array: dict[str, str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse_part("slurm", array)


def test_what_is_missing_is_named_up_to_a_dozen(tmp_path: Path) -> None:
    names = [f"p{i}" for i in range(20)]
    check_finished(names, tmp_path, lambda name: True)
    for n_done, more in ((7, " and 1 more"), (8, ""), (19, "")):
        with pytest.raises(UnfinishedError) as raised:
            check_finished(names, tmp_path, lambda name, n_done=n_done: int(name[1:]) < n_done)
        shown = ", ".join(names[n_done:][:12])
        assert str(raised.value) == (
            f"{n_done} of 20 parts in {tmp_path} are done; missing: {shown}{more}. "
            "Let the other workers finish, or run it again with part='auto'."
        )
        assert raised.value.missing == names[n_done:]


def test_an_empty_share_is_warned_of_and_done_parts_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    did: list[str] = []

    def share(part: Any, names: list[str], done: Callable[[str], bool]) -> list[str]:
        did.clear()
        do_share(part, names, tmp_path, lambda name: done(name) or name in did, did.append)
        return list(did)

    with caplog.at_level(logging.WARNING, logger="memlens"):
        assert share((2, 4), ["a", "b"], lambda name: False) == []
        assert "there are only 2 parts, so that part 2 of 4 is empty" in caplog.text
        caplog.clear()
        assert share((1, 2), ["a", "b"], lambda name: False) == ["b"]
        assert share("auto", [], lambda name: False) == []
        assert share("auto", ["a", "b", "c"], lambda name: name == "b") == ["a", "c"]
    assert not caplog.text
    assert not list(tmp_path.iterdir())


def test_a_part_that_was_done_meanwhile_is_not_done_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def done(name: str) -> bool:
        asked.append(name)
        return len(asked) > 1  # another process finishes it between the look and the claim

    do_share("auto", ["a"], tmp_path, done, lambda name: pytest.fail("done twice"))
    assert asked == ["a", "a", "a"]


def owner(**facts: Any) -> dict[str, Any]:
    here = {"host": platform.node(), "process": os.getpid(), "space": claims_module._space(), "time": "noon"}
    return {**here, **facts}


@pytest.mark.parametrize(
    ("facts", "runs", "ended"),
    [
        (owner(), True, False), (owner(), False, True), (owner(host="another"), False, False),
        (owner(space="another"), False, False), (owner(process="7"), False, False), ({}, False, False),
    ],
)  # fmt: skip
def test_only_processes_of_this_machine_are_looked_up(
    facts: dict[str, Any], runs: bool, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "process_runs", lambda process: runs)
    claim = Claim("a", 0, facts, 0)
    assert claim.has_ended is ended
    expected = f"process {facts['process']} on {facts['host']} since noon" if facts else "another process"
    assert str(claim) == expected


def put(folder: Path, name: str, facts: Any = None) -> Path:
    path = folder / ".claims" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"host": "far", "process": 1, "space": "", "time": "t"}) if facts is None else facts
    )
    return path


def test_the_last_generation_of_a_claim_stands(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        assert claims.standing(["a"]) == {}
        for name in ("a.0", "a.10", "a.9", "b.x", "c", "a.b.3", "d.2"):
            put(tmp_path, name)
        put(tmp_path, "e.0", "{")
        found = claims.standing(["a", "a.b", "b", "c", "e", "no"])
        assert {part: claim.generation for part, claim in found.items()} == {"a": 10, "a.b": 3, "e": 0}
        assert found["a"].owner["host"] == "far"
        assert found["e"].owner == {}
        assert str(found["e"]) == "another process"
        assert found["a"].touched == (tmp_path / ".claims" / "a.10").stat().st_mtime_ns
        assert claims.of("d") is not None
        assert claims.of("c") is None


def test_a_claim_dies_two_minutes_after_its_last_touch_that_was_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (claims_module.BEAT, claims_module.STALE) == (15, 120)  # seconds, as documented
    now = 1000.0
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now)
    path = put(tmp_path, "a.0")
    with Claims(tmp_path) as claims:

        def seen() -> tuple[bool, bool]:
            claim = claims.of("a")
            assert claim is not None
            return claims.is_alive(claim), claims.is_dead(claim)

        assert seen() == (False, False)  # nobody knows yet
        now += 119
        assert seen() == (False, False)
        now += 2
        assert seen() == (False, True)
        os.utime(path, ns=(5, 5))  # a touch, whatever the clock of its owner says
        assert seen() == (True, False)
        now += 120
        assert seen() == (True, False)
        now += 1
        assert seen() == (False, True)
        assert claims.take("a")
        assert path.exists()
        assert (tmp_path / ".claims" / "a.1").exists()
    assert not (tmp_path / ".claims").exists()


def test_taking_and_releasing(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        put(tmp_path, "a.4")
        put(tmp_path, "a.2")
        assert not claims.take("a")
        assert not claims.take("a", lost=3)
        assert claims.take("a", lost=4)
        path = tmp_path / ".claims" / "a.5"
        facts = json.loads(path.read_text())
        assert {**facts, "time": ""} == {**owner(), "time": ""}
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", facts["time"])
        put(tmp_path, "a.6")  # another retook it while this process was away
        claims.release("a")
        assert [file.name for file in (tmp_path / ".claims").iterdir()] == ["a.6"]
        with claims.taking("b") as mine:
            assert mine
            assert (tmp_path / ".claims" / "b.0").exists()
            with claims.taking("b") as again:
                assert not again
            assert (tmp_path / ".claims" / "b.0").exists()
        assert not (tmp_path / ".claims" / "b.0").exists()
        with claims.taking("a", lost=6) as mine:
            assert mine
        assert claims.take("c")
    assert not (tmp_path / ".claims").exists()
    assert not Claims(tmp_path)._create(put(tmp_path, "x.0"), "")


def test_claims_are_touched_until_they_are_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "BEAT", 0.01)
    touched: list[Path] = []
    beat = threading.Event()

    def utime(path: Path) -> None:
        touched.append(path)
        beat.set()

    monkeypatch.setattr(claims_module.os, "utime", utime)
    with Claims(tmp_path) as claims:
        assert claims.take("a")
        assert beat.wait(10)
        assert set(touched) == {tmp_path / ".claims" / "a.0"}
        thread = claims._thread
        assert thread is not None
        assert (thread.name, thread.daemon) == ("memlens claims", True)
        claims.release("a")
        thread.join(10)
        assert claims._thread is None  # nothing is left to touch
        beat.clear()
        claims.touch_too(tmp_path / "job")
        assert beat.wait(10)
        assert touched[-1] == tmp_path / "job"
        last = claims._thread
    assert last is not None
    last.join(10)
    assert not last.is_alive()


class Files:
    """A job whose parts are small files."""

    def __init__(self, folder: Path, wrong: str = "", keep: Any = None) -> None:
        self.folder, self.wrong, self.keep = folder, wrong, keep

    def done(self, part: str) -> bool:
        return (self.folder / f"{part}.txt").exists()

    def work(self, part: str) -> Any:
        if part == self.wrong:
            raise ValueError(f"cannot do {part}")
        (self.folder / f"{part}.txt").write_text(part)
        return part.upper()


class Elsewhere(Files):
    """A job that another process finishes meanwhile."""

    n_looks = 0

    def done(self, part: str) -> bool:
        self.n_looks += 1
        if self.n_looks == 4:
            (self.folder / f"{part}.txt").write_text(part)
            (self.folder / ".claims" / f"{part}.0").unlink()
        return super().done(part)


class Inline:
    """An executor that does at once what is submitted, or fails as it is told."""

    def __init__(self, fail: Callable[[str, int], BaseException | None] = lambda part, time: None) -> None:
        self.fail, self.given = fail, list[tuple[str, Any]]()

    def submit(self, fn: Any, *args: Any) -> Future[Any]:
        part, lost = args[-2:]
        self.given.append((part, lost))
        error = self.fail(part, sum(name == part for name, _ in self.given))
        future: Future[Any] = Future()
        if error is None:
            future.set_result(fn(*args))
        else:
            future.set_exception(error)
        return future


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_POLL", 0.01)
    monkeypatch.setattr(module, "_OPENED", {})
    return tmp_path


def run(executor: Any, job: Files, parts: str) -> list[tuple[str, Any]]:
    ended: list[tuple[str, Any]] = []
    run_parts(executor, job, list(parts), on_done=lambda part, value: ended.append((part, value)))
    return ended


def test_parts_are_done_by_the_executor_and_told_as_they_end(folder: Path) -> None:
    executor = Inline()
    assert run(executor, Files(folder), "abc") == [("a", "A"), ("b", "B"), ("c", "C")]
    assert executor.given == [("a", None), ("b", None), ("c", None)]
    assert sorted(file.name for file in folder.iterdir()) == ["a.txt", "b.txt", "c.txt"]
    assert run(executor, Files(folder), "a") == []  # done already
    assert len(executor.given) == 3
    run_parts(Inline(), Files(folder), ["d"])  # whoever does not listen need not
    assert (folder / "d.txt").exists()
    assert run(Inline(), Files(folder), "") == []
    with pytest.raises(WorkerError, match=r"^executor=5 has no submit\(\): give an executor of concurrent"):
        run(5, Files(folder), "a")
    with pytest.raises(
        WorkerError, match=r"cannot be sent to other processes \(.*\): leave what cannot be pickled"
    ):
        run(Inline(), Files(folder, keep=threading.Lock()), "e")
    assert not (folder / "e.txt").exists()


def test_a_part_may_be_lost_twice(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    executor = Inline(lambda part, time: RuntimeError("out of memory") if part == "b" and time < 3 else None)
    with caplog.at_level(logging.WARNING, logger="memlens"):
        assert dict(run(executor, Files(folder), "abc")) == {"a": "A", "b": "B", "c": "C"}
    assert [part for part, _ in executor.given].count("b") == 3
    assert (
        caplog.text.count("b was lost with its worker (RuntimeError: out of memory) and is submitted again")
        == 2
    )
    cancelled = Inline(lambda part, time: CancelledError() if time == 1 else None)
    assert run(cancelled, Files(folder), "d") == [("d", "D")]
    lost = Inline(lambda part, time: RuntimeError("gone") if part in "xz" else None)
    with pytest.raises(WorkerError) as raised:
        run(lost, Files(folder), "xyz")
    assert str(raised.value).startswith("2 parts were lost 3 times each with their workers, such as x (")
    assert str(raised.value).endswith("All that are missing: x, z.")
    assert (folder / "y.txt").exists()  # the others were done first
    for stop in (KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(stop)):
            run(Inline(lambda part, time, stop=stop: stop), Files(folder), "w")


def test_what_a_part_raises_is_raised_here(folder: Path) -> None:
    with pytest.raises(ValueError, match="cannot do b"):
        run(Inline(), Files(folder, wrong="b"), "abc")
    assert (folder / "a.txt").exists()
    assert not (folder / ".claims").exists()
    assert [file.suffix for file in folder.iterdir()] == [".txt", ".txt"]  # the packed job is gone


def test_a_broken_executor_leaves_the_rest_to_this_process(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    executor = Inline(lambda part, time: BrokenExecutor("a process died") if part != "a" else None)
    with caplog.at_level(logging.WARNING, logger="memlens"):
        assert sorted(run(executor, Files(folder), "abcd")) == [(p, p.upper()) for p in "abcd"]
    assert (
        "the executor is broken (BrokenExecutor: a process died): the remaining 3 parts are done in this"
        in caplog.text
    )


def test_what_others_claimed_is_awaited_or_taken_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims_module, "STALE", 0.1)
    put(folder, "a.3")
    executor = Inline()
    assert run(executor, Files(folder), "ab") == [("b", "B"), ("a", "A")]
    assert executor.given[0] == ("a", None)
    assert executor.given[-1] == ("a", 3)  # the generation of the claim that is dead

    put(folder, "c.0")
    monkeypatch.setattr(claims_module, "STALE", 100.0)
    job = Elsewhere(folder)
    assert run(Inline(), job, "c") == [("c", None)]
    assert job.n_looks == 4


def test_a_worker_tells_what_became_of_a_part(folder: Path) -> None:
    content = packed(Files(folder, wrong="w"))
    path, digest = folder / "job", module._digest(content)
    path.write_bytes(content)
    assert len(digest) == 32

    def told(part: str, lost: int | None = None, digest: str = digest) -> tuple[Any, bool, str]:
        found = work_on(str(path), digest, part, lost)
        return found.value, found.claimed, "" if found.error is None else f"{found.error}"

    assert told("a") == ("A", False, "")
    assert told("a") == (None, False, "")
    put(folder, "b.0")
    assert told("b") == (None, True, "")
    assert told("b", lost=0) == ("B", False, "")
    assert told("w") == (None, False, "cannot do w")
    path.write_bytes(content + b"x")
    assert told("c") == ("C", False, "")  # what was opened once is kept
    module._OPENED.clear()
    assert told("d") == (None, False, f"{path} is not what the driver wrote: it was changed since.")
    assert not (folder / "d.txt").exists()


def test_errors_reach_the_driver_even_where_they_cannot_be_pickled() -> None:
    plain = ValueError("as it is")
    assert module._plain(plain) is plain

    class Local(Exception):
        pass

    found = module._plain(Local("only here"))
    assert isinstance(found, WorkerError)
    assert str(found) == "Local: only here"


def test_functions_of_a_notebook_go_by_value() -> None:
    by = 3

    def times(x: int) -> int:
        return x * by

    found = unpacked(packed({"fn": times, "of": [1, (2, "a")]}))
    assert found["fn"](5) == 15
    assert found["fn"] is not times
    assert found["of"] == [1, (2, "a")]
