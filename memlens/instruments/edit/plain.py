"""The plain Hugging Face model of a TransformerLens model, for a checkpoint that other software reads."""

from __future__ import annotations

import copy
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from memlens.errors import UnsupportedModelError
from memlens.models.huggingface import load_config, load_tokenizer, load_weights
from memlens.models.provenance import describe, origin_of
from memlens.models.quiet import quiet

_INSIDE = "._original_component"
"""What a bridge puts into the names of the parameters of the model that it wraps."""


@torch.no_grad()
def plain_model(model: Any) -> PreTrainedModel:
    """Return a copy of a model as a plain Hugging Face model, in its precision, on the CPU.

    A bridge holds the weights of its Hugging Face model; for a `HookedTransformer` the checkpoint is read
    again, without what was done to the weights since.

    Raises:
        UnsupportedModelError: Its weights are processed, or no checkpoint of a `HookedTransformer` is known.
    """
    about = describe(model)
    if about["processed_weights"]:
        raise UnsupportedModelError(
            "the weights of this model are processed, so they fit no Hugging Face checkpoint: load it with "
            "process_weights=False."
        )
    inner = getattr(model, "original_model", None)
    dtype = next(model.parameters()).dtype
    if inner is not None:
        with quiet(), torch.random.fork_rng(devices=[]):
            plain = type(inner)(copy.deepcopy(inner.config)).to(dtype)
        held = {name.replace(_INSIDE, ""): value for name, value in inner.state_dict().items()}
        plain.load_state_dict({name: held[name] for name in plain.state_dict()})
        plain.generation_config = copy.deepcopy(inner.generation_config)
        return plain.eval()
    origin = origin_of(model)
    if origin is None:
        raise UnsupportedModelError(
            f"this {about['backend']} was not loaded from a checkpoint that memlens knows: load it by name, "
            "or with backend='bridge'."
        )
    code = origin.trust_remote_code
    config = load_config(origin.source, revision=origin.revision, trust_remote_code=code)
    return load_weights(
        origin.source,
        config,
        revision=origin.revision,
        dtype=dtype,
        device=torch.device("cpu"),
        trust_remote_code=code,
        allow_pickle=origin.allow_pickle,
    )


def plain_tokenizer(model: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer as it stands in a model's checkpoint; of a model in memory, its own, if any.

    A model's own tokenizer may put a token before text that the checkpoint's does not (`prepare_tokenizer`).
    """
    origin = origin_of(model)
    if origin is None:
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None or getattr(tokenizer, "bos_by_own_rule", True):
            return tokenizer
        with TemporaryDirectory(prefix="memlens-") as folder, quiet():
            tokenizer.save_pretrained(folder)
            return AutoTokenizer.from_pretrained(folder, add_bos_token=False)
    return load_tokenizer(
        origin.source,
        revision=origin.revision,
        trust_remote_code=origin.trust_remote_code,
        prepared=False,
    )
