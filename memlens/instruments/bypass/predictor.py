"""Predicting from one baseline pass what a bypass changes, and how well this orders the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from memlens.errors import OptionError, ResultError, UnsupportedModelError
from memlens.figures.labels import metric_text
from memlens.forward.batches import make_batches
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.exclusive import computes
from memlens.forward.hooks import attached, chosen_layers, hook_name
from memlens.forward.trunk import Trunk, is_bridge
from memlens.instruments.bypass.lipschitz import head_matrices, product_norm
from memlens.models.provenance import describe
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_layer_lines
from memlens.results.readings import read_predictor
from memlens.results.result import Result
from memlens.results.statistics.agreement import rank_correlation, standard_interval
from memlens.results.statistics.estimates import Estimate
from memlens.results.statistics.resampling import bootstrap_means
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result


@computes
@torch.no_grad()
def bypass_predictor(
    model: Any,
    sequences: SequenceSet,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Result:
    r"""Predict from the baseline alone how much bypassing each layer changes.

    :math:`\sum_h (1 - A_h[t, t])\, \|W_O^h W_V^h\|`: the attention of each head to other tokens, times the
    largest factor by which it can stretch what it reads there (spectral norm). This is the part of the bound
    B2 of `bypass_bounds` that depends on the layer. Ours.

    Args:
        model: A TransformerLens model.
        sequences: The input of the model, teacher-forced.
        layers: Layers; all by default.
        batch_size: Sequences at a time.
        progress: Show a progress bar.

    Returns:
        Kind "bypass_predictor", `(sequence, layer)`, averaged over the positions that predict a target:
        `predictor`; `attention_to_others`, the mean over heads of :math:`1 - A_h[t, t]`; and
        `relative_predictor`, the predictor divided by the norm of the residual at the block's input.

    Raises:
        OptionError: No layers.
        SiteError: A layer that does not exist.
        UnsupportedModelError: Blocks that memlens cannot read, or a bridge with processed weights.
        EmptySetError: No sequences.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> result = ml.bypass.predictor(model, ml.load_sequences("zoo", model)[:2], progress=False)
        >>> result["predictor"].dims
        ('sequence', 'layer')
    """
    trunk = Trunk(model)
    check_readable(model)
    chosen = some_layers(layers, trunk.n_layers)
    check_sequences(sequences, model, on_eos="keep")
    gains = ov_gains(model, chosen)
    parts: list[dict[str, Tensor]] = []
    with tqdm(total=len(sequences), disable=not progress, desc="bypass predictor", unit="seq") as bar:
        for batch, _ in make_batches(sequences, batch_size, trunk.device):
            parts.append(_of_batch(trunk, batch.tokens, batch.predicts, chosen, gains))
            bar.update(len(batch.rows))
    variables = {
        name: (("sequence", "layer"), torch.cat([p[name] for p in parts]).cpu().numpy()) for name in parts[0]
    }
    return make_result("bypass_predictor", model, sequences, variables, {"layer": chosen}, {"layers": chosen})


def check_readable(model: Any) -> None:
    """Raise `UnsupportedModelError` for a bridge with weights processed by TransformerLens."""
    if is_bridge(model) and describe(model)["processed_weights"]:
        raise UnsupportedModelError(
            "the weights of this TransformerBridge are processed and differ from those that its blocks use: "
            "load it with process_weights=False."
        )


def some_layers(layers: Sequence[int] | None, n_layers: int) -> list[int]:
    """Return the given layers, or all; an empty list is an `OptionError`."""
    chosen = chosen_layers(layers, n_layers)
    if not chosen:
        raise OptionError("layers=[] selects nothing: give at least one layer.")
    return chosen


@computes
@torch.no_grad()
def ov_gains(model: Any, layers: Sequence[int]) -> dict[int, Float[Tensor, " head"]]:
    r"""Return the spectral norm :math:`\|W_O^h W_V^h\|` of each head, by layer.

    Raises:
        UnsupportedModelError: Blocks that memlens cannot read.
    """
    blocks = FunctionalBlocks(Trunk(model), layers, width=2)
    pairs, place = {layer: head_matrices(blocks, layer) for layer in layers}, blocks.trunk.device
    return {layer: product_norm(w_o.double(), w_v.double()).to(place) for layer, (w_v, w_o) in pairs.items()}


def _of_batch(
    trunk: Trunk, tokens: Tensor, predicts: Tensor, layers: Sequence[int], gains: dict[int, Tensor]
) -> dict[str, Tensor]:
    """Run one batch, keeping only the diagonal of each pattern."""
    shared: dict[int, Tensor] = {}
    lengths: dict[int, Tensor] = {}

    def diagonal(layer: int, pattern: Tensor, hook: Any) -> None:
        shared[layer] = (1 - pattern.diagonal(dim1=-2, dim2=-1).double()).to(predicts.device)

    def length(layer: int, resid: Tensor, hook: Any) -> None:
        lengths[layer] = resid.double().norm(dim=-1).to(predicts.device)

    looks = (("pattern", diagonal), ("resid_pre", length))
    hooks = [(hook_name(site, layer), partial(look, layer)) for site, look in looks for layer in layers]
    with attached(trunk.model, hooks):
        trunk.run(trunk.embed(tokens), stop=max(layers) + 1)
    count = predicts.sum(-1)

    def average(values: Tensor) -> Tensor:
        return (values * predicts).sum(-1) / count

    weighted = {layer: torch.einsum("bht,h->bt", shared[layer], gains[layer]) for layer in layers}
    return {
        "predictor": torch.stack([average(weighted[n]) for n in layers], 1),
        "attention_to_others": torch.stack([average(shared[n].mean(1)) for n in layers], 1),
        "relative_predictor": torch.stack([average(weighted[n] / lengths[n]) for n in layers], 1),
    }


@dataclass(frozen=True)
class PredictorAgreement:
    """How well a predictor orders layers by what their bypass does.

    Attributes:
        value: Spearman's rank correlation over layers of mean predictor and mean damage.
        low: Lower end of its interval over sequences.
        high: Upper end of the interval.
        n_layers: Number of layers.
        n_sequences: Number of sequences.
        predictor: The predicting variable.
        metric: The metric of the damage.
    """

    value: float
    low: float
    high: float
    n_layers: int
    n_sequences: int
    predictor: str
    metric: str

    def __str__(self) -> str:
        return (
            f"rank correlation of {self.predictor} and {self.metric} over {self.n_layers} layers: "
            f"{Estimate(self.value, self.low, self.high, self.n_sequences)} ({self.n_sequences} sequences)"
        )


def predictor_agreement(
    predicted: Result,
    measured: Result,
    metric: str = "target_logprob",
    *,
    predictor: str = "predictor",
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> PredictorAgreement:
    """Compare what was predicted for the bypass of each layer with what it did, on the same sequences.

    Args:
        predicted: Result of `bypass_predictor`.
        measured: Result of `bypass_attention` or `bypass_bounds`.
        metric: A metric of `measured`. If it has a baseline, its effect counts, with harm positive; otherwise
            (`kl`) its value. Dimensions other than the layer are averaged.
        predictor: A variable of `predicted`.
        level: Coverage of the interval.
        n_resamples: Resamples of the bootstrap over sequences.
        seed: Seed of the bootstrap.

    Returns:
        The rank correlation over layers; 1 if predictor and damage order them alike. The interval is the
        value ± the bootstrap's standard error times the normal quantile. It tells how reliable this order of
        this model's layers is for other sequences, and nothing about other models.

    Raises:
        ResultError: The results differ in sequences or layers, or have fewer than three layers.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[-6:]
        >>> measured = ml.bypass_attention(model, seqs, progress=False)
        >>> lost = -measured.effect("target_logprob").rename("predictor")
        >>> predicted = ml.Result.create(lost.to_dataset(), kind="bypass_predictor")
        >>> round(ml.bypass.predictor_agreement(predicted, measured, n_resamples=20).value, 3)
        1.0
    """
    x, y = predicted[predictor], _damage(measured, metric)
    for dim in ("sequence", "layer"):
        if list(x[dim].values) != list(y[dim].values):
            raise ResultError(f"both results must have the same {dim}s in the same order to be compared.")
    if x.sizes["layer"] < 3:
        raise ResultError(f"{x.sizes['layer']} layers cannot be ranked: give results of three or more.")
    x, y = x.transpose("sequence", "layer"), y.transpose("sequence", "layer")
    tables = [np.asarray(v.values, dtype=float) for v in (x, y)]
    value = float(rank_correlation(*(np.nanmean(t, axis=0) for t in tables)))
    spread = rank_correlation(*(bootstrap_means(t, n_resamples, seed) for t in tables))
    low, high = standard_interval(value, spread, level, -1.0, len(tables[0]))
    return PredictorAgreement(value, low, high, x.sizes["layer"], x.sizes["sequence"], predictor, metric)


def _damage(measured: Result, metric: str) -> Any:
    has_baseline = f"{metric}_baseline" in measured.data
    values = measured.effect(metric) if has_baseline else measured[metric]
    extra = [d for d in values.dims if d not in ("sequence", "layer")]
    turned = -1 if has_baseline and metric_text(metric).better > 0 else 1
    return turned * (values.mean(extra) if extra else values)


register_kind("bypass_predictor", plot=plot_layer_lines, reading=read_predictor)
