"""The rows of the table: pieces of work that memlens and a peer do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import memlens as ml
from benchmarks import peers
from benchmarks.models import recalled
from memlens.sweeps.interventions import Intervention

Work = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: The work.
        peer_name: The peer.
        ours: Runs memlens; returns `[site, …]`.
        peer: Runs the peer on `share` of the sites.
        share: Share of the sites that the peer runs; its time is divided by it.
        difference: Largest difference of both results.
        sequences: The sequences.
        interventions: The interventions, for the count of operations.
    """

    name: str
    peer_name: str
    ours: Work
    peer: Work
    share: float
    difference: Callable[[Any, Any], float]
    sequences: ml.SequenceSet
    interventions: Callable[[], list[Intervention]]


def patching(model: Any, *, heads: bool) -> Row:
    """Rows 1 and 2: residual or head patching with a last-token metric, one pair of 32 tokens."""
    clean = recalled(model, 1, 32, 1)
    corrupt = ml.corrupt(clean, "shuffle_prefix", seed=0)
    site, over = ("z", "head") if heads else ("resid_pre", "position")
    function = "get_act_patch_attn_head_out_all_pos" if heads else "get_act_patch_resid_pre"
    options: dict[str, Any] = {"metrics": ("target_logprob",), "progress": False}

    def ours() -> np.ndarray:
        result = ml.patch_activations(model, clean, corrupt, site=site, over=over, **options)
        return result["target_logprob"].values[0]

    return Row(
        f"{'all heads' if heads else 'residual, layer x position,'} patched, 1 pair of 32 tokens",
        f"transformer_lens.patching.{function}",
        ours,
        lambda: peers.patch_with_transformer_lens(model, function, f"hook_{site}", clean, corrupt),
        1.0,
        lambda a, b: float(np.abs(a - b).max()),
        corrupt,
        lambda: ml.edits.activation_patches(model, clean, site=site, over=over),
    )


def heads_ablated(model: Any, n: int, *, generate: bool, peer_sites: int | None = None) -> Row:
    """Rows 3 to 5: every head ablated, exact match (and log-probability), `n` sequences of 32 + 32 tokens."""
    seqs = recalled(model, n, 32, 32)
    every = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    sites = every[:: max(1, len(every) // (peer_sites or len(every)))]
    metrics = ("exact_match",) if generate else ("target_logprob", "exact_match")

    def ours() -> ml.Result:
        return ml.ablate_heads(model, seqs, mode="zero", metrics=metrics, progress=False)

    def peer() -> Any:
        if generate:
            return peers.generated(model, seqs, [[peers.zero_head(*site)] for site in sites])
        return peers.heads_teacher_forced(model, seqs, sites)

    def difference(result: ml.Result, other: Any) -> float:
        mine = [result[m].values[:, [s[0] for s in sites], [s[1] for s in sites]].T for m in metrics]
        theirs = [other] if generate else list(other)
        return max(float(np.abs(a - b).max()) for a, b in zip(mine, theirs, strict=True))

    return Row(
        f"all heads ablated, {n} x (32 + 32) tokens",
        "one cached greedy generate per head" if generate else "one run_with_hooks per head",
        ours,
        peer,
        len(sites) / len(every),
        difference,
        seqs,
        lambda: ml.edits.head_ablations(model, seqs, mode="zero"),
    )


def layers_bypassed(model: Any, n: int, peer_sites: int | None = None) -> Row:
    """Row 6: each layer's attention bypassed, exact match, `n` sequences of 32 + 32 tokens."""
    seqs = recalled(model, n, 32, 32)
    layers = list(range(model.cfg.n_layers))
    some = layers[:: max(1, len(layers) // (peer_sites or len(layers)))]
    return Row(
        f"each layer bypassed, {n} x (32 + 32) tokens",
        "one cached greedy generate per layer",
        lambda: ml.bypass_attention(model, seqs, metrics=("exact_match",), progress=False),
        lambda: peers.generated(model, seqs, [peers.identity_attention(layer) for layer in some]),
        len(some) / len(layers),
        lambda result, other: float(np.abs(result["exact_match"].values[:, some].T - other).max()),
        seqs,
        lambda: ml.edits.attention_bypasses(model),
    )


def blocks_swept(model: Any, n: int) -> Row:
    """Row 7: each layer's attention bypassed with five metrics, against L/2 + 2 plain forward passes."""
    seqs = recalled(model, n, 32, 32)
    metrics = ("exact_match", "target_accuracy", "target_logprob", "completion_entropy", "matching_prefix")

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(seqs.tokens)

    def difference(result: ml.Result, logits: torch.Tensor) -> float:
        at = int(seqs.prefix_len[0])
        right = logits[:, at - 1 : -1].argmax(-1) == seqs.tokens[:, at:]
        return float(np.abs(result.baseline("target_accuracy").values - right.float().mean(1).numpy()).max())

    return Row(
        f"each layer bypassed, five metrics, {n} x (32 + 32) tokens",
        f"{model.cfg.n_layers / 2 + 2:g} plain forward passes of the same sequences",
        lambda: ml.bypass_attention(model, seqs, metrics=metrics, progress=False),
        forward,
        1 / (model.cfg.n_layers / 2 + 2),
        difference,
        seqs,
        lambda: ml.edits.attention_bypasses(model),
    )


ROWS: dict[str, Callable[[Any], Row]] = {
    "patch_residual": lambda model: patching(model, heads=False),
    "patch_heads": lambda model: patching(model, heads=True),
    "ablate_8_forward": lambda model: heads_ablated(model, 8, generate=False, peer_sites=16),
    "ablate_8_generate": lambda model: heads_ablated(model, 8, generate=True, peer_sites=4),
    "ablate_1_generate": lambda model: heads_ablated(model, 1, generate=True, peer_sites=6),
    "bypass_64_generate": lambda model: layers_bypassed(model, 64, peer_sites=2),
    "bypass_64_five_metrics": lambda model: blocks_swept(model, 64),
}
"""The rows of the table by name."""
