"""The k strongest components from fewer exact cells than a full sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memlens.choices import AblationMode, Positions
from memlens.errors import EmptySetError, OptionError, check_option
from memlens.files import replacing
from memlens.forward.batches import Batch
from memlens.forward.exclusive import computes
from memlens.forward.hooks import HookFn
from memlens.forward.metrics import Metric, MetricLike, as_metrics
from memlens.forward.trunk import Trunk
from memlens.instruments.screen.backward import GRADIENT_METHODS, PATHS
from memlens.instruments.screen.instruments import INSTRUMENTS, Cell, Screen, screen_of
from memlens.results.kinds import register_kind
from memlens.results.plots.heads import plot_top
from memlens.results.readings import read_top
from memlens.results.result import Result
from memlens.results.statistics.racing import Race, RaceOptions, race
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.store.keyed_folder import KeyedFolder, read_arrays
from memlens.sweeps.interventions import BatchHook, Intervention, as_interventions
from memlens.sweeps.labels import Grid, make_result
from memlens.sweeps.plan import intervention_flops
from memlens.sweeps.run import SweepOptions, about_sweep, kept, sweep

_CHEAP = 0.1
"""The largest share of the cost of all cells at which the gradients are taken without being asked for."""
_UNUSED = {"instrument": "head_ablation", "mode": "zero", "path": "site"}
"""Defaults, other than None, of the options that only instruments use."""
_BACKWARD = 2
"""What a backward pass costs, in forward passes."""


@computes
def find_top(
    model: Any,
    sequences: SequenceSet,
    k: int = 10,
    *,
    instrument: str = "head_ablation",
    interventions: Sequence[Intervention] | None = None,
    corrupt: SequenceSet | None = None,
    rank_by: str = "magnitude",
    level: float = 0.95,
    interval: str = "t",
    bounds: tuple[float, float] | None = None,
    control_variate: bool | None = None,
    equal_width: bool = False,
    first: int = 16,
    growth: float = 1.5,
    max_sequences: int | None = None,
    site: str | None = None,
    over: str | None = None,
    direction: str | None = None,
    mode: AblationMode = "zero",
    donor: Any = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | Positions | None = None,
    reference: SequenceSet | None = None,
    method: str = "attribution_patching",
    path: str = "site",
    steps: int = 8,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    seed: int = 0,
    **options: Unpack[SweepOptions],
) -> Result:
    r"""Find the k components with the largest mean effects, and run only the cells that this takes.

    A full sweep runs every component on every sequence. Here the sequences are added in rounds, in a random
    order. After each round components that surely do not belong to the top k are dropped, and components that
    surely belong to it are accepted; both need no more cells. The answer is the top k of the full sweep over
    the *given* sequences with a probability of at least `level`. Every cell that runs is that of the full
    sweep (up to the rounding of other batches), and where all sequences had to run the ranking is the full
    sweep's.

    Effects are those of the first metric, intervened minus baseline. Component :math:`i` exceeds :math:`j` if
    the mean of the differences of their effects within each sequence is above 0 by a one-sided test. A wrong
    answer needs a false claim about one of :math:`k (M - k)` pairs of the :math:`M` components, so each test
    may err with probability :math:`(1 - level) / (k (M - k) R)` in :math:`R` rounds (half of it for
    "magnitude", where the sign is estimated too).

    - ``interval="t"``: Student's t of the differences, times :math:`\sqrt{1 - n/N}` since the :math:`N`
      sequences are finitely many. It is approximate: where a few sequences with large effects of one sign
      decide the means, a sample without them misleads it. See the page on statistics for how often.
    - ``interval="betting"``: guaranteed for any effects within `bounds`, at any number of rounds (a bet
      against each claim, with draws without replacement: Waudby-Smith and Ramdas, arXiv 2010.09686). It needs
      more sequences. There is no control variate.

    *Control variate.* Estimates from gradients are known for all sequences once they are taken. With them
    each mean is estimated by :math:`\bar x - \beta (\bar g_\text{run} - \bar g_\text{all})`, where
    :math:`\beta` is fitted on the sequences that ran, for each component that this helps (judged by the
    residuals of left-out sequences). They also show whether the sequences that ran are like the others:
    nothing is claimed about a component whose estimates vary less than half as much over them as over all.
    The gradients cost as much for one component of a layer as for thousands: they pay for neurons, and not
    for heads or layers. By default they are taken where they cost at most a tenth of the full sweep. Their
    cost is in the share that the result reports.

    Args:
        model: A TransformerLens model.
        sequences: The recalled sequences; for patching, the clean ones.
        k: Number of components to find.
        instrument: What the components are, as for `memlens.screen_then_verify`, which describes the options
            of each: "head_ablation", "mlp_ablation", "neuron_ablation", "patching" or "neuron_patching".
        interventions: Components of your own, instead of an instrument: one intervention each.
        corrupt: For patching.
        rank_by: "magnitude" of the mean effect, or "decrease" or "increase" of the metric.
        level: Probability that the answer is right; also of all intervals together.
        interval: "t" or "betting".
        bounds: For "betting", the least and the largest effect that is possible: (-1, 1) for `exact_match`.
        control_variate: Whether to take gradients; None to decide by their cost.
        equal_width: Run accepted components until the end, so that the top k have intervals from the same
            sequences.
        first: Sequences of the first round.
        growth: How much larger the sample is after each further round.
        max_sequences: Stop after so many sequences and leave the rest undecided.
        site: For "patching", as for `patch_activations`.
        over: For "patching", as for `patch_activations`.
        direction: For patching, as for `patch_activations`.
        mode: For ablation, as for `ablate_heads`.
        donor: As for `screen_then_verify`.
        layers: All by default.
        positions: For "patching", token positions; for ablation, as for `ablate_heads`.
        reference: For ablation, as for `ablate_heads`; `sequences` by default.
        method: Of the gradients, as for `attribute_gradients`.
        path: As for `attribute_gradients`.
        steps: As for `attribute_gradients`.
        metrics: As for `sweep`; the first one ranks, and needs a gradient for the control variate.
        seed: Of the order of the sequences, and of "resample".
        options: Further options of `sweep`, except `per_token` and `part`. With `out`, each round is a sweep
            in a folder of its own, and a run that was stopped goes on where it was.

    Returns:
        Kind "top_components": each metric `(sequence, layer, head)` (or as the components are labeled), NaN
        in cells that did not run, its baseline, and as coordinates of each component:

        - `status`: "in", "out", "undecided" (only with `max_sequences`), or "undefined" (its effect on a
          sequence that ran is NaN; it is left out of the ranking);
        - `decided_by`: "interval"; "all sequences", where all had to run and the ranking is exact; or "tie",
          where in addition the means around place k are equal and the first in order are taken;
        - `estimate`, `low`, `high`: the mean effect over the given sequences, with an interval at `level` for
          all components and rounds together (a point where all ran);
        - `sequences_used`, and `controlled`: whether the gradients corrected the estimate.

        The settings have every option, `rounds`, `cells_run`, `cells_full`, `gradient_cells` (the gradients'
        cost in cells, by floating-point operations of matrix products with a backward pass as two forward
        passes) and `share`: (cells run + gradient cells) / cells of the full sweep.
        `Result.mean_ci(of="effect")` gives the usual intervals for the population of sequences that the given
        ones were drawn from; they take no account of the stopping.

    Raises:
        OptionError: An unknown or impossible option, or `bounds` that an effect exceeds.
        SequenceError: Corrupt sequences are missing or not used.
        SiteError: A layer, a position or a site that does not exist.
        EmptySetError: There are no sequences or no components.
        InterventionError: `interventions` are not interventions.
        ResultError: `out` holds another run.

    Source: ours, from racing (Maron and Moore 1994).

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[-24:]
        >>> top = ml.find_top(model, seqs, k=2, layers=[0, 1], progress=False)
        >>> table = top.to_frame(["status", "estimate", "low", "high"])
        >>> table["status"].value_counts().to_dict()
        {'out': 14, 'in': 2}
    """
    rules = RaceOptions(
        k, rank_by=rank_by, level=level, interval=interval, bounds=bounds, first=first, growth=growth,
        max_sequences=max_sequences, equal_width=equal_width,
    )  # fmt: skip
    for name in ("per_token", "part"):
        if options.get(name):
            raise OptionError(
                f"find_top has no {name}=: rounds depend on one another and on whole sequences."
            )
    check_option("method", method, GRADIENT_METHODS)
    check_option("path", path, PATHS)
    if not isinstance(steps, int) or steps < 1:
        raise OptionError(f"steps={steps!r} is not a number of points on a path: give 1 or more.")
    own: dict[str, Any] = {
        "site": site, "over": over, "direction": direction, "mode": mode, "layers": layers,
        "positions": positions, "reference": reference, "path": path, "donor": donor,
    }  # fmt: skip
    if control_variate and (interval == "betting" or interventions is not None):
        needs = "interval='t'" if interval == "betting" else "an instrument instead of interventions="
        raise OptionError(f"control_variate=True needs {needs}: leave it out.")
    if interventions is not None:
        given = {**own, "corrupt": corrupt, "instrument": instrument}
        for name, value in given.items():
            if value is not None and not (isinstance(value, str) and value == _UNUSED.get(name)):
                raise OptionError(f"interventions= are complete: leave out {name}={value!r}.")
    check_sequences(sequences, model, on_eos="keep")
    measured = as_metrics(metrics)
    gradients = _Gradients(
        metrics[0], method, path, steps, options.get("batch_size"), options.get("progress", True)
    )
    tool: Screen | None = None
    if interventions is None:
        tool = screen_of(instrument, model, sequences, corrupt, seed=seed, **own)
        cells = _cells(instrument, model, sequences, corrupt, own)
        items = tool.interventions(cells)
    else:
        items, cells = as_interventions(interventions), []
    base = sequences if tool is None else tool.base
    costs = intervention_flops(Trunk(model), base, items, fast=options.get("engine", "fast") == "fast")
    spent = gradients.flops(Trunk(model), base, cells) / (sum(costs) / len(costs)) if cells else 0.0
    full = len(base) * len(items)
    if control_variate is None:
        differentiable = measured[0].differentiable and interval == "t"
        control_variate = bool(cells) and differentiable and spent <= _CHEAP * full
    settings: dict[str, Any] = {
        **vars(rules), "metric": measured[0].name, "metrics": [m.name for m in measured],
        "control_variate": control_variate, "seed": seed,
        "engine": options.get("engine", "fast"),
    }  # fmt: skip
    if tool is not None:
        settings |= {"instrument": instrument, **tool.settings, "seed": seed}
    if control_variate:
        settings |= {"method": method, "path": path, "steps": steps}
    folder = _Folder.of(options.get("out"), model, base, items, metrics, settings)
    estimates = None
    if control_variate and tool is not None:
        estimates = folder.estimates(lambda: gradients.of(tool, cells))
    rounds = _Rounds(model, base, items, metrics, options, folder)
    found = race(rounds.effects, len(base), len(items), rules, estimates=estimates, seed=seed)
    return _finished(rounds, found, settings, spent if control_variate else 0.0, tool, measured)


@dataclass(frozen=True)
class _Gradients:
    """How the control variate is made."""

    metric: MetricLike
    method: str
    path: str
    steps: int
    batch_size: int | None
    progress: bool

    def of(self, tool: Screen, cells: Sequence[Cell]) -> Float[np.ndarray, "sequence part"]:
        """Return the estimated effects of some cells on all sequences."""
        result = tool.estimate(
            metric=self.metric, method=self.method, steps=self.steps, batch_size=self.batch_size,
            progress=self.progress,
        )  # fmt: skip
        effects = result.effect(result.metrics[0])
        places = [[cell[str(d)] for cell in cells] for d in effects.dims[1:]]
        labels = [{v: n for n, v in enumerate(effects[d].values.tolist())} for d in effects.dims[1:]]
        index = [[own[v] for v in at] for own, at in zip(labels, places, strict=True)]
        return effects.values[(slice(None), *index)]

    def flops(self, trunk: Trunk, seqs: SequenceSet, cells: Sequence[Cell]) -> float:
        """Return what they cost on all sequences: FLOP of matrix products."""
        (forward,) = intervention_flops(trunk, seqs, [Intervention("forward", [])], fast=False)
        passes = 1.0 + _BACKWARD
        if self.method == "integrated_gradients":
            if self.path == "embedding":
                passes += self.steps * (1 + _BACKWARD)
            else:
                parts = [(trunk.n_layers - n) / trunk.n_layers for n in {cell["layer"] for cell in cells}]
                passes += sum(parts) * (self.steps * (1 + _BACKWARD) + 1)  # and the end of each path
        return passes * forward * len(seqs)


def _cells(
    instrument: str, model: Any, clean: SequenceSet, corrupt: SequenceSet | None, own: Mapping[str, Any]
) -> list[Cell]:
    """Return the components of an instrument: what the gradients of the shortest sequence have."""
    if own["layers"] is not None and not len(own["layers"]):
        raise EmptySetError("there is no component to rank in layers=[]: give at least one layer.")
    row = int(clean.lengths.argmin())
    if not INSTRUMENTS[instrument].pairs:  # what replaces a component does not matter here
        own = {**own, "mode": "zero", "positions": None, "reference": None, "donor": None}
    tool = screen_of(
        instrument, model, clean[[row]], None if corrupt is None else corrupt[[row]], seed=0, **own
    )
    result = tool.estimate(
        metric="target_logprob", method="attribution_patching", steps=1, batch_size=1, progress=False
    )
    effects = result.effect("target_logprob")
    dims = [str(d) for d in effects.dims[1:]]
    stacked = effects.transpose("sequence", *dims).stack(site=dims)
    known = np.flatnonzero(np.isfinite(stacked.values[0]))
    return [
        {d: int(v) for d, v in zip(dims, place if isinstance(place, tuple) else (place,), strict=True)}
        for place in stacked["site"].values[known].tolist()
    ]


@dataclass(frozen=True)
class _OfRows:
    """A hook for some rows of the set that it was made for."""

    hook: BatchHook
    rows: Int[Tensor, " row"]

    def bind(self, batch: Batch) -> HookFn:
        return self.hook.bind(replace(batch, rows=self.rows[batch.rows]))


@dataclass(frozen=True)
class _SeenOfRows:
    """What an intervention on some rows of its set has seen."""

    observed: Callable[[Batch], Mapping[str, Tensor]]
    rows: Int[Tensor, " row"]

    def __call__(self, batch: Batch) -> Mapping[str, Tensor]:
        return self.observed(replace(batch, rows=self.rows[batch.rows]))


def _on_rows(item: Intervention, rows: Int[Tensor, " row"]) -> Intervention:
    """Return an intervention for a set of some rows of its own, as one of a list."""
    hooks = [(name, _OfRows(fn, rows) if isinstance(fn, BatchHook) else fn) for name, fn in item.hooks]
    seen = None if item.observed is None else _SeenOfRows(item.observed, rows)
    return replace(item, hooks=hooks, observed=seen, coords={})


class _Folder:
    """Where a run is kept, if anywhere.

    Args:
        folder: The run's folder; None if nothing is kept.
    """

    def __init__(self, folder: KeyedFolder | None) -> None:
        self.folder = folder

    @classmethod
    def of(
        cls,
        out: str | Path | None,
        model: Any,
        base: SequenceSet,
        items: Sequence[Intervention],
        metrics: Sequence[MetricLike],
        settings: Mapping[str, Any],
    ) -> _Folder:
        if out is None:
            return cls(None)
        about = about_sweep(model, base, items, metrics, **settings)
        return cls(KeyedFolder(out, "top", about, version=1, parts="*.npz", described=settings))

    def round(self, number: int) -> Path | None:
        """Return the folder of one round's sweep."""
        return None if self.folder is None else self.folder.path / f"round-{number:02d}"

    def estimates(self, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the gradients' estimates, which are kept once they are made."""
        name = "gradients.npz"
        if self.folder is None:
            return make()
        path = self.folder.path / name
        if path.exists():
            with self.folder.parsing(name):
                found = read_arrays(path)
                self.folder.check(name, found["estimates"], found.pop("seal", None))
            return found["estimates"]
        made = make()
        with replacing(path) as part, part.open("wb") as file:
            np.savez(file, seal=np.array(self.folder.seal(name, made)), estimates=made)
        return made


class _Rounds:
    """Runs the cells of one round after another and keeps their values."""

    def __init__(
        self,
        model: Any,
        base: SequenceSet,
        items: Sequence[Intervention],
        metrics: Sequence[MetricLike],
        options: SweepOptions,
        folder: _Folder,
    ) -> None:
        self.model, self.base, self.items, self.metrics = model, base, items, metrics
        self.options: dict[str, Any] = {
            n: v for n, v in options.items() if n not in ("out", "per_token", "part")
        }
        self.out, self.folder = options.get("out"), folder
        self.values: dict[str, np.ndarray] = {}
        self.baseline: dict[str, np.ndarray] = {}
        self.about: dict[str, Any] = {}
        self.number = 0

    def effects(self, rows: Int[np.ndarray, " row"], parts: Int[np.ndarray, " part"]) -> np.ndarray:
        """Run some components on some sequences, and return the effects on the first metric."""
        chosen = torch.as_tensor(rows)
        self.number += 1
        result = sweep(
            self.model, self.base[chosen], [_on_rows(self.items[i], chosen) for i in parts], self.metrics,
            out=self.folder.round(self.number), kind="top_components", **self.options,
        )  # fmt: skip
        if self.number == 1 and "float32_agreement" in result.settings:
            self.about["float32_agreement"] = result.settings["float32_agreement"]
        self.options["check_dtype"] = False  # once is enough
        for name in result.metrics:
            _put(
                self.values,
                name,
                result[name].values,
                (rows[:, None], parts),
                len(self.base),
                len(self.items),
            )
            before = result.data.get(f"{name}_baseline")
            if before is not None:
                _put(self.baseline, name, before.values, rows, len(self.base))
        return result.effect(as_metrics(self.metrics)[0].name).values


def _put(store: dict[str, np.ndarray], name: str, values: np.ndarray, places: Any, *shape: int) -> None:
    if name not in store:
        store[name] = np.full(shape, np.nan, np.result_type(values.dtype, np.float32))
    store[name][places] = values


def _finished(
    rounds: _Rounds,
    found: Race,
    settings: dict[str, Any],
    gradient_cells: float,
    tool: Screen | None,
    measured: Sequence[Metric],
) -> Result:
    """Return the result of a race."""
    grid = Grid.of(rounds.items)
    full = found.effects.size
    settings = {
        **settings, **rounds.about,
        "rounds": [
            {"sequences": n, "components": m} for n, m in zip(found.sizes, found.running, strict=True)
        ],
        "cells_run": found.cells, "cells_full": full, "gradient_cells": gradient_cells,
        "share": (found.cells + gradient_cells) / full,
    }  # fmt: skip
    variables = grid.variables(rounds.baseline, rounds.values, per_token=False)
    shape = tuple(map(len, grid.axes.values()))

    def placed(values: np.ndarray, empty: Any) -> tuple[list[str], np.ndarray]:
        if grid.index is None:
            return grid.keys, values
        full = np.full(shape, empty, dtype=values.dtype)
        full[tuple(grid.index.T)] = values
        return grid.keys, full

    coords = {
        "status": placed(found.status, ""),
        "decided_by": placed(found.by, ""),
        "estimate": placed(found.estimate, np.nan),
        "low": placed(found.low, np.nan),
        "high": placed(found.high, np.nan),
        "sequences_used": placed(found.used, 0),
        "controlled": placed(found.controlled, False),
    }
    result = make_result(
        "top_components", rounds.model, rounds.base, variables, {**grid.axes, **coords}, settings, measured
    )
    return kept(result if tool is None else tool.finish(result, rounds.metrics), rounds.out)


register_kind(
    "top_components",
    plot=plot_top,
    reading=read_top,
    cites=(("maron1994", "racing"), ("waudbysmith2024", "bets on means")),
)
