"""The public names of memlens, where each is described, and where each has an example."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import Any

import memlens

NAMESPACES = sorted(name for name in memlens.__all__ if inspect.ismodule(getattr(memlens, name)))
"""The modules among the public names: `ml.recall`, `ml.edits` and so on."""


def public(module: Any) -> list[str]:
    """The public names of a module that are no modules themselves, in alphabetical order."""
    listed = getattr(module, "__all__", None)
    if listed is None:
        own = inspect.getmembers(module, lambda value: getattr(value, "__module__", "") == module.__name__)
        listed = [name for name, _ in own if not name.startswith("_")]
    found = [n for n in listed if not inspect.ismodule(getattr(module, n)) and not n.startswith("__")]
    return sorted(found, key=str.lower)


def described(value: Any) -> bool:
    """Whether a value has a docstring of its own: a function or a class."""
    return inspect.isfunction(value) or inspect.isclass(value)


def summary(value: Any) -> str:
    """The first paragraph of a docstring, on one line, fit for a table."""
    return (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


@cache
def pages() -> dict[Any, tuple[str, str, list[str]]]:
    """Where each public object is described: its short name, the module shown, and all of its public names.

    An object with several public names (`ml.score_recall` is `ml.recall.score_recall`) is described once,
    under the shortest.
    """
    homes: dict[Any, tuple[str, str, list[str]]] = {}
    for space in ("", *NAMESPACES):
        module = getattr(memlens, space) if space else memlens
        for name in public(module):
            value = getattr(module, name)
            if described(value):
                shown = ".".join(filter(None, ("ml", space, name)))
                homes.setdefault(value, (name, module.__name__, []))[2].append(shown)
    return homes


def shown_by(value: Any) -> Any:
    """The object whose description has an example of this one: itself, or a function that returns it."""
    if ">>>" in (inspect.getdoc(value) or ""):
        return value
    makers = (
        other
        for other in pages()
        if inspect.isfunction(other)
        and ">>>" in (inspect.getdoc(other) or "")
        and re.search(rf"\b{value.__name__}\b", str(inspect.signature(other).return_annotation))
    )
    return next(makers, None)


def without_example() -> list[str]:
    """The public names without an example; an exception's is that of `MemlensError`."""
    return [
        names[0]
        for value, (_, _, names) in pages().items()
        if not (inspect.isclass(value) and issubclass(value, memlens.errors.MemlensError))
        and shown_by(value) is None
    ]
