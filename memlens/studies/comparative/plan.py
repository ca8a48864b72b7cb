"""What the study would cost on models that are not loaded: forwards, memory and hours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import pandas as pd
import torch
from pydantic import Field, PositiveInt

from memlens.errors import OptionError
from memlens.forward.generate import MOST_DECODED, cache_bytes
from memlens.forward.hooks import hook_name
from memlens.forward.memory import fitting
from memlens.models.families import Shape, find_model
from memlens.models.provenance import describe
from memlens.options import options_class
from memlens.studies.comparative.config import StudyModel
from memlens.studies.comparative.findings import TEXTS
from memlens.studies.comparative.options import ComparativeOptions
from memlens.studies.plans import blank_sequences
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.operators import Operators
from memlens.sweeps.plan import Plan, budget_on, device_for_shape, plan_shape, shape_of
from memlens.sweeps.roofline import Device, Roofline

PAPER_MODELS: tuple[str, ...] = tuple(TEXTS["paper"]["models"])
"""The paper's twenty models, in the order of families and sizes; their shapes are in the family table."""

_SAMPLE = 64
"""Sequences that are counted; costs are proportional to their number."""


@options_class
class PlanSizes:
    """How much is to be measured; the defaults are the paper's sizes where they are known."""

    per_domain: PositiveInt = 300_000
    """Sequences per domain."""
    domains: PositiveInt = 5
    """Domains; the paper's number is not known."""
    heads_per_domain: PositiveInt = 10_000
    """Sequences per domain for heads (whether the paper's 10,000 are per domain is not known)."""
    heads_if_large: PositiveInt = 2_500
    """The same for models with more than `large` parameters."""
    large: float = 1e10
    """See above; which models the paper calls large is not known."""
    memorized: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Expected share of memorized sequences, which are compressed, decoded and followed under noise."""
    prefix_len: PositiveInt = 32
    """Prompt tokens."""
    n_targets: PositiveInt = 32
    """Continuation tokens."""

    def of_heads(self, n_params: int) -> int:
        """Return the number of sequences for heads, in all domains, of a model of this size."""
        return self.domains * (self.heads_if_large if n_params > self.large else self.heads_per_domain)


def plan_comparative(
    models: Sequence[StudyModel] = (),
    *,
    sizes: PlanSizes | None = None,
    options: ComparativeOptions | None = None,
    device_tflops: float = 100.0,
    on: Device | str | None = None,
) -> pd.DataFrame:
    """Plan the study for the paper's list of models, or for other models.

    Models whose shape is in the family table are planned from it; others are loaded.

    Args:
        models: Which; the twenty of the paper by default.
        sizes: How much is measured.
        options: Strengths and draws of the noise.
        device_tflops: The device's speed as reached in practice, in 10^12 operations per second.
        on: Plan for a device by the roofline instead, as for `memlens.plan`: hours are the least possible.

    Returns:
        One row per model: `family`, `model`, `revision`, `corpus`, `sequences`, `head_sequences` (in all
        domains), `heads` (of all layers), `forwards` and `head_forwards` (whole forwards of a sequence, or
        their equivalent in layers), `pflop`, `weights_gib` (of 16 bits where the model is not
        loaded), `activations_gib` (the largest at a time, of 16 GiB allowed, or with `on` of 40 % of what the
        weights leave free), `hours`, `head_hours` (of these), `note`; with `on` also `fits`: whether weights
        and activations fit its memory.

    Raises:
        OptionError: A speed that is not above 0, or an unknown device.

    Example:
        >>> table = plan_comparative([StudyModel("EleutherAI/pythia-160m")], device_tflops=100)
        >>> table.loc[0, "heads"], bool(table.loc[0, "head_hours"] < table.loc[0, "hours"])
        (np.int64(144), True)
    """
    if not device_tflops > 0:
        raise OptionError(f"device_tflops={device_tflops}: give the device's speed, a number above 0.")
    sizes, options, rows = sizes or PlanSizes(), options or ComparativeOptions(), []
    devices: dict[int, Device | None] = {}
    for entry in [*models] or [StudyModel(name) for name in PAPER_MODELS]:
        facts, shape, n_params = _facts(entry)
        if shape.itemsize not in devices:
            devices[shape.itemsize] = None if on is None else device_for_shape(on, shape)
        there = devices[shape.itemsize]
        counted = plan_parts(shape, n_params, sizes, options, there)
        parts = pd.DataFrame(counted).T
        seconds = parts["flop"] / (device_tflops * 1e12) if there is None else parts["seconds"]
        hours, note = seconds / 3600, facts.pop("note")
        weights, activations = shape.itemsize * n_params, max(part["bytes"] for part in counted.values())
        rows.append(
            {
                **facts,
                "sequences": sizes.per_domain * sizes.domains,
                "head_sequences": sizes.of_heads(n_params),
                "heads": shape.n_layers * shape.n_heads,
                "forwards": round(parts["forwards"].sum()),
                "head_forwards": round(parts.loc["heads", "forwards"]),
                "pflop": parts["flop"].sum() / 1e15,
                "weights_gib": weights / 2**30,
                "activations_gib": activations / 2**30,
                "hours": hours.sum(),
                "head_hours": hours["heads"],
                **({} if there is None else {"fits": there.holds(weights + activations)}),
                "note": note,
            }
        )
    return pd.DataFrame(rows)


def _facts(entry: StudyModel) -> tuple[dict[str, str], Shape, int]:
    """Return what identifies a model, its shape and its number of parameters."""
    found = find_model(entry.name)
    if found is not None and found[1].shape is not None:
        family, listed = found
        size, revision, note = found[1].shape, entry.revision or "main", "not in the paper's list"
        if listed.name in PAPER_MODELS:
            note = TEXTS["paper"]["notes"][family.name].format(size=listed.size)
            revision = entry.revision or TEXTS["paper"]["revisions"].get(family.name, "main")
        facts = {"family": entry.family or family.name, "model": listed.name, "revision": revision}
        return {**facts, "corpus": entry.corpus_of, "note": note}, size, found[1].shape.n_params
    model = entry.load()
    described = describe(model)
    facts = {
        "family": entry.family_of(described), "model": entry.label, "revision": str(described["revision"]),
        "corpus": entry.corpus_of, "note": "not in the paper's list: planned from the loaded model",
    }  # fmt: skip
    return facts, shape_of(model), int(described["n_params"])


def plan_parts(
    shape: Shape,
    n_params: int,
    sizes: PlanSizes,
    options: ComparativeOptions,
    on: Device | None = None,
) -> dict[str, dict[str, float]]:
    """Return for each part its `forwards` (of whole sequences, or their equivalent), `flop` and `bytes`.

    With a device also `seconds`, the least time there by the roofline. Greedy decoding is counted for every
    sequence from the first target on, which is an upper bound.
    """
    length = sizes.prefix_len + sizes.n_targets
    seqs = blank_sequences(_SAMPLE, length, sizes.prefix_len)
    half = max(1, sizes.prefix_len // 2)
    shortened = blank_sequences(_SAMPLE, half + sizes.n_targets, half)
    n = sizes.per_domain * sizes.domains
    memorized = round(n * sizes.memorized)
    noisy = len(options.alphas) * options.noise_draws
    noise = [counted_edit("resid_post", [options.noise_layer], i) for i in range(noisy)]
    heads = [
        counted_edit("z", [layer], head) for layer in range(shape.n_layers) for head in range(shape.n_heads)
    ]
    work = partial(plan_shape, shape, on=on)
    base, noised, ablated, compressed = (
        work(seqs, []), work(seqs, noise), work(seqs, heads), work(shortened, [])
    )  # fmt: skip
    every_layer = Operators(shape)
    every_layer.unembed(_SAMPLE * sizes.n_targets, _SAMPLE)
    lens = _scaled(base, shape, 2 * memorized)
    for name, cost in _operators(every_layer, 2 * memorized * shape.n_layers / _SAMPLE, on).items():
        lens[name] += cost
    return {
        "recall": _scaled(base, shape, n),
        "greedy": _decoding(shape, sizes, n, on),
        "compression": _scaled(compressed, shape, memorized * (sizes.prefix_len - 1)),
        "noise": _scaled(noised, shape, n),
        "decoding": lens,
        "recovery": _scaled(noised, shape, 2 * memorized),
        "heads": _scaled(ablated, shape, sizes.of_heads(n_params)),
    }


def _scaled(plan: Plan, shape: Shape, n: int) -> dict[str, float]:
    """Return a plan for the sample as one for `n` sequences."""
    times = n / plan.n_sequences
    flop = (plan.block_flops + plan.unembed_flops) * times
    forwards = plan.block_forwards * times / shape.n_layers
    found = {"forwards": forwards, "flop": flop, "bytes": float(plan.bytes)}
    return found if plan.roofline is None else {**found, "seconds": plan.roofline.seconds * times}


def _decoding(shape: Shape, sizes: PlanSizes, n: int, on: Device | None) -> dict[str, float]:
    """Return the cost of decoding greedily: the prompts, and then token by token with a cache."""
    counted = Operators(shape)
    length = sizes.prefix_len + sizes.n_targets
    cache = cache_bytes(shape.n_layers, shape.n_kv_heads, shape.d_head, length, shape.itemsize)
    rows = fitting(cache, budget_on(on, shape.n_params * shape.itemsize), most=MOST_DECODED)
    for step in range(sizes.n_targets):
        new = 1 if step else sizes.prefix_len
        counted.layer(rows, rows * new, sizes.prefix_len + step, own=True, times=shape.n_layers)
        counted.unembed(rows, rows)
    return {"forwards": float(n), "bytes": float(rows * cache)} | _operators(counted, n / rows, on)


def _operators(counted: Operators, times: float, on: Device | None) -> dict[str, float]:
    """Return the operations of some operators, done so often, and their least time on a device."""
    found = {"flop": counted.flops * times}
    if on is None:
        return found
    line = Roofline.of(counted, on, weights=0, activations=0)
    return {**found, "seconds": line.seconds * times}


def counted_edit(site: str, layers: Sequence[int], number: int = 0) -> Intervention:
    """Return an intervention on some layers that is counted and never run."""
    hooks = [(hook_name(site, layer), _nothing) for layer in layers]
    return Intervention(f"{site} L{layers[0]}-{layers[-1]} {number}", hooks)


def _nothing(x: torch.Tensor, hook: object) -> torch.Tensor:
    return x
