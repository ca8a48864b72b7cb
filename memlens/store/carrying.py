"""How work reaches another process: pickled, with every model as the recipe by which it was loaded.

Functions and classes that cannot be imported there (closures, lambdas, what a notebook defines) go by value,
through `cloudpickle`. A TransformerLens model is never copied: the other process loads it once by its recipe
(`memlens.models.provenance`), and refuses it unless its fingerprint is that of the model here.
"""

from __future__ import annotations

import io
import pickle
import threading
from typing import Any

import cloudpickle
from torch import nn

from memlens.errors import MemlensError, WorkerError
from memlens.files import reason_of
from memlens.forward.trunk import Trunk
from memlens.models.provenance import Recipe, recipe_of
from memlens.store.fingerprint import model_fingerprint

_LOADED: dict[tuple[str, str], Any] = {}
"""The models of this process by recipe and fingerprint: each is loaded once."""
_LOADING = threading.Lock()


def packed(value: Any) -> bytes:
    """Return any value for `unpacked` in another process.

    Raises:
        WorkerError: Something in it cannot be pickled, or a model has no recipe; the message says why.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer).dump(value)
    except MemlensError:
        raise
    except Exception as error:
        raise WorkerError(
            f"this work cannot be sent to other processes ({reason_of(error)}): leave what cannot be "
            "pickled (an open file, a lock, a generator) out of what hooks and metrics hold or name."
        ) from error
    return buffer.getvalue()


def unpacked(content: bytes) -> Any:
    """Return what `packed` was given, with models loaded by their recipes.

    Raises:
        WorkerError: A model that was loaded here is another one than there.
        MemlensError: A model cannot be loaded.
    """
    return _Unpickler(io.BytesIO(content)).load()


class _Pickler(cloudpickle.Pickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.models: list[tuple[Any, tuple[Recipe, str]]] = []
        self.modules: dict[int, tuple[int, str]] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Trunk):
            return "trunk", *self._place(obj.model)
        if isinstance(obj, nn.Module) and (id(obj) in self.modules or hasattr(obj, "hook_dict")):
            return "module", *self._place(obj)
        return None

    def _place(self, module: Any) -> tuple[Recipe, str, str]:
        """The recipe of the model that a module belongs to, its fingerprint, and the module's name in it."""
        if id(module) not in self.modules:
            recipe = recipe_of(module)
            self.models.append((module, (recipe, model_fingerprint(module))))
            names = nn.Module.named_modules(module)
            self.modules |= {id(part): (len(self.models) - 1, name) for name, part in names}
        number, name = self.modules[id(module)]
        return *self.models[number][1], name


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        kind, recipe, fingerprint, name = pid
        found = nn.Module.get_submodule(loaded(recipe, fingerprint), name)
        return Trunk(found) if kind == "trunk" else found


def loaded(recipe: Recipe, fingerprint: str) -> Any:
    """Return the model of a recipe, loaded once in this process.

    Raises:
        WorkerError: It has another fingerprint.
    """
    key = repr(recipe), fingerprint
    with _LOADING:
        if key not in _LOADED:
            model = recipe.load()
            if model_fingerprint(model) != fingerprint:
                raise WorkerError(
                    f"{recipe.name!r}, loaded by a worker, is not the model of this run: either that one was "
                    "edited after it was loaded (save the edited model and load it by its path), or the "
                    "checkpoint or the installed versions differ there."
                )
            _LOADED[key] = model
        return _LOADED[key]
