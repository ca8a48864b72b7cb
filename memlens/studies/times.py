"""What the steps of a study take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

LOADING, READING = "loading of models", "reading"
"""The steps before a study. Models that a study loads itself count in its own steps."""

PLANNING = "planning"
"""What only a plan does."""

Times = Mapping[str, Mapping[str, float]]
"""By step: `seconds` by the clock, and `cpu_seconds` of the processor (of all threads)."""


class Stopwatch:
    """Adds up what each step takes, without the steps inside it.

    Attributes:
        times: By step, as in `Times`.
    """

    times: dict[str, dict[str, float]]

    def __init__(self) -> None:
        self.times = {}
        self._inside: list[dict[str, float]] = []

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time of what runs inside to that of a step."""
        start = clocks()
        self._inside.append(dict.fromkeys(start, 0.0))
        try:
            yield
        finally:
            inside, before = self._inside.pop(), self.times.get(step, {})
            spent = {clock: now - start[clock] for clock, now in clocks().items()}
            self.times[step] = {
                clock: before.get(clock, 0.0) + spent[clock] - inside[clock] for clock in spent
            }
            for clock in self._inside[-1] if self._inside else ():
                self._inside[-1][clock] += spent[clock]


def clocks() -> dict[str, float]:
    """Return the time now, by the clock and of the processor."""
    return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}
