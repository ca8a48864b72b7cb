"""Attention bypass of a plain Hugging Face model, for serving without TransformerLens.

Most architectures get their attention function from transformers' registry. A bypassed block gets another one
through its own copy of the config; other blocks keep theirs. The cache of a bypassed block is still filled,
so nothing around it changes. GPT-Neo does not use the registry; there, a hook writes the values where the
mixed values would be.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from memlens.errors import (
    OptionError,
    SilentInterventionError,
    SiteError,
    UnsupportedModelError,
    check_option,
)
from memlens.forward.hooks import check_layer
from memlens.instruments.bypass.bypass import BYPASS_MODES

_IDENTITY = "memlens_identity"
_GPT_NEO = ("GPTNeoSelfAttention", "GPTNeoFlashAttention2")
_CACHES = ("past_key_values", "layer_past", "past_key_value")


@dataclass
class _Held:
    """The identity on one attention module, shared by all bypasses of the module.

    Attributes:
        hooks: Removes its hooks.
        config: The module's own config, if it was replaced.
        holders: Number of bypasses that have not been removed.
        fired: Whether the identity ran in the current forward.
    """

    hooks: ExitStack = field(default_factory=ExitStack)
    config: Any = None
    holders: int = 0
    fired: bool = False


_HELD: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()
"""Bypassed modules: bypasses may be nested, and removed in any order."""


class TransformersBypass(AbstractContextManager["TransformersBypass"]):
    """A bypass of a Hugging Face model that lasts until it is removed; see `bypass_in_transformers`.

    Attributes:
        model: The Hugging Face model.
        layers: The bypassed layers.
        mode: "identity" or "zero".
    """

    model: nn.Module
    layers: tuple[int, ...]
    mode: str

    def __init__(self, model: nn.Module, layers: Sequence[int], mode: str) -> None:
        modules = _attention_modules(model)
        for layer in layers:
            check_layer(layer, _n_layers(model))
            if layer not in modules:
                raise SiteError(f"layer {layer} of {type(model).__name__} has no attention to bypass.")
        self.model, self.layers, self.mode = model, tuple(dict.fromkeys(layers)), mode
        self._undo, self._removed = ExitStack(), False
        chosen = [modules[layer] for layer in self.layers]
        for module in chosen:
            _check_served(module)
        for module in chosen:
            if mode == "zero":
                self._undo.callback(module.register_forward_hook(_zeros).remove)
            else:
                _hold(module)
                self._undo.callback(_release, module)

    def remove(self) -> None:
        """Give the model its own attention back; a second call does nothing."""
        self._undo.close()
        self._removed = True

    def __exit__(self, *_error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = ", removed" if self._removed else ""
        return f"<bypass of layers {list(self.layers)} ({self.mode}{state}) on {type(self.model).__name__}>"


def bypass_in_transformers(
    hf_model: Any, layers: int | Sequence[int], mode: str = "identity"
) -> TransformersBypass:
    """Bypass the attention of some layers of a plain Hugging Face model, for forward and `generate`.

    The intervention is that of `memlens.bypassed`: with "identity", the mixed values of each token are its
    own values; with "zero", attention adds nothing to the residual. It is in effect from this call until
    `remove()` or the end of a `with` block; bypasses may be nested, and removed in any order. A bypassed
    layer sees neither cache nor mask, so generation with any cache, left-padded batches and a prompt fed in
    chunks all give the same tokens as plain forwards. Other layers keep their own attention implementation.

    Args:
        hf_model: A decoder of transformers whose attention uses transformers' registry (GPT-NeoX, OLMo 1, 2
            and 3, Llama, GPTBigCode, Starcoder2 and most others), or a GPT-Neo.
        layers: The layer, or the layers bypassed together.
        mode: "identity" or "zero".

    Returns:
        A handle with `remove()`, which is also a context manager.

    Raises:
        OptionError: Unknown mode, or no layers.
        SiteError: A layer that does not exist.
        UnsupportedModelError: A TransformerLens model (use `memlens.bypassed`), a model with an encoder, or
            an architecture whose attention cannot be reached.
        SilentInterventionError: In a forward, if the model did not use the registry after all.

    Example:
        >>> import memlens as ml, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **shape)).eval()
        >>> tokens = torch.tensor([[5, 6, 7]])
        >>> plain = model(tokens).logits
        >>> with ml.bypass.in_transformers(model, [1]):
        ...     changed = model(tokens).logits
        >>> bool((changed == plain).all()), bool((model(tokens).logits == plain).all())
        (False, True)
    """
    check_option("mode", mode, BYPASS_MODES)
    chosen = [layers] if isinstance(layers, int) else list(layers)
    if not chosen:
        raise OptionError("layers=[] bypasses nothing: give at least one layer.")
    _check_plain(hf_model)
    return TransformersBypass(hf_model, chosen, mode)


def _check_plain(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a Hugging Face model: give the model itself."
        )
    if any(type(m).__module__.startswith("transformer_lens") for m in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a TransformerLens model: use memlens.bypassed on what load_model "
            "returned."
        )
    if not hasattr(model, "config") or getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a decoder of transformers: give a causal language model."
        )


def _n_layers(model: Any) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def _attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention of each block."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", getattr(module, "layer_id", None))
        own = hasattr(module, "is_causal") and hasattr(module, "config")
        if own and isinstance(layer, int) and not getattr(module, "is_cross_attention", False):
            if layer in found:
                raise UnsupportedModelError(
                    f"{type(model).__name__} has more than one attention module in layer {layer}: memlens "
                    "does not know which one to bypass."
                )
            found[layer] = module
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention modules with layer numbers: load it with "
            "memlens.load_model and use memlens.bypassed."
        )
    return found


def _asks_registry(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _check_served(module: nn.Module) -> None:
    if not _asks_registry(module) and type(module).__name__ not in _GPT_NEO:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not use transformers' attention registry: load the model with "
            "memlens.load_model and use memlens.bypassed."
        )


def _hold(module: nn.Module) -> None:
    held = _HELD.setdefault(module, _Held())
    held.holders += 1
    if held.holders == 1:
        (_redirect if _asks_registry(module) else _write_values)(module, held)


def _release(module: nn.Module) -> None:
    held = _HELD[module]
    held.holders -= 1
    if not held.holders:
        held.hooks.close()
        module.config = held.config or module.config
        del _HELD[module]


def _redirect(module: Any, held: _Held) -> None:
    """Make this module get the identity from the registry, and see only the values of its own input."""
    AttentionInterface.register(_IDENTITY, _identity_attention)

    def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        held.fired = False
        caches = {name: _Filled(kwargs[name]) for name in _CACHES if kwargs.get(name) is not None}
        return args, {**kwargs, **caches}

    def after(_module: nn.Module, _args: Any, _out: Any) -> None:
        if not held.fired:
            raise SilentInterventionError(
                f"{type(module).__name__} did not use transformers' attention registry, so the bypass had no "
                "effect: load the model with memlens.load_model and use memlens.bypassed."
            )

    held.hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    held.hooks.callback(module.register_forward_hook(after).remove)
    held.config = module.config
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = _IDENTITY


class _Filled:
    """A cache that stores new keys and values but returns only these, without the earlier ones."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._cache.update(keys, values, *args, **kwargs)
        return keys, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def _identity_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_kwargs: Any
) -> tuple[Tensor, None]:
    """Attention function for transformers whose weights are the identity: `[batch, pos, head, d_head]`."""
    if module in _HELD:
        _HELD[module].fired = True
    own = value[:, :, -query.shape[2] :]
    return own.repeat_interleave(query.shape[1] // own.shape[1], dim=1).transpose(1, 2), None


def _write_values(module: Any, held: _Held) -> None:
    """GPT-Neo: the input of the output projection becomes the output of the value projection."""
    kept: list[Tensor] = []

    def remember(_module: nn.Module, _args: Any, values: Tensor) -> None:
        kept[:] = [values]

    def write(_module: nn.Module, args: Any) -> Any:
        return (kept.pop(), *args[1:])

    held.hooks.callback(module.v_proj.register_forward_hook(remember).remove)
    held.hooks.callback(module.out_proj.register_forward_pre_hook(write).remove)


def _zeros(_module: nn.Module, _args: Any, out: Any) -> Any:
    """Make attention's output, bias included, 0; it stays 0 after a norm, since norms there have no bias."""
    return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)
