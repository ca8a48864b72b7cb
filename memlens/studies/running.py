"""What every study needs of its folder: findings, steps of which one may fail, and what the run gave."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from memlens.errors import MemlensError, OtherRunError
from memlens.files import write_atomically
from memlens.recall.score import score_recall
from memlens.recall.scores import RecallScores
from memlens.report.model import Finding
from memlens.report.run_directory import RunDirectory
from memlens.sequences.set import SequenceSet
from memlens.store.fingerprint import fingerprint, model_fingerprint, sequences_fingerprint

_LOG = logging.getLogger(__name__)

_T = TypeVar("_T")


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
        """Run a step; if it fails for any reason, record that and go on with the other steps."""
        try:
            work()
        except Exception as error:
            self.failed(name, error)

    def place(self, name: str) -> Path:
        """Return the folder that keeps a sweep's parts."""
        return Path(self.path) / "sweeps" / name.replace(" ", "_").replace("/", "_")

    def kept(self, name: str, work: Callable[..., _T]) -> _T:
        """Run a sweep that keeps its parts in `place(name)`, so that a second run goes on with it.

        Where another sweep stands there, of other options, sequences or weights, it is left alone: the next
        free name is taken (`name-2`, …), and found again by a run with these options.

        Args:
            name: Of the sweep.
            work: Runs it, given `out=`.
        """
        number = 1
        while True:
            try:
                return work(out=self.place(name if number == 1 else f"{name}-{number}"))
            except OtherRunError as error:
                _LOG.info("%s", error)
                number += 1

    def scored(self, name: str, model: Any, seqs: SequenceSet, **options: Any) -> RecallScores:
        """Score recall, or read the scores that an earlier run kept.

        They are kept by the weights, the edits that are held on the model, the sequences and the options.

        Args:
            name: Of the folder that keeps them.
            model: A TransformerLens model.
            seqs: What is scored.
            **options: Of `score_recall`.
        """
        about = sorted((key, value) for key, value in options.items() if key != "progress")
        place = self._keyed(name, model, seqs, about, ".parquet")
        if place.is_file():
            return RecallScores.load(place)
        scores = score_recall(model, seqs, **options)
        scores.save(place)
        return scores

    def stored(
        self, name: str, model: Any, seqs: SequenceSet, options: Any, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Make a JSON object, or read what an earlier run kept of these weights, sequences and options."""
        place = self._keyed(name, model, seqs, options, ".json")
        if place.is_file():
            return json.loads(place.read_text(encoding="utf-8"))
        made = make()
        write_atomically(place, json.dumps(made).encode())
        return made

    def _keyed(self, name: str, model: Any, seqs: SequenceSet, about: Any, suffix: str) -> Path:
        key = fingerprint([model_fingerprint(model), sequences_fingerprint(seqs), about])
        place = self.place(name) / f"{key}{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def failed(self, name: str, error: BaseException) -> None:
        """Record that a step failed: an unforeseen error with its type, and its traceback in the log."""
        unforeseen = not isinstance(error, (MemlensError, RuntimeError, ValueError))
        _LOG.warning("%s failed: %s", name, error, exc_info=error if unforeseen else None)
        self.failures[name] = f"{type(error).__name__}: {error}" if unforeseen else str(error)
        self.add_failure(name, self.failures[name])

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
