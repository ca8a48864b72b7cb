"""A localizer: the mean size of what each MLP or attention adds where the targets are predicted."""

from __future__ import annotations

from typing import Any

import numpy as np

from memlens.benchmark import localizer
from memlens.forward.capture import captured_at_targets
from memlens.forward.hooks import hook_name
from memlens.forward.trunk import Trunk


@localizer("size of addition", components=("layer_mlp", "layer_attention"), cost="one forward pass")
def size(model: Any, sequences: Any, *, component: str, others: Any, seed: int) -> np.ndarray:
    """Return one score per sequence and layer: the mean Euclidean norm over targets."""
    site = "mlp_out" if component == "layer_mlp" else "attn_out"
    names = [hook_name(site, layer) for layer in range(model.cfg.n_layers)]
    parts = captured_at_targets(Trunk(model), sequences, names, progress=False)
    norms = [np.stack([part.acts[name].norm(dim=-1).mean(1) for name in names], 1) for part in parts]
    return np.concatenate(norms)[..., None]
