"""`sweep`: one labelled array from many interventions."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm

from memlens.errors import EmptySetError, InterventionError, check_option
from memlens.models.hooks import resolve_hook
from memlens.models.provenance import describe
from memlens.models.trunk import Trunk
from memlens.results import Result
from memlens.sequences import SequenceSet
from memlens.sequences.checks import check_sequences
from memlens.sweeps.budget import Budget
from memlens.sweeps.engine import Engine
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.metrics import MetricLike, make_reduce, metric_names
from memlens.sweeps.schedule import run_batches

__all__ = ["ENGINES", "make_result", "sequence_coords", "sweep", "token_labels"]

ENGINES = ("fast", "reference")
_LOG = logging.getLogger(__name__)
Values = dict[str, np.ndarray]


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
    kind: str = "sweep",
    settings: Mapping[str, Any] | None = None,
) -> Result:
    """Run every intervention on every sequence and measure it at the target positions.

    The fast engine equals the reference engine (plain `run_with_hooks`, one intervention at a time, full
    logits) to 1e-5 in float32, for every intervention; hooks outside the blocks run on the reference path.

    Args:
        model: A `HookedTransformer` or `TransformerBridge`.
        sequences: What is recalled; targets are the continuations' tokens, teacher-forced.
        interventions: What is changed. Where all carry the same `coords` keys, these become the
            dimensions of the result (`layer`, `head`, …); else there is one dimension `intervention`.
        metrics: Names of `memlens.METRICS`, or functions of (logits, ids, mask) at the target positions
            that give one number a sequence.
        engine: "fast" or "reference".
        per_token: Keep a `target` dimension (built-in metrics only).
        memory_budget: Bytes that activations may take at a time; by default 1 GiB, on a GPU 40 % of what
            is free. When the device runs out of memory the portions are halved.
        batch_size: Sequences in a batch; chosen from the budget by default.
        progress: Show one bar.
        kind: What the result calls itself (memlens' own analyses give theirs).
        settings: Further parameters to record.

    Returns:
        A `Result` with one value per sequence and intervention for each metric, and the un-intervened
        value beside it (`<metric>_baseline`).

    Raises:
        EmptySetError: No sequences, or no interventions.
        SiteError: A hook name that the model does not have.
        SilentInterventionError: A hook that edits, and is ignored by the model.
        InterventionError: A hook raised; the message names it.
        NonFiniteError: The un-intervened model gives NaN or infinity.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> edit = ml.Intervention("no attention in 0", [("blocks.0.hook_attn_out", lambda x, hook: 0 * x)])
        >>> ml.sweep(model, seqs, [edit], progress=False)["exact_match"].dims
        ('sequence', 'intervention')
    """
    check_option("engine", engine, ENGINES)
    names = metric_names(metrics)
    trunk = Trunk(model)
    _check_inputs(trunk, sequences, interventions)
    budget = Budget.of(trunk, sequences, memory_budget, batch_size)
    runner = Engine(
        model,
        make_reduce(metrics, per_token=per_token),
        chunk_tokens=budget.chunk_tokens,
        unembed_rows=budget.unembed_rows,
        probe_tokens=sequences.tokens[:1, :4].to(trunk.device),
    )
    steps = len(interventions) * len(sequences)
    with tqdm(total=steps, disable=not progress, desc=kind.replace("_", " "), unit="run") as bar:
        baseline, values = run_batches(runner, trunk, sequences, interventions, engine, budget, bar)
    _warn_not_finite(values)
    recorded = {"engine": engine, "metrics": names, "per_token": per_token, **(settings or {})}
    variables = _label(values, interventions, per_token)
    for name, array in baseline.items():
        variables[f"{name}_baseline"] = (("sequence", *(["target"] * per_token)), array)
    return make_result(kind, model, sequences, variables, _coords(interventions), recorded)


def _check_inputs(trunk: Trunk, seqs: SequenceSet, interventions: Sequence[Intervention]) -> None:
    check_sequences(seqs, trunk.model, on_eos="keep")
    if isinstance(interventions, Intervention):
        raise InterventionError(
            f"interventions is one Intervention ({interventions.name!r}): give a list of it."
        )
    if not interventions:
        raise EmptySetError("there are no interventions to run: give at least one.")
    for item in interventions:
        if not isinstance(item, Intervention):
            raise InterventionError(
                f"{item!r} is no Intervention: wrap it in memlens.Intervention(name, hooks)."
            )
    known = trunk.model.hook_dict
    for name in {name for item in interventions for name, _ in item.hooks if name not in known}:
        resolve_hook(trunk.model, name)


def _warn_not_finite(values: Values) -> None:
    for name, array in values.items():
        if name == "target_logprob" and np.isnan(array).all(axis=tuple(range(array.ndim))[2:]).any():
            _LOG.warning("some interventions drive the model to NaN; their values are NaN in the result")


def _grid_keys(interventions: Sequence[Intervention]) -> list[str] | None:
    """The coordinates that all interventions share and that tell them apart; None where there are none."""
    keys = list(interventions[0].coords)
    if not keys or any(list(i.coords) != keys for i in interventions):
        return None
    cells = {tuple(i.coords.values()) for i in interventions}
    return keys if len(cells) == len(interventions) else None


def _axis(interventions: Sequence[Intervention], key: str) -> list[Hashable]:
    return list(dict.fromkeys(i.coords[key] for i in interventions))


def _coords(interventions: Sequence[Intervention]) -> dict[str, list[Hashable]]:
    keys = _grid_keys(interventions)
    if keys is None:
        return {"intervention": [i.name for i in interventions]}
    return {key: _axis(interventions, key) for key in keys}


def _label(values: Values, interventions: Sequence[Intervention], per_token: bool) -> dict[str, Any]:
    """Spread `[seq, intervention, …]` over the grid of coordinates; cells without one are NaN."""
    tail = ("target",) if per_token else ()
    keys = _grid_keys(interventions)
    if keys is None:
        return {name: (("sequence", "intervention", *tail), array) for name, array in values.items()}
    axes = {key: {value: i for i, value in enumerate(_axis(interventions, key))} for key in keys}
    index = tuple(np.array([axes[key][i.coords[key]] for i in interventions]) for key in keys)
    out: dict[str, Any] = {}
    for name, array in values.items():
        grid = np.full((len(array), *(len(a) for a in axes.values()), *array.shape[2:]), np.nan, array.dtype)
        grid[(slice(None), *index)] = array
        out[name] = (("sequence", *keys, *tail), grid)
    return out


def sequence_coords(seqs: SequenceSet) -> dict[str, Any]:
    """The coordinates of a `sequence` dimension: ids, lengths, and the table's plain columns."""
    table = seqs.table
    coords: dict[str, Any] = {
        "sequence": table["id"].astype(str).to_numpy(),
        "prefix_len": ("sequence", seqs.prefix_len.numpy()),
        "n_targets": ("sequence", seqs.n_targets.numpy()),
    }
    for column in table.columns:
        values = table[column].to_numpy()
        plain = values.dtype.kind in "biuf" or all(isinstance(v, str) for v in values)
        if column not in {"id", *coords} and plain:
            coords[str(column)] = ("sequence", values if values.dtype.kind in "biuf" else values.astype(str))
    return coords


def token_labels(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray | None:
    """Return each token as text, "" outside the mask; None for a model without a tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return None
    known = {i: tokenizer.decode([i]) for i in ids[mask].unique().tolist()}
    flags = mask.tolist()
    return np.array(
        [
            [known[i] if real else "" for i, real in zip(row, flag, strict=True)]
            for row, flag in zip(ids.tolist(), flags, strict=True)
        ]
    )


def make_result(
    kind: str,
    model: Any,
    seqs: SequenceSet,
    variables: Mapping[str, Any],
    coords: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Result:
    """Build a `Result` whose attributes say how it came about."""
    import json

    about = describe(model)
    attrs = {
        **about,
        "kind": kind,
        "seed": settings.get("seed", 0),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": json.dumps({**settings, "sequences": dict(seqs.attrs)}, default=str),
    }
    labels = {name: c for name, c in sequence_coords(seqs).items() if name not in variables}
    return Result(xr.Dataset(dict(variables), {**labels, **coords}, attrs))
