"""The documentation's Python runs, and the stored tutorials are fit to be shown."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import nbformat
import pytest

import memlens as ml

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page for folder in ("docs", "docs/how-to", "docs/studies") for page in (ROOT / folder).glob("*.md")
)
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))


def _python_blocks(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


RUN = [page for page in PAGES if page.parent.name != "studies" and _python_blocks(page)]
"""Pages whose Python runs here; the studies take minutes, and have tests of their own."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_code_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in _python_blocks(page):
        exec(compile(block, str(page.relative_to(ROOT)), "exec"), names)


def test_enough_pages_hold_code_that_runs() -> None:
    assert len(RUN) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_links_only_to_pages_that_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    made = {(ROOT / "docs/tutorials" / path.name).resolve() for path in TUTORIALS}  # copied by docs/conf.py
    missing = [link for link in links if not (page.parent / link).exists()]
    assert [link for link in missing if (page.parent / link).resolve() not in made] == []


def test_what_the_template_imports_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a public name, or among the modules for extensions; both are promised in docs/stability.md."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    names = importlib.import_module("names")
    conf = ast.parse((ROOT / "docs" / "conf.py").read_text(encoding="utf-8"))
    (shown,) = (
        ast.literal_eval(node.value)
        for node in conf.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "EXTENDING" and node.value
    )
    known = {id(value) for value in names.pages()}
    for module, chosen in shown.items():
        found = importlib.import_module(module)
        known |= {id(getattr(found, name)) for name in chosen or names.public(found)}
    used = {
        (node.module or "", alias.name)
        for file in (ROOT / "examples" / "memlens-example").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("memlens.")
        for alias in node.names
    }
    assert len(used) > 25
    found = {(module, name): resolve_name(f"{module}:{name}") for module, name in used}
    unknown = [key for key, value in found.items() if id(value) not in known]
    assert [(module, name) for module, name in unknown if names.described(found[module, name])] == []
    assert {module for module, _ in unknown} <= {*shown}  # constants and names of types


def test_every_public_name_has_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its own docstring, or in that of a function that returns it; they run as doctests."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    assert importlib.import_module("names").without_example() == []


def test_a_tutorial_has_a_colab_badge_once_there_is_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    tutorials = importlib.import_module("run_tutorials")
    notebook = nbformat.read(TUTORIALS[0], as_version=4)
    plain = [cell.source for cell in tutorials.with_badge(notebook, TUTORIALS[0].name, "").cells]
    for _ in range(2):  # again is the same
        notebook = tutorials.with_badge(notebook, TUTORIALS[0].name, "https://github.com/someone/memlens")
    badge, install, *rest = (cell.source for cell in notebook.cells)
    assert (
        f"colab.research.google.com/github/someone/memlens/blob/main/tutorials/{TUTORIALS[0].name}" in badge
    )
    assert '%pip install -q "memlens @ git+https://github.com/someone/memlens"' in install
    assert rest == plain
    nbformat.validate(notebook)
    if not tutorials.repository():
        assert all("colab" not in path.read_text(encoding="utf-8") for path in TUTORIALS)


def _texts() -> dict[str, str]:
    """Every page and every notebook's cells, by name; of the table of former names only what they are now."""
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (*PAGES, ROOT / "README.md")}
    pages["architecture"] = re.sub(r"^\| `[\w.]+` \| (?=`m)", "", pages["architecture"], flags=re.MULTILINE)
    for path in TUTORIALS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        pages[path.stem] = "\n".join("".join(cell["source"]) for cell in cells)
    return pages


NOT_NAMES = {"memlens.plugins"}
"""What looks like a name of memlens and is none: the group of entry points."""


@pytest.mark.parametrize(("page", "text"), _texts().items(), ids=_texts())
def test_every_name_of_memlens_on_a_page_exists(page: str, text: str) -> None:
    found = re.findall(r"(?<![\w./-])(?:ml|memlens)(?:\.[A-Za-z]\w*)+", text)
    for name in sorted(set(found) - NOT_NAMES):
        steps = name.split(".")[1:]
        value: Any = ml
        for number, step in enumerate(steps):
            if not hasattr(value, step) and name.startswith("memlens."):
                value = resolve_name(".".join(["memlens", *steps[: number + 1]]))
            else:
                assert hasattr(value, step), f"{page} names {name}"
                value = getattr(value, step)


@pytest.mark.parametrize(("page", "text"), _texts().items(), ids=_texts())
def test_what_a_page_imports_from_memlens_exists(page: str, text: str) -> None:
    for module, names in re.findall(r"^\s*from (memlens(?:\.\w+)*) import ([\w, ]+)", text, re.MULTILINE):
        for name in re.split(r",\s*", re.sub(r" as \w+", "", names)):
            assert hasattr(resolve_name(module), name), f"{page}: from {module} import {name}"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_stored_tutorial_is_whole_small_and_says_nothing_of_the_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    assert any(
        "application/vnd.plotly.v1+json" in o.get("data", {}) for cell in cells for o in cell["outputs"]
    )
    assert len(text) < 1_500_000
    assert not re.search(r"/(home|root|tmp|Users|work)/", text)
