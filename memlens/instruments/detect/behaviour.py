"""Neurons whose activation goes with one of two behaviours, and steering the model along them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, Unpack

import numpy as np
import plotly.graph_objects as go
import torch
import xarray as xr
from jaxtyping import Bool, Float
from pydantic import Field, NonNegativeInt
from torch import Tensor

from memlens import figures
from memlens.errors import OptionError, ResultError, SiteError
from memlens.figures.labels import metric_text
from memlens.forward.exclusive import computes
from memlens.forward.hooks import HookFn, chosen_layers, hook_name
from memlens.forward.metrics import MetricLike
from memlens.forward.trunk import Trunk
from memlens.instruments.detect.groups import Groups, mean_over_targets
from memlens.options import options_class
from memlens.results.kinds import register_kind
from memlens.results.plots.selection import Selection, takes
from memlens.results.result import Result
from memlens.results.statistics.comparison import corrected
from memlens.results.statistics.estimates import mean_estimate
from memlens.sequences.set import SequenceSet
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.labels import make_result
from memlens.sweeps.run import SweepOptions, sweep

BehaviourSite = Literal["mlp_post", "mlp_out"]


@options_class
class BehaviourOptions:
    """Options of `behaviour_neurons`; the result records all of them.

    Example:
        >>> import memlens as ml
        >>> ml.detect.BehaviourOptions(share=0.1).share
        0.1
    """

    site: BehaviourSite = "mlp_post"
    """What a neuron is: a hidden unit of the MLP, or a component of what the MLP adds to the residual."""
    layers: tuple[NonNegativeInt, ...] | None = None
    """Layers; all by default."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the neurons of these layers, together, that are chosen by the size of `rho`."""
    n_splits: NonNegativeInt = 10
    """Random halvings of the sequences by which the choice's stability is measured."""
    seed: int = 0
    """Seed of the halvings and of the shuffled labels."""


@computes
def behaviour_neurons(
    model: Any,
    a: SequenceSet,
    b: SequenceSet,
    *,
    names: tuple[str, str] = ("a", "b"),
    options: BehaviourOptions | None = None,
    progress: bool = True,
) -> Result:
    r"""Find the neurons whose activation goes with behaviour `a`, such as recalling, rather than with `b`.

    With :math:`h_{si}` the activation of neuron :math:`i`, averaged over the positions that predict the
    targets of sequence :math:`s`: `mean_difference` is :math:`\text{NMD}_i = \bar h_i^a - \bar h_i^b`, and
    `rho` the correlation of :math:`h_{si}` with the behaviour (1 for `a`, 0 for `b`), whose sign is that of
    the mean difference. The `share` with the largest :math:`|\rho|` is `chosen`.

    *Stability.* The sequences are halved at random `n_splits` times; `overlap` is the share of the neurons
    chosen on one half that the other half chooses too, and `overlap_shuffled` the same with labels shuffled
    among the sequences, the control.

    Args:
        model: A TransformerLens model.
        a: Sequences with the one behaviour, such as planted ones that are recalled.
        b: Sequences of the same task with the other, such as sums that must be computed.
        names: What sequences of the two sets are called in the figure and its text.
        options: See `BehaviourOptions`.
        progress: Show a progress bar.

    Returns:
        Kind "behaviour_neurons": `mean_difference` (in the unit of the activation), `rho`, `p` (of the
        correlation, corrected over all neurons), `chosen` (0 or 1), each `(layer, neuron)`; `overlap` and
        `overlap_shuffled` `(split)`; `projection` `(sequence)`, the mean over chosen neurons of
        :math:`\text{sign}(\rho_i) h_{si}`, on the sequences that they were chosen on.

    Raises:
        EmptySetError: One of the sets is empty.
        SiteError: A layer that does not exist.

    Source: the mean difference, the correlation and top shares by :math:`|\rho|` are those of arXiv
    2412.18497; that rho is taken over sequences, p values and the stability are ours.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> copies = seqs.table["copies"].to_numpy()
        >>> found = ml.detect.behaviour_neurons(model, seqs[copies == 256], seqs[copies == 1], progress=False)
        >>> int(found["chosen"].sum()) == round(0.05 * found["chosen"].size)
        True
    """
    options, groups = options or BehaviourOptions(), Groups.of(a, b)
    seqs = groups.sequences.with_table(
        groups.sequences.table.assign(group=np.where(groups.recalled, "a", "b"))
    )
    layers = chosen_layers(options.layers, Trunk(model).n_layers)
    acts = mean_over_targets(model, seqs, options.site, layers, progress=progress, desc="neurons")
    label = groups.recalled
    rho = correlations(acts, label)
    n_chosen = max(1, round(options.share * rho.size))
    chosen = _top(rho, n_chosen)
    sites = ("layer", "neuron")
    overlap = _stability(acts, label, n_chosen, options)
    variables = {
        "mean_difference": (sites, acts[label].mean(0) - acts[~label].mean(0)),
        "rho": (sites, rho),
        "p": (sites, corrected(_p_of(rho, len(label)).ravel()).reshape(rho.shape)),
        "chosen": (sites, chosen.astype(np.int8)),
        "overlap": ("split", overlap[:, 0]),
        "overlap_shuffled": ("split", overlap[:, 1]),
        "projection": ("sequence", (acts[:, chosen] * np.sign(rho[chosen])).mean(1)),
    }
    coords = {"layer": layers, "neuron": np.arange(rho.shape[1]), "split": np.arange(options.n_splits)}
    settings = {**asdict(options), "n_a": len(a), "n_b": len(b), "names": list(names)}
    return make_result("behaviour_neurons", model, seqs, variables, coords, settings)


def projection(
    model: Any, found: Result, sequences: SequenceSet, *, progress: bool = True
) -> Float[np.ndarray, "seq"]:
    r"""Return how far the chosen neurons of each sequence are on the side of behaviour a.

    The mean over chosen neurons of :math:`\text{sign}(\rho_i) h_{si}`, as `projection` of the result, for
    other sequences than those that the neurons were chosen on.

    Args:
        model: A TransformerLens model.
        found: What `behaviour_neurons` returned.
        sequences: The sequences.
        progress: Show a progress bar.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> found = ml.detect.behaviour_neurons(model, seqs[-6:], seqs[:6], progress=False)
        >>> ml.detect.projection(model, found, seqs[6:9], progress=False).shape
        (3,)
    """
    layers, site = found["layer"].values.tolist(), found.settings["site"]
    acts = mean_over_targets(model, sequences, site, layers, progress=progress, desc="neurons")
    chosen = found["chosen"].values == 1
    return (acts[:, chosen] * np.sign(found["rho"].values[chosen])).mean(1)


def correlations(
    acts: Float[np.ndarray, "seq layer neuron"], label: Bool[np.ndarray, "seq"]
) -> Float[np.ndarray, "layer neuron"]:
    """Return each neuron's correlation with the label; 0 for a neuron without spread."""
    x, y = acts - acts.mean(0, dtype=float), label - label.mean()
    norm = np.sqrt((x**2).sum(0) * (y**2).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norm > 0, np.tensordot(y, x, 1) / norm, 0.0)


def _p_of(rho: np.ndarray, n: int) -> np.ndarray:
    """Return the two-sided p value of Pearson's correlation; 1 with fewer than three sequences."""
    from scipy import stats

    if n < 3:
        return np.ones_like(rho)
    half = n / 2 - 1
    return 2 * stats.beta.sf(np.abs(rho), half, half, loc=-1, scale=2)


def _top(rho: np.ndarray, n: int) -> Bool[np.ndarray, "layer neuron"]:
    found = np.zeros(rho.size, bool)
    found[np.argsort(-np.abs(rho).ravel(), kind="stable")[:n]] = True
    return found.reshape(rho.shape)


def _stability(
    acts: np.ndarray, label: np.ndarray, n_chosen: int, options: BehaviourOptions
) -> Float[np.ndarray, "split control"]:
    """Return the overlap of the choices of two halves, with the labels and with shuffled ones."""
    rng = np.random.default_rng(options.seed)
    found = np.full((options.n_splits, 2), np.nan)
    for split in range(options.n_splits):
        for control, labels in enumerate((label, rng.permutation(label))):
            halves = list(_halves(labels, rng))
            if all(0 < labels[rows].sum() < len(rows) for rows in halves):
                first, second = (_top(correlations(acts[rows], labels[rows]), n_chosen) for rows in halves)
                found[split, control] = (first & second).sum() / n_chosen
    return found


def _halves(label: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield two halves of the rows, each with half of either label."""
    parts = [rng.permutation(np.flatnonzero(label == value)) for value in (True, False)]
    yield np.concatenate([part[: len(part) // 2] for part in parts])
    yield np.concatenate([part[len(part) // 2 :] for part in parts])


def steered(model: Any, found: Result, alpha: float, *, random: int | None = None) -> Intervention:
    r"""Return an intervention that moves the chosen neurons toward behaviour a (or from it, below 0).

    At every position :math:`h_i \leftarrow h_i + \alpha \, \text{sign}(\rho_i) \, |\text{NMD}_i|` for each
    chosen neuron :math:`i`; with :math:`\alpha = 1` by as much as the two behaviours differ on average.

    Args:
        model: The model of `found`, or another of its shape.
        found: What `behaviour_neurons` returned.
        alpha: How far.
        random: A control instead: the number of a draw in which each layer's shifts go to random neurons of
            the layer, with random signs.

    Raises:
        ResultError: `found` is of another kind.
        OptionError: `alpha` is not finite.
        SiteError: The model has no such layer or neuron.

    Source: arXiv 2412.18497, there after the feed-forward block; the random shift of equal size is ours in
    this form.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> found = ml.detect.behaviour_neurons(model, seqs[-4:], seqs[:4], progress=False)
        >>> with ml.applied(model, ml.detect.steered(model, found, -2.0)):
        ...     model(seqs.tokens[:1]).shape[:2] == seqs.tokens[:1].shape
        True
    """
    if found.kind != "behaviour_neurons":
        raise ResultError(f"a {found.kind} result has no behaviour neurons: give that of behaviour_neurons.")
    if not math.isfinite(alpha):
        raise OptionError(f"alpha={alpha} is no finite number: say how far to steer.")
    site, trunk = found.settings["site"], Trunk(model)
    width = trunk.model.cfg.d_mlp if site == "mlp_post" else trunk.d_model
    shifts = np.where(found["chosen"].values == 1, found["mean_difference"].values, 0.0)
    if shifts.shape[1] != width:
        raise SiteError(f"the neurons were found among {shifts.shape[1]}, and this model has {width}.")
    layers = chosen_layers(found["layer"].values.tolist(), trunk.n_layers)
    if random is not None:
        shifts = _random_shifts(shifts, layers, found.settings["seed"], random)
    device, dtype = trunk.device, trunk.dtype
    hooks = [
        (hook_name(site, layer), _shifting(torch.tensor(alpha * shift, dtype=dtype, device=device)))
        for layer, shift in zip(layers, shifts, strict=True)
        if shift.any()
    ]
    direction = "behaviour" if random is None else f"random {random}"
    coords = {"alpha": float(alpha), "direction": direction}
    return Intervention(f"steer by {alpha:g} ({direction})", hooks, coords)


def _random_shifts(shifts: np.ndarray, layers: Sequence[int], seed: int, draw: int) -> np.ndarray:
    out = np.empty_like(shifts)
    for i, layer in enumerate(layers):
        rng = np.random.default_rng([seed % 2**64, draw, layer])
        signs = rng.choice([-1.0, 1.0], shifts.shape[1])
        out[i] = signs * np.abs(rng.permutation(shifts[i]))
    return out


def _shifting(shift: Float[Tensor, "width"]) -> HookFn:
    def add(x: Tensor, hook: Any) -> Tensor:
        return x + shift

    return add


def steering_doses(
    model: Any, found: Result, alphas: Sequence[float], *, n_random: int = 3
) -> list[Intervention]:
    """Return `steered` for every alpha, along the behaviour and along `n_random` random shifts.

    Their coordinates are `alpha` and `direction` ("behaviour", "random 0", …), for `memlens.sweep` and
    `memlens.evaluate_tasks`.

    Raises:
        OptionError: No alphas, or two equal ones.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> found = ml.detect.behaviour_neurons(model, seqs[-6:], seqs[:6], progress=False)
        >>> len(ml.detect.steering_doses(model, found, [-1.0, 1.0], n_random=2))
        6
    """
    if not len(alphas) or len(set(alphas)) < len(alphas):
        raise OptionError(f"alphas={list(alphas)!r}: give one or more different numbers.")
    draws = [None, *range(n_random)]
    return [steered(model, found, alpha, random=draw) for alpha in alphas for draw in draws]


@computes
def steering_curve(
    model: Any,
    found: Result,
    sequences: SequenceSet,
    alphas: Sequence[float] = (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0),
    *,
    n_random: int = 3,
    metrics: Sequence[MetricLike] = ("exact_match", "target_logprob"),
    **options: Unpack[SweepOptions],
) -> Result:
    """Measure recall against the dose of steering, with random shifts of equal size as controls.

    What tasks lose at the same doses: ``ml.evaluate_tasks(model, tasks, ml.detect.steering_doses(...))``.

    Args:
        model: As for `steered`.
        found: As for `steered`.
        sequences: Other sequences than those that the neurons were found on.
        alphas: Doses; at 0 nothing changes, and the baseline is that.
        n_random: Random shifts for each dose.
        metrics: As for `sweep`.
        options: Further options of `sweep`.

    Returns:
        Kind "steering": each metric `(sequence, alpha, direction)` with its baseline.

    Raises:
        What `steering_doses` and `sweep` raise.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> seqs = ml.load_sequences("zoo", model)
        >>> found = ml.detect.behaviour_neurons(model, seqs[-6:-2], seqs[:4], progress=False)
        >>> curve = ml.detect.steering_curve(model, found, seqs[-2:], [-2.0, 2.0], n_random=1, progress=False)
        >>> curve["exact_match"].dims
        ('sequence', 'alpha', 'direction')
    """
    doses = steering_doses(model, found, alphas, n_random=n_random)
    settings = {"n_random": n_random, "found": found.settings}
    return sweep(model, sequences, doses, metrics, kind="steering", settings=settings, **options)


@takes(of="value", group=None)
def plot_steering(result: Result, s: Selection) -> go.Figure:
    """Draw curves over the dose, one per direction; with a group, of the behaviour's direction alone."""
    shown: tuple[str, ...] = ("alpha", "direction")
    data = result.data.sortby("alpha")
    if s.group is not None:
        data, shown = data.sel(direction="behaviour", drop=True), ("alpha",)
    ci, caption = s.drawn(Result(data), shown, "Steering along behaviour neurons")
    return figures.line_over_layers(ci, x="alpha", x_title="dose α", **caption)


@takes()
def plot_behaviour(result: Result, s: Selection, *, most: int = 40) -> go.Figure:
    """Draw the correlations of the neurons that go most with the behaviour."""
    rho = result["rho"].stack(site=("layer", "neuron"))
    top = rho.isel(site=np.argsort(-np.abs(rho.values), kind="stable")[:most])
    labels = [f"L{layer}N{neuron}" for layer, neuron in top["site"].values]
    values = np.stack([top.values, *np.full((2, len(labels)), np.nan)])
    a, b = _sides(result)
    words = {"label": f"correlation with being {a} rather than {b}", "units": ""}
    array = xr.DataArray(
        values, dims=("statistic", "site"), attrs=words,
        coords={"statistic": ["mean", "low", "high"], "site": labels},
    )  # fmt: skip
    settings = result.settings
    subtitle = (
        f"sequences: {settings['n_a']} {a}, {settings['n_b']} {b} · {result.data.attrs.get('model', '')}"
    )
    return figures.dots_with_intervals(
        xr.Dataset({"rho": array}),
        dim="site",
        most=most,
        title=s.title or "Behaviour neurons",
        subtitle=subtitle,
    )


def _sides(result: Result) -> tuple[str, str]:
    """Return what the two sides are called; results of earlier versions do not say."""
    a, b = result.settings.get("names", ("a", "b"))
    return str(a), str(b)


def read_behaviour(result: Result, metric: str | None) -> str:
    """Say which neuron goes most with the behaviour, and how stable the choice is."""
    rho, settings = result["rho"], result.settings
    layer, neuron = np.unravel_index(int(np.abs(rho.values).argmax()), rho.shape)
    known = int((result["p"] < 0.05).sum())
    a, b = _sides(result)
    said = (
        f"Neuron {neuron} of layer {rho['layer'].values[layer]} tells most whether a sequence is {a} or "
        f"{b}: correlation {float(rho[layer, neuron]):.3g} over {settings['n_a']} and {settings['n_b']} "
        f"sequences. Of {rho.size} neurons {known} have a corrected p below 0.05, and "
        f"{int(result['chosen'].sum())} were chosen."
    )
    if result.data.sizes["split"]:
        same, chance = (float(result[name].mean()) for name in ("overlap", "overlap_shuffled"))
        said += (
            f" Two halves of the sequences choose a share of {same:.3g} in common (mean of "
            f"{result.data.sizes['split']} halvings); with shuffled labels it is {chance:.3g}."
        )
    return said


def read_steering(result: Result, metric: str | None) -> str:
    """Say what the largest dose in each direction does, against random shifts of equal size."""
    name = metric or result.metrics[0]
    text, effect = metric_text(name, result[name]), result.effect(name)
    others = [d for d in effect["direction"].values if d != "behaviour"]
    parts = []
    for alpha in sorted({float(effect["alpha"].min()), float(effect["alpha"].max())}):
        own = effect.sel(alpha=alpha, direction="behaviour")
        said = f"With α = {alpha:g} the {text.label} changes by {mean_estimate(own).text(text.unit)}"
        if others:
            control = effect.sel(alpha=alpha, direction=others).mean("direction")
            said += (
                f"; random shifts of equal size change it by {mean_estimate(control).text(text.unit)}, "
                f"and the difference is {mean_estimate(own - control).text(text.unit)}"
            )
        parts.append(said + ".")
    return " ".join(parts)


_CITES = (("huang2024", "neurons by correlation with a behaviour, and steering along them"),)
register_kind("behaviour_neurons", plot=plot_behaviour, reading=read_behaviour, cites=_CITES)
register_kind("steering", plot=plot_steering, reading=read_steering, cites=_CITES)
