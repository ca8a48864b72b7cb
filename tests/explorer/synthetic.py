"""Explorations made of nothing: any size, any text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from memlens.explorer.data import Continuation, Edits, Exploration, SequenceView
from memlens.instruments.ablate.heads import Head

SETTINGS = {
    "model": "a <b>model</b>", "metric": "target_logprob", "ablation": "zero", "bypass": "identity",
    "lens": "logit", "top_heads": 1,
}  # fmt: skip


def continuation(edits: Edits, targets: Sequence[str], rng: np.random.Generator, wrong: str) -> Continuation:
    correct = rng.random(len(targets)) < 0.5
    written = [target if right else wrong for target, right in zip(targets, correct, strict=True)]
    return Continuation(
        edits, rng.random(len(targets)), rng.integers(0, 90, len(targets)),
        written, correct, written, correct, "".join(written),
    )  # fmt: skip


def view(
    name: str,
    tokens: Sequence[str],
    prefix_len: int,
    *,
    n_layers: int = 3,
    n_heads: int = 4,
    kept: Sequence[Head] | None = None,
    edits: Sequence[Edits] = (Edits((0,)), Edits((1,)), Edits(ablated=((1, 2),))),
    wrong: str = " wrong",
    seed: int = 0,
) -> SequenceView:
    rng = np.random.default_rng(seed)
    n, targets = len(tokens), tokens[prefix_len:]
    heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)] if kept is None else kept
    weights = {head: np.tril(rng.integers(0, 256, (n, n))).astype(np.uint8) for head in heads}
    return SequenceView(
        name, {"domain": "text"}, tokens, prefix_len, "".join(tokens[:prefix_len]), "".join(targets),
        continuation(Edits(), targets, rng, wrong),
        rng.random((n_layers, len(targets))), rng.integers(0, 70_000, (n_layers, len(targets))),
        rng.normal(size=(n_layers, n_heads)), rng.normal(size=n_layers), rng.normal(size=n_layers),
        weights, [continuation(edit, targets, rng, wrong) for edit in edits],
    )  # fmt: skip


def exploration(views: Sequence[SequenceView]) -> Exploration:
    return Exploration(views, SETTINGS)
