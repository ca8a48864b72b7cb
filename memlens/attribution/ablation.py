"""Head ablation: what recall loses when one attention head's output is replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memlens.attribution.replacing import Replace, replacement_settings, replacements, replacing
from memlens.errors import SiteError, check_option
from memlens.models.hooks import check_head, chosen_layers, hook_name
from memlens.models.trunk import Trunk
from memlens.results import Result
from memlens.sequences import SequenceSet
from memlens.sweeps import Batch, Intervention, sweep
from memlens.sweeps.metrics import MetricLike

__all__ = ["HEAD_MODES", "ablate_heads", "head_ablations", "head_replacements"]

HEAD_MODES = ("mean_of_other_heads", "zero", "mean", "resample")
POSITIONS = ("all", "targets")


def ablate_heads(
    model: Any,
    sequences: SequenceSet,
    *,
    mode: str = "mean_of_other_heads",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: str = "all",
    reference: SequenceSet | None = None,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    seed: int = 0,
    **options: Any,
) -> Result:
    r"""Ablate every attention head alone and measure recall.

    The head's output :math:`z_h` (`[pos, d_head]`, before the output projection) becomes

    - ``"mean_of_other_heads"``: :math:`\frac{1}{H-1}\sum_{h' \ne h} z_{h'}` of the same layer and position
      (the ablation of arXiv 2603.21658 as second-hand notes report it; site and positions are our choice);
    - ``"zero"``: 0;
    - ``"mean"``: its mean over all positions of `reference`;
    - ``"resample"``: what it gives at the same position of another sequence of `reference`, drawn once.

    With grouped queries, heads are query heads.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        mode: One of the above.
        layers: Layers to ablate in; all by default.
        heads: Heads to ablate; all by default.
        positions: "all", or "targets" for only those that predict a target token.
        reference: The set for "mean" and "resample"; `sequences` itself by default.
        metrics: As for `sweep`.
        seed: For "resample".
        options: Further options of `sweep`, such as `engine=` or `per_token=`.

    Returns:
        Kind "head_ablation": each metric `(sequence, layer, head)`, and its baseline `(sequence)`.
        An effect (`Result.effect`) is intervened minus baseline: negative where the head helped.

    Raises:
        OptionError: Unknown mode or positions.
        SiteError: A layer or head that does not exist, or a lone head without others.
        SequenceError: "resample" with fewer than two reference sequences.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> result = ml.ablate_heads(model, ml.load_sequences("zoo", model)[:2], mode="zero", progress=False)
        >>> result["target_logprob"].dims
        ('sequence', 'layer', 'head')
    """
    interventions = head_ablations(
        model,
        sequences,
        mode=mode,
        layers=layers,
        heads=heads,
        positions=positions,
        reference=reference,
        seed=seed,
    )
    settings = replacement_settings(mode, positions, reference, seed)
    return sweep(model, sequences, interventions, metrics, kind="head_ablation", settings=settings, **options)


def head_ablations(
    model: Any,
    sequences: SequenceSet,
    *,
    mode: str = "mean_of_other_heads",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: str = "all",
    reference: SequenceSet | None = None,
    seed: int = 0,
) -> list[Intervention]:
    """Return the interventions that `ablate_heads` runs, one a head; see there."""
    check_option("mode", mode, HEAD_MODES)
    check_option("positions", positions, POSITIONS)
    trunk = Trunk(model)
    layers = chosen_layers(layers, trunk.n_layers)
    heads = list(range(trunk.n_heads) if heads is None else heads)
    for head in heads:
        check_head(head, trunk.n_heads)
    reference = sequences if reference is None else reference
    replace = head_replacements(model, trunk, mode, layers, reference, len(sequences), seed)
    return [
        Intervention(
            f"{mode} L{layer}H{head}",
            [(hook_name("z", layer), replacing(replace[layer], head, positions))],
            {"layer": layer, "head": head},
        )
        for layer in layers
        for head in heads
    ]


def head_replacements(
    model: Any, trunk: Trunk, mode: str, layers: Sequence[int], reference: SequenceSet, n: int, seed: int
) -> dict[int, Callable[[Batch], Replace]]:
    """Return by layer what replaces the output of a head, or of several together; see `ablate_heads`."""
    if mode != "mean_of_other_heads":
        return replacements(model, "z", mode, layers, reference, n, seed)
    if trunk.n_heads < 2:
        raise SiteError(
            "mean_of_other_heads needs at least two heads a layer and this model has one: use 'zero'."
        )
    return dict.fromkeys(layers, lambda batch: _mean_of_others)


def _mean_of_others(z: Tensor, head: Any) -> Tensor:
    """The mean of the heads that stay; zero where none does."""
    if isinstance(head, int):
        return (z.sum(2) - z[:, :, head]) / (z.shape[2] - 1)
    left = z.shape[2] - len(head)
    return ((z.sum(2) - z[:, :, head].sum(2)) / left if left else torch.zeros_like(z[:, :, 0]))[:, :, None]
