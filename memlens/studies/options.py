"""The options of a study are one class: the Python call, the command line, the YAML file and the record."""

from __future__ import annotations

import functools
from typing import Any, TypeVar, dataclass_transform, get_args, get_type_hints

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from memlens.errors import OptionError, near_matches

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True)
def options_class(cls: type[_T]) -> type[_T]:
    """Make a class a frozen pydantic dataclass whose errors are `OptionError`.

    Closed choices are `Literal` types, bounds are `Annotated` types (`pydantic.PositiveInt`,
    `Annotated[float, Field(gt=0)]`). The docstring below each field is its help text, which
    `cls.__pydantic_fields__[name].description` holds. Rules over several fields go into `__post_init__`.

    Example::

        @options_class
        class PatchOptions:
            mode: Literal["zero", "mean"] = "zero"
            "What replaces the component."

        PatchOptions(mode="men")  # OptionError: mode='men' is not known: choose one of 'zero', 'mean'. …
    """
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True)
    made: Any = dataclass(frozen=True, config=config)(cls)
    checked = made.__init__

    @functools.wraps(checked)
    def init(self: Any, *args: Any, **values: Any) -> None:
        try:
            checked(self, *args, **values)
        except ValidationError as error:
            raise OptionError(_words(made, error)) from None

    made.__init__ = init
    return made


def _words(cls: Any, error: ValidationError) -> str:
    """Return the first error in one sentence."""
    first: Any = error.errors()[0]
    name, given, kind = ".".join(map(str, first["loc"])), first["input"], first["type"]
    known = list(cls.__pydantic_fields__)
    if kind == "value_error":  # raised by __post_init__
        return str(first["ctx"]["error"])
    if kind == "unexpected_keyword_argument":
        return f"{cls.__name__} has no field {name!r}: it has {', '.join(known)}.{near_matches(name, known)}"
    if kind == "missing":
        return f"{cls.__name__} needs {name}: give it."
    if kind == "literal_error":
        choices = _choices(get_type_hints(cls).get(str(first["loc"][0])))
        hint = near_matches(str(given), choices)
        return f"{name}={given!r} is not known: choose one of {', '.join(map(repr, choices))}.{hint}"
    return f"{name}={given!r} is not possible: {first['msg'][0].lower()}{first['msg'][1:]}."


def _choices(hint: Any) -> list[str]:
    """Return the strings that a type admits, wherever they stand in it."""
    if isinstance(hint, str):
        return [hint]
    return [choice for part in get_args(hint) for choice in _choices(part)]
