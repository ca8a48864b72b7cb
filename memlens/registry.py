"""Registries: the named things that memlens knows, each declared once, where it is defined.

A kind of result, a metric, a reader, a family, a localizer or a study enters its registry when its module is
imported. A registry imports memlens' own modules, and those that other packages name in the entry-point group
`memlens.plugins`, when it is first asked for a name that it does not have yet.
"""

from __future__ import annotations

import logging
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import FrameType
from typing import Generic, TypeVar

from memlens.errors import OptionError, near_matches

PLUGINS = "memlens.plugins"
"""Entry-point group of other packages: each entry names a module, whose import registers what it defines."""

_LOG = logging.getLogger(__name__)
_loaded: list[Plugin] | None = None
_added: list[tuple[str, str]] = []
"""Everything that was registered: by which module, and what."""

T = TypeVar("T")


class Registry(Generic[T]):
    """Named objects of one type.

    Args:
        what: The word for them in errors, such as "kind".
        of: Their class; None: any.
        modules: Modules of memlens that define some; of a package, all of its modules.

    Example:
        >>> shapes = Registry[int]("shape")
        >>> shapes.add("triangle", 3)
        3
        >>> shapes["triangle"], "square" in shapes, shapes.names()
        (3, False, ['triangle'])
    """

    what: str

    def __init__(self, what: str, *, of: type[T] | None = None, modules: Sequence[str] = ()) -> None:
        self.what, self._of = what, of
        self._modules = list(modules)
        self._items: dict[str, T] = {}
        self._by: dict[str, str] = {}

    def add(self, name: str, value: T) -> T:
        """Register an object and return it.

        Raises:
            OptionError: Another object of this name is registered, or it is not of the registry's class.
        """
        if self._of is not None and not isinstance(value, self._of):
            raise OptionError(
                f"{self.what} {name!r} is {value!r}: register an object of the class {self._of.__name__}."
            )
        if name in self._items and self._items[name] is not value:
            raise OptionError(
                f"{self.what} {name!r} is registered already by {self._by[name]}: choose another name."
            )
        self._items[name], self._by[name] = value, _registering()
        _added.append((self._by[name], f"{self.what} {name}"))
        return value

    def __getitem__(self, name: str) -> T:
        """Return the object with this name.

        Raises:
            OptionError: There is none; the message lists the known names.
        """
        if name not in self:
            known = self.names()
            raise OptionError(
                f"unknown {self.what} {name!r}: choose from {', '.join(known)}.{near_matches(name, known)}"
            )
        return self._items[name]

    def get(self, name: str) -> T | None:
        """Return the object with this name, or None."""
        return self._items[name] if name in self else None

    def __contains__(self, name: object) -> bool:
        while name not in self._items and self._modules:
            _import_all(self._modules.pop(0))
        if name not in self._items:
            load_plugins()
        return name in self._items

    def names(self) -> list[str]:
        """Return every name, in the order of registration."""
        self._load()
        return list(self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __repr__(self) -> str:
        return f"<{self.what}: {', '.join(self.names())}>"

    def values(self) -> list[T]:
        """Return every object, in the order of registration."""
        self._load()
        return list(self._items.values())

    def _load(self) -> None:
        while self._modules:
            _import_all(self._modules.pop(0))
        load_plugins()


def _registering() -> str:
    """Return the name of the module that registers something, or "memlens" for all of memlens' own."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] != "memlens":
            return "memlens" if "importlib" in name else name
        frame = frame.f_back
    return "memlens"


def _import_all(name: str) -> None:
    module = import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"{name}."):
        import_module(found.name)


@dataclass(frozen=True)
class Plugin:
    """A module of another package that extends memlens.

    Attributes:
        name: The name of its entry point.
        module: The module that is imported.
        package: The package that it belongs to, with its version.
        error: Why it cannot be imported; `""` if it can.
        adds: What it registered.
    """

    name: str
    module: str
    package: str
    error: str = ""
    adds: tuple[str, ...] = ()


def named_plugins() -> list[Plugin]:
    """Return the modules that installed packages name, without importing them."""
    return [_plugin(entry) for entry in sorted(entry_points(group=PLUGINS))]


def load_plugins() -> tuple[Plugin, ...]:
    """Import the modules of installed packages that extend memlens; once per process.

    A plugin that cannot be imported is skipped with a warning that names it, so that it does not break
    memlens; what it registered before it failed stays.
    """
    global _loaded
    if _loaded is None:
        _loaded = []  # before the imports: a plugin may ask a registry itself
        for entry in sorted(entry_points(group=PLUGINS)):
            _loaded.append(_load(entry))
    return tuple(_loaded)


def _load(entry: EntryPoint) -> Plugin:
    before = len(_added)
    try:
        if entry.pattern.match(entry.value) is None:
            raise OptionError(f"{entry.value!r} is not the name of a module")
        entry.load()
    except (Exception, SystemExit) as error:
        failed = _plugin(entry, f"{type(error).__name__}: {error}")
        _LOG.warning(
            "the plugin %s (%s, of %s) cannot be imported: %s",
            failed.name, failed.module, failed.package, failed.error,
        )  # fmt: skip
        return failed
    # a module that another one has imported registered its things then
    own = [what for by, what in _added[:before] if f"{by}.".startswith(f"{entry.module}.")]
    new = [what for by, what in _added[before:] if by != "memlens"]
    return _plugin(entry, adds=tuple(dict.fromkeys([*own, *new])))


def _plugin(entry: EntryPoint, error: str = "", adds: tuple[str, ...] = ()) -> Plugin:
    package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else ""
    return Plugin(entry.name, entry.value, package, error, adds)
