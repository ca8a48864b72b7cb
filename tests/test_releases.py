"""What TransformerLens 4.x does not run is proved there by other tests, and one run of everything stays."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import pytest

from memlens.cli import app
from tests.releases import (
    BUT,
    CALLS_IT,
    COMPOSED,
    NO_MODEL,
    PACKAGE,
    PARTS,
    TESTS,
    TO_ITS_END,
    WITHOUT_TRANSFORMER_LENS,
    runs_on_4,
    touches_no_model,
)


def functions_of(folder: str) -> list[tuple[Any, str]]:
    """Every test of a folder or file: its file and the name of its function."""
    path = TESTS / folder
    files = sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
    return [
        (file, node.name)
        for file in files
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def commands(found: Any, *before: str) -> Iterator[str]:
    """Every command that has none below it, such as "run localize"."""
    for name in (name for name in found if not name.startswith("-")):
        below = [*commands(found[name], *before, name)]
        yield from below or [" ".join((*before, name))]


@pytest.mark.parametrize("part", PARTS)
def test_what_the_rest_is_composed_of_runs_on_every_release(part: str) -> None:
    found = functions_of(part)
    assert len(found) > 50
    assert all(runs_on_4(*test) for test in found)
    examples = [*(PACKAGE / part).rglob("*.py")]
    assert examples
    assert all(runs_on_4(path, f"memlens.{part}") for path in examples)


def test_every_command_and_study_has_a_run_to_its_end_or_makes_no_model() -> None:
    assert {*TO_ITS_END} - {"explore"} | {*NO_MODEL} == {*commands(app)} - {"audit"}  # `run audit`, again
    assert not {*TO_ITS_END} & {*NO_MODEL}


@pytest.mark.parametrize("stays", [*TO_ITS_END.values(), *CALLS_IT])
def test_what_stays_exists_and_runs(stays: str) -> None:
    file, _, name = stays.partition("::")
    found = [test for test in functions_of(file) if test[1] == name or not name]
    assert found
    assert all(runs_on_4(*test) for test in found)


@pytest.mark.parametrize("listed", [*WITHOUT_TRANSFORMER_LENS, *COMPOSED])
def test_what_is_listed_is_there_and_is_left_out_but_for_what_stays(listed: str) -> None:
    found = functions_of(listed)
    ran = [test for test in found if runs_on_4(*test)]
    assert len(ran) < len(found)
    if listed in COMPOSED and (TESTS / listed).is_dir():
        assert ran


def test_files_that_use_models_are_off_the_first_list() -> None:
    for name in BUT:
        (folder, _) = name.split("/")
        assert folder in WITHOUT_TRANSFORMER_LENS
        assert functions_of(name)
        assert not touches_no_model(TESTS / name)
