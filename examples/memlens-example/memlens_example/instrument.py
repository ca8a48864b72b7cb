"""An instrument: the output of each MLP is multiplied by a factor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from memlens.forward.metrics import MetricLike
from memlens.instruments.screen.instruments import register_instrument
from memlens.report.bibliography import Reference, register_reference
from memlens.results.kinds import register_kind
from memlens.results.readings import read_effects
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.run import sweep
from memlens_example.figure import plot_bars


def mlp_scalings(model: Any, factor: float) -> list[Intervention]:
    """Return one intervention per layer: its MLP's output times `factor`."""

    def scale(out: Tensor, hook: Any) -> Tensor:
        return factor * out

    return [
        Intervention(f"MLP {layer} x {factor:g}", [(f"blocks.{layer}.hook_mlp_out", scale)], {"layer": layer})
        for layer in range(model.cfg.n_layers)
    ]


def scale_mlps(
    model: Any,
    sequences: SequenceSet,
    *,
    factor: float = 0.5,
    metrics: Sequence[MetricLike] = ("target_logprob", "top10"),
    **options: Any,
) -> Result:
    """Scale the MLP of every layer alone, and measure recall.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        factor: What the MLP's output is multiplied by.
        metrics: As for `memlens.sweep`.
        options: Further options of `memlens.sweep`.

    Returns:
        Kind "mlp_scaling": each metric `(sequence, layer)`, and its baseline `(sequence)`.
    """
    edits = mlp_scalings(model, factor)
    settings = {"factor": factor}
    return sweep(model, sequences, edits, metrics, kind="mlp_scaling", settings=settings, **options)


register_reference("example2026", Reference("A. Author and others", 2026, "Scaled MLPs"))
register_kind(
    "mlp_scaling", plot=plot_bars, reading=read_effects, cites=(("example2026", "scaling the MLPs"),)
)
register_instrument("scaled MLPs", ranks="layer", kind="mlp_scaling", run=scale_mlps)
