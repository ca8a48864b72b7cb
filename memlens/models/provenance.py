"""What a result records about its model."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from memlens.models.families import architecture_of, family_of

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
