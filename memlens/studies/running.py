"""What every study needs of its folder: findings, steps of which one may fail, and what the run gave."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from memlens.errors import MemlensError
from memlens.report import Finding, RunDirectory
from memlens.sequences import SequenceSet

__all__ = ["StudyDirectory", "StudyRun", "at_most"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyRun:
    """What a study gave.

    Attributes:
        report: The HTML file.
        findings: In order.
        failures: Steps that failed, with their messages; the others are in the report.
    """

    report: Path
    findings: list[Finding]
    failures: dict[str, str] = field(default_factory=dict)


class StudyDirectory(RunDirectory):
    """A run's folder that goes on when a step of the study fails."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # pyright: ignore[reportArgumentType]
        self.findings: list[Finding] = []
        self.failures: dict[str, str] = {}

    def step(self, name: str, work: Callable[[], None]) -> None:
        """Run a step; if it fails, note it and go on: what is saved stays, what is left still runs."""
        try:
            work()
        except (MemlensError, RuntimeError, ValueError) as error:
            self.failed(name, error)

    def failed(self, name: str, error: BaseException) -> None:
        """Note that a step failed."""
        _LOG.warning("%s failed: %s", name, error)
        self.failures[name] = str(error)
        self.add_failure(name, error)

    def find(self, finding: Finding) -> None:
        """Note a finding."""
        self.findings.append(finding)
        self.add_finding(finding)

    def done(self) -> StudyRun:
        """Write the report and return what the study gave."""
        return StudyRun(self.finish(), self.findings, self.failures)


def at_most(seqs: SequenceSet, most: int | None, seed: int) -> SequenceSet:
    """Return the set, or a random choice of `most` of it in the set's order."""
    if most is None or len(seqs) <= most:
        return seqs
    rng = np.random.default_rng(seed)
    return seqs[np.sort(rng.choice(len(seqs), most, replace=False))]
