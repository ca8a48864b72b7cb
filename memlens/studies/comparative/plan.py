"""What the study would cost on models that are not here: forwards, memory and hours, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from memlens.errors import ModelNotFoundError, OptionError, near_matches
from memlens.forward.hooks import hook_name
from memlens.models.families import find_model
from memlens.models.provenance import describe
from memlens.sequences.set import SequenceSet
from memlens.studies.comparative.config import StudyModel
from memlens.studies.comparative.measure import loaded
from memlens.studies.comparative.options import ComparativeOptions
from memlens.sweeps.interventions import Intervention
from memlens.sweeps.plan import ModelShape, Plan, plan_shape


@dataclass(frozen=True)
class HubModel:
    """One model of the paper's list.

    Attributes:
        name: Hub name, as in the family table.
        n_layers: Blocks.
        d_model: Width.
        n_heads: Query heads of a block.
        n_kv_heads: Key and value heads.
        d_mlp: Width of the MLP.
        d_vocab: Rows of the embedding.
        gated: Whether the MLP has a gate (three matrices).
        parallel: Whether attention and MLP read the same input.
        tied: Whether embedding and unembedding share weights.
        revision: What is loaded.
        note: What of the paper's own choice is not known.
    """

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    d_vocab: int
    gated: bool
    parallel: bool = False
    tied: bool = False
    revision: str = "main"
    note: str = ""

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_heads

    @property
    def n_params(self) -> int:
        """Weights of all matrices; biases, norms and position embeddings are left out."""
        attention = 2 * self.d_model * self.d_model + 2 * self.d_model * self.n_kv_heads * self.d_head
        mlp = (3 if self.gated else 2) * self.d_model * self.d_mlp
        return self.n_layers * (attention + mlp) + (2 - self.tied) * self.d_model * self.d_vocab


_PYTHIA = "sizes as in the authors' earlier code; deduplicated or not, and the step, is not known"
_DOLMA = "which Dolma 1.x is not known: OLMo-{size}-0724-hf is of a later version"
_STAGE = "main is the end of all training stages; which was taken, and what was sampled, is not known"
_PLAIN = "the size is known; repository and revision are the obvious ones"


def _pythia(size: str, layers: int, width: int, heads: int, vocab: int) -> HubModel:
    return HubModel(
        f"EleutherAI/pythia-{size}", layers, width, heads, heads, 4 * width, vocab, gated=False,
        parallel=True, revision="step143000", note=_PYTHIA,
    )  # fmt: skip


def _gated(
    name: str, layers: int, width: int, heads: int, kv: int, mlp: int, vocab: int, note: str, *,
    tied: bool = False,
) -> HubModel:  # fmt: skip
    return HubModel(name, layers, width, heads, kv, mlp, vocab, gated=True, tied=tied, note=note)


def _starcoder(size: str, layers: int, width: int, heads: int) -> HubModel:
    return HubModel(
        f"bigcode/starcoderbase-{size}", layers, width, heads, 1, 4 * width, 49152, gated=False, tied=True,
        note=_PLAIN,
    )  # fmt: skip


HUB_MODELS: tuple[HubModel, ...] = (
    _pythia("160m", 12, 768, 12, 50304),
    _pythia("410m", 24, 1024, 16, 50304),
    _pythia("1b", 16, 2048, 8, 50304),
    _pythia("2.8b", 32, 2560, 32, 50304),
    _pythia("6.9b", 32, 4096, 32, 50432),
    _pythia("12b", 36, 5120, 40, 50688),
    _gated("allenai/OLMo-1B-hf", 16, 2048, 16, 16, 8192, 50304, _DOLMA.format(size="1B"), tied=True),
    _gated("allenai/OLMo-7B-hf", 32, 4096, 32, 32, 11008, 50304, _DOLMA.format(size="7B")),
    _gated("allenai/OLMo-2-0425-1B", 16, 2048, 16, 16, 8192, 100352, _STAGE),
    _gated("allenai/OLMo-2-1124-7B", 32, 4096, 32, 32, 11008, 100352, _STAGE),
    _gated("allenai/OLMo-2-1124-13B", 40, 5120, 40, 40, 13824, 100352, _STAGE),
    _gated("allenai/OLMo-2-0325-32B", 64, 5120, 40, 8, 27648, 100352, _STAGE),
    _gated("allenai/Olmo-3-1025-7B", 32, 4096, 32, 32, 11008, 100278, _STAGE),
    _gated("allenai/Olmo-3-1125-32B", 64, 5120, 40, 8, 27648, 100278, _STAGE),
    _gated("openlm-research/open_llama_3b", 26, 3200, 32, 32, 8640, 32000, _PLAIN),
    _gated("openlm-research/open_llama_7b", 32, 4096, 32, 32, 11008, 32000, _PLAIN),
    _gated("openlm-research/open_llama_13b", 40, 5120, 40, 40, 13824, 32000, _PLAIN),
    _starcoder("1b", 24, 2048, 16),
    _starcoder("3b", 36, 2816, 22),
    _starcoder("7b", 42, 4096, 32),
)
"""The twenty models, in the order of families and sizes."""


def shape_of(name: str) -> HubModel:
    """Return the shape of a model of the list, with or without the organization.

    Raises:
        ModelNotFoundError: It is not in the list.

    >>> shape_of("starcoderbase-7b").n_layers * shape_of("starcoderbase-7b").n_heads
    1344
    """
    for model in HUB_MODELS:
        if name.lower() in (model.name.lower(), model.name.rpartition("/")[2].lower()):
            return model
    known = [model.name for model in HUB_MODELS]
    raise ModelNotFoundError(
        f"the paper's list has no model {name!r}: give one of {', '.join(known)}.{near_matches(name, known)}"
    )


def hub_table() -> pd.DataFrame:
    """Return one row a model: `family`, `model`, `size`, `revision`, `corpus`, `heads` (all), `note`.

    >>> hub_table()["family"].value_counts().to_dict()["pythia"]
    6
    """
    rows = []
    for model in HUB_MODELS:
        found = find_model(model.name)
        assert found is not None  # the tests hold the list against the family table
        family, entry = found
        rows.append(
            {
                "family": family.name,
                "model": model.name,
                "size": entry.size,
                "revision": model.revision,
                "corpus": entry.corpus or family.corpus,
                "heads": model.n_layers * model.n_heads,
                "note": model.note,
            }
        )
    return pd.DataFrame(rows)


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
