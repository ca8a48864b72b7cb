"""`sweep`: one labeled array from many interventions; `measure`: the same without any.

A sweep with a folder (`memlens.store.keyed_folder`) is divided into parts, one file each. A part is a pure
function of the contents of the model, the sequences, the interventions and the metrics (see
`memlens.store.fingerprint`).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from memlens.errors import EmptySetError, InterventionError, OptionError, WriteError, check_option
from memlens.files import expanded
from memlens.forward.batches import make_batches
from memlens.forward.exclusive import computation, computes
from memlens.forward.hooks import hook_points, resolve_hook
from memlens.forward.memory import Budget
from memlens.forward.metrics import MetricLike, as_metrics
from memlens.forward.trunk import Trunk, has_own_forward
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_sweep
from memlens.results.readings import read_effects
from memlens.results.result import Result
from memlens.results.storage import load_result
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.store.executors import run_parts
from memlens.store.fingerprint import fingerprint, model_fingerprint
from memlens.store.sharing import Part, check_finished, do_share
from memlens.sweeps.contexts import in_dtype
from memlens.sweeps.engine.engine import Engine
from memlens.sweeps.engine.schedule import joined, run_batches
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.labels import Grid, Values, make_result
from memlens.sweeps.plan import intervention_flops
from memlens.sweeps.randomness import with_watched_draws
from memlens.sweeps.shards import Parts, Shard, ShardStore, cut, part_limit, save_frame

ENGINES = ("fast", "reference")
_LOG = logging.getLogger(__name__)


class SweepOptions(TypedDict, total=False):
    """The options of `sweep` that the instruments built on it take and pass on; `sweep` describes them."""

    engine: str
    per_token: bool
    memory_budget: int | None
    batch_size: int | None
    progress: bool
    out: str | Path | None
    part: Part | None
    executor: Any
    check_dtype: bool | None


@computes
@torch.no_grad()
def sweep(
    model: Any,
    sequences: SequenceSet,
    interventions: Sequence[Intervention],
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    *,
    engine: str = "fast",
    per_token: bool = False,
    memory_budget: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    out: str | Path | None = None,
    part: Part | None = None,
    executor: Any = None,
    check_dtype: bool | None = None,
    seed: int | None = None,
    kind: str = "sweep",
    settings: Mapping[str, Any] | None = None,
) -> Result:
    """Run every intervention on every sequence and measure it at the target positions.

    The fast engine equals the reference engine (plain `run_with_hooks`, one intervention at a time, full
    logits) to 1e-5 in float32, for every intervention; hooks outside the layers run on the reference path.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        sequences: The sequences; targets are the continuations' tokens, teacher-forced.
        interventions: What to change. If all have the same `coords` keys, these become the dimensions of
            the result (`layer`, `head`, …); otherwise there is one dimension `intervention`.
        metrics: Names of `memlens.METRICS`, `memlens.Metric` objects, or functions of (logits, ids, mask) at
            the target positions that return one number per sequence.
        engine: "fast" or "reference".
        per_token: Keep a `target` dimension (built-in metrics only).
        memory_budget: Bytes that activations may take; by default 1 GiB, or 40 % of a GPU's free memory. If
            the device runs out of memory, the portions are halved.
        batch_size: Sequences in a batch; chosen from the budget by default.
        progress: Show a progress bar that counts floating-point operations.
        out: A folder for every finished part, and at the end for `result.nc`. The same call computes only
            what is missing, however the last one ended; the values are those of an uninterrupted run.
        part: Only a share of the parts in `out`, for job arrays: (i, n) or "i/n" for each n-th part beginning
            with the i-th (from 0), "slurm" for the same from the variables of a Slurm job array, "auto" for
            whatever no other process has claimed. What others do is left to them.
        executor: Do the parts on the workers of an executor of `concurrent.futures`, or of
            `client.get_executor()` of Dask Distributed. They share the folder `out`, and load the model by
            the arguments that `load_model` was given here.
        check_dtype: Also run a sample in float32 and record the largest differences as the setting
            `float32_agreement`; by default where the weights have 16 bits.
        seed: For hooks that draw random numbers: each call of a function of your own starts torch's, numpy's
            and Python's global generators from (seed, intervention, hook, first sequence of the batch), so
            the same call with the same `batch_size` gives the same values, on either engine and in parts. By
            default they are left alone, and a hook that draws is warned of.
        kind: The result's kind (memlens' own analyses set theirs).
        settings: Further parameters to record.

    Returns:
        A `Result` with one value per sequence and intervention for each metric, and the value
        without intervention (`<metric>_baseline`).

    Raises:
        EmptySetError: No sequences, or no interventions.
        SiteError: A hook name that the model does not have.
        SilentInterventionError: The model ignores what a hook writes.
        InterventionError: A hook raised, or returned another shape; the message names it.
        OptionError: A metric raised, or is called like a dimension of the result.
        NonFiniteError: The unchanged model gives NaN or infinity.
        ResultError: `out` holds another sweep, or a damaged part.
        UnfinishedError: With `part`: this share is done, and parts of others are missing.
        WorkerError: With `executor`: the model or a hook cannot be sent to workers, or a part was lost with
            its worker too often.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> edit = ml.Intervention("no attention in 0", [("blocks.0.hook_attn_out", lambda x, hook: 0 * x)])
        >>> ml.sweep(model, seqs, [edit], progress=False)["exact_match"].dims
        ('sequence', 'intervention')
    """
    check_option("engine", engine, ENGINES)
    measured = as_metrics(metrics)
    trunk = Trunk(model)
    if engine == "fast" and has_own_forward(model):
        _LOG.warning("the forward of the whole model was replaced: the slow reference engine is used")
        engine = "reference"
    _check_inputs(trunk, sequences, interventions)
    budget = Budget.of(trunk, sequences, memory_budget, batch_size)
    costs = intervention_flops(trunk, sequences, interventions, fast=engine == "fast")
    given = (model, sequences, interventions, metrics)
    runner = _Runner(
        *given, costs=costs, engine=engine, per_token=per_token, budget=budget, memory_budget=memory_budget,
        seed=seed,
    )  # fmt: skip
    recorded: dict[str, Any] = {
        "engine": engine,
        "metrics": [metric.name for metric in measured],
        "per_token": per_token,
        **runner.seeded,
        **(settings or {}),
    }
    grid = Grid.of(interventions)
    grid.check_names(metric.name for metric in measured)
    bar = tqdm(
        total=sum(costs) * len(sequences),
        disable=not progress,
        desc=f"{kind.replace('_', ' ')}: {len(interventions):,} x {len(sequences):,}",
        unit="FLOP",
        unit_scale=True,
    )
    with bar:
        if out is None:
            if part is not None or executor is not None:
                raise OptionError("part= and executor= need a folder that all workers share: give out=.")
            baseline, values = runner.run(Shard(range(len(sequences)), range(len(interventions))), bar)
            lost = _is_lost(values)
        else:
            about = runner.about
            shards = cut(len(sequences), costs, budget.batch_size, part_limit(trunk.device.type))
            store = ShardStore(out, about, shards, {"kind": kind, **recorded})
            if part is not None or executor is not None:
                frame = make_result(kind, model, sequences, grid.cells, grid.axes, recorded)
                save_frame(out, frame, grid, per_token, measured)
                _share(_SweepJob(runner, store), part, executor, bar)
            baseline, values, lost = _from_parts(runner, store, grid, bar)
    if lost:
        _LOG.warning("some interventions drive the model to NaN; their values are NaN in the result")
    if trunk.dtype.itemsize < 4 if check_dtype is None else check_dtype:
        recorded["float32_agreement"] = agreement_with_float32(
            trunk, sequences, interventions, metrics, baseline, values, per_token=per_token
        )
    variables = grid.variables(baseline, values, per_token=per_token)
    return kept(make_result(kind, model, sequences, variables, grid.axes, recorded, measured), out)


class _Runner:
    """Computes the parts of a sweep.

    Args:
        model: The model, like the next arguments as of `sweep`.
        sequences: The sequences.
        interventions: The interventions.
        metrics: The metrics.
        costs: What each intervention costs on one sequence, in FLOP.
        engine: "fast" or "reference".
        per_token: Whether values have a `target` axis.
        budget: How much runs at a time.
        memory_budget: What was given for it.
        seed: Of hooks that draw random numbers.
    """

    def __init__(
        self,
        model: Any,
        sequences: SequenceSet,
        interventions: Sequence[Intervention],
        metrics: Sequence[MetricLike],
        *,
        costs: Sequence[float],
        engine: str,
        per_token: bool,
        budget: Budget,
        memory_budget: int | None,
        seed: int | None,
    ) -> None:
        self.given = (model, sequences, interventions, metrics)
        self.memory_budget, self.seed = memory_budget, seed
        self._watched = with_watched_draws(interventions, seed)
        self.costs, self.engine, self.per_token, self.budget = costs, engine, per_token, budget
        self._engine = Engine.of(Trunk(model), sequences, metrics, budget, per_token=per_token)

    def __reduce__(self) -> Any:
        # another device has another amount of memory, but the rows of a batch belong to the result
        names = ("costs", "engine", "per_token", "memory_budget", "seed")
        options = {name: getattr(self, name) for name in names}
        return _runner_elsewhere, (self.given, options, self.budget.batch_size)

    @property
    def seeded(self) -> dict[str, int]:
        """What random numbers depend on, where there is a seed."""
        return {} if self.seed is None else {"seed": self.seed, "batch_size": self.budget.batch_size}

    @property
    def about(self) -> dict[str, str]:
        """What identifies the sweep."""
        return about_sweep(*self.given, engine=self.engine, per_token=self.per_token, **self.seeded)

    def run(self, shard: Shard, bar: Any) -> tuple[Values, Values]:
        """Return a part's baseline and values."""
        sequences = self.given[1]
        some = [(self.costs[i], self._watched[i]) for i in shard.items]
        return run_batches(self._engine, sequences, some, self.engine, self.budget, bar, shard.rows)

    def cost(self, shard: Shard) -> float:
        """Return what a part costs, in FLOP."""
        return sum(self.costs[i] for i in shard.items) * len(shard.rows)


def _runner_elsewhere(given: tuple[Any, ...], options: dict[str, Any], batch_size: int) -> _Runner:
    model, sequences, *_ = given
    budget = Budget.of(Trunk(model), sequences, options["memory_budget"], batch_size)
    return _Runner(*given, budget=budget, **options)


def _from_parts(runner: _Runner, store: ShardStore, grid: Grid, bar: Any) -> tuple[Values, Values, bool]:
    """Read the parts that are there, and compute and save the others.

    Returns:
        The baseline, the values, and whether some are lost (see `_is_lost`).
    """
    parts, lost = Parts(store, grid.stretch), False
    for shard in store.shards:
        done = store.load(shard)
        if done is None:
            done = runner.run(shard, bar)
            store.save(shard, *done)
        elif bar.n < bar.total:
            bar.update(runner.cost(shard))
            bar.initial = bar.n  # what was done before counts for no speed
        parts.add(shard, *done)
        lost = lost or _is_lost(done[1])
    return *parts.joined(), lost


class _SweepJob:
    """The parts of a sweep for `run_parts` and `do_share`.

    Args:
        runner: Computes them.
        store: Its folder; opened anew in another process, where what arrived must be the same sweep.
    """

    folder: Path

    def __init__(self, runner: _Runner, store: ShardStore) -> None:
        self.runner, self.store, self.folder = runner, store, store.folder.path
        self.shards = {shard.name: shard for shard in store.shards}

    def __reduce__(self) -> Any:
        return _job_elsewhere, (self.runner, str(self.folder.absolute()), self.store.shards)

    def done(self, part: str) -> bool:
        """Whether a part's file is there."""
        return self.store.is_done(part)

    @torch.no_grad()
    def work(self, part: str, bar: Any = None) -> None:
        """Compute and save a part."""
        with computation(self.runner.given[0]):
            bar = tqdm(disable=True) if bar is None else bar
            self.store.save(self.shards[part], *self.runner.run(self.shards[part], bar))


def _job_elsewhere(runner: _Runner, folder: str, shards: Sequence[Shard]) -> _SweepJob:
    return _SweepJob(runner, ShardStore(folder, runner.about, shards))


def _share(job: _SweepJob, part: Part | None, executor: Any, bar: Any) -> None:
    """Do a share of a sweep's parts, or all of them on other processes, and check that none is missing."""
    names = list(job.shards)
    for name in names:
        if job.done(name):
            bar.update(job.runner.cost(job.shards[name]))
            bar.initial = bar.n
    if part is not None and executor is not None:
        raise OptionError("part= and executor= contradict each other: give one.")
    if executor is not None:
        run_parts(
            executor, job, names,
            on_done=lambda name, _: bar.update(job.runner.cost(job.shards[name])),
        )  # fmt: skip
    elif part is not None:
        do_share(part, names, job.folder, job.done, lambda name: job.work(name, bar))
    check_finished(names, job.folder, job.done)


def kept(result: Result, out: str | Path | None) -> Result:
    """Return a result, saved as `result.nc` where the sweep has a folder `out`.

    One whose values are not in memory is written a portion at a time, and then read from that file.

    Analyses that extend the result of `sweep` save it through this function, too. In a folder of a finished
    run that cannot be written any more, the file that is there stays.
    """
    if out is None:
        return result
    path = expanded(out) / "result.nc"
    try:
        result.save(path)
    except WriteError as error:
        if error.errno not in _READ_ONLY or not path.exists():
            raise
        _LOG.warning("%s is read-only and keeps its %s", path.parent, path.name)
        return result
    in_memory = all(variable.chunks is None for variable in result.data.variables.values())
    return result if in_memory else load_result(path)


_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Why nothing can be written to a folder, other than a lack of space."""


def about_sweep(
    model: Any,
    seqs: SequenceSet,
    interventions: Sequence[Intervention],
    metrics: Sequence[MetricLike],
    /,
    **options: Any,
) -> dict[str, str]:
    """Return what identifies a saved sweep, entry by entry, so that an error can name what differs."""
    return {
        "the model": model_fingerprint(model),
        "the sequences": fingerprint(seqs),
        "the interventions": fingerprint(list(interventions), model),
        "the metrics": fingerprint(list(metrics), model),
        "the options": fingerprint(options),
    }


def _check_inputs(trunk: Trunk, seqs: SequenceSet, interventions: Sequence[Intervention]) -> None:
    check_sequences(seqs, trunk.model, on_eos="keep")
    if isinstance(interventions, Intervention):
        raise InterventionError(
            f"interventions is one Intervention ({interventions.name!r}): give a list that contains it."
        )
    if not interventions:
        raise EmptySetError("there are no interventions to run: give at least one.")
    for item in interventions:
        if not isinstance(item, Intervention):
            raise InterventionError(
                f"{item!r} is not an Intervention: wrap it in memlens.Intervention(name, hooks)."
            )
        for check in item.checks:
            check(trunk.model)
    known = hook_points(trunk.model)
    for name in {name for item in interventions for name, _ in item.hooks if name not in known}:
        resolve_hook(trunk.model, name)


def _is_lost(values: Values) -> bool:
    """Whether an intervention drives the model to NaN on a sequence."""
    logprob = values.get("target_logprob")
    return logprob is not None and bool(np.isnan(logprob).all(axis=tuple(range(2, logprob.ndim))).any())


@computes
@torch.no_grad()
def measure(
    model: Any,
    sequences: SequenceSet,
    metrics: Sequence[MetricLike] = ("target_logprob", "exact_match"),
    *,
    per_token: bool = False,
    memory_budget: int | None = None,
    batch_size: int | None = None,
) -> dict[str, np.ndarray]:
    """Return each metric of the unchanged model, one number per sequence (or `[seq, target]`).

    Args:
        model: A TransformerLens model.
        sequences: The sequences.
        metrics: As for `sweep`, like the other arguments and the errors.
        per_token: Keep a `target` axis, NaN after a sequence's last target (built-in metrics only).
        memory_budget: Bytes that activations may take.
        batch_size: Sequences in a batch.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-xs")
        >>> found = ml.measure(model, ml.load_sequences("zoo", model)[:3], ["target_accuracy"])
        >>> found["target_accuracy"].shape
        (3,)
    """
    check_sequences(sequences, model, on_eos="keep")
    trunk = Trunk(model)
    budget = Budget.of(trunk, sequences, memory_budget, batch_size)
    engine = Engine.of(trunk, sequences, metrics, budget, per_token=per_token)
    batches = make_batches(sequences, budget.batch_size, trunk.device)
    if has_own_forward(model):
        parts = [engine.reference(batch, targets, None) for batch, targets in batches]
    else:
        parts = [engine.baseline(batch, targets).values for batch, targets in batches]
    return {name: joined([p[name].numpy() for p in parts]) for name in parts[0]}


_COMPARED_SEQUENCES = 4
_COMPARED_INTERVENTIONS = 8


@torch.no_grad()
def agreement_with_float32(
    trunk: Trunk,
    seqs: SequenceSet,
    interventions: Sequence[Intervention],
    metrics: Sequence[MetricLike],
    baseline: Mapping[str, np.ndarray],
    values: Mapping[str, np.ndarray],
    *,
    per_token: bool,
) -> dict[str, Any]:
    """Compare some of a sweep's values with plain forwards in float32.

    Returns:
        `dtype`, how many `sequences` and `interventions` were compared, and by metric the largest absolute
        difference of values, and of effects (intervened minus baseline).
    """
    items = _spread(len(interventions), _COMPARED_INTERVENTIONS)
    rows = range(min(len(seqs), _COMPARED_SEQUENCES))
    found: dict[str, dict[str, float]] = {}
    with in_dtype(trunk.model, torch.float32):
        wide = Trunk(trunk.model)
        budget = Budget.of(wide, seqs, None, len(rows))
        runner = Engine.of(wide, seqs, metrics, budget, per_token=per_token)
        ((batch, targets),) = make_batches(seqs, len(rows), wide.device, rows)
        plain = runner.reference(batch, targets, None)
        wanted = [runner.reference(batch, targets, interventions[i]) for i in items]
    for name, before in plain.items():
        found[name] = _differences(
            baseline[name][: len(rows)],
            np.asarray(values[name][: len(rows)][:, items]),
            before,
            torch.stack([w[name] for w in wanted], 1),
        )
    return {
        "dtype": str(trunk.dtype).removeprefix("torch."),
        "sequences": len(rows),
        "interventions": len(items),
        "largest_difference": found,
    }


def _differences(base: np.ndarray, values: np.ndarray, plain: Tensor, wanted: Tensor) -> dict[str, float]:
    width = plain.shape[1:]
    if width:  # a `target` axis, padded to the widest of all sequences
        base, values = base[:, : width[0]], values[..., : width[0]]
    want, before = wanted.numpy().astype(float), plain.numpy().astype(float)
    off = np.abs(values - want)
    effects = np.abs((values - base[:, None]) - (want - before[:, None]))
    return {"value": float(np.nanmax(off)), "effect": float(np.nanmax(effects))}


def _spread(n: int, most: int) -> list[int]:
    """Return up to `most` numbers below `n`, evenly spread, with the first and the last."""
    return sorted({round(float(i)) for i in np.linspace(0, n - 1, min(n, most))})


register_kind("sweep", plot=plot_sweep, reading=read_effects)
