"""The package as a whole: the names that `import memlens` offers, and what an installed copy holds."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import memlens as ml

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ml.__all__)
def test_every_public_name_loads_and_says_what_it_is(name: str) -> None:
    value = getattr(ml, name)
    if inspect.isfunction(value) or inspect.isclass(value) or inspect.ismodule(value):
        assert inspect.getdoc(value)


def test_there_is_one_list_of_public_names() -> None:
    """`__init__.pyi` is what users' type checkers, completion and `import memlens` all read."""
    stub = ast.parse(Path(ml.__file__).with_suffix(".pyi").read_text())
    listed = {a.asname for node in stub.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert listed == set(ml.__all__) <= set(dir(ml))
    functions_and_classes = [n for n in ml.__all__ if not inspect.ismodule(getattr(ml, n))]
    assert len(functions_and_classes) <= 41


@pytest.mark.parametrize(
    "name",
    [
        "bypass",
        "detect",
        "edits",
        "instruments",
        "lens",
        "recall",
        "sequences",
        "stats",
        "studies",
        "tasks",
        "zoo",
    ],
)
def test_every_name_of_a_namespace_loads_and_says_what_it_is(name: str) -> None:
    space = getattr(ml, name)
    assert space.__all__
    for each in space.__all__:
        value = getattr(space, each)
        assert not inspect.ismodule(value), f"ml.{name}.{each} is shadowed by a module of that name"
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="No memlens attribute no_such_name"):
        ml.no_such_name  # noqa: B018


def test_the_version_is_the_installed_one() -> None:
    assert ml.__version__ == metadata.version("memlens")


def test_the_citation_has_the_version_that_the_package_defines_once() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    assert str(cited) == ml.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" in project["dynamic"]


def test_importing_memlens_is_silent_and_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "transformer_lens", "plotly", "xarray", "pandas")
    code = f"import sys, memlens; sys.stderr.write(str([m for m in {heavy} if m in sys.modules]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == ""
    assert found.stderr == "[]"


@pytest.mark.slow
def test_importing_every_module_prints_nothing() -> None:
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted((ROOT / "memlens").rglob("*.py"))
        if file.name != "__main__.py"
    ]
    code = f"import importlib; [importlib.import_module(m) for m in {modules}]"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == ""


@pytest.mark.slow
def test_a_built_copy_holds_every_file_of_the_package(tmp_path: Path) -> None:
    options = ["--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("memlens-*.whl")
    assert wheel.stat().st_size < 8e6
    with zipfile.ZipFile(wheel) as built:
        held = {name for name in built.namelist() if name.startswith("memlens/")}
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "memlens").rglob("*") if file.is_file()}
    assert held == {name for name in files if "__pycache__" not in name}
    assert {
        "memlens/py.typed",
        "memlens/models/zoo/pythia-s/model.safetensors",
        "memlens/models/zoo/pythia-s/sequences.parquet",
        "memlens/report/assets/report.html.j2",
    } <= held
