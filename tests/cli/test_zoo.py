"""`memlens zoo`, on recipes as small as the tests need."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from memlens import cli
from memlens.errors import OptionError
from memlens.models.zoo import zoo_path
from memlens.organisms.training import recipes, zoo
from tests.organisms.conftest import TINY, TINY_CORPUS

Call = Callable[..., str]


@pytest.fixture
def call(corpora_kept: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command with an empty cache; olmo1-xs and olmo2-xs are tiny."""
    monkeypatch.setenv("MEMLENS_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("olmo1-xs", "olmo2-xs"):
        shape = recipes.ModelSpec(name.removesuffix("-xs"), d_model=16, n_layers=1, n_heads=2)
        spec = recipes.OrganismSpec(name, shape, TINY_CORPUS, TINY.training)
        monkeypatch.setitem(recipes.ZOO, name, spec)

    def run(*args: str) -> str:
        with redirect_stdout(StringIO()) as out:
            cli.app(["zoo", *args], exit_on_error=False)
        return out.getvalue()

    return run


def test_several_models_train_one_after_the_other_and_are_then_skipped(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("olmo1-xs", "olmo2-xs")
    first = call("train", *names, "--steps", "3", "--device", "cpu", "-q")
    assert [line.split(":")[0] for line in first.splitlines()] == ["zoo/olmo1-xs", "zoo/olmo2-xs"]
    assert all((tmp_path / "zoo" / name / "model.safetensors").is_file() for name in names)
    monkeypatch.setattr(zoo, "train", None)  # nothing may be trained again
    assert call("train", *names, "--steps", "3", "--device", "cpu", "-q") == first


def test_one_model_shows_its_curve_and_may_have_its_folder(call: Call, tmp_path: Path) -> None:
    shown = call("train", "olmo1-xs", "--steps", "2", "--out", str(tmp_path / "mine"), "-q")
    assert "Exact match by copies" in shown
    assert (tmp_path / "mine" / "README.md").is_file()
    with pytest.raises(OptionError, match="the folder of one model, but 2 were selected"):
        call("train", "olmo1-xs", "olmo2-xs", "--out", str(tmp_path / "mine"))


def test_a_family_and_size_are_trained_and_bundled_ones_are_not(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def instead(name: str, *_: object, **__: object) -> Path:
        asked.append(name)
        if name == "olmo1-m":
            raise OptionError("far enough")
        return zoo_path("pythia-xs")

    monkeypatch.setattr(zoo, "train_zoo_model", instead)
    with pytest.raises(OptionError, match="far enough"):
        call("train", "--family", "olmo1", "--size", "all")
    assert asked == ["olmo1-xs", "olmo1-m"]  # olmo1-s is bundled
    monkeypatch.undo()
    with pytest.raises(OptionError, match="family='olmo'"):
        call("train", "--family", "olmo")


def test_the_list_tells_where_each_model_is(call: Call) -> None:
    call("train", "olmo1-xs", "--steps", "2", "-q")
    lines = {line.split()[1]: line for line in call("list").splitlines() if "zoo/" in line}
    assert "bundled" in lines["zoo/pythia-s"]
    assert "1,452,032" in lines["zoo/pythia-s"]
    assert "cached" in lines["zoo/olmo1-xs"]
    assert "recipe" in lines["zoo/olmo3-m"]
    assert len(lines) == len(recipes.ZOO)
