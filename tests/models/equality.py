"""A comparison with Hugging Face's model that shares no code with `memlens.check_model`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memlens.models.provenance import describe


@torch.no_grad()
def distance_from_huggingface(model: Any, hf_model: nn.Module, tokens: Tensor) -> float:
    """Return the largest absolute difference of logits.

    Processed weights are compared by log-probabilities, since centering the unembedding shifts all logits of
    a position by one constant. `hf_model` must not be the one that a bridge was made from, which is changed.
    """
    expected = hf_model(tokens.to(next(hf_model.parameters()).device)).logits.float().cpu()
    actual = model(tokens.to(model.cfg.device)).float().cpu()
    if describe(model)["processed_weights"]:
        expected, actual = expected.log_softmax(-1), actual.log_softmax(-1)
    return float((expected - actual).abs().max())
