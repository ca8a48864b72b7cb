"""Plans by small runs: every step is timed, and what small runs took gives the time of the whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.options import options_class
from memlens.report.model import Finding
from memlens.studies.pilot import Pilot, extrapolate, hits_until, plan_steps, record_times, save_plan
from memlens.studies.registry import Call, SequenceChoice, Study
from memlens.studies.running import StudyDirectory, StudyRun
from memlens.studies.times import LOADING, READING, Stopwatch


class Clock:
    """Time that passes only where it is said to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> dict[str, float]:
        return {"seconds": self.now, "cpu_seconds": 2 * self.now}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("memlens.studies.times.clocks", clock)
    return clock


def test_a_step_s_time_is_without_that_of_the_steps_inside(clock: Clock) -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.timed("outer"):
            clock.now += 1
            with watch.timed("inner"):
                clock.now += 10
            clock.now += 2
    assert watch.times["outer"] == {"seconds": 6.0, "cpu_seconds": 12.0}
    assert watch.times["inner"] == {"seconds": 20.0, "cpu_seconds": 40.0}


def test_the_time_of_a_failed_step_counts(clock: Clock, tmp_path: Path) -> None:
    folder = StudyDirectory(tmp_path, title="A run", settings={}, fresh=True)

    def broken() -> None:
        clock.now += 4
        raise ValueError("no")

    folder.step("broken", broken, part="parts")
    folder.step("whole", lambda: None, part="parts")
    assert [(t["step"], t["seconds"]) for t in json.loads((tmp_path / "run.json").read_text())["times"]] == [
        ("parts", 4.0)
    ]


@options_class
class _Options:
    most: int = 64
    few: int = 4
    unlimited: int | None = None


class _Where:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def load(self) -> str:
        self.clock.now += 100
        return "the model"


def _study(clock: Clock, failing: bool = False) -> tuple[Study, SequenceChoice]:
    @options_class
    class Inputs(SequenceChoice):
        def load(self, model: Any) -> Any:
            clock.now += 5  # all sequences are read each time
            return ml.SequenceSet.from_tokens(torch.ones((320, 4), dtype=torch.long), 2)

    def run(model: Any, sequences: Any, out: Path, options: Any, **more: Any) -> StudyRun:
        folder = StudyDirectory(out, title="A run", settings={}, fresh=True)

        def sweep() -> None:
            clock.now += 3 + 0.5 * min(len(sequences), options.most)
            with folder.timed("scores"):
                clock.now += 0.25 * len(sequences)

        def look() -> None:
            clock.now += 2 * options.few
            if failing:
                raise ValueError("nothing to see")

        folder.step("a sweep", sweep)
        folder.step("look", look)
        folder.find(Finding("Found", "It ran."))
        return folder.done()

    scales = {"": "most", "scores": "sequences", "look": "few", "reading": "", "report": ""}
    return Study(
        run, _Options, "What?", inputs=Inputs, sizes=("most", "few", "unlimited"), scales=scales
    ), Inputs("x")


def test_what_grows_with_the_sequences_is_planned_to_the_second(clock: Clock, tmp_path: Path) -> None:
    study, inputs = _study(clock)
    plan = plan_steps(study, inputs, Call(_Where(clock), _Options(), None))
    assert plan is not None
    planned = {row["step"]: row["seconds"] for row in plan["steps"]}
    assert planned == {
        LOADING: 100, READING: 5, "a sweep": 3 + 0.5 * 64, "scores": 0.25 * 320, "look": 2 * 4, "report": 0
    }  # fmt: skip
    assert plan["sizes"] == {"sequences": 320, "most": 64, "few": 4}
    assert plan["notes"] == []

    call = Call(_Where(clock), _Options(), tmp_path)
    save_plan(plan, tmp_path)
    with call.watch.timed(READING):
        arguments = inputs.read(call)
    study(**arguments, options=call.options, out=tmp_path)
    times = record_times(tmp_path, call.watch.times)
    assert {row["step"]: row["seconds"] for row in times} == planned
    assert all(row["planned_seconds"] == row["seconds"] for row in times)
    assert all(row["planned_cpu_seconds"] == row["cpu_seconds"] == 2 * row["seconds"] for row in times)
    assert json.loads((tmp_path / "run.json").read_text())["times"] == times


def test_what_a_small_run_could_not_do_is_said(clock: Clock) -> None:
    study, inputs = _study(clock, failing=True)
    plan = plan_steps(study, inputs, Call(_Where(clock), _Options(), None))
    assert plan is not None
    assert any("look" in note and "nothing to see" in note for note in plan["notes"])


def test_sizes_of_small_runs() -> None:
    whole = {"sequences": 100, "most": 64, "controls": 32, "few": 3, "none": 0}
    first, second = (Pilot.of(whole, number) for number in (0, 1))
    assert first.sizes == {"sequences": 7, "most": 4, "controls": 2, "few": 2, "none": 0}
    assert second.sizes == {"sequences": 14, "most": 8, "controls": 4, "few": 3, "none": 0}
    least = Pilot.of(whole, 0, least=8).sizes
    # A quarter of the controls are examined, so a quarter of the sequences has to be looked at.
    assert (least["controls"], least["sequences"]) == (8, 25)
    assert second.share("none") == second.share("unknown") == 1.0
    assert Pilot.of(whole, 0).options(_Options()).most == 4


def test_what_is_found_of_repeated_things_tells_how_long_to_look() -> None:
    rng = np.random.default_rng(0)
    # By run: after how many hits each new thing is found.
    finds = np.array([np.sort(np.unique(rng.integers(500, size=5_000), return_index=True)[1])[:450] + 1
                      for _ in range(50)])  # fmt: skip
    for seen in (400, 1_000):
        found = round((finds <= seen).sum(1).mean())
        assert hits_until(450, found, seen) == pytest.approx(finds[:, 449].mean(), rel=0.05)
        assert hits_until(found, found, seen) == seen
    assert hits_until(501, 500, 5_000) == math.inf
    assert hits_until(1, 0, 0) == math.inf


def test_a_limit_that_is_found_on_the_way_is_that_of_the_larger_run() -> None:
    small, large = (Pilot.of({"sequences": 320}, number).limited("rows", whole, size)
                    for number, whole, size in ((0, 50, 10), (1, 100, 20)))  # fmt: skip
    runs = [
        (pilot, {READING: {"seconds": s, "cpu_seconds": s}})
        for pilot, s in ((small, 3.0), (small, 3.0), (large, 5.0))
    ]
    assert extrapolate(runs, {"": "sequences", READING: "rows"})[READING]["seconds"] == pytest.approx(21.0)


def test_what_a_process_does_once_counts_once() -> None:
    small, large = (Pilot.of({"sequences": 320}, number) for number in (0, 1))
    # Two seconds for each twenty sequences, and four for imports in the first run.
    runs = [
        (pilot, {"sweep": {"seconds": s, "cpu_seconds": 2 * s}})
        for pilot, s in ((small, 4.0 + 2.0), (small, 2.0), (large, 4.0))
    ]
    found = extrapolate(runs, {"": "sequences"})["sweep"]
    assert found == {"seconds": pytest.approx(4.0 + 32.0), "cpu_seconds": pytest.approx(2 * (4.0 + 32.0))}
