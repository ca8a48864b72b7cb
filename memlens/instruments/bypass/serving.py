"""Attention bypass of a plain Hugging Face model, so that it is served without TransformerLens.

Most architectures ask transformers' registry for their attention function; a bypassed block is given one
of its own through a config of its own, and every other block keeps the one it has. The block's cache is
still filled, so that blocks, caches and masks around it stay as they are. GPT-Neo does not ask the registry;
there, the values are written where the mixed values would stand.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
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
    """The identity as it stands on one attention module, for all who asked for it.

    Attributes:
        holders: How many bypasses of this module have not been removed.
        config: The config to give back; None where hooks do all.
        handles: Hooks to take off.
        fired: Whether the identity ran in the present forward.
    """

    holders: int = 0
    config: Any = None
    handles: list[Any] = field(default_factory=list)
    fired: bool = False


_HELD: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()
"""Bypassed modules: bypasses may be nested, and removed in any order."""


class TransformersBypass:
    """A bypass that stands on a Hugging Face model until it is removed: see `bypass_in_transformers`.

    Attributes:
        model: The Hugging Face model.
        layers: The bypassed blocks.
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
        self._modules: list[nn.Module] = []
        self._handles: list[Any] = []
        chosen = [modules[layer] for layer in self.layers]
        for module in chosen:
            _check_served(module)
        for module in chosen:
            if mode == "zero":
                self._handles.append(module.register_forward_hook(_zeros))
            else:
                _hold(module)
                self._modules.append(module)

    def remove(self) -> None:
        """Give the model its own attention back; a second call does nothing."""
        while self._modules:
            _release(self._modules.pop())
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> TransformersBypass:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "" if self._modules or self._handles else ", removed"
        return f"<bypass of layers {list(self.layers)} ({self.mode}{state}) on {type(self.model).__name__}>"


def bypass_in_transformers(
    hf_model: Any, layers: int | Sequence[int], mode: str = "identity"
) -> TransformersBypass:
    """Bypass the attention of some blocks of a plain Hugging Face model, for forward and `generate`.

    The edit is that of `memlens.bypassed`: with "identity" every token's mixed values are its own values;
    with "zero" attention adds nothing to the residual. It acts from this call on, until `remove()` or the end
    of a `with` block; bypasses may be nested, and removed in any order. A bypassed block sees neither cache
    nor mask, so generation with any cache, left-padded batches and a prompt fed in chunks all give the tokens
    of plain forwards. Other blocks keep their own attention implementation.

    Args:
        hf_model: A decoder of transformers whose attention goes through transformers' registry (GPT-NeoX,
            OLMo 1, 2 and 3, Llama, GPTBigCode, Starcoder2 and most others), or a GPT-Neo.
        layers: The block, or the blocks bypassed together.
        mode: "identity" or "zero".

    Returns:
        A handle with `remove()`, which is also a context manager.

    Raises:
        OptionError: Unknown mode, or no layers.
        SiteError: A layer that does not exist.
        UnsupportedModelError: A TransformerLens model (use `memlens.bypassed`), a model with an encoder, or
            an architecture whose attention cannot be reached.
        SilentInterventionError: In a forward, when the model did not ask the registry after all.

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
            f"{type(model).__name__} is run by TransformerLens: use memlens.bypassed on the model that "
            "load_model gave."
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
                    f"{type(model).__name__} has more than one attention in layer {layer}: memlens does not "
                    "know which to bypass."
                )
            found[layer] = module
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention that transformers numbers by layer: load it with "
            "memlens.load_model and use memlens.bypassed."
        )
    return found


def _asks_registry(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _check_served(module: nn.Module) -> None:
    if not _asks_registry(module) and type(module).__name__ not in _GPT_NEO:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not take its attention from transformers' registry: load the "
            "model with memlens.load_model and use memlens.bypassed."
        )


def _hold(module: nn.Module) -> None:
    held = _HELD.setdefault(module, _Held())
    held.holders += 1
    if held.holders == 1:
        (_redirect if _asks_registry(module) else _write_values)(module, held)


def _release(module: nn.Module) -> None:
    held = _HELD[module]
    held.holders -= 1
    if held.holders:
        return
    for handle in held.handles:
        handle.remove()
    if held.config is not None:
        module.config = held.config
    del _HELD[module]


def _redirect(module: Any, held: _Held) -> None:
    """Let this module ask the registry for the identity, and see no older values than its input's."""
    AttentionInterface.register(_IDENTITY, _identity_attention)

    def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        held.fired = False
        caches = {name: _Filled(kwargs[name]) for name in _CACHES if kwargs.get(name) is not None}
        return args, {**kwargs, **caches}

    def after(_module: nn.Module, _args: Any, _out: Any) -> None:
        if not held.fired:
            raise SilentInterventionError(
                f"{type(module).__name__} did not ask transformers' registry for its attention, so the "
                "bypass had no effect: load the model with memlens.load_model and use memlens.bypassed."
            )

    held.handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    held.config = module.config
    module.config = copy.copy(module.config)
    module.config._attn_implementation_internal = _IDENTITY


class _Filled:
    """A cache that takes what it is given and gives it back alone, without what it holds."""

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
    """Transformers' attention function for weights that are the identity: `[batch, pos, head, d_head]`."""
    if module in _HELD:
        _HELD[module].fired = True
    own = value[:, :, -query.shape[2] :]
    return own.repeat_interleave(query.shape[1] // own.shape[1], dim=1).transpose(1, 2), None


def _write_values(module: Any, held: _Held) -> None:
    """GPT-Neo: what the output projection is given becomes what the value projection gave."""
    kept: list[Tensor] = []

    def remember(_module: nn.Module, _args: Any, values: Tensor) -> None:
        kept[:] = [values]

    def write(_module: nn.Module, args: Any) -> Any:
        return (kept.pop(), *args[1:])

    held.handles = [
        module.v_proj.register_forward_hook(remember),
        module.out_proj.register_forward_pre_hook(write),
    ]


def _zeros(_module: nn.Module, _args: Any, out: Any) -> Any:
    """Attention's output, bias included, becomes 0; a norm after it keeps that (norms there have no bias)."""
    return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)
