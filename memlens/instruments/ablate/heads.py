"""Head ablation: what recall loses when the output of attention heads is replaced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Unpack

import numpy as np
import torch
import xarray as xr

from memlens.choices import AblationMode, Positions
from memlens.errors import OptionError, ResultError, SiteError
from memlens.forward.exclusive import computes
from memlens.forward.hooks import check_head, check_layer, chosen_layers
from memlens.forward.metrics import MetricLike
from memlens.forward.trunk import Trunk
from memlens.instruments.ablate.replacing import AblationOptions, Cell, Replacement, ReplacementOptions
from memlens.instruments.screen.gradients import ablation_screen
from memlens.instruments.screen.instruments import register_instrument
from memlens.results.kinds import register_kind
from memlens.results.plots.heads import plot_cumulative, plot_pairs
from memlens.results.plots.layers import plot_head_map
from memlens.results.readings import read_cumulative, read_effects, read_pairs
from memlens.results.result import Result
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.run import SweepOptions, kept, sweep

Head = tuple[int, int]
"""A layer and a head."""


@computes
def ablate_heads(
    model: Any,
    sequences: SequenceSet,
    *,
    mode: AblationMode = "mean_of_other_heads",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    positions: Positions = "all",
    reference: SequenceSet | None = None,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    seed: int = 0,
    donor: Any = None,
    **options: Unpack[SweepOptions],
) -> Result:
    r"""Ablate each attention head, one at a time, and measure recall.

    The head's output :math:`z_h` (`[pos, d_head]`, before the output projection) becomes

    - ``"mean_of_other_heads"``: :math:`\frac{1}{H-1}\sum_{h' \ne h} z_{h'}` of the same layer and position
      (the ablation of arXiv 2603.21658 as second-hand notes report it; site and positions are our choice);
    - ``"zero"``: 0;
    - ``"mean"``: its mean over all positions of `reference`;
    - ``"resample"``: its value at the same position of another sequence of `reference`, drawn once per
      sequence;
    - ``"donor"``: its value in another model, `donor`, on the same sequence.

    With grouped queries, heads are query heads.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        mode: One of the above.
        layers: Layers to ablate in; all by default.
        heads: Heads to ablate; all by default.
        positions: "all", "prompt" (the positions of the prompt), "targets" (those that predict a target) or
            "last_prompt" (the one that predicts the first target).
        reference: The set for "mean" and "resample"; `sequences` itself by default.
        metrics: As for `sweep`.
        seed: For "resample".
        donor: For "donor", a model of the same architecture, shape and vocabulary: a clean twin, a
            checkpoint, the base of a fine-tune.
        options: Further options of `sweep`, such as `engine=` or `per_token=`.

    Returns:
        Kind "head_ablation": each metric `(sequence, layer, head)`, and its baseline `(sequence)`.
        An effect (`Result.effect`) is intervened minus baseline: negative where the head helped.

    Raises:
        OptionError: Unknown mode or positions, "donor" without a donor, or a donor for another mode.
        SiteError: A layer or head that does not exist, or a lone head without others.
        SequenceError: "resample" with fewer than two reference sequences.
        DonorError: The donor does not fit the model.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> result = ml.ablate_heads(model, ml.load_sequences("zoo", model)[:2], mode="zero", progress=False)
        >>> result["target_logprob"].dims
        ('sequence', 'layer', 'head')
    """
    replacement = Replacement(mode, positions, reference, seed, donor)
    interventions = head_ablations(model, sequences, layers=layers, heads=heads, **vars(replacement))
    return sweep(
        model, sequences, interventions, metrics, kind="head_ablation", settings=replacement.settings,
        **options,
    )  # fmt: skip


@computes
def head_ablations(
    model: Any,
    sequences: SequenceSet,
    *,
    mode: AblationMode = "mean_of_other_heads",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    **options: Unpack[ReplacementOptions],
) -> list[Intervention]:
    """Return the interventions that `ablate_heads` runs, one per head; see there for the options.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> [edit.coords for edit in ml.edits.head_ablations(model, seqs, layers=[1], heads=[0, 3])]
        [{'layer': 1, 'head': 0}, {'layer': 1, 'head': 3}]
    """
    replacement = Replacement(mode, **options)
    trunk = Trunk(model)
    cells = [
        (f"{mode} {head_label((layer, head))}", [(layer, head)], {"layer": layer, "head": head})
        for layer in chosen_layers(layers, trunk.n_layers)
        for head in (range(trunk.n_heads) if heads is None else heads)
    ]
    return replacement.interventions(model, sequences, "z", _checked(trunk, cells))


@computes
def head_set_ablations(
    model: Any,
    sequences: SequenceSet,
    sets: Mapping[str, Sequence[Head]],
    *,
    mode: AblationMode = "mean_of_other_heads",
    **options: Unpack[ReplacementOptions],
) -> list[Intervention]:
    """Return one intervention per set of heads, which are ablated together.

    Modes and options are those of `ablate_heads`, but for all heads of a set at once: "mean_of_other_heads"
    is the mean of the layer's heads that are not in the set, and zero if there are none. `sets` holds heads
    `(layer, head)` by name; an empty set changes nothing.

    Raises:
        OptionError: Unknown mode or positions.
        SiteError: A head that does not exist, or that a set contains twice.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> (pair,) = ml.edits.head_set_ablations(model, seqs, {"two": [(0, 1), (2, 3)]})
        >>> pair.start_layer, pair.last_layer
        (0, 2)
    """
    cells = _checked(Trunk(model), [(name, heads, {}) for name, heads in sets.items()])
    return Replacement(mode, **options).interventions(model, sequences, "z", cells)


def _checked(trunk: Trunk, sets: Iterable[tuple[str, Sequence[Head], Mapping[str, Any]]]) -> list[Cell]:
    """Check named sets of heads, and group their heads by layer."""
    cells: list[Cell] = []
    for name, heads, coords in sets:
        by_layer: dict[int, list[int]] = {}
        for layer, head in sorted(heads):
            check_layer(layer, trunk.n_layers)
            check_head(head, trunk.n_heads)
            by_layer.setdefault(layer, []).append(head)
        if len(set(heads)) < len(heads):
            raise SiteError(f"the set {name!r} contains a head twice: {list(heads)}.")
        parts = {layer: some[0] if len(some) == 1 else some for layer, some in by_layer.items()}
        cells.append((name, parts, coords))
    return cells


def rank_heads(result: Result, metric: str | None = None) -> list[Head]:
    """Return heads from the one whose ablation harms most to the one that harms least.

    Args:
        result: Of `ablate_heads`; the mean effect over its sequences decides.
        metric: Its first metric by default.

    Raises:
        ResultError: The result is not a head ablation.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> result = ml.ablate_heads(model, ml.load_sequences("zoo", model)[:2], layers=[3], progress=False)
        >>> len(ml.instruments.rank_heads(result)) == model.cfg.n_heads
        True
    """
    if result.kind != "head_ablation":
        raise ResultError(f"a result of kind {result.kind!r} does not rank heads: give one of ablate_heads.")
    effect = result.effect(metric or result.metrics[0])
    mean = effect.mean([d for d in effect.dims if d not in ("layer", "head")])
    flat = mean.stack(site=("layer", "head")).dropna("site")
    order = np.argsort(flat.values, kind="stable")
    return [(int(layer), int(head)) for layer, head in flat["site"].values[order]]


@computes
def ablate_heads_cumulatively(
    model: Any,
    sequences: SequenceSet,
    order: Sequence[Head] | Result,
    *,
    counts: Sequence[int] | None = None,
    n_random: int = 3,
    mode: AblationMode = "mean_of_other_heads",
    metrics: Sequence[MetricLike] = ("exact_match", "target_logprob"),
    **options: Unpack[AblationOptions],
) -> Result:
    """Ablate the first head of a ranking, the first two, and so on: how many until recall is lost?

    Random orders of all heads serve as a baseline. A ranking looks better on the sequences it was made from:
    rank on one half and test on the other.

    Args:
        model: A TransformerLens model.
        sequences: What is recalled.
        order: Heads `(layer, head)`, in the order of their ablation; or a result of `ablate_heads` (see
            `rank_heads`).
        counts: Numbers of heads to ablate; by default 1, 2, 3, 4, 6, 8, 12, 16, 24, … up to all.
        n_random: Number of random orders.
        mode: As for `ablate_heads` and `head_set_ablations`.
        metrics: As for `sweep`.
        options: `positions`, `reference`, `donor` and `seed` (which also draws the random orders) as for
            `ablate_heads`; further options of `sweep`.

    Returns:
        Kind "cumulative_head_ablation": each metric `(sequence, order, n_ablated)` with `order` "ranked",
        "random 0", …; and, where exact match is measured, `heads_until_lost` `(sequence, order)`: the
        smallest count at which a sequence that the unchanged model recalls is no longer recalled, NaN
        if it is never lost or was not recalled.

    Raises:
        OptionError: An empty order, or a count that exceeds it.
        SiteError: A head that does not exist.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:4]
        >>> alone = ml.ablate_heads(model, seqs[:2], progress=False)
        >>> more = ml.instruments.ablate_heads_cumulatively
        >>> lost = more(model, seqs[2:], alone, counts=[1, 4], progress=False)
        >>> lost["exact_match"].dims, lost["order"].values.tolist()
        (('sequence', 'order', 'n_ablated'), ['ranked', 'random 0', 'random 1', 'random 2'])
    """
    replacement, rest = Replacement.split(mode, options)
    trunk = Trunk(model)
    ranked = rank_heads(order) if isinstance(order, Result) else [(int(a), int(b)) for a, b in order]
    counts = _counts(len(ranked)) if counts is None else list(counts)
    if not ranked or not counts or min(counts) < 1 or max(counts) > len(ranked):
        raise OptionError(
            f"counts={list(counts)} of an order of {len(ranked)} heads: give 1 to {len(ranked)}."
        )
    every = [(layer, head) for layer in range(trunk.n_layers) for head in range(trunk.n_heads)]
    generator = torch.Generator().manual_seed(replacement.seed)
    orders = {"ranked": ranked}
    for i in range(n_random):
        orders[f"random {i}"] = [every[j] for j in torch.randperm(len(every), generator=generator).tolist()]
    cells = [
        (f"{name}: {n}", heads[:n], {"order": name, "n_ablated": n})
        for name, heads in orders.items()
        for n in counts
    ]
    interventions = replacement.interventions(model, sequences, "z", _checked(trunk, cells))
    ranking = [head_label(head) for head in ranked[: max(counts)]]
    settings = {**replacement.settings, "n_random": n_random, "ranking": ranking}
    result = sweep(
        model, sequences, interventions, metrics, kind="cumulative_head_ablation", settings=settings, **rest
    )
    return kept(Result(result.data.assign(_until_lost(result))), rest.get("out"))


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
    """Return the label of a head, such as `L3H2`."""
    return f"L{head[0]}H{head[1]}"


@computes
def ablate_head_pairs(
    model: Any,
    sequences: SequenceSet,
    heads: Sequence[Head],
    *,
    mode: AblationMode = "mean_of_other_heads",
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    **options: Unpack[AblationOptions],
) -> Result:
    r"""Ablate every pair of the given heads, and each head alone.

    The interaction of heads a and b in a metric :math:`m` is

    .. math:: m_{ab} - m_a - m_b + m_0

    It is 0 where their effects add up, negative where losing both hurts more than the sum (each can replace
    the other), and positive where it hurts less (they work in one chain).

    n heads `(layer, head)` make n (n - 1) / 2 pairs. All other arguments are those of `ablate_heads`; a pair
    is ablated as `head_set_ablations` describes.

    Returns:
        Kind "head_pair_ablation": each metric `(sequence, head_a, head_b)`, symmetric, single heads on the
        diagonal; `interaction` of the first metric, NaN on the diagonal; heads are labeled `L3H2`.

    Raises:
        OptionError: Fewer than two heads.
        SiteError: A head that does not exist, or that is given twice.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> pairs = ml.instruments.ablate_head_pairs(model, seqs, [(0, 1), (2, 0), (2, 3)], progress=False)
        >>> pairs["interaction"].dims, pairs["interaction"]["head_a"].values.tolist()
        (('sequence', 'head_a', 'head_b'), ['L0H1', 'L2H0', 'L2H3'])
    """
    heads = [(int(layer), int(head)) for layer, head in heads]
    if len(heads) < 2:
        raise OptionError(f"heads={heads} makes no pair: give at least two heads as (layer, head).")
    if len(set(heads)) < len(heads):
        raise SiteError(f"heads={heads} contains a head twice: give each once.")
    replacement, rest = Replacement.split(mode, options)
    labels = [head_label(head) for head in heads]
    cells = [(i,) for i in range(len(heads))] + list(combinations(range(len(heads)), 2))
    sets = {" + ".join(labels[i] for i in cell): [heads[i] for i in cell] for cell in cells}
    result = sweep(
        model, sequences, head_set_ablations(model, sequences, sets, **vars(replacement)), metrics,
        kind="head_pair_ablation", settings={**replacement.settings, "heads": labels}, **rest,
    )  # fmt: skip
    return kept(Result(_squared(result, cells, labels)), rest.get("out"))


def _squared(result: Result, cells: Sequence[tuple[int, ...]], labels: list[str]) -> xr.Dataset:
    """Turn a list of single heads and pairs into a symmetric square, and add the interaction."""
    data = result.data.drop_dims("intervention")
    n = len(labels)
    places = np.zeros((n, n), dtype=int)  # of each pair, and of each head alone, among the cells
    for number, cell in enumerate(cells):
        places[cell[0], cell[-1]] = places[cell[-1], cell[0]] = number
    squares: dict[str, Any] = {}
    for name in result.metrics:
        values = result[name].data.astype(float)
        square = values[:, places.ravel()].reshape(len(values), n, n, *values.shape[2:])
        squares[name] = (("sequence", "head_a", "head_b", *result[name].dims[2:]), square)
    data = data.assign(squares).assign_coords(head_a=labels, head_b=labels)
    both = data[result.metrics[0]]
    alone = result[result.metrics[0]].isel(intervention=slice(n))  # the first cells
    a, b = (alone.rename(intervention=dim).assign_coords({dim: labels}) for dim in ("head_a", "head_b"))
    interaction = both - a - b + result.baseline(result.metrics[0])
    off = xr.DataArray(~np.eye(n, dtype=bool), dims=("head_a", "head_b"))
    return data.assign(interaction=interaction.where(off).transpose(*both.dims))


register_kind("head_ablation", plot=plot_head_map, reading=read_effects)
register_kind("head_pair_ablation", plot=plot_pairs, reading=read_pairs)
register_kind("cumulative_head_ablation", plot=plot_cumulative, reading=read_cumulative)
register_instrument(
    "head_ablation", ranks="head", kind="head_ablation", run=ablate_heads,
    screen=ablation_screen("z", "head"), options=("mode", "positions", "reference", "donor"),
)  # fmt: skip
