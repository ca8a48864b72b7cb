"""What every study needs: a folder with findings, steps that may fail, and the words of its report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import yaml

from memlens.errors import MemlensError, OtherRunError, UnfinishedError
from memlens.files import exact_json, parsed_exact, parsing, write_atomically
from memlens.recall.score import score_recall
from memlens.recall.scores import GROUPS, RecallScores
from memlens.report.model import Finding
from memlens.report.run_directory import RunDirectory
from memlens.results.result import Result
from memlens.results.statistics.estimates import Estimate
from memlens.results.storage import load_result
from memlens.sequences.set import SequenceSet
from memlens.store.claims import Claims
from memlens.store.fingerprint import fingerprint, model_fingerprint
from memlens.store.sharing import parse_part
from memlens.studies.times import Stopwatch

_LOG = logging.getLogger(__name__)

_K = TypeVar("_K")
_T = TypeVar("_T")


@dataclass(frozen=True)
class StudyRun:
    """What a study returns.

    Attributes:
        report: The HTML file.
        findings: In order.
        failures: The messages of steps that failed. The report names them; steps that do not depend on them
            still run.
        tables: What the command prints besides the findings, by title.
        facts: What it tells other programs besides (`--json`).
        exceeded: Which limit of the options was exceeded, in one sentence: the command then exits with 3.
    """

    report: Path
    findings: list[Finding]
    failures: dict[str, str] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    exceeded: str = ""


class StudyDirectory(RunDirectory):
    """A run's folder that continues when a step of the study fails.

    Attributes:
        hide: Takes out of messages what must not be written; None: nothing.
        sharing: `part` or `executor` for the sweeps that are kept (see `memlens.sweep`); empty: neither.
        keeps_in: The folder of what a second run continues from; `sweeps` in the run's folder.
    """

    hide: Callable[[str], str] | None
    sharing: dict[str, Any]
    keeps_in: Path

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # pyright: ignore[reportArgumentType]
        self.hide, self.sharing, self._kept = None, {}, 0
        self.keeps_in = self.path / "sweeps"
        self.findings: list[Finding] = []
        self.failures: dict[str, str] = {}
        self._watch = Stopwatch()

    def step(self, name: str, work: Callable[[], None], *, part: str | None = None) -> None:
        """Run a step; if it fails for any reason, record that and continue with the next.

        Args:
            name: Of the step.
            work: What it does.
            part: The name under which its time is added up, if not its own.
        """
        with self.timed(part or name):
            try:
                work()
            except Exception as error:
                self.failed(name, error)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Record what a step takes, without the steps inside it."""
        try:
            with self._watch.timed(step):
                yield
        finally:
            self.add_time(step, self._watch.times[step])

    def place(self, name: str) -> Path:
        """Return the folder that keeps a sweep's parts."""
        return self.keeps_in / name.replace(" ", "_").replace("/", "_")

    def kept(self, name: str, work: Callable[..., _T]) -> _T:
        """Run a sweep that keeps its parts in `place(name)`, so that a second run resumes it.

        If that folder holds a sweep with other options, sequences or weights, it is left alone: the next free
        name is used (`name-2`, …), and a run with these options finds it again.

        Args:
            name: Of the sweep.
            work: Runs it, given `out=`.
        """
        number, sharing = 1, {**self.sharing}
        if (share := parse_part(self.sharing.get("part", "auto"))) is not None:
            # else the first task would do all sweeps of a single part
            sharing["part"] = (share[0] + self._kept) % share[1], share[1]
        self._kept += 1
        while True:
            try:
                return work(out=self.place(name if number == 1 else f"{name}-{number}"), **sharing)
            except OtherRunError as error:
                _LOG.info("%s", error)
                number += 1

    def kept_each(self, works: Mapping[_K, tuple[str, Callable[..., _T]]]) -> dict[_K, _T]:
        """Run several sweeps by `kept`; missing parts of one do not keep the others from being run.

        Args:
            works: By any key: the sweep's name, and what runs it.

        Raises:
            UnfinishedError: Parts of some are missing.
        """
        found: dict[_K, _T] = {}
        with unfinished_together() as attempt:
            for key, (name, work) in works.items():
                with attempt():
                    found[key] = self.kept(name, work)
        return found

    def scored(self, name: str, model: Any, seqs: SequenceSet, **options: Any) -> RecallScores:
        """Score recall, or read the scores of an earlier run.

        They are identified by the weights, the interventions active on the model, the sequences and the
        options.

        Args:
            name: Of the folder for these scores.
            model: A TransformerLens model.
            seqs: The sequences.
            **options: Of `score_recall`.
        """
        about = sorted((key, value) for key, value in options.items() if key != "progress")
        place = self._keyed(name, model, seqs, about, ".parquet")
        return _once(
            place, RecallScores.load, lambda: score_recall(model, seqs, **options), RecallScores.save
        )

    def stored(
        self, name: str, model: Any, seqs: SequenceSet, options: Any, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Make a JSON object, or read that of an earlier run with the same weights, sequences and options."""
        return _once(self._keyed(name, model, seqs, options, ".json"), _read_exact, make, _write_exact)

    def result(
        self, name: str, model: Any, seqs: SequenceSet, options: Any, make: Callable[[], Result]
    ) -> Result:
        """Make a result, or read that of an earlier run, as `stored` does."""
        place = self._keyed(name, model, seqs, options, ".nc")
        return _once(place, partial(load_result, lazy=False), make, Result.save)

    def _keyed(self, name: str, model: Any, seqs: SequenceSet, about: Any, suffix: str) -> Path:
        # The results name the sequences and their groups, which are no part of a set's fingerprint.
        named = [seqs.ids, {name: seqs.table[name].tolist() for name in GROUPS if name in seqs.table}]
        key = fingerprint([model_fingerprint(model), fingerprint(seqs), named, about])
        return self.place(name) / f"{key}{suffix}"

    def failed(self, name: str, error: BaseException) -> None:
        """Record that a step failed; an unexpected error with its type, and its traceback in the log."""
        unexpected = not isinstance(error, MemlensError)
        words = str(error) if self.hide is None else self.hide(str(error))
        trace = error if unexpected and self.hide is None else None  # which would repeat the message
        _LOG.warning("%s failed: %s", name, words, exc_info=trace)
        self.failures[name] = f"{type(error).__name__}: {words}" if unexpected else words
        self.add_failure(name, self.failures[name])

    def find(self, finding: Finding) -> None:
        """Record a finding."""
        self.findings.append(finding)
        self.add_finding(finding)

    def done(self) -> StudyRun:
        """Write the report and return what the study found."""
        with self.timed("report"):
            report = self.finish()
        return StudyRun(report, self.findings, self.failures)


def _once(
    place: Path, read: Callable[[Path], _T], make: Callable[[], _T], save: Callable[[_T, Path], object]
) -> _T:
    """Return what a file holds, or make it and save it there."""
    if place.is_file():
        return read(place)
    made = make()
    save(made, place)
    return made


def _read_exact(place: Path) -> dict[str, Any]:
    with parsing(place):
        return parsed_exact(place.read_text(encoding="utf-8"), dict[str, Any])


def _write_exact(made: Mapping[str, Any], place: Path) -> None:
    write_atomically(place, exact_json(made).encode())


@contextmanager
def unfinished_together() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Try several things that may lack parts of other workers, and raise one error for all at the end.

    Yields:
        A function that returns a context for each attempt.

    Raises:
        UnfinishedError: After the last attempt, if parts were missing in one.
    """
    missing: list[str] = []
    messages: list[str] = []

    @contextmanager
    def attempt() -> Iterator[None]:
        try:
            yield
        except UnfinishedError as error:
            missing.extend(error.missing)
            messages.append(str(error))

    yield attempt
    if messages:
        raise UnfinishedError("\n".join(messages), missing)


@contextmanager
def last_of_all(folder: str | Path) -> Iterator[None]:
    """Claim the report of a run whose parts are done, for the worker that writes it.

    Raises:
        UnfinishedError: Another worker writes it.
    """
    with Claims(folder) as claims, claims.taking("report") as mine:
        if not mine:
            raise UnfinishedError(f"all parts are done; the report of {folder} is being written elsewhere.")
        yield


class Texts:
    """The words of a study's report: the `texts.yaml` in the folder of its modules.

    Args:
        module: The file of a module (`__file__`).
    """

    def __init__(self, module: str) -> None:
        text = Path(module).with_name("texts.yaml").read_text(encoding="utf-8")
        self._entries: dict[str, Any] = yaml.safe_load(text)

    def __getitem__(self, part: str) -> Any:
        return self._entries[part]

    def summary(self, **values: Any) -> dict[str, str]:
        """Return what the study says of itself in the report's five sentences, with its values filled in."""
        return {key: text.format(**values) for key, text in self["summary"].items()}

    def finding(
        self, name: str, found: Estimate | None = None, /, *, control: str | None = None, **values: Any
    ) -> Finding:
        """Return a finding, with its texts filled in.

        Args:
            name: Of the entry in `findings`, with the keys `title` and `statement`, and optionally `unit`,
                `control`, `plain` and `beside` (see `Finding`).
            found: The number, which the texts call `{found}`.
            control: What the number is compared with. The entry's own `control` is the text around
                `{control}`, which is left out without it, as is a `beside` that names it.
            **values: What else the texts name.
        """
        entry = {"unit": "", "control": "{control}", **self["findings"][name]}
        words = {key: text.format(found=found, control=control, **values) for key, text in entry.items()}
        if not control and "{control}" in entry["control"]:
            words["control"] = None
        if not control and "{control}" in entry.get("beside", ""):
            words["beside"] = ""
        return Finding(**words) if found is None else Finding.of(found=found, **words)


def spoken(found: Mapping[str, Estimate], unit: str = "", *, skip: str | None = None) -> str | None:
    """Return several estimates in one line; None if there are none but `skip`."""
    unit = f" {unit}" if unit else ""
    parts = [f"{name} {value}{unit}, n = {value.n}" for name, value in found.items() if name != skip]
    return "; ".join(parts) or None


def at_most(seqs: SequenceSet, most: int | None, seed: int) -> SequenceSet:
    """Return the set, or a random choice of `most` of its sequences, in the set's order."""
    if most is None or len(seqs) <= most:
        return seqs
    rng = np.random.default_rng(seed)
    return seqs[np.sort(rng.choice(len(seqs), most, replace=False))]


def matched_with(chosen: SequenceSet, controls: SequenceSet) -> SequenceSet:
    """Return the controls that are matched to chosen sequences; all of them if `matched_to` is not known."""
    if "matched_to" not in controls.table:
        return controls
    wanted = controls.table["matched_to"].astype(str).isin(chosen.table["id"].astype(str))
    return controls[np.flatnonzero(wanted)]
