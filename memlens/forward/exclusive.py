"""One thread at a time computes with a model, in the weights' own precision; others wait.

Hooks, skipped blocks and wider dtypes are set on the model itself, so two computations on it must not
overlap. `exclusively` holds a re-entrant lock of a model, which a bridge shares with its Hugging Face model.
`computes` decorates whatever computes numbers: it holds the lock during the call, switches autocast off,
brings copied weights up to date (`memlens.models.state`), and drops what was found out about a model that has
changed since. A generator holds the lock only while it computes its next value.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from memlens.errors import ModelInUseError
from memlens.models.state import content_key, inner_model, settled

P = ParamSpec("P")
R = TypeVar("R")


class _Use:
    """Who uses a model, and what is known of it.

    Attributes:
        owner: The thread that holds the lock; None if it is free.
        held: How often that thread has taken it.
        computing: Whether a computation of that thread is going on.
        key: Content of the model when `known` was found out.
        known: Facts about the model by name.
        kept: What is kept until the computation ends.
    """

    owner: int | None = None
    held: int = 0
    computing: bool = False
    key: tuple[Any, ...] | None = None
    known: dict[str, Any]
    kept: dict[Any, Any]

    def __init__(self) -> None:
        self.known, self.kept = {}, {}


_TURN = threading.Condition()
_USES: WeakKeyDictionary[Any, _Use] = WeakKeyDictionary()
_WAITING: dict[int, _Use] = {}
"""The model for which each waiting thread waits."""


def _use_of(model: Any) -> _Use:
    inner = inner_model(model)
    found = _USES.get(inner)
    if found is None:
        with _TURN:
            found = _USES.setdefault(inner, _Use())
    return found


def _take(use: _Use) -> None:
    me = threading.get_ident()
    if use.owner == me:  # only this thread can change that
        use.held += 1
        return
    with _TURN:
        while use.owner is not None:
            if _waits_for(use.owner, me):
                raise ModelInUseError(
                    "two threads wait for each other: each uses a model that the other needs next. Let one "
                    "of them begin when the other has finished."
                )
            _WAITING[me] = use
            try:
                _TURN.wait()
            finally:
                del _WAITING[me]
        use.owner, use.held = me, 1


def _waits_for(thread: int | None, me: int) -> bool:
    """Whether a thread waits for `me`, directly or through other threads."""
    while thread in _WAITING:
        thread = _WAITING[thread].owner
        if thread == me:
            return True
    return False


def _give_back(use: _Use) -> None:
    if use.held > 1:
        use.held -= 1
        return
    with _TURN:
        use.owner, use.held = None, 0
        _TURN.notify_all()


@contextmanager
def exclusively(model: Any) -> Iterator[None]:
    """Hold a model's lock inside a `with` statement; another thread that wants it waits.

    Args:
        model: A TransformerLens model, or the Hugging Face model in a bridge: both have one lock.

    Raises:
        ModelInUseError: The thread that holds it waits for a model that this thread holds.
    """
    use = _use_of(model)
    _take(use)
    try:
        yield
    finally:
        _give_back(use)


@contextmanager
def computation(model: Any) -> Iterator[None]:
    """Do what `computes` does, inside a `with` statement."""
    with exclusively(model):
        use = _use_of(model)
        if use.computing:
            yield
            return
        with settled(model), _numbered():
            key = content_key(model)
            if key != use.key:
                use.key, use.known = key, {}
            use.computing = True
            try:
                with _own_precision(model):
                    yield
            finally:
                use.computing, use.kept = False, {}


@contextmanager
def _numbered() -> Iterator[None]:
    """Give a number to the outermost computation of this thread."""
    if computation_number() is not None:
        yield
        return
    _LOCAL.number = next(_NUMBERS)
    try:
        yield
    finally:
        _LOCAL.number = None


@contextmanager
def _own_precision(model: nn.Module) -> Iterator[None]:
    kinds = {"cpu", next(model.parameters()).device.type} - {"meta"}
    with ExitStack() as stack:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def computes(fn: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that computes with a model; see the module's docstring.

    The model is the argument `model`, or the model of the argument `trunk` or `self`.
    """
    names = list(inspect.signature(fn).parameters)
    name = next(name for name in ("model", "trunk", "self") if name in names)
    place = names.index(name)

    def model_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs[name] if name in kwargs else args[place] if place < len(args) else None
        return given if name == "model" else getattr(given, "model", None)

    def opened(model: Any) -> Any:
        # what is not a model is refused by the function itself
        return computation(model) if isinstance(model, nn.Module) else ExitStack()

    if inspect.isgeneratorfunction(fn):

        @functools.wraps(fn)
        def steps(*args: P.args, **kwargs: P.kwargs) -> Iterator[Any]:
            model, values = model_of(args, kwargs), fn(*args, **kwargs)
            while True:
                with opened(model):
                    try:
                        value = next(values)
                    except StopIteration:
                        return
                yield value

        return cast(Callable[P, R], steps)

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with opened(model_of(args, kwargs)):
            return fn(*args, **kwargs)

    return call


_LOCAL = threading.local()
_NUMBERS = itertools.count()


def known_of(model: Any) -> dict[str, Any]:
    """Return what is known of a model as it is now, to be added to; outside a computation nothing is kept."""
    use = _use_of(model)
    return use.known if use.computing and use.owner == threading.get_ident() else {}


def kept_of(model: Any) -> dict[Any, Any]:
    """Return what is kept of a model until the computation with it ends, to be added to: read weights."""
    use = _use_of(model)
    return use.kept if use.computing and use.owner == threading.get_ident() else {}


def computation_number() -> int | None:
    """Return a number of the outermost computation that this thread is in, of whatever model; None outside.

    Until it ends no model that it uses changes, so that activations can be kept so long.
    """
    return getattr(_LOCAL, "number", None)
