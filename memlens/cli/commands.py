"""Commands from options classes: a parameter that is an options class becomes one option per field."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from cyclopts import Parameter, Token

from memlens.cli.console import split_names
from memlens.options import Flags, convert, descriptions

_MODELS = {"model", "models", "compare", "reference", "donor"}


def complete_model(context: Any) -> list[str]:
    """Return the names of models that start with the word under the cursor."""
    from memlens.models.families import families_table
    from memlens.models.zoo import zoo_names

    begun = context if isinstance(context, str) else context.incomplete
    zoo = [f"zoo/{name.removeprefix('zoo/')}" for name in zoo_names()]
    return [name for name in (*zoo, *families_table()["model"]) if name.startswith(begun)]


def from_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command with one option for each field of the function's options classes.

    The command makes the objects from the given fields, so that only the classes define which values are
    allowed. If the function has a parameter `given`, it gets the given fields of each class.
    """
    hints = get_type_hints(function, include_extras=True)
    spread: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(cls := hints[name]):
            spread[name] = cls if isinstance(cls, type) else type(cls)
            parameters += option_parameters(spread[name])
        elif name != "given":
            parameters.append(parameter.replace(annotation=hints[name]))
    parameters.sort(key=lambda p: (p.kind, p.default is not p.empty and p.kind != p.KEYWORD_ONLY))
    signature = inspect.Signature(parameters)

    def command(*args: Any, **kwargs: Any) -> Any:
        values = signature.bind_partial(*args, **kwargs).arguments
        given = {
            name: {f.name: values.pop(f.name) for f in fields(cls) if f.name in values}
            for name, cls in spread.items()
        }
        made = {name: cls(**given[name]) for name, cls in spread.items()}
        more = {"given": given} if "given" in inspect.signature(function).parameters else {}
        return function(**values, **made, **more)

    command.__name__, command.__doc__, command.__module__ = function.__name__, function.__doc__, __name__
    command.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def option_parameters(cls: type) -> list[inspect.Parameter]:
    """Return one parameter per field of an options class; nested options are left to Python and YAML."""
    texts, hints = descriptions(cls), get_type_hints(cls, include_extras=True)
    found = []
    for field in fields(cls):
        hint = hints[field.name]
        plain = _plain(hint)
        if any(is_dataclass(part) for part in (plain, *get_args(plain))):
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        default = _default_of(cls, field.name, default)
        flags = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Flags)), Flags())
        parameter = Parameter(
            name=[f"--{field.name.replace('_', '-')}", *flags.names],
            help=texts[field.name] or None,
            converter=None if _is(plain, bool) else _reader(cls, field.name, plain),
            consume_multiple=_is(plain, list),
            completer=complete_model if field.name in _MODELS else None,
            negative_iterable=(),
            show_default=_shown if default or (default == 0 and default is not False) else False,
        )
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if flags.positional else inspect.Parameter.KEYWORD_ONLY
        found.append(
            inspect.Parameter(field.name, kind, default=default, annotation=Annotated[plain, parameter])
        )
    return found


def _default_of(cls: type, name: str, default: Any) -> Any:
    """Return a field's default for a signature."""
    info = vars(cls).get("__pydantic_fields__", {}).get(name)
    if info is None:
        return inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter.empty if info.is_required() else info.get_default(call_default_factory=True)


def _shown(default: Any) -> str:
    """Return a default in the form in which it is typed."""
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _reader(cls: type, name: str, hint: Any) -> Callable[[Any, Sequence[Token]], Any]:
    """Return the converter of a field, which the class checks; tuples and names are written with commas."""

    def read(_: Any, tokens: Sequence[Token]) -> Any:
        typed: Any = [token.value for token in tokens]
        if NoneType in get_args(hint) and typed == ["none"]:
            return None
        if _is(hint, tuple):
            typed = [part.strip() for value in typed for part in value.split(",") if part.strip()]
        elif _is(hint, list):
            typed = split_names(_, tokens) if name in _MODELS else typed
        else:
            typed = typed[-1]
        return convert(cls, name, typed)

    return read


def _plain(hint: Any) -> Any:
    """Return a type without its annotations."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if get_origin(hint) in (list, tuple):
        inner = tuple(part if part is ... else _plain(part) for part in get_args(hint))
        return get_origin(hint)[inner]
    if NoneType in get_args(hint):
        (inner,) = (part for part in get_args(hint) if part is not NoneType)
        return _plain(inner) | None
    return hint


def _is(hint: Any, kind: type) -> bool:
    """Whether a type, optional or not, is of a kind."""
    parts = get_args(hint) if NoneType in get_args(hint) else (hint,)
    return any((get_origin(part) or part) is kind for part in parts)
