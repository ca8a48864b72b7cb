"""Heads ablated together: any sets, and more and more of a ranking until recall goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from memlens.attribution.ablation import HEAD_MODES, head_replacements
from memlens.attribution.replacing import POSITIONS, replacement_settings, replacing
from memlens.errors import OptionError, ResultError, SiteError, check_option
from memlens.models.hooks import check_head, check_layer, hook_name
from memlens.models.trunk import Trunk
from memlens.results import Result
from memlens.sequences import SequenceSet
from memlens.sweeps import Intervention, sweep
from memlens.sweeps.metrics import MetricLike
from memlens.sweeps.run import kept

__all__ = ["Head", "ablate_heads_cumulatively", "head_label", "head_set_ablations", "rank_heads"]

Head = tuple[int, int]
"""Layer and head."""


def head_set_ablations(
    model: Any,
    sequences: SequenceSet,
    sets: Mapping[str, Sequence[Head]],
    *,
    mode: str = "mean_of_other_heads",
    positions: str = "all",
    reference: SequenceSet | None = None,
    seed: int = 0,
) -> list[Intervention]:
    """Return one intervention for each set of heads, which are ablated together.

    Modes are those of `ablate_heads`, all heads of a set at once: "mean_of_other_heads" is the mean of the
    layer's heads that are not in the set, and zero where none is left.

    Args:
        model: A TransformerLens model.
        sequences: What the interventions will run on.
        sets: Heads `(layer, head)` by name; an empty set changes nothing.
        mode: See `ablate_heads`.
        positions: See `ablate_heads`.
        reference: The set for "mean" and "resample"; `sequences` itself by default.
        seed: For "resample".

    Raises:
        OptionError: Unknown mode or positions.
        SiteError: A head that does not exist, or one that a set holds twice.
    """
    check_option("mode", mode, HEAD_MODES)
    check_option("positions", positions, POSITIONS)
    trunk = Trunk(model)
    for name, heads in sets.items():
        for layer, head in heads:
            check_layer(layer, trunk.n_layers)
            check_head(head, trunk.n_heads)
        if len(set(heads)) < len(heads):
            raise SiteError(f"the set {name!r} holds a head twice: {list(heads)}.")
    layers = sorted({layer for heads in sets.values() for layer, _ in heads})
    reference = sequences if reference is None else reference
    replace = head_replacements(model, trunk, mode, layers, reference, len(sequences), seed)
    found = []
    for name, heads in sets.items():
        by_layer: dict[int, list[int]] = {}
        for layer, head in heads:
            by_layer.setdefault(layer, []).append(head)
        hooks = [
            (hook_name("z", layer), replacing(replace[layer], some, positions))
            for layer, some in sorted(by_layer.items())
        ]
        found.append(Intervention(name, hooks))
    return found


def rank_heads(result: Result, metric: str | None = None) -> list[Head]:
    """Return heads from the one whose ablation harms most to the one that harms least.

    Args:
        result: Of `ablate_heads`; the mean effect over its sequences decides.
        metric: Its first metric by default.

    Raises:
        ResultError: The result is no head ablation.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> result = ml.ablate_heads(model, ml.load_sequences("zoo", model)[:2], layers=[3], progress=False)
        >>> len(ml.rank_heads(result)) == model.cfg.n_heads
        True
    """
    if result.kind != "head_ablation":
        raise ResultError(f"a result of kind {result.kind!r} ranks no heads: give one of ablate_heads.")
    effect = result.effect(metric or result.metrics[0])
    mean = effect.mean([d for d in effect.dims if d not in ("layer", "head")])
    flat = mean.stack(site=("layer", "head")).dropna("site")
    order = np.argsort(flat.values, kind="stable")
    return [(int(layer), int(head)) for layer, head in flat["site"].values[order]]


def ablate_heads_cumulatively(
    model: Any,
    sequences: SequenceSet,
    order: Sequence[Head] | Result,
    *,
    counts: Sequence[int] | None = None,
    n_random: int = 3,
    mode: str = "mean_of_other_heads",
    positions: str = "all",
    reference: SequenceSet | None = None,
    metrics: Sequence[MetricLike] = ("exact_match", "target_logprob"),
    seed: int = 0,
    **options: Any,
) -> Result:
    """Ablate the first head of a ranking, the first two, and so on: how many must go until recall goes?

    The control are random orders of all the model's heads. A ranking made on the sequences it is tried on
    flatters itself: rank on one half and try on the other.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        order: Heads `(layer, head)`, the first goes first; or a result of `ablate_heads` (see `rank_heads`).
        counts: How many heads go, each count tried; by default 1, 2, 3, 4, 6, 8, 12, 16, 24, … up to all.
        n_random: Random orders.
        mode: See `ablate_heads` and `head_set_ablations`.
        positions: See `ablate_heads`.
        reference: The set for "mean" and "resample"; `sequences` itself by default.
        metrics: As for `sweep`.
        seed: For the random orders, and for "resample".
        options: Further options of `sweep`.

    Returns:
        Kind "cumulative_head_ablation": each metric `(sequence, order, n_ablated)` with `order` "ranked",
        "random 0", …; and, where exact match is measured, `heads_until_lost` `(sequence, order)`: the
        smallest count tried at which a sequence that the whole model recalls is no longer recalled, NaN
        where it is never lost or was not recalled.

    Raises:
        OptionError: No order, or a count that it cannot give.
        SiteError: A head that does not exist.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:4]
        >>> alone = ml.ablate_heads(model, seqs[:2], progress=False)
        >>> lost = ml.ablate_heads_cumulatively(model, seqs[2:], alone, counts=[1, 4], progress=False)
        >>> lost["exact_match"].dims, lost["order"].values.tolist()
        (('sequence', 'order', 'n_ablated'), ['ranked', 'random 0', 'random 1', 'random 2'])
    """
    trunk = Trunk(model)
    ranked = rank_heads(order) if isinstance(order, Result) else [(int(a), int(b)) for a, b in order]
    counts = _counts(len(ranked)) if counts is None else list(counts)
    if not ranked or not counts or min(counts) < 1 or max(counts) > len(ranked):
        raise OptionError(
            f"counts={list(counts)} of an order of {len(ranked)} heads: give 1 to {len(ranked)}."
        )
    every = [(layer, head) for layer in range(trunk.n_layers) for head in range(trunk.n_heads)]
    generator = torch.Generator().manual_seed(seed)
    orders = {"ranked": ranked}
    for i in range(n_random):
        orders[f"random {i}"] = [every[j] for j in torch.randperm(len(every), generator=generator).tolist()]
    cells = {f"{name}: {n}": (name, n, heads[:n]) for name, heads in orders.items() for n in counts}
    edits = head_set_ablations(
        model,
        sequences,
        {key: heads for key, (_, _, heads) in cells.items()},
        mode=mode,
        positions=positions,
        reference=reference,
        seed=seed,
    )
    edits = [
        Intervention(e.name, e.hooks, {"order": cells[e.name][0], "n_ablated": cells[e.name][1]})
        for e in edits
    ]
    settings = {
        **replacement_settings(mode, positions, reference, seed),
        "n_random": n_random,
        "ranking": [head_label(h) for h in ranked[: max(counts)]],
    }
    result = sweep(
        model, sequences, edits, metrics, kind="cumulative_head_ablation", settings=settings, **options
    )
    return kept(Result(result.data.assign(_until_lost(result))), options.get("out"))


def _until_lost(result: Result) -> dict[str, xr.DataArray]:
    if "exact_match" not in result.data or "target" in result["exact_match"].dims:
        return {}
    recalled = result.baseline("exact_match") == 1
    lost = (result["exact_match"] == 0) & recalled
    counts = result["n_ablated"].astype(float)
    return {"heads_until_lost": counts.where(lost).min("n_ablated").transpose("sequence", "order")}


def _counts(n: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, … and `n`."""
    found = {n, *(k for p in range(n.bit_length() + 1) for k in (2**p, 3 * 2**p) if k < n)}
    return sorted(found)


def head_label(head: Head) -> str:
    """Return what a head is called, such as `L3H2`."""
    return f"L{head[0]}H{head[1]}"
