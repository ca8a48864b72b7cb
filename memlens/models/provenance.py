"""Where a model comes from: what a result records about it, and how another process loads it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from memlens.errors import WorkerError
from memlens.models.families import architecture_of, family_of
from memlens.models.zoo import is_zoo_name

if TYPE_CHECKING:
    from memlens.models.names import Source

Fact = str | int | float | bool

_FACTS: WeakKeyDictionary[nn.Module, dict[str, Fact]] = WeakKeyDictionary()
"""What `load_model` knows about a model that the model itself does not tell; dropped with the model."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a model was loaded from.

    Attributes:
        source: Where it is.
        revision: Its revision on the hub.
        trust_remote_code: Whether code that comes with it may run.
        allow_pickle: Whether weights in pickles may be read.
    """

    source: Source
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


_ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()


def remember_origin(model: nn.Module, origin: Origin) -> None:
    """Record which checkpoint a model was loaded from."""
    _ORIGINS[model] = origin


def origin_of(model: nn.Module) -> Origin | None:
    """Return the checkpoint that a model was loaded from; None for a model that was made in memory."""
    return _ORIGINS.get(model)


@dataclass(frozen=True)
class Recipe:
    """The arguments of `load_model` that gave a model.

    Attributes:
        name: A name, or the absolute path of a folder or file.
        options: The keyword arguments: backend, revision, dtype, device, … A device that was not given is
            chosen where the model is loaded.
        then: Makes another model from it, such as an untrained twin.
    """

    name: str
    options: Mapping[str, Any]
    then: Callable[[Any], Any] | None = None

    def load(self) -> Any:
        """Load the model."""
        from memlens.models.load import load_model

        model = load_model(self.name, **self.options)
        return model if self.then is None else self.then(model)


_RECIPES: WeakKeyDictionary[nn.Module, tuple[Recipe, list[Any]]] = WeakKeyDictionary()
"""Recipes by model, with the state of the weights after loading; dropped with the model."""


def remember_recipe(model: nn.Module, name: str | Path, options: Mapping[str, Any]) -> None:
    """Record by which arguments a model was loaded."""
    place = Path(name).expanduser()
    is_path = place.exists() and not (isinstance(name, str) and is_zoo_name(name))
    _RECIPES[model] = Recipe(str(place.absolute() if is_path else name), dict(options)), _state(model)


def derive_recipe(new: nn.Module, model: nn.Module, then: Callable[[Any], Any]) -> None:
    """Record how a model was made from another one, if that one was loaded by a name or path."""
    recipe, _ = _RECIPES.get(model, (None, None))
    if recipe is not None and recipe.then is None:
        _RECIPES[new] = replace(recipe, then=then), _state(new)


def recipe_of(model: nn.Module) -> Recipe:
    """Return the recipe of a model.

    Raises:
        WorkerError: The model was not loaded by a name or path, was edited after it was loaded, or has hooks:
            loading it again would give another one.
    """
    found = _RECIPES.get(model)
    if found is None:
        raise WorkerError(
            f"this {type(model).__name__} was not loaded by a name or a path, so that workers cannot load "
            "it: "
            "save it to a folder, and give load_model the path."
        )
    recipe, state = found
    if state != _state(model):
        raise WorkerError(
            f"{recipe.name!r} was edited after it was loaded, so that workers would load another model: save "
            "the edited one to a folder, and give load_model the path."
        )
    points: Mapping[str, Any] = getattr(model, "hook_dict", {})
    if hooked := [name for name, point in points.items() if point.fwd_hooks]:
        raise WorkerError(
            f"{recipe.name!r} has a hook on {hooked[0]!r}, which workers would not have: remove it "
            "(model.reset_hooks()), or make it part of the interventions."
        )
    return recipe


def _state(model: nn.Module) -> list[Any]:
    """What changes when a weight is written to or gets another dtype; the device does not count."""
    parameters = nn.Module.named_parameters(model)
    return [(n, p.dtype, tuple(p.shape), -1 if p.is_inference() else p._version) for n, p in parameters]


def remember(model: nn.Module, /, **facts: Fact) -> None:
    """Record facts about a model for `describe`. Later facts replace earlier ones of the same name."""
    _FACTS.setdefault(model, {}).update(facts)


def describe(model: Any) -> dict[str, Fact]:
    """Return where a model comes from and what it is, in plain values that file attributes can hold.

    This works for any TransformerLens model; facts that `load_model` remembered (name, revision) are added.

    Returns:
        `model` (name), `revision` (`""` for a local folder), `backend`, `family`, `architecture`, `dtype`,
        `device`, `transformer_lens` and `memlens` (versions), `processed_weights`, `n_params`.
    """
    cfg = model.cfg
    name = str(getattr(cfg, "model_name", "") or "unnamed")
    facts: dict[str, Fact] = {
        "model": name,
        "revision": "",
        "backend": _backend(model),
        "family": family_of(model, name=name),
        "architecture": architecture_of(model),
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "device": str(cfg.device),
        "transformer_lens": version("transformer-lens"),
        "memlens": version("memlens"),
        "processed_weights": _processed(model),
        "n_params": sum(parameter.numel() for parameter in model.parameters()),
    }
    return facts | _FACTS.get(model, {})


def _backend(model: Any) -> str:
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((n for n in ("HookedTransformer", "TransformerBridge") if n in names), type(model).__name__)


def _processed(model: Any) -> bool:
    """Folded LayerNorms show in the norm's name; the bridge keeps a flag."""
    if getattr(model, "_weights_processed", False) is True:
        return True
    return str(getattr(model.cfg, "normalization_type", "")).endswith("Pre")
