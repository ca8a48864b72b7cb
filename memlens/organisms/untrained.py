"""The untrained twin of a loaded model, with random weights: a control for claims about depth."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from memlens.forward.trunk import is_bridge
from memlens.models.load import load_model
from memlens.models.provenance import describe, remember


def untrained_like(model: Any, *, seed: int = 0) -> Any:
    """Return a model of the same class and shape with newly drawn weights.

    The initialization is that of the library for this architecture: Hugging Face's for a
    `TransformerBridge`, TransformerLens' for a `HookedTransformer`.

    Args:
        model: A TransformerLens model.
        seed: Seed of the weights; the caller's random state does not change.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> twin = untrained_like(model)
        >>> bool((twin.W_U == model.W_U).all()), twin.W_U.shape == model.W_U.shape
        (False, True)
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = _bridge_twin(model) if is_bridge(model) else _hooked_twin(model, seed)
    remember(twin, model=f"{describe(model)['model']} (untrained, seed {seed})", revision="")
    return twin


def _bridge_twin(model: Any) -> Any:
    config = deepcopy(model.original_model.config)
    like = next(model.parameters())
    fresh = AutoModelForCausalLM.from_config(config, dtype=like.dtype).to(like.device)
    return load_model(fresh.eval(), backend="bridge", tokenizer=model.tokenizer)


def _hooked_twin(model: Any, seed: int) -> Any:
    config = deepcopy(model.cfg)
    config.init_weights, config.seed = True, seed
    return type(model)(config, tokenizer=model.tokenizer)
