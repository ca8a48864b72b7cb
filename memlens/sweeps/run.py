"""`sweep`: one labeled array from many interventions; `measure`: the same without any.

A sweep with a folder (`memlens.store.keyed_folder`) is divided into parts, one file each. A part is a pure
function of the contents of the model, the sequences, the interventions and the metrics (see
`memlens.store.fingerprint`).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from memlens.errors import EmptySetError, InterventionError, WriteError, check_option
from memlens.files import expanded, replacing
from memlens.forward.batches import make_batches
from memlens.forward.exclusive import computes
from memlens.forward.hooks import resolve_hook
from memlens.forward.memory import Budget
from memlens.forward.metrics import MetricLike, as_metrics
from memlens.forward.trunk import Trunk, has_own_forward
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_sweep
from memlens.results.readings import read_effects
from memlens.results.result import Result
from memlens.sequences.checks import check_sequences
from memlens.sequences.set import SequenceSet
from memlens.store.fingerprint import fingerprint, model_fingerprint
from memlens.store.keyed_folder import KeyedFolder, read_arrays
from memlens.sweeps.contexts import in_dtype
from memlens.sweeps.engine.engine import Engine
from memlens.sweeps.engine.schedule import joined, run_batches
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.labels import Values, gridded, make_result
from memlens.sweeps.plan import intervention_flops
from memlens.sweeps.randomness import with_watched_draws

ENGINES = ("fast", "reference")
_LOG = logging.getLogger(__name__)
_SHARD_FLOPS = {"cpu": 1e12, "cuda": 1e15}
"""The largest cost of a saved part: about ten seconds."""


class SweepOptions(TypedDict, total=False):
    """The options of `sweep` that the instruments built on it take and pass on; `sweep` describes them."""

    engine: str
    per_token: bool
    memory_budget: int | None
    batch_size: int | None
    progress: bool
    out: str | Path | None
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
        InterventionError: A hook raised; the message names it.
        NonFiniteError: The unchanged model gives NaN or infinity.
        ResultError: `out` holds another sweep, or a damaged part.

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
    runner = Engine.of(trunk, sequences, metrics, budget, per_token=per_token)
    costs = intervention_flops(trunk, sequences, interventions, fast=engine == "fast")
    store = None
    shards = [Shard(range(len(sequences)), range(len(interventions)))]
    if out is not None:
        seeded = {} if seed is None else {"seed": seed, "batch_size": budget.batch_size}
        about = _about(model, sequences, interventions, metrics, engine=engine, per_token=per_token, **seeded)
        most = _SHARD_FLOPS.get(trunk.device.type, _SHARD_FLOPS["cuda"])
        store = ShardStore(out, about, cut(len(sequences), costs, budget.batch_size, most))
        shards = store.shards
    watched = with_watched_draws(interventions, seed)
    parts = []
    with tqdm(
        total=sum(costs) * len(sequences),
        disable=not progress,
        desc=f"{kind.replace('_', ' ')}: {len(interventions):,} x {len(sequences):,}",
        unit="FLOP",
        unit_scale=True,
    ) as bar:
        for shard in shards:
            done = None if store is None else store.load(shard)
            some = [(costs[i], watched[i]) for i in shard.items]
            if done is not None:
                bar.update(sum(cost for cost, _ in some) * len(shard.rows))
                bar.initial = bar.n  # what was done before counts for no speed
            else:
                done = run_batches(runner, sequences, some, engine, budget, bar, shard.rows)
                if store is not None:
                    store.save(shard, *done)
            parts.append((shard, *done))
    baseline, values = _assembled(parts)
    _warn_not_finite(values)
    recorded: dict[str, Any] = {
        "engine": engine,
        "metrics": [metric.name for metric in measured],
        "per_token": per_token,
        **({} if seed is None else {"seed": seed, "batch_size": budget.batch_size}),
        **(settings or {}),
    }
    if trunk.dtype.itemsize < 4 if check_dtype is None else check_dtype:
        recorded["float32_agreement"] = agreement_with_float32(
            trunk, sequences, interventions, metrics, baseline, values, per_token=per_token
        )
    variables, coords = gridded(values, interventions, per_token)
    for name, array in baseline.items():
        variables[f"{name}_baseline"] = (("sequence", *(["target"] * per_token)), array)
    return kept(make_result(kind, model, sequences, variables, coords, recorded, measured), out)


def kept(result: Result, out: str | Path | None) -> Result:
    """Return a result, saved as `result.nc` where the sweep has a folder `out`.

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


_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Why nothing can be written to a folder, other than a lack of space."""


def _about(
    model: Any,
    seqs: SequenceSet,
    interventions: Sequence[Intervention],
    metrics: Sequence[MetricLike],
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


def _assembled(parts: Sequence[tuple[Shard, Values, Values]]) -> tuple[Values, Values]:
    """Join parts, which are ordered by their sequences and then by their interventions."""
    rows: dict[range, list[tuple[Values, Values]]] = {}
    for shard, base, values in parts:
        rows.setdefault(shard.rows, []).append((base, values))
    _, bases, found = parts[0]
    base = {n: joined([some[0][0][n] for some in rows.values()]) for n in bases}
    values = {
        n: joined([np.concatenate([v[n] for _, v in some], 1) for some in rows.values()]) for n in found
    }
    return base, values


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
    known = trunk.model.hook_dict
    for name in {name for item in interventions for name, _ in item.hooks if name not in known}:
        resolve_hook(trunk.model, name)


def _warn_not_finite(values: Values) -> None:
    for name, array in values.items():
        if name == "target_logprob" and np.isnan(array).all(axis=tuple(range(array.ndim))[2:]).any():
            _LOG.warning("some interventions drive the model to NaN; their values are NaN in the result")


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


_PARTS_VERSION = 2
"""The version of the format; version 1 used fingerprints that could collide."""
_FEWEST = 16
"""The smallest number of interventions per part, since each part runs the unchanged model once."""


@dataclass(frozen=True)
class Shard:
    """A part of a sweep: some sequences under some interventions.

    Attributes:
        rows: Row numbers of the sequences.
        items: Numbers of the interventions.
    """

    rows: range
    items: range

    @property
    def name(self) -> str:
        """The name of its file."""
        return (
            f"sequences-{self.rows.start:06d}-{self.rows.stop:06d}"
            f"-interventions-{self.items.start:06d}-{self.items.stop:06d}.npz"
        )


def cut(n_sequences: int, costs: Sequence[float], batch_size: int, most: float) -> list[Shard]:
    """Divide a sweep into parts of about the same cost.

    >>> [(s.rows, s.items) for s in cut(3, [1.0] * 40, 2, 40.0)]
    [(range(0, 2), range(0, 20)), (range(0, 2), range(20, 40)), (range(2, 3), range(0, 40))]
    """
    shards = []
    for first in range(0, n_sequences, batch_size):
        rows = range(first, min(first + batch_size, n_sequences))
        start, cost = 0, 0.0
        for i, each in enumerate(costs):
            if i - start >= _FEWEST and cost + each * len(rows) > most:
                shards.append(Shard(rows, range(start, i)))
                start, cost = i, 0.0
            cost += each * len(rows)
        shards.append(Shard(rows, range(start, len(costs))))
    return shards


class ShardStore:
    """The finished parts of one sweep in a folder.

    Raises:
        OtherRunError: The folder belongs to another sweep, or another version of memlens wrote it.
        ResultError: Its manifest cannot be read.
    """

    folder: KeyedFolder
    shards: list[Shard]

    def __init__(self, folder: str | Path, about: Mapping[str, str], shards: Sequence[Shard]) -> None:
        cut = [[s.rows.start, s.rows.stop, s.items.start, s.items.stop] for s in shards]
        self.folder = KeyedFolder(
            folder, "sweep", about, version=_PARTS_VERSION, parts="*.npz", content={"parts": cut}
        )
        self.shards = [Shard(range(a, b), range(c, d)) for a, b, c, d in self.folder.content["parts"]]

    def load(self, shard: Shard) -> tuple[Values, Values] | None:
        """Return a part's baseline and values; None if it is not finished.

        Raises:
            ResultError: The file is damaged, or is not the part that this sweep wrote.
        """
        path = self.folder.path / shard.name
        if not path.exists():
            return None
        with self.folder.parsing(shard.name):
            found = read_arrays(path)
            self.folder.check(shard.name, found, found.pop("seal", None))
        base = {n[5:]: a for n, a in found.items() if n.startswith("base ")}
        return base, {n[6:]: a for n, a in found.items() if n.startswith("value ")}

    def save(self, shard: Shard, base: Values, values: Values) -> None:
        """Write a finished part, whole or not at all."""
        named = {f"base {n}": a for n, a in base.items()} | {f"value {n}": a for n, a in values.items()}
        seal = np.array(self.folder.seal(shard.name, named))
        with replacing(self.folder.path / shard.name) as part, part.open("wb") as file:
            np.savez(file, seal=seal, **named)  # pyright: ignore[reportArgumentType]


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
            values[name][: len(rows)][:, items],
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
