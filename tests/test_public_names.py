"""The names that `import memlens` offers."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import memlens as ml


@pytest.mark.parametrize("name", ml.__all__)
def test_every_public_name_loads_and_says_what_it_is(name: str) -> None:
    value = getattr(ml, name)
    if inspect.isfunction(value) or inspect.isclass(value) or inspect.ismodule(value):
        assert inspect.getdoc(value)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        ml.no_such_name  # noqa: B018


def test_importing_memlens_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "plotly", "xarray")
    code = f"import sys, memlens; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
