"""Checks of a model before it is used: architecture, readable and finite weights."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from memlens.errors import NonFiniteError, UnsupportedModelError
from memlens.models.families import architecture_of

_OTHER_CAUSAL = {"GPT2LMHeadModel", "OpenAIGPTLMHeadModel"}
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def check_causal(config: Any, name: str) -> None:
    """Raise `UnsupportedModelError` unless a config describes a decoder-only causal language model.

    >>> from transformers import GPTNeoXConfig
    >>> check_causal(GPTNeoXConfig(), "a model")
    """
    architecture = architecture_of(config)
    causal = architecture.endswith("ForCausalLM") or architecture in _OTHER_CAUSAL
    if not causal or getattr(config, "is_encoder_decoder", False):
        shown = architecture or getattr(config, "model_type", None) or "unknown"
        raise UnsupportedModelError(
            f"{name!r} is a {shown}, which is not a causal language model: memlens needs a decoder that "
            f"predicts the next token, such as GPTNeoXForCausalLM or LlamaForCausalLM."
        )


def check_plain_weights(model: nn.Module, name: str) -> None:
    """Raise `UnsupportedModelError` unless all weights are in memory as floating-point numbers.

    Weights on the meta device (offloaded to disk, or never made) cannot be read, and the codes of 8- and
    4-bit weights would be taken for weights.
    """
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"the weights of {name!r} are not in memory ({parameter_name!r} is on the meta device): load "
                "the model without offloading to disk and without init_empty_weights."
            )
        if not parameter.is_floating_point() and parameter.ndim > 1:
            raise UnsupportedModelError(
                f"the weights of {name!r} are quantized ({parameter_name!r} is {parameter.dtype}): "
                "TransformerLens would take the codes for weights. Load the checkpoint without a "
                "quantization_config, or call the Hugging Face model's .dequantize() and load the result."
            )


def check_finite_weights(model: nn.Module, name: str, finite: Container[int] = ()) -> None:
    """Raise `NonFiniteError`, naming the first layer and parameter with NaN or infinity, if there is one.

    Args:
        model: The model.
        name: Its name.
        finite: The `id` of each parameter that is known to be finite (`noting_finite_products`).
    """
    for parameter_name, parameter in model.named_parameters():
        if id(parameter) in finite or not parameter.is_floating_point():
            continue
        if n_bad := _count_nonfinite(parameter):
            found = _LAYER.search(parameter_name)
            where = f"layer {found[1]}" if found else "outside the layers"
            raise NonFiniteError(
                f"The weights of {name!r} hold NaN or infinity, first in {where}, in {parameter_name!r} "
                f"({n_bad} of {parameter.numel()} values): the checkpoint is damaged, "
                f"or {parameter.dtype} is too narrow for it (try dtype='float32')."
            )


@contextmanager
def noting_finite_products(model: nn.Module, finite: set[int]) -> Iterator[None]:
    """Note which weights a forward pass shows to be finite, so that they need not be read for it once more.

    They are those of linear layers whose output is finite: every one is a factor, or an addend, of some
    number in each row of it, and whatever is multiplied by NaN or infinity is NaN or infinite (zero, too, by
    IEEE 754), and so is each sum with such a term.

    Args:
        model: The model, which runs inside the `with` statement.
        finite: Receives the `id` of each parameter.
    """

    def look(module: nn.Module, _args: Any, out: Tensor) -> None:
        if out.numel() and bool(torch.isfinite(out.sum())):
            finite.update(map(id, module.parameters(recurse=False)))

    with ExitStack() as stack:
        for module in model.modules():
            if type(module).forward in _PRODUCTS and "forward" not in vars(module):
                stack.enter_context(module.register_forward_hook(look, prepend=True))
        yield


_PRODUCTS = (nn.Linear.forward, Conv1D.forward)


def _count_nonfinite(values: Tensor) -> int:
    """One pass suffices for nearly every tensor: a sum is finite only if all of its terms are.

    It is taken in the tensor's own type, in 16 bits ten times as fast as in float32; one that overflows only
    costs the second pass.
    """
    if bool(torch.isfinite(values.sum())):
        return 0
    return int((~torch.isfinite(values)).sum())


def first_nonfinite_layer(model: Any, tokens: Int[Tensor, "seq pos"]) -> str | None:
    """Return where the residual stream first holds NaN or infinity, such as `"embedding"` or `"layer 3"`.

    Args:
        model: A TransformerLens model.
        tokens: Token ids, `[seq, pos]`.

    Returns:
        The first place in the order of computation (the last is `"unembedding"`, where only the logits are
        not finite), or None if everything is finite.
    """
    finite: dict[str, bool] = {}

    def watch(place: str) -> Any:
        def hook(activation: Tensor, hook: Any = None) -> None:
            finite[place] = bool(torch.isfinite(activation).all())

        return hook

    n_layers = model.cfg.n_layers
    hooks = [("blocks.0.hook_resid_pre", watch("embedding"))]
    hooks += [(f"blocks.{layer}.hook_resid_post", watch(f"layer {layer}")) for layer in range(n_layers)]
    with torch.no_grad():
        logits = model.run_with_hooks(tokens.to(model.cfg.device), fwd_hooks=hooks)
    finite["unembedding"] = bool(torch.isfinite(logits).all())
    order = ["embedding", *(f"layer {layer}" for layer in range(n_layers)), "unembedding"]
    return next((place for place in order if not finite[place]), None)


def nonfinite_error(model: Any, tokens: Int[Tensor, "seq pos"]) -> NonFiniteError:
    """Return the error to raise when activations turn out not to be finite; it names the first layer."""
    place = first_nonfinite_layer(model, tokens)
    where = f"first after {place}" if place else "not reproducibly"
    return NonFiniteError(
        f"The activations hold NaN or infinity ({where}; dtype {model.cfg.dtype}): "
        f"load the model with dtype='float32' or 'bfloat16', or check its weights."
    )
