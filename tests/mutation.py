"""Mutation testing: how many small faults, put into a package at random, the tests of that package notice.

    python -m tests.mutation memlens/results/statistics --sample 80 --seed 0

A seeded sample of the mutants that the operators of mutmut make is tried. mutmut's own command leaves out
decorated functions and tries all mutants or those named; here each runs in a fork of a process in which
torch and the other libraries are imported already, with only the tests that execute the mutated lines,
fastest first. The checkout is not written to: the fork imports the mutated source instead of the file.

Left out, as no test should see them: annotations, docstrings, and what errors, warnings and log entries say.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import pkgutil
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import libcst as cst
import libcst.matchers as m
import numpy as np
import pytest
from coverage import Coverage
from mutmut.mutation.mutators import mutation_operators, operator_string
from statsmodels.stats.proportion import proportion_confint

ROOT = Path(__file__).parent.parent
TESTS = {
    "memlens/results/statistics": ["results", "recall/test_sampling.py", "instruments/test_tasks.py"],
    "memlens/recall": [
        "recall",
        "studies/test_pairing.py",
        "sequences/test_memmaps.py",
        "sequences/test_bos.py",
    ],
    "memlens/sequences/readers": ["sequences"],
    "memlens/forward": [
        "forward",
        "recall/test_score.py",
        "sweeps/test_engine.py",
        "instruments/test_fast_equals_reference.py",
        "instruments/test_bounds.py",
        "sequences/test_bos.py",
    ],
    "memlens/store": ["store", "sweeps/test_shards.py", "sweeps/test_executors.py"],
    "memlens/forward/check": [
        "forward/test_check_model.py",
        "forward/test_check_parts.py",
        "forward/test_identity.py",
        "forward/test_kept_verdicts.py",
        "forward/test_tolerances.py",
        "sequences/test_bos.py",
    ],
    "memlens/recall/score_file.py": ["recall/test_score_file.py"],
    "memlens/results/statistics/racing.py": ["results/test_racing.py"],
    "memlens/sweeps/operators.py": ["sweeps/test_roofline.py"],
    "memlens/sweeps/roofline.py": ["sweeps/test_roofline.py"],
    "memlens/sweeps/shards.py": ["sweeps/test_shards.py"],
}
"""The tests of each package or module, besides its docstrings' examples. Slow ones are left out."""
TEXT = ("warn", "debug", "info", "warning", "error", "exception")
"""Functions of which the arguments are text for people."""
OPTIONS = ["-q", "-m", "not slow", "-p", "no:cacheprovider", "--no-header", "--tb=no", "--assert=plain"]
MOST_SECONDS = 60.0
"""Of tests for one mutant, on the processor, as the unchanged code takes."""
MOST_MEMORY = 12 * 2**30
"""Of a mutant, in bytes."""


@dataclass(frozen=True)
class Mutant:
    """A changed source file.

    Attributes:
        path: The file, from the root of the repository.
        source: Its changed text.
        lines: First and last changed line, from 1.
        diff: The change, to read.
    """

    path: str
    source: str
    lines: tuple[int, int]
    diff: str


class _Finder(cst.CSTVisitor):
    """Lists (node, changed node) of one module."""

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Decorator | cst.Raise | cst.Import | cst.ImportFrom):
            return False
        if m.matches(node, m.Expr(m.SimpleString() | m.ConcatenatedString())):
            return False
        if m.matches(node, m.Call(func=m.Attribute(attr=m.OneOf(*map(m.Name, TEXT))))):
            return False
        if m.matches(
            node, m.Assign(value=m.Call(func=m.Name("TypeVar") | m.Attribute(attr=m.Name("getLogger"))))
        ):
            return False
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                changed = list(operator(node))
                self.found += [
                    (node, new) for new in (changed[:1] if operator is operator_string else changed)
                ]
        return True


def _python_files(path: Path, pattern: str = "*.py") -> list[Path]:
    return sorted(path.rglob(pattern)) if path.is_dir() else [path]


def mutants(package: str, n: int, seed: int) -> tuple[list[Mutant], int]:
    """Return `n` mutants drawn from all of a package, and how many there are."""
    found: list[tuple[Path, cst.Module, cst.CSTNode, cst.CSTNode]] = []
    for path in _python_files(ROOT / package):
        module, finder = cst.parse_module(path.read_text()), _Finder()
        module.visit(finder)
        found += [(path, module, *pair) for pair in finder.found]
    drawn = random.Random(seed).sample(found, min(n, len(found)))
    return [_mutant(*one) for one in drawn], len(found)


def _mutant(path: Path, module: cst.Module, old: cst.CSTNode, new: cst.CSTNode) -> Mutant:
    before, name = module.code, str(path.relative_to(ROOT))
    changed = module.deep_replace(old, new)
    after = changed.code if isinstance(changed, cst.Module) else ""
    diff = list(difflib.unified_diff(before.splitlines(), after.splitlines(), name, name, lineterm="", n=0))
    blocks = difflib.SequenceMatcher(
        None, before.splitlines(), after.splitlines(), autojunk=False
    ).get_opcodes()
    lines = [
        k for kind, start, end, *_ in blocks if kind != "equal" for k in (start + 1, max(end, start + 1))
    ]
    return Mutant(name, after, (min(lines), max(lines)), "\n".join(diff[2:]))


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


class _Mutated(importlib.machinery.SourceFileLoader, importlib.abc.MetaPathFinder):
    """Imports one module from another text."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(_module(mutant.path), str(ROOT / mutant.path))
        self.source = mutant.source

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        return (
            importlib.util.spec_from_file_location(self.name, self.path, loader=self)
            if fullname == self.name
            else None
        )

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def _import_all() -> None:
    import memlens

    for module in pkgutil.walk_packages(memlens.__path__, "memlens."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def _import_libraries() -> None:
    """Import what memlens and its tests import, then forget memlens itself."""
    _import_all()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("memlens", "tests")]:
        del sys.modules[name]


def _in_fork(work: Callable[[], int], seconds: float, on_processor: int = resource.RLIM_INFINITY) -> int:
    """Return the code of `work` in a fork without output; -1 after so many seconds, also of computing."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (on_processor, on_processor))
            code = work()
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return -1 if code in (-signal.SIGXCPU, -signal.SIGKILL) else code
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


def _pytest(*args: str, plugins: Sequence[object] = ()) -> int:
    with tempfile.TemporaryDirectory() as place:
        return int(pytest.main([*OPTIONS, f"--basetemp={place}/t", *args], plugins=plugins))


class _Recorder:
    """A plugin of pytest: each test's seconds on the processor, and the lines that passing tests execute."""

    def __init__(self, package: str) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self.coverage = Coverage(
            data_file=None, include=[f"{ROOT / package}", f"{ROOT / package}/*"], config_file=False
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        start = time.process_time()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.process_time() - start

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)

    def lines(self, passed: Container[str]) -> dict[str, dict[int, list[str]]]:
        data = self.coverage.get_data()
        return {
            str(Path(file).relative_to(ROOT)): {
                line: [test for test in tests if test in passed]
                for line, tests in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }


def _record(package: str, tests: str) -> dict[str, Any]:
    """Return `seconds` by test, which `passed`, and the tests of each line (`lines`); kept for later."""
    state = hashlib.sha256(f"3 {OPTIONS}".encode())
    for path in [*_python_files(ROOT / tests), *_python_files(ROOT / package)]:
        state.update(path.read_bytes())
    kept = Path(tempfile.gettempdir()) / "memlens-mutation" / f"{state.hexdigest()[:24]}.json"

    def run() -> int:
        _import_all()  # or the first test to import a module would count as the test of all its definitions
        recorder = _Recorder(package)
        recorder.coverage.start()
        _pytest(tests, plugins=[recorder])
        recorder.coverage.stop()
        kept.parent.mkdir(exist_ok=True)
        passed = [test for test in recorder.seconds if test not in recorder.failed]
        found = {"seconds": recorder.seconds, "passed": passed, "lines": recorder.lines(set(passed))}
        kept.write_text(json.dumps(found))
        return 0

    if not kept.exists():
        _in_fork(run, 1800)
    return json.loads(kept.read_text())


def _spans(source: str, first: int, last: int) -> Iterator[range]:
    """Yield the lines of a change, then of each statement that encloses it, from the inside."""
    yield range(first, last + 1)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    around = [(node.lineno, node.end_lineno or node.lineno) for node in nodes]
    yield from (
        range(a, b + 1) for a, b in sorted(around, key=lambda s: s[1] - s[0]) if a <= first and last <= b
    )


class Tests:
    """What is known about the tests of a package."""

    def __init__(self, package: str) -> None:
        files = [
            path for name in TESTS[package] for path in _python_files(ROOT / "tests" / name, "test_*.py")
        ]
        self.files = [str(file.relative_to(ROOT)) for file in files]
        self.seconds: dict[str, float] = {}
        self.passed: set[str] = set()
        self.lines: dict[str, dict[int, list[str]]] = {}
        for tests in [*self.files, package]:
            found = _record(package, tests)
            self.seconds.update(found["seconds"])
            self.passed.update(found["passed"])
            for path, lines in found["lines"].items():
                for line, names in lines.items():
                    self.lines.setdefault(path, {}).setdefault(int(line), []).extend(names)

    def of(self, mutant: Mutant) -> list[str]:
        """Return the tests that execute the changed lines, fastest first, at most `MOST_SECONDS` of them.

        For a change outside functions these are the tests that execute any line of the module, or import it.
        """
        lines = self.lines.get(mutant.path, {})
        for span in _spans((ROOT / mutant.path).read_text(), *mutant.lines):
            if tests := {test for line in span for test in lines.get(line, ())}:
                break
        else:
            tests = {test for found in lines.values() for test in found}
            importing = {file for file in self.files if _module(mutant.path) in (ROOT / file).read_text()}
            tests |= {test for test in self.passed if test.partition("::")[0] in importing}
        chosen = sorted(tests, key=lambda test: (self.seconds[test], test))
        sums = np.cumsum([self.seconds[test] for test in chosen])
        return chosen[: 1 + int((sums[1:] <= MOST_SECONDS).sum())]


def tried(mutant: Mutant, tests: Tests) -> str:
    """Return "caught" where a test fails or none can run, "endless" where one does not end, or "SURVIVED"."""
    chosen = tests.of(mutant)

    def run() -> int:
        sys.meta_path.insert(0, _Mutated(mutant))
        return _pytest("-x", *chosen)

    most = 30 + 3 * sum(tests.seconds[test] for test in chosen)
    code = _in_fork(run, 20 * most, int(most)) if chosen else 0
    return {0: "SURVIVED", -1: "endless"}.get(code, "caught")


def main(args: list[str] | None = None) -> None:
    """Try a sample of a package's mutants; print those that survive, and the share that is caught."""
    parser = argparse.ArgumentParser(
        description="Put small faults into a package and see whether its tests notice."
    )
    parser.add_argument("package", choices=list(TESTS))
    parser.add_argument("--sample", type=int, default=80, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the sample to try again")
    given: Any = parser.parse_args(args)
    os.chdir(ROOT)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    _import_libraries()
    tests = Tests(given.package)
    drawn, n_all = mutants(given.package, given.sample, given.seed)
    chosen = range(len(drawn)) if given.only is None else given.only
    n_caught = 0
    for number in chosen:
        mutant, outcome = drawn[number], tried(drawn[number], tests)
        n_caught += outcome != "SURVIVED"
        said = f" {mutant.path}\n{mutant.diff}" if outcome == "SURVIVED" else ""
        sys.stdout.write(f"{number} {outcome}{said}\n")
        sys.stdout.flush()
    low, high = proportion_confint(n_caught, len(chosen), method="wilson")
    sys.stdout.write(f"{given.package}: {n_caught} of {len(chosen)} caught, of {n_all} mutants: ")
    sys.stdout.write(f"{n_caught / len(chosen):.0%} (95 % interval {low:.0%} to {high:.0%})\n")


if __name__ == "__main__":
    main()
