"""Options as classes: one definition serves the Python call, the command line, a YAML file and the record.

An options class is a frozen dataclass whose fields are checked when an object is made. The docstring under a
field is its only help text; a `Literal` lists what a closed choice allows, and `Field` sets bounds.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.dataclasses import rebuild_dataclass
from pydantic_core import ErrorDetails

from memlens.errors import OptionError, SourceNotFoundError, near_matches
from memlens.files import expanded, naming, read_yaml

C = TypeVar("C")

_CONFIG = ConfigDict(
    arbitrary_types_allowed=True, use_attribute_docstrings=True, extra="forbid", validate_default=True
)


@dataclass(frozen=True)
class Flags:
    """How a field is given on the command line beyond its name, as in `Annotated[int, Flags("-n")]`.

    Attributes:
        names: Further names.
        positional: Whether it may be given without its name.
    """

    names: tuple[str, ...]
    positional: bool

    def __init__(self, *names: str, positional: bool = False) -> None:
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "positional", positional)


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def options_class(cls: type[C]) -> type[C]:
    """Make a class of annotated fields a frozen dataclass that checks its values.

    Values are converted where nothing is lost ("3" and 3.0 become 3, a list becomes a tuple), so that what a
    shell or a YAML file gives can be passed on as it is.

    Raises:
        OptionError: When an object is made with an unknown option or a value that is not allowed; the message
            names the option, the value, and what is allowed.

    Example:
        >>> from typing import Annotated, Literal
        >>> @options_class
        ... class Cut:
        ...     mode: Literal["zero", "mean"] = "zero"
        ...     '''What a removed part becomes.'''
        ...     layers: Annotated[int, Field(ge=1)] = 1
        ...     '''Number of layers.'''
        >>> Cut(layers=2)
        Cut(mode='zero', layers=2)
        >>> Cut(layers=0)
        Traceback (most recent call last):
        memlens.errors.OptionError: layers=0 is not allowed: give 1 or more.
    """
    made: Any = pydantic_dataclass(frozen=True, config=_CONFIG)(cls)
    caller = sys._getframe(1)  # where names in the annotations of a class inside a function are found
    rebuild_dataclass(made, raise_errors=False, _types_namespace={**caller.f_globals, **caller.f_locals})
    check = made.__init__

    @functools.wraps(check)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            check(self, *args, **kwargs)
        except ValidationError as error:
            raise _option_error(made, error.errors()[0]) from None

    made.__init__ = init
    return made


def convert(cls: type, name: str, value: Any) -> Any:
    """Return a value as an options class would hold it in one of its fields.

    Raises:
        OptionError: It is not allowed.
    """
    try:
        return TypeAdapter(get_type_hints(cls, include_extras=True)[name]).validate_python(value)
    except ValidationError as error:
        raise _option_error(cls, error.errors()[0], name) from None


def descriptions(cls: type) -> dict[str, str]:
    """Return the help text of each option of a class, in order."""
    texts = {
        name: " ".join(field.description.split())
        for base in reversed(cls.__mro__)
        for name, field in vars(base).get("__pydantic_fields__", {}).items()
        if field.description
    }
    return {field.name: texts.get(field.name, "") for field in fields(cls)}


def read_options(path: str | Path, *classes: type, check: bool = False) -> dict[str, Any]:
    """Return the options that a YAML file sets.

    Args:
        path: The file: a mapping of option to value.
        *classes: The options classes whose fields it may set.
        check: Also check the values, for classes whose options all have defaults.

    Raises:
        SourceNotFoundError: There is no such file.
        FileFormatError: It is not YAML, or not a mapping.
        OptionError: It sets an option that none of the classes has, or a value that is not allowed.
    """
    path = expanded(path)
    if not path.is_file():
        raise SourceNotFoundError(f"there is no options file {path}: give the path of a YAML file.")
    content = read_yaml(path)
    known = [name for cls in classes for name in descriptions(cls)]
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    for name in values:
        if name not in known:
            raise OptionError(f"{path} sets the unknown option {name!r}.{near_matches(name, known)}")
    with naming(path):
        for cls in classes if check else ():
            cls(**{name: value for name, value in values.items() if name in descriptions(cls)})
    return values


_REQUIREMENTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "greater_than_equal": lambda limit: f"give {limit['ge']:g} or more.",
    "greater_than": lambda limit: f"give a number above {limit['gt']:g}.",
    "less_than_equal": lambda limit: f"give {limit['le']:g} or less.",
    "less_than": lambda limit: f"give a number below {limit['lt']:g}.",
    "too_short": lambda limit: f"give {limit['min_length']} or more values.",
    "int_parsing": lambda _: "give a whole number.",
    "int_type": lambda _: "give a whole number.",
    "int_from_float": lambda _: "give a whole number.",
    "float_parsing": lambda _: "give a number.",
    "bool_parsing": lambda _: "give true or false.",
}


def _option_error(cls: type, error: ErrorDetails, name: str | None = None) -> OptionError:
    """Return pydantic's first error as an `OptionError` with a message in the style of memlens."""
    context = error.get("ctx", {})
    if isinstance(cause := context.get("error"), ValueError):  # raised by __post_init__
        return OptionError(str(cause))
    place, value, kind = error["loc"], error["input"], error["type"]
    known = list(descriptions(cls))
    first = place[0] if place else ""
    name = name or (known[first] if isinstance(first, int) else first)  # an int: given by position
    if kind == "unexpected_keyword_argument":
        return OptionError(
            f"{cls.__name__} has no option {name!r}: it has {', '.join(known)}.{near_matches(name, known)}"
        )
    if kind in ("missing", "missing_argument"):
        return OptionError(f"{cls.__name__} needs the option {name!r}: give it.")
    if kind == "literal_error":
        choices = str(context["expected"])
        near = near_matches(
            str(value), [choice.strip("'") for choice in choices.replace(" or ", ", ").split(", ")]
        )
        return OptionError(
            f"{name}={value!r} is not known: choose one of {choices.replace(' or ', ', ')}.{near}"
        )
    wanted = _REQUIREMENTS.get(kind, lambda _: f"{error['msg'][0].lower()}{error['msg'][1:]}.")(context)
    return OptionError(f"{name}={value!r} is not allowed: {wanted}")
