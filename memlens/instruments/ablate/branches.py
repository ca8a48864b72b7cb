"""Ablation of whole branches: what recall loses when a layer's MLP or attention output is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from memlens.choices import AblationMode
from memlens.forward.exclusive import computes
from memlens.forward.hooks import chosen_layers
from memlens.forward.metrics import MetricLike
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.replacing import AblationOptions, Replacement, ReplacementOptions
from memlens.instruments.screen.gradients import ablation_screen
from memlens.instruments.screen.instruments import register_instrument
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_layer_lines
from memlens.results.readings import read_effects
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.run import sweep


@computes
def ablate_mlps(
    model: Any,
    sequences: SequenceSet,
    *,
    mode: AblationMode = "zero",
    layers: Sequence[int] | None = None,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    **options: Unpack[AblationOptions],
) -> Result:
    """Ablate the MLP of each layer, one at a time, and measure recall.

    What the MLP adds to the residual (`hook_mlp_out`, including its bias, after a post-norm if there is one)
    is replaced. The arguments are those of `ablate_heads`; `mode` is "zero", "mean", "resample" or "donor".

    Returns:
        Kind "mlp_ablation": each metric `(sequence, layer)`, and its baseline `(sequence)`.

    Raises:
        OptionError: Unknown mode or positions.
        SiteError: A layer that does not exist.
        SequenceError: "resample" with fewer than two reference sequences.
        DonorError: The donor does not fit the model.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> result = ml.ablate_mlps(model, ml.load_sequences("zoo", model)[:2], progress=False)
        >>> result["target_logprob"].dims
        ('sequence', 'layer')
    """
    replacement, rest = Replacement.split(mode, options)
    interventions = mlp_ablations(model, sequences, layers=layers, **vars(replacement))
    return sweep(
        model, sequences, interventions, metrics, kind="mlp_ablation", settings=replacement.settings, **rest
    )


@computes
def mlp_ablations(
    model: Any,
    sequences: SequenceSet,
    *,
    mode: AblationMode = "zero",
    layers: Sequence[int] | None = None,
    **options: Unpack[ReplacementOptions],
) -> list[Intervention]:
    """Return the interventions that `ablate_mlps` runs, one per layer; see there for the options.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> [edit.coords for edit in ml.edits.mlp_ablations(model, seqs, layers=[2])]
        [{'layer': 2}]
    """
    return _ablations(model, sequences, "mlp_out", "MLP", layers, Replacement(mode, **options))


@computes
def attention_ablations(
    model: Any,
    sequences: SequenceSet,
    *,
    mode: AblationMode = "zero",
    layers: Sequence[int] | None = None,
    **options: Unpack[ReplacementOptions],
) -> list[Intervention]:
    """Return interventions that replace what attention adds to the residual, one per layer.

    Modes and options are those of `ablate_mlps`, applied to `hook_attn_out`.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> len(ml.edits.attention_ablations(model, seqs)) == model.cfg.n_layers
        True
    """
    return _ablations(model, sequences, "attn_out", "attention", layers, Replacement(mode, **options))


def _ablations(
    model: Any,
    sequences: SequenceSet,
    site: str,
    word: str,
    layers: Sequence[int] | None,
    replacement: Replacement,
) -> list[Intervention]:
    cells = [
        (f"{replacement.mode} {word} {layer}", {layer: None}, {"layer": layer})
        for layer in chosen_layers(layers, Trunk(model).n_layers)
    ]
    return replacement.interventions(model, sequences, site, cells)


register_kind("mlp_ablation", plot=plot_layer_lines, reading=read_effects)
register_instrument(
    "mlp_ablation", ranks="layer", kind="mlp_ablation", run=ablate_mlps,
    screen=ablation_screen("mlp_out", "layer"), options=("mode", "positions", "reference", "donor"),
)  # fmt: skip
