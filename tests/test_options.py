"""Options classes: what they accept, refuse and say."""

from __future__ import annotations

import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import Field

from memlens.errors import FileFormatError, OptionError, SourceNotFoundError
from memlens.options import descriptions, options_class, read_options


@options_class
class Cut:
    """What is cut."""

    mode: Literal["zero", "mean"] = "zero"
    """What a removed part
    becomes."""
    layers: Annotated[int, Field(ge=1)] = 1
    """Number of layers."""
    heads: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 0.5

    def __post_init__(self) -> None:
        if self.heads == ():
            raise OptionError("heads=() cuts nothing.")


def test_values_are_converted_where_nothing_is_lost() -> None:
    given: dict[str, Any] = {"layers": "3", "heads": [np.int64(2), 1.0], "share": 1}
    assert asdict(Cut(**given)) == {"mode": "zero", "layers": 3, "heads": (2, 1), "share": 1.0}
    assert descriptions(Cut) == {
        "mode": "What a removed part becomes.", "layers": "Number of layers.", "heads": "", "share": "",
    }  # fmt: skip
    assert pickle.loads(pickle.dumps(Cut(layers=2))) == replace(Cut(), layers=2)
    with pytest.raises(AttributeError):
        Cut().layers = 2  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "zro"}, "mode='zro' is not known: choose one of 'zero', 'mean'. Did you mean 'zero'?"),
        ({"layers": 0}, "layers=0 is not allowed: give 1 or more."),
        ({"layers": 1.5}, "layers=1.5 is not allowed: give a whole number."),
        ({"layers": "x"}, "layers='x' is not allowed: give a whole number."),
        ({"heads": (1, -1)}, "heads=-1 is not allowed: give 0 or more."),
        ({"share": 0}, "share=0 is not allowed: give a number above 0."),
        ({"share": 2}, "share=2 is not allowed: give 1 or less."),
        (
            {"layer": 2},
            "Cut has no option 'layer': it has mode, layers, heads, share. Did you mean 'layers'?",
        ),
        ({"heads": ()}, "heads=() cuts nothing."),
    ],
)
def test_what_is_not_allowed_is_said_in_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        Cut(**given)
    assert str(error.value) == message
    with pytest.raises(OptionError):  # also when an object is copied
        replace(Cut(), **given)


def test_a_yaml_file_sets_options(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("mode: mean\nheads: [1, 2]\n")
    assert Cut(**read_options(path, Cut)) == Cut(mode="mean", heads=(1, 2))
    path.write_text("layer: 2\n")
    with pytest.raises(OptionError, match=r"unknown option 'layer'\. Did you mean 'layers'"):
        read_options(path, Cut)
    for content in ("- 1\n", "a: [\n"):
        path.write_text(content)
        with pytest.raises(FileFormatError):
            read_options(path, Cut)
    with pytest.raises(SourceNotFoundError):
        read_options(tmp_path / "missing.yaml", Cut)
