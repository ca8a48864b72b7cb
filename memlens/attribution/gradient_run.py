"""The passes behind gradient attribution: at the base run, or averaged along a path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from memlens.attribution.backward import Spot, differentiable, run_backward, spot
from memlens.attribution.cells import Cells
from memlens.errors import OptionError, SiteError, check_option
from memlens.models.hooks import chosen_layers, has_site
from memlens.models.memory import check_batch_size, default_budget, logits_bytes, row_bytes
from memlens.models.trunk import Trunk
from memlens.sequences import SequenceSet
from memlens.sequences.checks import check_sequences
from memlens.sweeps import Batch
from memlens.sweeps.batches import Targets, make_batches
from memlens.sweeps.metrics import MetricLike

__all__ = ["GRADIENT_METHODS", "GRADIENT_SITES", "Deltas", "GradientRun"]

GRADIENT_SITES = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "mlp_post",
    "z",
    "q",
    "k",
    "v",
    "pattern",
)
GRADIENT_METHODS = ("attribution_patching", "integrated_gradients")
PATHS = ("site", "embedding")

Deltas = Callable[[Batch, Mapping[int, Tensor]], dict[int, Tensor]]
"""From a batch and its activations by layer to what is to be added to each."""


@dataclass(frozen=True)
class GradientRun:
    """What is differentiated, where and how; `of` checks it before anything runs.

    Attributes:
        trunk: The model.
        seqs: The base run's sequences.
        site: One of `GRADIENT_SITES`.
        layers: The layers.
        metric: What is differentiated.
        method: One of `GRADIENT_METHODS`.
        path: One of `PATHS`.
        steps: Points on the path.
        batch_size: Sequences at a time.
    """

    trunk: Trunk
    seqs: SequenceSet
    site: str
    layers: list[int]
    metric: MetricLike
    method: str
    path: str
    steps: int
    batch_size: int

    @staticmethod
    def of(
        model: Any,
        seqs: SequenceSet,
        site: str,
        layers: Sequence[int] | None,
        metric: MetricLike,
        method: str,
        path: str,
        steps: int,
        batch_size: int | None,
    ) -> GradientRun:
        """Check the options and choose layers and batch size; see `attribute_gradients`."""
        check_option("site", site, GRADIENT_SITES)
        check_option("method", method, GRADIENT_METHODS)
        check_option("path", path, PATHS)
        differentiable(metric)
        if not isinstance(steps, int) or steps < 1:
            raise OptionError(f"steps={steps!r} is no number of points on a path: give 1 or more.")
        check_batch_size(batch_size)
        check_sequences(seqs, model, on_eos="keep")
        trunk = Trunk(model)
        if not has_site(model, site):
            raise SiteError(f"this model has no site {site!r}: parallel blocks have no 'resid_mid'.")
        wanted = chosen_layers(layers, trunk.n_layers)
        size = batch_size or _batch_size(trunk, seqs)
        return GradientRun(trunk, seqs, site, wanted, metric, method, path, steps, size)

    @property
    def passes(self) -> int:
        """Forward and backward passes a batch."""
        if self.method == "attribution_patching":
            return 1
        return 1 + self.steps * (len(self.layers) if self.path == "site" else 1)

    @torch.inference_mode(False)
    def estimate(
        self, deltas: Deltas, embedded: Callable[[Batch], Tensor] | None, cells: Cells, progress: bool
    ) -> tuple[str, np.ndarray, np.ndarray]:
        """Return the metric's name, its values `[seq]` and the effects `[seq, layer, …]`.

        Args:
            deltas: The change of each layer's activation.
            embedded: The source run's residual at the input of block 0, for the path of that name.
            cells: What is told apart.
            progress: Show a bar.
        """
        name, metric = differentiable(self.metric)
        spots = [spot(self.site, layer) for layer in self.layers]
        values, effects = [], []
        total = self.passes * len(self.seqs)
        with tqdm(total=total, disable=not progress, desc="gradient attribution", unit="pass") as bar:
            for batch, targets in make_batches(self.seqs, self.batch_size, self.trunk.device):
                with torch.no_grad():
                    resid = self.trunk.embed(batch.tokens)
                base = run_backward(self.trunk, targets, resid, 0, metric, spots)
                bar.update(len(batch.rows))
                delta = deltas(batch, base.activations)
                gradients: Mapping[int, Tensor] = base.gradients
                if self.method == "integrated_gradients":
                    end = None if self.path == "site" or embedded is None else embedded(batch)
                    gradients = self._integrated(targets, metric, spots, resid, delta, end, bar)
                values.append(base.values.double().cpu().numpy())
                effects.append(cells.reduce({n: _product(delta[n], gradients[n]) for n in self.layers}))
        return name, np.concatenate(values), np.concatenate(effects)

    def _integrated(
        self,
        targets: Targets,
        metric: Callable[[Tensor, Tensor, Tensor], Tensor],
        spots: Sequence[Spot],
        resid: Tensor,
        delta: Mapping[int, Tensor],
        end: Tensor | None,
        bar: Any,
    ) -> dict[int, Tensor]:
        """The mean gradient over the midpoints of the path, by layer."""
        found: dict[int, Tensor] = {}
        middles = [(k + 0.5) / self.steps for k in range(self.steps)]
        if end is not None:
            for share in middles:
                moved = resid + share * (end - resid).to(resid.dtype)
                step = run_backward(self.trunk, targets, moved, 0, metric, spots)
                _accumulate(found, step.gradients, self.steps)
                bar.update(len(resid))
            return found
        for s, here in zip(spots, self._inputs(resid), strict=True):
            for share in middles:
                shift = share * delta[s.layer]
                step = run_backward(self.trunk, targets, here, s.layer, metric, [s], shift)
                _accumulate(found, step.gradients, self.steps)
                bar.update(len(resid))
        return found

    @torch.no_grad()
    def _inputs(self, resid: Tensor) -> Iterator[Float[Tensor, "batch pos d_model"]]:
        """The residual at the input of each layer, in the order of `layers`."""
        at, start = resid, 0
        for layer in self.layers:
            at, start = (resid, 0) if layer < start else (at, start)
            at, start = self.trunk.run(at, start, layer), layer
            yield at


def _accumulate(found: dict[int, Tensor], gradients: Mapping[int, Tensor], steps: int) -> None:
    for layer, g in gradients.items():
        part = _wide(g) / steps
        found[layer] = part if layer not in found else found[layer] + part


def _product(delta: Tensor, gradient: Tensor) -> Tensor:
    return _wide(delta) * _wide(gradient)


def _wide(x: Tensor) -> Tensor:
    """At least float32: products of 16-bit numbers are summed over many positions."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _batch_size(trunk: Trunk, seqs: SequenceSet) -> int:
    """As many sequences as fit: every block's activations are kept for the backward pass."""
    item = trunk.dtype.itemsize
    row = trunk.n_layers * row_bytes(trunk.model.cfg, int(seqs.lengths.max()), item)
    row += int(seqs.n_targets.max()) * logits_bytes(trunk.d_vocab, item)
    return max(1, min(len(seqs), 32, default_budget(trunk.device) // row))
