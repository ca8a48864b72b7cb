"""Relative Gaussian noise in the residual stream, as an intervention."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from memlens.attribution.replacing import POSITIONS, where
from memlens.errors import OptionError, check_option
from memlens.models.hooks import check_layer, hook_name
from memlens.models.trunk import Trunk
from memlens.sweeps import Batch, ByBatch, Intervention

__all__ = ["NOISE_SITES", "SCALES", "NoiseSource", "check_alpha", "embedding_noise", "residual_noise"]

NOISE_SITES = ("resid_post", "resid_pre")
SCALES = ("norm", "std")


class NoiseSource:
    """Standard normal numbers for every sequence, kept as long as their batch runs.

    A sequence's numbers depend on the seed, its row and the draw, and not on the batch, the order of the
    interventions, the strength or padding.

    Args:
        seed: The seed.
        draw: Draws of one seed differ.
    """

    seed: int
    draw: int

    def __init__(self, seed: int = 0, draw: int = 0) -> None:
        self.seed, self.draw = seed, draw
        self._key: tuple[Any, ...] = ()
        self._noise = torch.empty(0)

    def __getstate__(self) -> dict[str, int]:
        """What it is, without what it happens to hold."""
        return {"seed": self.seed, "draw": self.draw}

    def of(self, batch: Batch, width: int) -> Float[Tensor, "batch pos width"]:
        """Return `width` numbers a position; 0 where no token stands."""
        key = (width, *batch.rows.tolist())
        if key != self._key:
            out = np.zeros((*batch.tokens.shape, width), dtype=np.float32)
            for i, (row, n) in enumerate(zip(batch.rows.tolist(), batch.mask.sum(1).tolist(), strict=True)):
                rng = np.random.default_rng([self.seed % 2**64, row, self.draw])
                out[i, :n] = rng.standard_normal((n, width), dtype=np.float32)
            self._key, self._noise = key, torch.from_numpy(out).to(batch.tokens.device)
        return self._noise


def embedding_noise(
    model: Any,
    *,
    alpha: float = 0.5,
    seed: int = 0,
    positions: str = "prompt",
    scale: str = "norm",
    draw: int = 0,
) -> Intervention:
    r"""Return relative Gaussian noise on the embeddings as one `Intervention`: a corruption of the prompt.

    It is added to the residual at the input of block 0 (token embeddings, with position embeddings where the
    model adds them there); the formula is that of `perturb_residual`.

    Args:
        model: A TransformerLens model.
        alpha: Strength: with `scale="norm"` the noise's expected length relative to the embedding's.
        seed: A sequence's noise depends on the seed, its row in the set and the draw only.
        positions: "prompt" (those given to the model), "all", "targets" or "last_prompt".
        scale: "norm" or "std".
        draw: Draws of one seed differ.

    Raises:
        OptionError: Unknown positions or scale, or an alpha that is negative or not finite.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:4]
        >>> result = ml.sweep(model, seqs, [ml.embedding_noise(model, alpha=1.0)], progress=False)
        >>> bool((result.effect("target_logprob") != 0).all())
        True
    """
    return residual_noise(
        model,
        NoiseSource(seed, draw),
        alpha=alpha,
        layer=0,
        site="resid_pre",
        positions=positions,
        scale=scale,
        name=f"embedding noise {alpha:g}",
    )


def residual_noise(
    model: Any,
    source: NoiseSource,
    *,
    alpha: float,
    layer: int,
    site: str,
    positions: str,
    scale: str,
    name: str = "",
    coords: Mapping[str, Hashable] | None = None,
) -> Intervention:
    """Return the noise of one strength at one site; see `perturb_residual`."""
    check_option("site", site, NOISE_SITES)
    check_option("positions", positions, POSITIONS)
    check_option("scale", scale, SCALES)
    check_alpha(alpha)
    check_layer(layer, Trunk(model).n_layers)

    def make(batch: Batch) -> Callable[..., Tensor]:
        at = where(batch, positions)

        def fn(x: Tensor, hook: Any) -> Tensor:
            noise = source.of(batch, x.shape[-1])[:, : x.shape[1]].to(x)
            new = x + alpha * _size(x, scale) * noise
            return new if at is None else torch.where(at[:, : x.shape[1], None].to(x.device), new, x)

        return fn

    return Intervention(
        name or f"noise {alpha:g} {site} L{layer}", [(hook_name(site, layer), ByBatch(make))], coords or {}
    )


def check_alpha(alpha: float) -> None:
    """Raise `OptionError` unless a strength is a finite number, 0 or above."""
    if not 0 <= alpha < float("inf"):
        raise OptionError(f"alpha={alpha}: give a finite number, 0 or above.")


def _size(x: Float[Tensor, "*batch d"], scale: str) -> Float[Tensor, "*batch 1"]:
    """The standard deviation that one feature's noise of strength 1 has."""
    if scale == "std":
        return x.std(-1, keepdim=True, correction=0)
    return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
