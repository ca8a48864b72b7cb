"""The package as a whole: the names that `import memlens` offers, and what an installed copy holds."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import memlens as ml

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ml.__all__)
def test_every_public_name_loads_and_says_what_it_is(name: str) -> None:
    value = getattr(ml, name)
    if inspect.isfunction(value) or inspect.isclass(value) or inspect.ismodule(value):
        assert inspect.getdoc(value)


def test_the_names_are_the_same_to_users_type_checkers_and_completion() -> None:
    lazy = set(ml._HOMES) | {"__version__", "errors"}
    assert set(ml.__all__) == lazy
    assert len(ml.__all__) == len(lazy)
    assert lazy <= set(dir(ml))
    for_checkers = next(
        node for node in ast.parse(Path(ml.__file__).read_text()).body if isinstance(node, ast.If)
    )
    imported = {
        alias.name: node.module
        for node in for_checkers.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == ml._HOMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        ml.no_such_name  # noqa: B018


def test_the_version_is_the_installed_one() -> None:
    assert ml.__version__ == metadata.version("memlens")


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
