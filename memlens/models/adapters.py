"""Adapters of PEFT (LoRA and the like): merged into a copy of the model, or refused."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from memlens.errors import UnsupportedModelError


def without_peft(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside a `PeftModel`, with its adapters; other models unchanged.

    Raises:
        UnsupportedModelError: The adapter is not in the layers (prompt or prefix tuning).
    """
    config = getattr(model, "peft_config", None)
    tuner = getattr(model, "base_model", None)
    if not isinstance(config, dict) or not hasattr(model, "get_base_model"):
        return model
    kinds = sorted({str(getattr(one.peft_type, "value", one.peft_type)) for one in config.values()})
    inner = getattr(tuner, "model", None)
    if inner is None or not _adapted(inner):
        raise UnsupportedModelError(
            f"adapters of the kind {', '.join(kinds)} are not part of the layers and cannot be merged into "
            "the weights: give memlens the base model, or a model with LoRA-like adapters."
        )
    return inner


def merged_adapters(hf_model: Any, name: str) -> tuple[Any, str]:
    """Return a copy with all active adapters merged into its weights, and their names; others unchanged.

    The given model keeps its adapters. `load_model` compares the copy with the given model.

    Raises:
        UnsupportedModelError: An adapter cannot be merged.
    """
    if not _adapted(hf_model):
        return hf_model, ""
    merged = copy.deepcopy(hf_model)
    active: dict[str, None] = {}
    for path, layer in _adapted(merged):
        active |= dict.fromkeys(getattr(layer, "active_adapters", ()))
        try:
            layer.merge(safe_merge=True)
        except Exception as error:
            raise UnsupportedModelError(
                f"the adapter in {path!r} of {name!r} cannot be merged into its weights "
                f"({type(error).__name__}: {error}): merge it yourself (PEFT's merge_and_unload)."
            ) from error
    for path, layer in reversed(_adapted(merged)):
        parent, _, child = path.rpartition(".")
        setattr(merged.get_submodule(parent), child, layer.get_base_layer())
    merged._hf_peft_config_loaded = False
    return merged, ", ".join(active)


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """Layers that PEFT has wrapped, outermost first."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if callable(getattr(module, "get_base_layer", None)) and callable(getattr(module, "merge", None))
    ]
