"""Cells: from an array over positions, heads or neurons to the sites that a result distinguishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from memlens.errors import OptionError, check_option
from memlens.forward.hooks import SITES

OVER = ("position", "layer", "head", "head_position", "neuron", "neuron_position")
_PARTS = {"head": ("head", "kv_head"), "neuron": ("d_mlp",)}


def check_over(site: str, over: str | None) -> str:
    """Return `over`, or the parts of the site if it is None.

    Raises:
        OptionError: An unknown `over`, or one that the site does not have.

    >>> check_over("z", None), check_over("mlp_post", None), check_over("mlp_out", None)
    ('head', 'neuron', 'layer')
    """
    axes = SITES[site].shape.split()
    own = next((part for part, names in _PARTS.items() if set(names) & set(axes)), None)
    if over is None:
        return own or "layer"
    check_option("over", over, OVER)
    part = over.removesuffix("_position")
    if part in _PARTS and part != own:
        needed = "'z'" if part == "head" else "'mlp_post'"
        raise OptionError(f"over={over!r} needs site={needed}: {site!r} has no {part}s.")
    return over


@dataclass(frozen=True)
class Cells:
    """The axes of an activation that are kept; all others are summed.

    Attributes:
        over: One of `OVER`.
        positions: The token positions to keep, if `over` has positions.
        site: The site of the activation.
    """

    over: str
    positions: Sequence[int]
    site: str

    @property
    def dims(self) -> tuple[str, ...]:
        """The dimensions after the layer."""
        return () if self.over == "layer" else tuple(self.over.split("_"))

    def coords(self, shape: Sequence[int]) -> dict[str, list[int]]:
        """The coordinates of an array `[seq, layer, …]` of this shape."""
        sizes = dict(zip(self.dims, shape[2:], strict=True))
        return {
            dim: list(self.positions) if dim == "position" else list(range(n)) for dim, n in sizes.items()
        }

    def reduce(self, products: Mapping[int, Tensor]) -> np.ndarray:
        """Sum elementwise products, in the activation's shape, of each layer to `[batch, layer, …]`."""
        return np.stack([self._sum(p) for p in products.values()], axis=1)

    def _sum(self, x: Tensor) -> np.ndarray:
        x = x.transpose(1, 2) if self.site == "pattern" else x  # heads first, then queries
        parted = len(SITES[self.site].shape.split()) == 4
        kept = x.sum(-1) if parted else x  # [batch, pos] and heads or features
        if self.over in ("head", "neuron"):
            return _array(kept.sum(1))
        if self.over == "layer":
            return _array(kept.flatten(1).sum(1))
        if self.over == "position":
            return self._picked(_array(kept.sum(-1)))
        return self._picked(_array(kept.transpose(1, 2)))

    def _picked(self, x: np.ndarray) -> np.ndarray:
        """Select the positions; those beyond the sequences of a batch are NaN."""
        wide = np.full((*x.shape[:-1], max(self.positions, default=-1) + 1), np.nan)
        n = min(wide.shape[-1], x.shape[-1])
        wide[..., :n] = x[..., :n]
        return wide[..., list(self.positions)]


def _array(x: Tensor) -> np.ndarray:
    return x.double().cpu().numpy()
