"""What the Hugging Face model computes on the probe tokens, recorded before TransformerLens touches it.

Of a large model each weight is read once: few tokens run through all layers (`Reference.tokens`), since the
time of a matrix product with few rows is that of reading the matrix. What depends on more positions (masks,
sliding windows, rotations) is a matter of a layer's code and options, not of its weights, so more tokens
(`Reference.first`) run through the first layers only, up to the first one of the last kind to appear.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memlens.errors import ModelLoadError
from memlens.forward.check.kinds import first_of_each_kind

_ROWS, _LENGTH, _FEW = 2, 12, 3
FEW_FROM = 10**7
"""A model of so many weights runs in full on few tokens."""


@dataclass(frozen=True)
class FirstLayers:
    """What the first layers of the Hugging Face model compute.

    Attributes:
        tokens: The probe tokens.
        resid: The residual at the input of each of the layers and at the output of the last one.
    """

    tokens: Int[Tensor, "seq pos"]
    resid: list[Float[Tensor, "seq pos d_model"]]


@dataclass(frozen=True)
class Reference:
    """What the Hugging Face model computes on the probe tokens.

    Attributes:
        tokens: The probe tokens.
        resid: The residual at the input of each layer, `[layer, seq, pos, d_model]`; empty where the model
            does not give it.
        logits: Its logits.
        first: What its first layers compute on more tokens; None where `tokens` are all.
    """

    tokens: Int[Tensor, "seq pos"]
    resid: list[Float[Tensor, "seq pos d_model"]]
    logits: Float[Tensor, "seq pos vocab"]
    first: FirstLayers | None = None


def probe_tokens(vocab: int, n_ctx: int | None) -> Int[Tensor, "seq pos"]:
    """Return the tokens that models are compared on: fixed, and spread over the vocabulary."""
    length = min(_LENGTH, n_ctx or _LENGTH)
    ids = torch.arange(_ROWS * length) * 7919 + 11
    return (ids % vocab).reshape(_ROWS, length)


@torch.no_grad()
def record_reference(hf_model: Any, name: str, *, sparing: bool = True) -> Reference:
    """Run the Hugging Face model on the probe tokens, before anything changes it.

    Args:
        hf_model: The model.
        name: Its name.
        sparing: Run a large model in full on few tokens only, and its first layers on the others.

    Raises:
        ModelLoadError: It does not run.
    """
    config: Any = hf_model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    tokens = probe_tokens(config.vocab_size, getattr(config, "max_position_embeddings", None))
    tokens = tokens.to(next(hf_model.parameters()).device)
    large = sparing and sum(p.numel() for p in hf_model.parameters()) >= FEW_FROM
    blocks = _first_blocks(hf_model, config) if large else []
    was_training, attention = hf_model.training, getattr(config, "_attn_implementation", None)
    try:
        hf_model.set_attn_implementation("eager")  # as TransformerLens runs it: rounding alike
        hf_model.eval()
        first = _run_first(hf_model, blocks, tokens) if blocks else None
        few = tokens if first is None else tokens[:1, :_FEW]
        out = hf_model(input_ids=few, output_hidden_states=True, use_cache=False)
    except Exception as error:
        raise ModelLoadError(
            f"{name!r} does not run in transformers ({type(error).__name__}: {error})."
        ) from error
    finally:
        hf_model.train(was_training)
        if attention is not None:
            hf_model.set_attn_implementation(attention)
    states = getattr(out, "hidden_states", None) or ()
    return Reference(few, [state.detach() for state in states[:-1]], out.logits.detach(), first)


def _first_blocks(hf_model: Any, config: Any) -> Sequence[nn.Module]:
    """Return the layers up to the first one of the last kind, and the next one; none if they are many."""
    n_layers = config.num_hidden_layers
    lists = [m for m in hf_model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if len(lists) != 1:  # its layers cannot be told
        return []
    per_layer = [own for own in vars(config).values() if isinstance(own, list) and len(own) == n_layers]
    n_first = max(first_of_each_kind(lists[0], per_layer)) + 1
    return [*lists[0]][: n_first + 1] if 2 * n_first <= n_layers else []


class _Enough(Exception):
    """The first layers have run."""


def _run_first(hf_model: Any, blocks: Sequence[nn.Module], tokens: Tensor) -> FirstLayers | None:
    """Run the model until all but the last of these layers have run; None if they are not reached in turn."""
    resid: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        resid.append((args[0] if args else kwargs["hidden_states"]).detach().clone())
        if module is blocks[-1]:
            raise _Enough

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.register_forward_pre_hook(look, prepend=True, with_kwargs=True))
        try:
            hf_model(input_ids=tokens, use_cache=False)
        except _Enough:
            return FirstLayers(tokens, resid) if len(resid) == len(blocks) else None
    return None
