"""What a study will take, step by step: estimated from three small runs of the study itself.

The first two small runs have the size `f`, the third `g` (fractions of the whole). A step of which they took
`c`, `s` and `t` is planned at

    c + (1 - f) (t - s) / (g - f),

so that what does not depend on the number of sequences (bootstraps, figures, the report) counts once, and the
rest in proportion. What a process does only once (imports, caches) is in `c` alone: the difference would
count it 1 / (g - f) times. Models are loaded once, before the first run, and count as they are. The method is
ours.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from memlens.files import read_json, write_json
from memlens.studies.registry import Call, Inputs, Study
from memlens.studies.times import LOADING, PLANNING, READING, Stopwatch, Times

_T = TypeVar("_T")

PLAN_FILE = "plan.json"
FRACTION = 1 / 16
"""The size of the smaller run; the larger one has twice as many."""
_CLOCKS = ("seconds", "cpu_seconds")


@dataclass(frozen=True)
class Pilot:
    """A small run of a study.

    Attributes:
        whole: How many sequences, questions or updates the whole study takes at most, by what limits them:
            the name of an option, or "sequences".
        sizes: How many the small run takes.
        arguments: Of the study.
        note: What the plan cannot know.
    """

    whole: Mapping[str, int]
    sizes: Mapping[str, int]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @classmethod
    def of(cls, whole: Mapping[str, int], number: int, *, least: int = 2, source: str = "sequences") -> Pilot:
        """Return the sizes of the smaller (0) or the larger (1) small run.

        Args:
            whole: The sizes of the whole study.
            number: Which run: its sizes are a sixteenth of the whole, or twice as many.
            least: No size of the smaller run is below this, where the whole is not.
            source: What all others are drawn from. Its part is at least as large as theirs (of those of 16 or
                more), so that as large a part of the sequences is recalled as is examined.

        >>> Pilot.of({"sequences": 320, "explored": 4, "none": 0}, 0).sizes
        {'sequences': 20, 'explored': 2, 'none': 0}
        >>> Pilot.of({"sequences": 320, "explored": 4, "examined": 16}, 1).sizes
        {'sequences': 80, 'explored': 4, 'examined': 4}
        """
        first = {name: min(n, max(least, math.ceil(n * FRACTION))) for name, n in whole.items()}
        if source in whole:
            drawn = [(first[name], n) for name, n in whole.items() if n >= 1 / FRACTION and name != source]
            parts = [-(-size * whole[source] // n) for size, n in drawn]  # rounded up
            first[source] = max([first[source], *parts])
        return cls(whole, {name: min(whole[name], n * (1 + number)) for name, n in first.items()})

    def options(self, options: _T) -> _T:
        """Return options of the study with the small sizes."""
        return replace(options, **{name: n for name, n in self.sizes.items() if hasattr(options, name)})  # pyright: ignore[reportArgumentType, reportCallIssue]

    def giving(self, arguments: Mapping[str, Any], note: str = "") -> Pilot:
        """Return the same run with the study's arguments, and what the plan cannot know."""
        return replace(self, arguments=arguments, note=note)

    def limited(self, name: str, whole: int, size: int) -> Pilot:
        """Return the same run with one more limit, which is no option: sizes of the whole and of the run."""
        return replace(self, whole={**self.whole, name: whole}, sizes={**self.sizes, name: size})

    def share(self, name: str) -> float:
        """Return the part of the whole that the run takes of what an option limits."""
        return self.sizes[name] / self.whole[name] if self.whole.get(name) else 1.0


def sizes_of(options: object, names: Sequence[str]) -> dict[str, int]:
    """Return the values of some options, without those that limit nothing (None)."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def hits_until(n: float, found: int, hits: int) -> float:
    """Return how many hits are expected until `n` different ones are found.

    After `h` hits on `S` things that are hit equally often, `S (1 - exp(-h / S))` are expected to be found,
    which gives `S` and with it the answer; infinity if `S` is below `n`.

    Args:
        n: How many different ones are wanted.
        found: Different ones found so far.
        hits: Hits so far, repeated ones included.

    >>> hits_until(40, 10, 10)
    40.0
    >>> round(hits_until(40, 10, 11), 1)
    69.2
    >>> hits_until(40, 10, 30)
    inf
    """
    from scipy.optimize import brentq

    if n <= found:
        return hits * n / found
    if found == hits:
        return float(n) if found else math.inf
    # x is h / S.
    x: float = brentq(lambda x: -math.expm1(-x) / x - found / hits, 1e-12, hits)  # pyright: ignore[reportAssignmentType]
    share = n * x / hits
    return -hits / x * math.log1p(-share) if share < 1 else math.inf


def extrapolate(runs: Sequence[tuple[Pilot, Times]], scales: Mapping[str, str]) -> Times:
    """Return what each step of the whole study will take.

    Args:
        runs: Two runs of the smaller size and one of the larger, each with what its steps took.
        scales: Of the study; "" as a value: the step takes the same time for any number of sequences.
    """
    (_, cold), (small, first), (large, second) = runs
    found: dict[str, dict[str, float]] = {}
    for step in dict.fromkeys([*cold, *first, *second]):
        limit = next((scales[end] for end in scales if end and step.endswith(end)), scales[""])
        limit = limit if limit in large.whole or not limit else scales[""]
        # What a run finds may tell how large the whole is: the larger run tells it best.
        f, g = replace(small, whole=large.whole).share(limit), large.share(limit)
        found[step] = {}
        for clock in _CLOCKS:
            once, start, more = (times.get(step, {}).get(clock, 0.0) for times in (cold, first, second))
            slope = max(0.0, more - start) / (g - f) if g > f and step != LOADING else 0.0
            found[step][clock] = once + (1 - f) * slope
    return found


def plan_steps(study: Study, inputs: Inputs, call: Call) -> dict[str, Any] | None:
    """Plan a study by small runs of it in temporary folders.

    Returns:
        `steps`, a list of `step`, `seconds` and `cpu_seconds`; `sizes`, what limits the number of sequences;
        and `notes`, what the small runs could not do. None if the study cannot run here.
    """
    loaded = {} if call.loaded is None else call.loaded
    runs: list[tuple[Pilot, Times]] = []
    notes: list[str] = []
    for number in (0, 0, 1):
        with tempfile.TemporaryDirectory() as name:
            watch = Stopwatch()
            here = replace(call, loaded=loaded, watch=watch, progress=False, out=Path(name))
            with watch.timed(READING):
                pilot = inputs.pilot(here, study.sizes, number)
            if pilot is None:
                return None
            study(**pilot.arguments, out=Path(name) / "run", command=None, progress=False)
            run = read_json(Path(name) / "run" / "run.json")
        times = watch.times | {entry["step"]: entry for entry in run["times"]}
        times.pop(PLANNING, None)
        runs.append((pilot, times))
        notes = [
            *filter(None, [pilot.note]),
            *(
                f"Not planned: {entry['step']}, which a small run could not do: {entry['message']}"
                for entry in run["failures"]
            ),
        ]
    return {
        "steps": [{"step": step, **spent} for step, spent in extrapolate(runs, study.scales).items()],
        "sizes": dict(runs[-1][0].whole),
        "notes": notes,
    }


def save_plan(plan: Mapping[str, Any], folder: Path) -> None:
    """Save a plan in the folder of the run that it is for."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN_FILE, plan)


def record_times(folder: Path, reading: Times) -> list[dict[str, Any]]:
    """Add the time of reading, and the plan in the folder, to a run's `run.json`.

    Returns:
        The `times` of `run.json`: for each step `step`, `seconds` and `cpu_seconds`, and as far as it was
        planned `planned_seconds` and `planned_cpu_seconds`.
    """
    file, place = folder / "run.json", folder / PLAN_FILE
    run = read_json(file) if file.is_file() else {}
    planned = {entry["step"]: entry for entry in read_json(place)["steps"]} if place.is_file() else {}
    times = [{"step": step, **spent} for step, spent in reading.items()] + run.get("times", [])
    for entry in times:
        if found := planned.get(entry["step"]):
            entry.update({f"planned_{clock}": found[clock] for clock in _CLOCKS})
    if run:
        write_json(file, {**run, "times": times})
    return times
