"""Options classes: defaults, bounds and choices are checked, and errors name the field and what it may be."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, Literal

import pytest
from pydantic import PositiveInt

from memlens.errors import OptionError
from memlens.studies.options import options_class


@options_class
class Options:
    """Some options."""

    mode: Literal["zero", "mean"] = "zero"
    """What replaces the component."""
    edits: tuple[Literal["a", "b"], ...] = ("a",)
    """Which edits."""
    n: PositiveInt | None = None
    """How many; None takes all."""

    def __post_init__(self) -> None:
        if self.edits == ("b",):
            raise OptionError("edits lacks 'a'.")


def test_options_are_a_frozen_dataclass_with_a_help_text_for_each_field() -> None:
    options = replace(Options(), n=3)
    assert asdict(options) == {"mode": "zero", "edits": ("a",), "n": 3}
    with pytest.raises(AttributeError):
        options.n = 4  # pyright: ignore
    fields: Any = Options
    assert fields.__pydantic_fields__["n"].description == "How many; None takes all."


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "men"}, "mode='men' is not known: choose one of 'zero', 'mean'. Did you mean 'mean'?"),
        ({"edits": ("c",)}, "'c' is not known: choose one of 'a', 'b'"),
        ({"n": 0}, "n=0 is not possible: input should be greater than 0."),
        ({"m": 0}, "Options has no field 'm': it has mode, edits, n."),
        ({"edits": ("b",)}, "edits lacks 'a'."),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        Options(**values)
    assert message in str(error.value)
