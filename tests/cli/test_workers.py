"""`--workers` and `--scheduler`: what is refused, what is started, and that it ends with the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import memlens as ml
from memlens.cli.workers import executor_of
from memlens.errors import OptionError
from tests.cli.test_commands import call
from tests.devices import dev
from tests.small import ragged

distributed = pytest.importorskip("distributed")


def test_what_workers_cannot_do_is_one_line(recited: tuple[str, str], tmp_path: Path) -> None:
    model, rows = recited
    place = ("-m", model, "--out", str(tmp_path / "run"))
    localize = ("run", "localize", *place, "-s", rows)
    for command, words in (
        ((*localize, "--workers", "0"), "--workers 0 does no work: give 1 or more."),
        ((*localize, "--workers", "2", "--part", "0/2"), "--workers and --part contradict each other"),
        (
            (*localize, "--workers", "2", "--scheduler", "a"),
            "--workers and --scheduler contradict each other",
        ),
        (
            (*localize, "--plan", "--slurm", "--workers", "2"),
            "writes a script with --part: leave out --workers",
        ),
        (
            ("run", "idioms", *place, "--workers", "2"),
            "count the text again for its share of them: run it without --workers (localize",
        ),
        (
            ("benchmark", "run", "mini", "--scheduler", "a", "--part", "auto"),
            "--scheduler and --part contradict",
        ),
    ):
        code, _, error = call(*command)
        assert code == 2
        assert words in " ".join(error.split())
    assert not (tmp_path / "run").exists()


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(OptionError, match=r"--scheduler needs Dask .* 'memlens\[dask\]'"),
        executor_of(None, "a", None),
    ):
        raise AssertionError
    with executor_of(None, None, "0/2") as executor:
        assert executor is None


class Fake:
    """A cluster and a client that write down what happens to them."""

    log: list[Any]

    def __init__(self, *given: Any, **options: Any) -> None:
        self.log.append((given, options))
        if given == ("nowhere",):
            raise OSError("timed out")

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append("closed")

    def run(self, function: Any) -> None:
        self.log.append(function.__name__)

    def nthreads(self) -> dict[str, int]:
        return {"a": 1, "b": 1}

    def get_executor(self) -> str:
        return "executor"


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    log: list[Any] = []
    monkeypatch.setattr(Fake, "log", log, raising=False)
    for name in ("Client", "LocalCluster"):
        monkeypatch.setattr(distributed, name, Fake)
    return log


def test_ctrl_c_closes_the_workers(fakes: list[Any]) -> None:
    with pytest.raises(KeyboardInterrupt), executor_of(3, None, None) as executor:
        raise KeyboardInterrupt(executor)
    assert fakes[0][1]["n_workers"] == 3
    assert fakes[2:] == ["_ignore_interrupts", "closed", "closed"]


def test_a_running_scheduler_is_asked(fakes: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with executor_of(None, "tcp://there:8786", None) as executor:
        assert executor == "executor"
    assert fakes[0][0] == ("tcp://there:8786",)
    assert fakes[1:] == ["closed"]
    with (
        pytest.raises(OptionError, match="no Dask scheduler answers at 'nowhere'"),
        executor_of(None, "nowhere", None),
    ):
        raise AssertionError


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tiny_folder: Any, tmp_path: Path) -> None:
    """They have to start and to import everything, which takes some twenty seconds."""
    model = ml.load_model(tiny_folder("gpt_neox"), device=dev())
    options: dict[str, Any] = {"mode": "zero", "batch_size": 1, "progress": False}
    with executor_of(2, None, None) as executor:
        found = ml.ablate_heads(model, ragged(), out=tmp_path / "many", executor=executor, **options)
    whole = ml.ablate_heads(model, ragged(), out=tmp_path / "one", **options)
    assert found.data.drop_attrs().identical(whole.data.drop_attrs())
    parts = sorted((tmp_path / "one").glob("*.npz"))
    assert len(parts) == 4
    for part in parts:
        assert part.read_bytes() == (tmp_path / "many" / part.name).read_bytes()
