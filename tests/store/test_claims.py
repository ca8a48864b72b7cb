"""Claims: of many that want a part one gets it, a dead claim is retaken by one, and a living one never."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from memlens.errors import OptionError, UnfinishedError
from memlens.files import json_text
from memlens.store import claims as module
from memlens.store.claims import Claims
from memlens.store.sharing import check_finished, do_share, parse_part

DEAD = {"host": "another", "process": 1, "space": "", "time": "2026-01-01 00:00:00"}


def foreign(folder: Path, part: str, generation: int = 0, **facts: object) -> Path:
    """A claim of a process on another machine."""
    path = folder / ".claims" / f"{part}.{generation}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json_text({**DEAD, **facts}))
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(module, "STALE", 0.4)
    monkeypatch.setattr("memlens.store.sharing._LOOK", 0.05)


def test_a_claim_is_had_by_one_and_given_back(tmp_path: Path) -> None:
    with Claims(tmp_path) as ours, Claims(tmp_path) as theirs:
        assert ours.take("a")
        assert not theirs.take("a")
        assert f"process {os.getpid()} on " in str(theirs.of("a"))
        assert theirs.take("b")
        ours.release("a")
        assert theirs.take("a")
    assert list(tmp_path.iterdir()) == []


def test_a_claim_of_an_ended_process_of_this_machine_is_retaken_at_once(tmp_path: Path) -> None:
    script = """
import os, sys
from memlens.store.claims import Claims
Claims(sys.argv[1]).take("a")
os._exit(1)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, env=env)
    with Claims(tmp_path) as ours:
        assert (tmp_path / ".claims" / "a.0").exists()
        assert ours.take("a")
        assert (tmp_path / ".claims" / "a.1").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
def test_a_claim_is_dead_only_when_it_was_watched_without_a_touch(tmp_path: Path) -> None:
    """The clock of the other machine does not matter: it may be hours off, in either direction."""
    late, early = (foreign(tmp_path, name) for name in ("late", "early"))
    os.utime(late, (time.time() + 7200,) * 2)
    os.utime(early, (time.time() - 7200,) * 2)
    with Claims(tmp_path) as ours:
        assert not ours.take("late")
        assert not ours.take("early")
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            os.utime(late, (time.time() + 7200 + time.monotonic(),) * 2)  # its owner is alive
            ours.standing(["late", "early"])
            time.sleep(0.05)
        assert ours.take("early")
        assert not ours.take("late")


@pytest.mark.usefixtures("quick")
def test_an_owner_keeps_its_claim_while_it_works(tmp_path: Path) -> None:
    path = foreign(tmp_path, "a")
    with Claims(tmp_path) as ours, Claims(tmp_path) as theirs:
        assert ours.take("a", lost=0)
        path.unlink()
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            assert not theirs.take("a")
            time.sleep(0.02)
        claim = theirs.of("a")
        assert claim is not None
        assert theirs.is_alive(claim)


def _race(folder: str, gate: Any, won: str) -> None:
    with Claims(folder) as claims:
        gate.wait()
        if claims.take("a", lost=0):
            Path(won, str(os.getpid())).touch()
        gate.wait()


def test_of_many_that_retake_a_dead_claim_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for number in range(4):
        folder, won = tmp_path / str(number), tmp_path / f"won {number}"
        folder.mkdir()
        won.mkdir()
        foreign(folder, "a")
        gate = context.Barrier(6)
        racers = [context.Process(target=_race, args=(str(folder), gate, str(won))) for _ in range(6)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert len(list(won.iterdir())) == 1


def shared(folder: Path, part: object, names: list[str], log: list[str] | None = None) -> list[str]:
    """What one process does of a run whose parts are empty files."""
    did: list[str] = [] if log is None else log

    def work(name: str) -> None:
        did.append(name)
        (folder / name).touch()

    do_share(part, names, folder, lambda name: (folder / name).exists(), work)  # pyright: ignore[reportArgumentType]
    return did


def test_shares_together_are_the_whole_and_overlap_nowhere(tmp_path: Path) -> None:
    names = [f"p{i}" for i in range(10)]
    assert shared(tmp_path, (1, 3), names) == ["p1", "p4", "p7"]
    assert shared(tmp_path, "0/3", names) == ["p0", "p3", "p6", "p9"]
    with pytest.raises(UnfinishedError, match=r"7 of 10 parts .* missing: p2, p5, p8\.") as error:
        check_finished(names, tmp_path, lambda name: (tmp_path / name).exists())
    assert error.value.missing == ["p2", "p5", "p8"]
    assert shared(tmp_path, "auto", names) == ["p2", "p5", "p8"]
    assert shared(tmp_path, "auto", names) == []


@pytest.mark.usefixtures("quick")
def test_auto_leaves_living_claims_and_takes_over_dead_ones(tmp_path: Path) -> None:
    names = ["p0", "p1", "p2"]
    foreign(tmp_path, "p0")
    alive = foreign(tmp_path, "p1")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(alive)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert shared(tmp_path, "auto", names) == ["p2", "p0"]
    finally:
        ended.set()
        thread.join()
    with pytest.raises(UnfinishedError, match=r"p1 \(claimed by process 1 on another since 2026"):
        check_finished(names, tmp_path, lambda name: (tmp_path / name).exists())


def test_a_claim_on_a_part_that_is_done_does_not_stay(tmp_path: Path) -> None:
    """Its owner was killed between the part and the release. Claims on anything else stay."""
    for generation in (0, 1):
        foreign(tmp_path, "p1", generation)
    other, missing = foreign(tmp_path, "report"), foreign(tmp_path, "p3")
    (tmp_path / "p1").touch()
    assert shared(tmp_path, "1/2", ["p0", "p1"]) == []
    assert set((tmp_path / ".claims").iterdir()) == {other, missing}


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ((16, 16), r"part=\(16, 16\) is out of range: of 16 parts there are 0/16 to 15/16"),
        ("3/0", "out of range"),
        ("3-16", r"part='3-16' is not clear: give I/N"),
        ((-1, 4), "is not clear"),
    ],
)
def test_a_wrong_part_is_refused(part: object, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse_part(part)  # pyright: ignore[reportArgumentType]


def test_the_part_of_a_slurm_array() -> None:
    array = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "2"}
    assert [parse_part("slurm", {**array, "SLURM_ARRAY_TASK_ID": str(i)}) for i in (10, 12, 16)] == [
        (0, 4),
        (1, 4),
        (3, 4),
    ]
    with pytest.raises(OptionError, match=r"has gaps"):
        parse_part("slurm", {**array, "SLURM_ARRAY_TASK_ID": "18"})
    with pytest.raises(OptionError, match=r"needs a job array, and SLURM_ARRAY_TASK_ID is ''"):
        parse_part("slurm", {})
