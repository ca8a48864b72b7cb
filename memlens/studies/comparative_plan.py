"""What the study would cost on models that are not here: forwards, memory and hours, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from memlens.errors import ModelNotFoundError, OptionError
from memlens.models.families import find_model
from memlens.models.hooks import hook_name
from memlens.models.provenance import describe
from memlens.sequences import SequenceSet
from memlens.studies.comparative_config import StudyModel
from memlens.studies.comparative_hub import HUB_MODELS, HubModel, shape_of
from memlens.studies.comparative_loading import loaded
from memlens.studies.comparative_options import ComparativeOptions
from memlens.sweeps import Intervention
from memlens.sweeps.planner import Plan, plan_shape
from memlens.sweeps.shapes import ModelShape

__all__ = ["PlanSizes", "blank_sequences", "counted_edit", "plan_comparative", "plan_parts"]

_SAMPLE = 64
"""Sequences that are counted; costs go with their number."""


@dataclass(frozen=True)
class PlanSizes:
    """How much is to be measured; the defaults are the paper's sizes where they are known.

    Attributes:
        per_domain: Sequences of each domain.
        domains: Domains; the paper's number is not known.
        heads_per_domain: Sequences of each domain for heads (whether the paper's 10,000 are of each domain is
            not known).
        heads_if_large: The same for models of more than `large` parameters.
        large: See above; which models the paper calls large is not known.
        memorized: Share of sequences that are expected to be memorized, and so compressed, decoded and
            followed under noise.
        prefix_len: Tokens given.
        n_targets: Tokens of the continuation.
    """

    per_domain: int = 300_000
    domains: int = 5
    heads_per_domain: int = 10_000
    heads_if_large: int = 2_500
    large: float = 1e10
    memorized: float = 0.01
    prefix_len: int = 32
    n_targets: int = 32

    def __post_init__(self) -> None:
        for name in (
            "per_domain",
            "domains",
            "heads_per_domain",
            "heads_if_large",
            "prefix_len",
            "n_targets",
        ):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)} leaves nothing to plan: give 1 or more.")
        if not 0 <= self.memorized <= 1:
            raise OptionError(f"memorized={self.memorized} is no share: give a number from 0 to 1.")


def plan_comparative(
    models: Sequence[StudyModel] = (),
    *,
    sizes: PlanSizes | None = None,
    options: ComparativeOptions | None = None,
    device_tflops: float = 100.0,
) -> pd.DataFrame:
    """Plan the study for the paper's list of models, or for other models.

    Models of the list are planned from their shape alone; others are loaded for it.

    Args:
        models: Which; the twenty of the paper by default.
        sizes: How much is measured.
        options: Strengths and draws of the noise.
        device_tflops: What the device does in a second, in 10^12 operations, as it is reached in practice.

    Returns:
        One row a model: `family`, `model`, `revision`, `corpus`, `sequences`, `head_sequences` (in all
        domains), `heads` (of all blocks), `forwards` and `head_forwards` (whole forwards of a sequence, or
        their worth in blocks), `pflop`, `weights_gib` (16 bits), `activations_gib` (at most at a time, of
        16 GiB allowed), `hours`, `head_hours` (of these), `note`.

    Raises:
        OptionError: A speed that is not above 0.

    Example:
        >>> table = plan_comparative([StudyModel("EleutherAI/pythia-160m")], device_tflops=100)
        >>> table.loc[0, "heads"], bool(table.loc[0, "head_hours"] < table.loc[0, "hours"])
        (np.int64(144), True)
    """
    if not device_tflops > 0:
        raise OptionError(f"device_tflops={device_tflops}: give the device's speed, a number above 0.")
    chosen, sizes = [*models] or [StudyModel(m.name) for m in HUB_MODELS], sizes or PlanSizes()
    options = options or ComparativeOptions()
    return pd.DataFrame([_row(entry, sizes, options, device_tflops) for entry in chosen])


def _row(
    entry: StudyModel, sizes: PlanSizes, options: ComparativeOptions, device_tflops: float
) -> dict[str, object]:
    facts, shape, n_params = _facts(entry)
    parts = plan_parts(shape, n_params, sizes, options)
    flops = {name: float(part["flop"]) for name, part in parts.items()}
    hours = {name: value / (device_tflops * 1e12) / 3600 for name, value in flops.items()}
    forwards = {name: float(part["forwards"]) for name, part in parts.items()}
    return {
        **facts,
        "sequences": sizes.per_domain * sizes.domains,
        "head_sequences": sizes.domains * _head_sequences(n_params, sizes),
        "heads": shape.n_layers * shape.n_heads,
        "forwards": round(sum(forwards.values())),
        "head_forwards": round(forwards["heads"]),
        "pflop": sum(flops.values()) / 1e15,
        "weights_gib": 2 * n_params / 2**30,
        "activations_gib": max(float(part["bytes"]) for part in parts.values()) / 2**30,
        "hours": sum(hours.values()),
        "head_hours": hours["heads"],
        "note": facts["note"],
    }


def _facts(entry: StudyModel) -> tuple[dict[str, str], ModelShape, int]:
    """Return what names a model, its shape and its parameters."""
    try:
        hub: HubModel | None = shape_of(entry.name)
    except ModelNotFoundError:
        hub = None
    if hub is not None:
        found = find_model(hub.name)
        family = entry.family or (found[0].name if found is not None else "")
        shape = ModelShape(
            hub.n_layers, hub.d_model, hub.n_heads, hub.n_kv_heads, hub.d_head, hub.d_mlp, hub.d_vocab,
            hub.gated, hub.parallel,
        )  # fmt: skip
        revision, note, n_params = entry.revision or hub.revision, hub.note, hub.n_params
        name, corpus = hub.name, StudyModel(hub.name, corpus=entry.corpus).corpus_of
    else:
        model = loaded(entry)
        described = describe(model)
        family, shape, n_params = entry.family_of(described), ModelShape.of(model), int(described["n_params"])
        revision, note = str(described["revision"]), "not of the paper's list: planned from the loaded model"
        name, corpus = entry.label, entry.corpus_of
    facts = {"family": family, "model": name, "revision": revision, "corpus": corpus, "note": note}
    return facts, shape, n_params


def _head_sequences(n_params: int, sizes: PlanSizes) -> int:
    return sizes.heads_if_large if n_params > sizes.large else sizes.heads_per_domain


def plan_parts(
    shape: ModelShape, n_params: int, sizes: PlanSizes, options: ComparativeOptions
) -> dict[str, dict[str, float]]:
    """Return for each part its `forwards` (of whole sequences, or their worth), `flop` and `bytes`.

    Greedy decoding is counted for every sequence from the first target on, which is the most it can be.
    """
    seqs = blank_sequences(_SAMPLE, sizes.prefix_len + sizes.n_targets, sizes.prefix_len)
    n = sizes.per_domain * sizes.domains
    memorized = round(n * sizes.memorized)
    noisy = len(options.alphas) * options.noise_draws
    noise = [counted_edit("resid_post", [options.noise_layer], i) for i in range(noisy)]
    heads = [
        counted_edit("z", [layer], head) for layer in range(shape.n_layers) for head in range(shape.n_heads)
    ]
    base, noised, ablated = (plan_shape(shape, seqs, edits) for edits in ([], noise, heads))
    parts = {
        "recall": _scaled(base, shape, n),
        "noise": _scaled(noised, shape, n),
        "recovery": _scaled(noised, shape, 2 * memorized),
        "heads": _scaled(ablated, shape, sizes.domains * _head_sequences(n_params, sizes)),
    }
    one = parts["recall"]["flop"] / n
    length = sizes.prefix_len + sizes.n_targets
    unembed = 2.0 * shape.d_model * shape.d_vocab * sizes.n_targets
    parts["greedy"] = {
        "forwards": n * sizes.n_targets / length, "flop": n * one * sizes.n_targets / length + n * unembed,
        "bytes": 0.0,
    }  # fmt: skip
    prompts = memorized * (sizes.prefix_len - 1)
    parts["compression"] = {"forwards": float(prompts), "flop": prompts * one * 0.75, "bytes": 0.0}
    lens = one + shape.n_layers * unembed
    parts["decoding"] = {"forwards": 2.0 * memorized, "flop": 2 * memorized * lens, "bytes": 0.0}
    return parts


def _scaled(plan: Plan, shape: ModelShape, n: int) -> dict[str, float]:
    """Return a plan for the sample as one for `n` sequences."""
    times = n / plan.n_sequences
    flop = (plan.block_flops + plan.unembed_flops) * times
    return {
        "forwards": plan.block_forwards * times / shape.n_layers,
        "flop": flop,
        "bytes": float(plan.bytes),
    }


def counted_edit(site: str, layers: Sequence[int], number: int = 0) -> Intervention:
    """Return an edit of some layers that is counted and never run."""
    hooks = [(hook_name(site, layer), _nothing) for layer in layers]
    return Intervention(f"{site} L{layers[0]}-{layers[-1]} {number}", hooks)


def _nothing(x: torch.Tensor, hook: object) -> torch.Tensor:
    return x


def blank_sequences(n: int, length: int, prefix_len: int) -> SequenceSet:
    """Return sequences of which only the lengths count."""
    return SequenceSet.from_tokens(np.zeros((n, length), dtype=np.int64), prefix_len)
