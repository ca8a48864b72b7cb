"""Commands made from options classes: what is typed, what a file says, and what a class holds are one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, PositiveInt

from memlens.cli import run as runs
from memlens.cli.commands import option_parameters
from memlens.errors import OptionError
from memlens.options import Flags, options_class
from memlens.report.model import Finding
from memlens.studies.registry import STUDIES, Call, Placement, Study
from memlens.studies.running import StudyDirectory, StudyRun
from tests.cli.test_commands import call


@options_class
class MyOptions:
    """Options of a study that a test defines."""

    depth: Annotated[PositiveInt, Flags("--deep")] = 2
    """How deep."""
    sizes: tuple[int, ...] = (1, 2)
    """Which sizes."""
    at_most: PositiveInt | None = 5
    """Most items."""
    models: list[str] = Field(default_factory=list)
    """Which models."""
    texts: list[str] = Field(default_factory=list)
    """Which texts."""
    loud: bool = True
    """Say it."""


@options_class
class MyInputs:
    """What the command reads."""

    word: str = "a"
    """A word."""

    def read(self, call: Call) -> dict[str, Any]:
        return {"model": None, "sequences": self.word}

    def plan(self, call: Call) -> Any:
        raise OptionError("there is no plan.")


def my_study(
    model: Any, sequences: str, out: Path, *, options: MyOptions, command: str, progress: bool
) -> StudyRun:
    folder = StudyDirectory(out, title=sequences, settings=vars(options), command=command, fresh=True)
    found.append(options)
    folder.find(Finding("Done", "It ran."))
    return folder.done()


found: list[MyOptions] = []
mine = Study(run=my_study, options=MyOptions, help="Mine.", inputs=MyInputs, where=Placement)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Run the study's command and return its options, or the code and the error."""
    monkeypatch.setattr(runs, "run_app", runs.App(name="run", result_action="return_value"))
    runs.run_app.command(runs.study_command(mine), name="mine")

    def run(*args: str) -> MyOptions:
        found.clear()
        runs.run_app(
            ["mine", "--out", str(tmp_path / "out"), "-q", *args], exit_on_error=False, print_error=False
        )
        return found[0]

    return run


def test_what_is_typed_is_what_the_class_holds(command: Any, tmp_path: Path) -> None:
    assert command() == MyOptions()
    typed = command("--deep", "3", "--sizes", "4,5", "--at-most", "none", "--no-loud")
    assert typed == MyOptions(depth=3, sizes=(4, 5), at_most=None, loud=False)
    assert command("--models", "a,b", "c", "--models", "d").models == ["a", "b", "c", "d"]
    assert command("--texts", "a, b", "c").texts == ["a, b", "c"]
    (tmp_path / "x,y").mkdir()
    assert command("--models", f"{tmp_path / 'x,y'}").models == [str(tmp_path / "x,y")]
    file = tmp_path / "options.yaml"
    file.write_text("depth: 7\nsizes: [9]\n")
    assert command("--options", str(file)) == MyOptions(depth=7, sizes=(9,))
    assert command("--options", str(file), "--depth", "8") == MyOptions(depth=8, sizes=(9,))
    file.write_text("deepth: 7\n")
    with pytest.raises(OptionError, match="Did you mean 'depth'"):
        command("--options", str(file))


def test_every_study_s_options_are_all_on_the_command_line() -> None:
    for name in STUDIES:
        study = STUDIES[name]
        shown = call("run", name, "--help")[1]
        for parameter in option_parameters(study.options):
            assert f"--{parameter.name.replace('_', '-')}" in shown, (name, parameter.name)


def test_a_refused_value_is_named_as_it_is_typed() -> None:
    code, _, err = call("run", "bypass", "-m", "zoo/pythia-s", "--out", "x", "--quartiles", "1")
    assert (code, err.strip()) == (2, "error: --quartiles '1' is not allowed: give 2 or more.")
