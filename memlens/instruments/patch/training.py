"""A memory over training: when it is learned and lost, and in which components it is by then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Unpack

import xarray as xr
from torch import nn

from memlens.errors import EmptySetError, OptionError
from memlens.files import expanded
from memlens.forward.exclusive import computes
from memlens.instruments.donors import donor_settings
from memlens.instruments.patch.patching import patch_activations
from memlens.models.load import load_model
from memlens.models.names import checkpoint_steps
from memlens.models.provenance import describe
from memlens.results.kinds import register_kind
from memlens.results.plots.layers import plot_training
from memlens.results.readings import read_training
from memlens.results.result import Result
from memlens.results.statistics.training import training_events
from memlens.sequences.set import SequenceSet
from memlens.sweeps.run import SweepOptions, kept

Checkpoint = nn.Module | Callable[[], nn.Module]
"""A loaded model, or a function that loads it when it is needed."""
_METRICS = ("target_logprob", "exact_match")


@computes
def memory_over_training(
    model: Any,
    sequences: SequenceSet,
    *,
    checkpoints: Sequence[int] | Mapping[int, Checkpoint] | None = None,
    name: str | Path | None = None,
    site: str = "mlp_out",
    over: str = "layer",
    layers: Sequence[int] | None = None,
    **options: Unpack[SweepOptions],
) -> Result:
    r"""Follow sequences over a model's training checkpoints, by component.

    For each checkpoint and each component, `patch_activations` runs twice on the same sequences, with
    :math:`\ell` the mean log-probability of the targets:

    - *into the model*: the model with this component's activation from the checkpoint. Where
      :math:`\ell` stays, the component does at that step already what the memory needs of it;
    - *into the checkpoint*: the checkpoint with this component's activation from the model. Where
      :math:`\ell` rises, what the component learns later is what the checkpoint lacks.

    Components share one basis along a training run, so that early checkpoints differ from the model by more
    than one memory: compare with sequences that are not recalled. Ours; patching of components between
    checkpoints needs no other training run.

    Args:
        model: The model after training, or another checkpoint that the others are compared with.
        sequences: What is followed.
        checkpoints: Training steps, which are loaded one after the other; or for each step a model or a
            function that loads it. By default every step that `load_model` can load.
        name: Where steps are loaded from, such as a folder; the model's own name by default.
        site: The activation that is exchanged, as for `patch_activations`.
        over: "layer", or "head" for sites with heads, such as "z".
        layers: All by default.
        options: Further options of `sweep`, without `per_token`; under `out`, every checkpoint has a folder.

    Returns:
        Kind "memory_over_training": `target_logprob` and `exact_match` `(sequence, step)` of the checkpoints
        themselves; `into_model` and `into_checkpoint` `(sequence, step, layer)` (or with `head`) in nats,
        with the baselines `into_model_baseline` `(sequence)` and `into_checkpoint_baseline`
        `(sequence, step)`, so that `Result.effect` is the change; and by sequence `first` (the first step at
        which it is recalled exactly; NaN for never), `forgotten` (how often it is recalled at one step and
        not at the next), `relearned` and `last` of
        `memlens.results.statistics.training.training_events`.

    Raises:
        OptionError: `per_token`, an `over` that is neither "layer" nor "head", or checkpoints that are not
            steps or models by step.
        EmptySetError: There are no checkpoints.
        ModelNotFoundError: The model's name has no such step.
        DonorError: A checkpoint does not fit.

    Example:
        >>> import memlens as ml
        >>> model = ml.load_model("zoo/pythia-s")
        >>> twin = ml.load_model("zoo/pythia-s-clean")  # stands for a checkpoint from before the memory
        >>> seqs = ml.load_sequences("zoo", model)[:2]
        >>> steps = {0: twin, 2562: model}
        >>> follow = ml.instruments.memory_over_training
        >>> result = follow(model, seqs, checkpoints=steps, progress=False)
        >>> result["into_model"].dims, float(abs(result.effect("into_model").sel(step=2562)).max())
        (('sequence', 'step', 'layer'), 0.0)
    """
    if options.get("per_token"):
        raise OptionError("per_token=True: checkpoints are compared by whole continuations, so leave it out.")
    if over not in ("layer", "head"):
        raise OptionError(f"over={over!r}: checkpoints are compared by 'layer' or by 'head'.")
    loaders = _loaders(model, checkpoints, name)
    out = options.pop("out", None)
    parts, donors = [], {}
    for step, load in loaders.items():
        folder = None if out is None else expanded(out) / f"step{step}"
        checkpoint = load()
        donors[step] = donor_settings(checkpoint)["donor"]
        how: dict[str, Any] = {"site": site, "over": over, "layers": layers, **options}
        parts.append(_at_step(model, checkpoint, sequences, folder, **how))
    steps = xr.DataArray(list(loaders), dims="step", name="step")
    data = xr.concat([part.drop_attrs(deep=False) for part in parts], dim=steps, join="exact")
    own = data["into_model_baseline"]
    data["into_model_baseline"] = own.isel(step=-1, drop=True)
    hits = data["exact_match"].transpose("sequence", "step").values == 1
    events = training_events(hits, steps.values)
    data = data.transpose("sequence", "step", ...).assign(
        {n: ("sequence", events[n].to_numpy(float)) for n in events}
    )
    settings = {"site": site, "over": over, "checkpoints": donors, "sequences": dict(sequences.attrs)}
    about = {**describe(model), "seed": 0}
    return kept(Result.create(data, kind="memory_over_training", settings=settings, **about), out)


def _loaders(
    model: Any, checkpoints: Sequence[int] | Mapping[int, Checkpoint] | None, name: str | Path | None
) -> dict[int, Callable[[], Any]]:
    """Return a function that loads each checkpoint, by step in order."""
    name = str(describe(model)["model"]) if name is None else name
    if checkpoints is None:
        checkpoints = checkpoint_steps(name)
    if not checkpoints:
        raise EmptySetError(
            f"there are no checkpoints of {str(name)!r}: give models by step in checkpoints=, or train a zoo "
            "model, which keeps some (`memlens zoo train pythia-xs`)."
        )
    steps = list(checkpoints) if isinstance(checkpoints, Iterable) else [checkpoints]
    if not isinstance(checkpoints, Iterable) or not all(isinstance(s, Integral) for s in steps):
        raise OptionError(f"checkpoints={steps}: give training steps, or models by training step.")
    if isinstance(checkpoints, Mapping):
        return {step: _loader(checkpoints[step]) for step in sorted(checkpoints)}
    backend = "bridge" if hasattr(model, "original_model") else "hooked"
    place = {"dtype": model.cfg.dtype, "device": next(model.parameters()).device, "backend": backend}

    def of_step(step: int) -> Callable[[], Any]:
        return lambda: load_model(name, checkpoint_step=step, **place)

    return {step: of_step(step) for step in sorted(set(checkpoints))}


def _loader(checkpoint: Checkpoint) -> Callable[[], Any]:
    if not isinstance(checkpoint, nn.Module) and not callable(checkpoint):
        raise OptionError(f"checkpoints holds {checkpoint!r}: give a model, or a function that loads it.")
    return (lambda: checkpoint) if isinstance(checkpoint, nn.Module) else checkpoint


def _at_step(
    model: Any, checkpoint: Any, seqs: SequenceSet, folder: Path | None, **options: Any
) -> xr.Dataset:
    """Exchange components between a model and one checkpoint, in both directions."""

    def patched(target: Any, donor: Any, direction: str) -> Result:
        out = None if folder is None else folder / direction
        return patch_activations(
            target, seqs, donor=donor, direction=direction, out=out, metrics=_METRICS, **options
        )

    found = {"model": patched(model, checkpoint, "noising")}
    found["checkpoint"] = patched(checkpoint, model, "denoising")
    data: dict[str, xr.DataArray] = {
        name: found["model"][f"{name}_corrupt"].assign_attrs(found["model"][name].attrs) for name in _METRICS
    }
    for into, result in found.items():
        data[f"into_{into}"] = result["target_logprob"].assign_attrs(
            label=f"target log-prob, patched into the {into}", long_name=""
        )
        data[f"into_{into}_baseline"] = result["target_logprob_baseline"]
    return xr.Dataset(data)


register_kind("memory_over_training", plot=plot_training, reading=read_training)
