"""What a bypass would change, guessed from one baseline pass; and how well the guess orders the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from memlens.forward.hooks import attached, chosen_layers, hook_name
from memlens.forward.trunk import Trunk, is_bridge
from memlens.instruments.bypass.lipschitz import product_norm
from memlens.models.provenance import describe
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_layer_lines
from memlens.results.readings import read_predictor
from memlens.results.result import Result
from memlens.results.statistics.agreement import rank_correlation, standard_interval
from memlens.results.statistics.intervals import bootstrap_means
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.sweeps.labels import make_result


@torch.no_grad()
def bypass_predictor(
    model: Any,
    sequences: SequenceSet,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Result:
    r"""Guess from the baseline alone how much each layer's bypass changes.

    :math:`\sum_h (1 - A_h[t, t])\, \|W_O^h W_V^h\|`: how much of its attention each head gives to other
    tokens, times how long it can make what it takes from them (spectral norm). It is the factor of the bound
    B2 of `bypass_bounds` that tells layers apart. Ours.

    Args:
        model: A TransformerLens model.
        sequences: What the model reads, teacher-forced.
        layers: Layers; all by default.
        batch_size: Sequences at a time.
        progress: Show a bar.

    Returns:
        Kind "bypass_predictor", `(sequence, layer)`, averaged over the positions that predict a target:
        `predictor`; `attention_to_others`, the mean over heads of :math:`1 - A_h[t, t]`; and
        `relative_predictor`, the mean of the predictor over the norm of the residual at the block's input.

    Raises:
        OptionError: No layers.
        SiteError: A layer that does not exist.
        UnsupportedModelError: Blocks whose parts are not known, or a bridge with processed weights.
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
    """Raise `UnsupportedModelError` for a bridge whose weights TransformerLens has processed."""
    if is_bridge(model) and describe(model)["processed_weights"]:
        raise UnsupportedModelError(
            "the weights of this TransformerBridge are processed, and cannot be read as its blocks use them: "
            "load it with process_weights=False."
        )


def some_layers(layers: Sequence[int] | None, n_layers: int) -> list[int]:
    """Return the layers asked for, all by default; none is an `OptionError`."""
    chosen = chosen_layers(layers, n_layers)
    if not chosen:
        raise OptionError("layers=[] leaves nothing to look at: give at least one layer.")
    return chosen


@torch.no_grad()
def ov_gains(model: Any, layers: Sequence[int]) -> dict[int, Float[Tensor, " head"]]:
    r"""Return the spectral norm :math:`\|W_O^h W_V^h\|` of each head, by layer.

    Raises:
        UnsupportedModelError: Blocks whose parts are not known.
    """
    blocks = FunctionalBlocks(Trunk(model), layers, width=2)
    found = {}
    for layer in layers:
        block, d_head = blocks.blocks[layer], blocks.d_head
        w_v = block.qkv().weight[-blocks.n_kv * d_head :].unflatten(0, (-1, d_head))
        w_o = block.o.weight.unflatten(1, (blocks.n_heads, d_head)).transpose(0, 1)
        w_v = w_v.repeat_interleave(blocks.n_heads // blocks.n_kv, 0)
        found[layer] = product_norm(w_o.double(), w_v.double())
    return found


def _of_batch(
    trunk: Trunk, tokens: Tensor, predicts: Tensor, layers: Sequence[int], gains: dict[int, Tensor]
) -> dict[str, Tensor]:
    """Run one batch; of each pattern only the diagonal is kept."""
    shared: dict[int, Tensor] = {}
    lengths: dict[int, Tensor] = {}

    def diagonal(layer: int) -> Callable[..., None]:
        def look(pattern: Tensor, hook: Any) -> None:
            shared[layer] = 1 - pattern.diagonal(dim1=-2, dim2=-1).double()

        return look

    def length(layer: int) -> Callable[..., None]:
        def look(resid: Tensor, hook: Any) -> None:
            lengths[layer] = resid.double().norm(dim=-1)

        return look

    hooks = [(hook_name("pattern", layer), diagonal(layer)) for layer in layers]
    hooks += [(hook_name("resid_pre", layer), length(layer)) for layer in layers]
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
        high: Upper end.
        n_layers: Layers compared.
        n_sequences: Sequences averaged.
        predictor: Which variable predicted.
        metric: What the damage was measured by.
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
            f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] ({self.n_sequences} sequences)"
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
    """Compare what was predicted of each layer's bypass with what it did, on the same sequences.

    Args:
        predicted: From `bypass_predictor`.
        measured: From `bypass_attention`, or from `bypass_bounds`.
        metric: A metric of `measured`. Of one with a baseline the effect is taken, turned so that harm is
            positive; of another (`kl`) the value. Dimensions other than the layer are averaged.
        predictor: Which variable of `predicted`.
        level: Coverage of the interval.
        n_resamples: Resamples of the bootstrap over sequences.
        seed: Of the bootstrap.

    Returns:
        The rank correlation over layers; 1 where the predictor orders them as the damage does. The interval
        is that value ± the bootstrap's standard error times the normal quantile; it says how reliably these
        layers of this model are so ordered for other sequences, and nothing of other models.

    Raises:
        ResultError: Other sequences or layers, or fewer than three layers.
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
    low, high = standard_interval(value, spread, level, -1.0)
    return PredictorAgreement(value, low, high, x.sizes["layer"], x.sizes["sequence"], predictor, metric)


def _damage(measured: Result, metric: str) -> Any:
    has_baseline = f"{metric}_baseline" in measured.data
    values = measured.effect(metric) if has_baseline else measured[metric]
    extra = [d for d in values.dims if d not in ("sequence", "layer")]
    turned = -1 if has_baseline and metric_text(metric).better > 0 else 1
    return turned * (values.mean(extra) if extra else values)


register_kind("bypass_predictor", plot=plot_layer_lines, reading=read_predictor)
