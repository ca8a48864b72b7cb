"""The registry itself: who registered a name, and what may be registered."""

from __future__ import annotations

import types
from typing import Any

import pytest

import memlens as ml
from memlens.errors import OptionError
from memlens.models.families import FAMILIES
from memlens.registry import Registry
from memlens.report.bibliography import REFERENCES
from memlens.results.kinds import KINDS
from memlens.sequences.named import NAMED_SETS
from memlens.studies.registry import STUDIES

REGISTRIES: tuple[Registry[Any], ...] = (
    ml.METRICS, KINDS, FAMILIES, NAMED_SETS, REFERENCES, STUDIES, ml.instruments.INSTRUMENTS,
    ml.benchmark.LOCALIZERS,
)  # fmt: skip


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.what)
def test_an_object_of_another_class_is_refused(registry: Registry[Any]) -> None:
    with pytest.raises(OptionError, match=f"{registry.what} 'mine' is 'nothing': register an object of"):
        registry.add("mine", "nothing")
    assert "mine" not in registry


def test_a_taken_name_says_who_has_it() -> None:
    with pytest.raises(OptionError, match=r"kind of result 'sweep' is registered already by memlens:"):
        KINDS.add("sweep", KINDS["recall"])
    shapes = Registry[int]("shape")
    for name, sides in (("first_plugin", 3), ("second_plugin.shapes", 4)):
        module = types.ModuleType(name)
        vars(module).update(shapes=shapes, sides=sides)
        add = "shapes.add('triangle', sides)"
        if sides == 3:
            exec(add, vars(module))
        else:
            with pytest.raises(OptionError, match="'triangle' is registered already by first_plugin: choose"):
                exec(add, vars(module))
    assert shapes["triangle"] == 3
