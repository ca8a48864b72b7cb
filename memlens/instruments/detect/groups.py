"""Two groups of sequences that a detector compares, and what is read from the model for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memlens.errors import EmptySetError
from memlens.forward.capture import captured_at_targets
from memlens.forward.hooks import hook_name
from memlens.forward.trunk import Trunk
from memlens.sequences.set import SequenceSet

RECALLED, MATCHED = "recalled", "matched"
_CAPTURE_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class Groups:
    """Recalled sequences followed by the ones that they are compared with.

    Attributes:
        sequences: Both sets; the table's column `group` is "recalled" or "matched".
        recalled: True for the first.
        pair: A number per sequence, the same for a sequence and its matched controls (column `matched_to`);
            cross-validation and halves never separate them.

    Example:
        >>> import memlens as ml
        >>> seqs = ml.load_sequences("zoo")
        >>> ml.detect.Groups.of(seqs[-2:], seqs[:2]).recalled.tolist()
        [True, True, False, False]
    """

    sequences: SequenceSet
    recalled: Bool[np.ndarray, "seq"]
    pair: Int[np.ndarray, "seq"]

    @classmethod
    def of(cls, recalled: SequenceSet, matched: SequenceSet) -> Groups:
        """Join two sets.

        Raises:
            EmptySetError: One of them is empty.
            SequenceError: Both have a sequence with the same id.
        """
        for name, seqs in ((RECALLED, recalled), (MATCHED, matched)):
            if not len(seqs):
                raise EmptySetError(f"there are no {name} sequences: a detector compares two groups.")
        labeled = [
            seqs.with_table(seqs.table.assign(group=name))
            for name, seqs in ((RECALLED, recalled), (MATCHED, matched))
        ]
        own = [str(name) for name in recalled.ids]
        links = matched.table["matched_to"].astype(str) if "matched_to" in matched.table else matched.ids
        pair = pd.factorize(np.array([*own, *map(str, links)], dtype=object))[0]
        label = np.arange(len(recalled) + len(matched)) < len(recalled)
        return cls(labeled[0].concat(labeled[1]), label, pair)

    def __len__(self) -> int:
        return len(self.recalled)

    def halves(self, seed: int) -> tuple[Int[np.ndarray, "a"], Int[np.ndarray, "b"]]:
        """Return the rows of two random halves; pairs stay together, and each group is divided evenly."""
        rng, n_pairs = np.random.default_rng(seed), int(self.pair.max()) + 1
        with_recalled = np.isin(np.arange(n_pairs), self.pair[self.recalled])
        first = np.zeros(n_pairs, bool)
        for pairs in (np.flatnonzero(with_recalled), np.flatnonzero(~with_recalled)):
            first[rng.permutation(pairs)[: -(-len(pairs) // 2)]] = True
        return np.flatnonzero(first[self.pair]), np.flatnonzero(~first[self.pair])


def capture_batch(trunk: Trunk, seqs: SequenceSet, widths: int) -> int:
    """Return how many sequences' activations of `widths` numbers per position are held together."""
    return min(16, max(1, _CAPTURE_BYTES // (int(seqs.lengths.max()) * widths * trunk.dtype.itemsize)))


def mean_over_targets(
    model: Any,
    seqs: SequenceSet,
    site: str,
    layers: Sequence[int],
    *,
    progress: bool = True,
    desc: str = "activations",
) -> Float[np.ndarray, "seq layer width"]:
    """Return each sequence's activations, averaged over the positions that predict its targets."""
    trunk = Trunk(model)
    names = [hook_name(site, layer) for layer in layers]
    width = trunk.model.cfg.d_mlp if site == "mlp_post" else trunk.d_model
    size = capture_batch(trunk, seqs, width * len(layers))
    parts = [
        _mean(torch.stack([item.acts[name] for name in names], 1), item.targets.mask)
        for item in captured_at_targets(trunk, seqs, names, batch_size=size, progress=progress, desc=desc)
    ]
    return np.concatenate(parts)


def _mean(acts: Float[Tensor, "batch layer target width"], mask: Bool[Tensor, "batch target"]) -> np.ndarray:
    weight = (mask / mask.sum(-1, keepdim=True))[:, None, :, None]
    return (acts.float() * weight).sum(2).cpu().numpy()


@dataclass(frozen=True, eq=False)
class Tokens:
    """Some target tokens of every sequence, with the residual stream where each is predicted.

    Attributes:
        row: The sequence of each token.
        place: Its number among the sequence's targets.
        acts: `[token, layer, d_model]`, the residual after each layer.
    """

    row: Int[np.ndarray, "token"]
    place: Int[np.ndarray, "token"]
    acts: Float[np.ndarray, "token layer d_model"]


def spread_targets(n_targets: int, most: int) -> Int[np.ndarray, "place"]:
    """Return at most `most` of a continuation's targets, evenly spaced.

    >>> spread_targets(9, 3).tolist(), spread_targets(2, 3).tolist()
    ([0, 4, 8], [0, 1])
    """
    return np.unique(np.linspace(0, n_targets - 1, min(most, n_targets)).round().astype(int))


def residuals_at_targets(
    model: Any, seqs: SequenceSet, layers: Sequence[int], most: int, *, progress: bool = True
) -> Tokens:
    """Return the residual after each layer where at most `most` targets of each sequence are predicted."""
    trunk = Trunk(model)
    names = [hook_name("resid_post", layer) for layer in layers]
    rows, places, acts = [], [], []
    start, n_targets = 0, seqs.n_targets.tolist()
    size = capture_batch(trunk, seqs, trunk.d_model * len(layers))
    for item in captured_at_targets(trunk, seqs, names, batch_size=size, progress=progress, desc="residuals"):
        for i in range(len(item.final)):
            chosen = spread_targets(n_targets[start + i], most)
            rows.append(np.full(len(chosen), start + i))
            places.append(chosen)
            acts.append(torch.stack([item.acts[n][i, chosen] for n in names], 1).float().cpu().numpy())
        start += len(item.final)
    return Tokens(*(np.concatenate(parts) for parts in (rows, places, acts)))
