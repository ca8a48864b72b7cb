"""The sizes of a model that costs depend on, for models that are not here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from memlens.models.trunk import Trunk

__all__ = ["ModelShape"]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that costs depend on; it stands in for a model that is not here.

    Attributes:
        n_layers: Blocks.
        d_model: Width of the residual.
        n_heads: Query heads of a block.
        n_kv_heads: Key and value heads.
        d_head: Width of a head.
        d_mlp: Width of the MLP.
        d_vocab: Tokens.
        gated_mlp: Whether the MLP has a gate.
        parallel: Whether attention and MLP read the same input.
        dtype: Of weights and activations.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    gated_mlp: bool
    parallel: bool
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """Return the shape of a loaded model.

        >>> import memlens as ml
        >>> ModelShape.of(ml.load_model("zoo/pythia-s")).n_layers
        6
        """
        trunk, cfg = Trunk(model), model.cfg
        return cls(
            trunk.n_layers, trunk.d_model, trunk.n_heads, trunk.n_kv_heads, trunk.d_head,
            getattr(cfg, "d_mlp", None) or 4 * trunk.d_model, trunk.d_vocab,
            bool(getattr(cfg, "gated_mlp", False)), trunk.parallel, trunk.dtype,
        )  # fmt: skip

    @property
    def model(self) -> ModelShape:
        """Itself: where a trunk has its model."""
        return self

    @property
    def cfg(self) -> ModelShape:
        """Itself: where a model has its configuration."""
        return self

    @property
    def device(self) -> torch.device:
        """A GPU, by whose rules portions are cut."""
        return torch.device("cuda")
