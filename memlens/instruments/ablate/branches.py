"""Ablation of whole branches: what recall loses when a layer's MLP or attention output is replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memlens.errors import check_option
from memlens.forward.hooks import chosen_layers, hook_name
from memlens.forward.metrics import MetricLike
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.replacing import POSITIONS, replacement_settings, replacements, replacing
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_layer_lines
from memlens.results.readings import read_effects
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.run import sweep

MLP_MODES = ("zero", "mean", "resample")


def ablate_mlps(
    model: Any,
    sequences: SequenceSet,
    *,
    mode: str = "zero",
    layers: Sequence[int] | None = None,
    positions: str = "all",
    reference: SequenceSet | None = None,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    seed: int = 0,
    **options: Any,
) -> Result:
    """Ablate the MLP of every layer alone and measure recall.

    What the MLP adds to the residual (`hook_mlp_out`, its bias included, after a post-norm where there is
    one) becomes

    - ``"zero"``: 0;
    - ``"mean"``: its mean over all positions of `reference`;
    - ``"resample"``: what it gives at the same position of another sequence of `reference`, drawn once.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        mode: One of the above.
        layers: Layers to ablate; all by default.
        positions: "all", "prompt" (those given to the model), "targets" (those that predict a target) or
            "last_prompt" (the one that predicts the first target).
        reference: The set for "mean" and "resample"; `sequences` itself by default.
        metrics: As for `sweep`.
        seed: For "resample".
        options: Further options of `sweep`.

    Returns:
        Kind "mlp_ablation": each metric `(sequence, layer)`, and its baseline `(sequence)`.

    Raises:
        OptionError: Unknown mode or positions.
        SiteError: A layer that does not exist.
        SequenceError: "resample" with fewer than two reference sequences.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> result = ml.ablate_mlps(model, ml.load_sequences("zoo", model)[:2], progress=False)
        >>> result["target_logprob"].dims
        ('sequence', 'layer')
    """
    interventions = mlp_ablations(
        model, sequences, mode=mode, layers=layers, positions=positions, reference=reference, seed=seed
    )
    settings = replacement_settings(mode, positions, reference, seed)
    return sweep(model, sequences, interventions, metrics, kind="mlp_ablation", settings=settings, **options)


def mlp_ablations(
    model: Any,
    sequences: SequenceSet,
    *,
    mode: str = "zero",
    layers: Sequence[int] | None = None,
    positions: str = "all",
    reference: SequenceSet | None = None,
    seed: int = 0,
) -> list[Intervention]:
    """Return the interventions that `ablate_mlps` runs, one a layer; see there."""
    return branch_ablations(
        model,
        sequences,
        "mlp_out",
        mode=mode,
        layers=layers,
        positions=positions,
        reference=reference,
        seed=seed,
    )


def branch_ablations(
    model: Any,
    sequences: SequenceSet,
    branch: str,
    *,
    mode: str = "zero",
    layers: Sequence[int] | None = None,
    positions: str = "all",
    reference: SequenceSet | None = None,
    seed: int = 0,
) -> list[Intervention]:
    """Return one intervention a layer that replaces what its MLP, or its attention, adds to the residual.

    Args:
        model: A TransformerLens model.
        sequences: What the interventions will run on.
        branch: "mlp_out" or "attn_out".
        mode: See `ablate_mlps`.
        layers: See there.
        positions: See there.
        reference: See there.
        seed: For "resample".

    Raises:
        OptionError: Unknown branch, mode or positions.
        SiteError: A layer that does not exist.
        SequenceError: "resample" with fewer than two reference sequences.
    """
    check_option("branch", branch, tuple(_BRANCHES))
    check_option("mode", mode, MLP_MODES)
    check_option("positions", positions, POSITIONS)
    layers = chosen_layers(layers, Trunk(model).n_layers)
    reference = sequences if reference is None else reference
    by = replacements(model, branch, mode, layers, reference, len(sequences), seed)
    return [
        Intervention(
            f"{mode} {_BRANCHES[branch]} {layer}",
            [(hook_name(branch, layer), replacing(by[layer], None, positions))],
            {"layer": layer},
        )
        for layer in layers
    ]


_BRANCHES = {"mlp_out": "MLP", "attn_out": "attention"}


register_kind("mlp_ablation", plot=plot_layer_lines, reading=read_effects)
