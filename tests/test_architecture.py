"""The folders are as docs/architecture.md says, and a value walks through them as it says."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from types import FrameType
from typing import Any, TypeVar

import pytest

import memlens as ml
from tests.devices import dev

PACKAGE = Path(ml.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
FACES = {"__init__", "__main__", "bypass", "detect", "edits", "lens", "stats", "tasks", "zoo"}
"""Modules at the top that only collect public names."""

T = TypeVar("T")
_PREFIX = f"{PACKAGE}/"


def _section(title: str) -> str:
    return PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]


def _rooms_walked() -> list[str]:
    """The rooms of the walk that the page describes, in its order."""
    return re.findall(r"^\| \d\. `([\w/]+)/` \|", _section("One value, from file to figure"), re.MULTILINE)


class Rooms:
    """Records which modules of memlens run code, as paths without suffix."""

    def __init__(self) -> None:
        self.entered: set[str] = set()

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(_PREFIX):
            self.entered.add(file.removeprefix(_PREFIX).removesuffix(".py"))

    def during(self, call: Callable[[], T]) -> T:
        sys.setprofile(self._note)
        try:
            return call()
        finally:
            sys.setprofile(None)


def _room(module: str) -> str:
    """The room of the page that a module is in: the innermost one that is listed, else its folder."""
    inside = [room for room in _rooms_walked() if f"{module}/".startswith(f"{room}/")]
    return max(inside, key=len, default=module.rpartition("/")[0] or module)


@pytest.mark.slow
def test_a_value_walks_through_the_rooms_that_the_page_lists() -> None:
    model = ml.load_model("zoo/pythia-s", device=dev())

    def walk(rooms: Rooms) -> list[set[str]]:
        entered: list[set[str]] = []

        def step(call: Callable[[], T]) -> T:
            rooms.entered.clear()
            value = rooms.during(call)
            entered.append({_room(module) for module in rooms.entered})
            return value

        seqs = step(lambda: ml.load_sequences("zoo", model))
        often = seqs[seqs.table["copies"].to_numpy() == 256][:4]
        recall = {"generate": False, "progress": False}
        memorized = step(lambda: ml.score_recall(model, often, **recall).memorized())
        result = step(lambda: ml.ablate_heads(model, memorized[:2], layers=[1], progress=False))
        step(result.plot)
        return entered

    walk(Rooms())  # imports run code too
    entered = walk(Rooms())
    tools = {"errors", "files", "models", "options", "registry", "store"}  # they hold no value of the walk
    walked = _rooms_walked()
    assert 1 < len(walked) <= 9
    assert set().union(*entered) - tools == set(walked)
    where = {room: [number for number, rooms in enumerate(entered) if room in rooms] for room in walked}
    assert [min(where[room]) for room in walked if room not in ("forward", "results")] == sorted(
        min(where[room]) for room in walked if room not in ("forward", "results")
    )
    assert entered[0] - tools == {"sequences/readers", "sequences"}
    assert entered[1] - tools == {"sequences", "recall", "forward"}
    assert entered[3] - tools == {"results", "figures"}


def test_the_page_lists_every_folder_and_no_other() -> None:
    rows = re.findall(r"^\| ((?:`[\w/.]+`(?:, )?)+) \|", _section("How data flows"), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([\w.]+?)(?:\.py|/)`", row)}
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - FACES
    assert listed == folders | modules


def test_the_page_gives_the_order_of_the_import_contract() -> None:
    import tomllib

    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(contract for contract in contracts if contract["type"] == "layers")["layers"]
    order = [sorted(part.strip() for part in layer.replace("memlens.", "").split("|")) for layer in layers]
    line = re.search(r"^`errors`.*?`cli`$", _section("The import contract"), re.MULTILINE | re.DOTALL)
    assert line
    listed = [sorted(re.findall(r"`(\w+)`", step)) for step in line.group().split("→")]
    assert listed == order[::-1]


def _renamed() -> list[tuple[str, str]]:
    section = _section("Where each former name is")
    return re.findall(
        r"^\| `((?:ml|memlens)\.[\w.]+)` \| `((?:ml|memlens)\.[\w.]+)` \|", section, re.MULTILINE
    )


@pytest.mark.parametrize(("before", "now"), _renamed())
def test_a_former_name_is_where_the_page_says(before: str, now: str) -> None:
    assert before != now
    parts = re.sub(r"^ml\.", "memlens.", now).split(".")
    value: Any = ml if len(parts) == 2 else resolve_name(".".join(parts[:-1]))
    assert hasattr(value, parts[-1])


def test_the_page_lists_the_former_names() -> None:
    assert len(_renamed()) > 90


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_only_public_faces_list_their_names() -> None:
    """A leaf module's public names are those without an underscore; pyright checks that."""
    faces = {"__init__.py", *(f"{name}.py" for name in FACES)}
    with_list = [
        str(path.relative_to(PACKAGE))
        for path in _modules()
        if any(
            isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets)
            for node in ast.parse(path.read_text(encoding="utf-8")).body
        )
        and not (path.name == "__init__.py" or (path.parent == PACKAGE and path.name in faces))
    ]
    assert with_list == []


SMALL = {
    "instruments": "holds the folders of the instruments",
    "instruments/patch": "pairs of runs, activation patching and path patching",
    "models/zoo": "holds the checkpoints of the zoo; its code is in organisms/training",
    "organisms": "its corpus and training are folders",
    "store": "fingerprints, a keyed folder, and a sweep's parts in one",
    "studies": "holds a folder per study",
    "studies/localization": "the smallest study",
}
"""Folders with fewer than four modules, with the reason."""

LARGE: dict[str, str] = {
    "forward": "everything that runs a model's blocks; hooks, trunk and blocks each have their own readers",
    "benchmark": "one module per step, from a localizer's scores to the page that shows them",
    "instruments/detect": "one module per detector, as the guide lists them",
}
"""Folders with more than thirteen modules, with the reason."""


def test_folders_hold_four_to_thirteen_modules() -> None:
    """Counted without `__init__.py`; the top holds the public faces and is not counted."""
    for folder in sorted({path.parent for path in _modules() if path.parent != PACKAGE}):
        name = str(folder.relative_to(PACKAGE))
        held = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        assert held >= 4 or name in SMALL, f"{name} holds {held}"
        assert held <= 13 or name in LARGE, f"{name} holds {held}"
