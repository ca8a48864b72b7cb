"""Every instrument, on every family and backend: the fast engine equals the plain one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import memlens as ml
from tests.small import CASES, corrupted, ragged, spread

METRICS = ("target_logprob", "margin", "completion_entropy")
Run = Callable[..., ml.Result]


def ablation(mode: str, positions: str = "all") -> Run:
    return lambda model, seqs, **kw: ml.ablate_heads(
        model, seqs, mode=mode, positions=positions, layers=[0, 2], heads=[1, 3], **kw
    )


def bypass(mode: str, heads: list[int] | None = None) -> Run:
    return lambda model, seqs, **kw: ml.bypass_attention(model, seqs, mode=mode, heads=heads, **kw)


def patch(site: str, **options: Any) -> Run:
    return lambda model, seqs, **kw: ml.patch_activations(
        model, seqs, corrupted(seqs), site=site, layers=[0, 2], **options, **kw
    )


def mlps(mode: str, positions: str = "all") -> Run:
    return lambda model, seqs, **kw: ml.ablate_mlps(model, seqs, mode=mode, positions=positions, **kw)


def knock_out(**options: Any) -> Run:
    return lambda model, seqs, **kw: ml.knock_out_neurons(model, seqs, top_k=[2, 9], **options, **kw)


def noise(**options: Any) -> Run:
    return lambda model, seqs, **kw: ml.perturb_residual(model, seqs, alphas=[0, 0.4], **options, **kw)


def paths(receiver_input: str, receivers: list[Any] | None = None, mlps: str = "recomputed") -> Run:
    return lambda model, seqs, **kw: ml.patch_paths(
        model, seqs, corrupted(seqs), senders=[(0, 1), (0, 3)], receivers=receivers,
        receiver_input=receiver_input, mlps=mlps, **kw
    )  # fmt: skip


EVERYWHERE: dict[str, Run] = {
    "ablate mean_of_other_heads": ablation("mean_of_other_heads"),
    "bypass identity": bypass("identity"),
    "bypass one head": bypass("identity", [1]),
    "bypass zero": bypass("zero"),
    "bypass uniform": bypass("uniform"),
    **{f"patch {site}": patch(site) for site in ("resid_pre", "resid_mid", "attn_out", "mlp_out", "z")},
    "knock out neurons": knock_out(windows=[1, 2]),
    "noise and similarities": noise(layer=1, scale="std", positions="all"),
    "paths to the logits": paths("logits"),
    "paths into queries": paths("q", [(n, h) for n in (1, 2) for h in range(4)]),
    "paths into keys": paths("k", [(1, 0), (2, 0)], "frozen"),
    "paths into values": paths("v", [(2, 0)]),
    "paths into MLPs": paths("mlp", [1, 2]),
}
"""One for every place of a block that instruments read or write, on all families and backends."""

IN_TURN: dict[str, Run] = {
    **{f"ablate {mode}": ablation(mode) for mode in ("zero", "mean", "resample")},
    "ablate at targets": ablation("zero", "targets"),
    "bypass to the first token": bypass("first_token"),
    "patch resid_post": patch("resid_post"),
    "patch noising": patch("resid_pre", direction="noising"),
    **{f"ablate MLPs {mode}": mlps(mode) for mode in ("zero", "mean", "resample")},
    "ablate MLPs at the last prompt position": mlps("zero", "last_prompt"),
    "knock out all but some neurons": knock_out(windows=1, keep=True, positions="targets"),
    "knock out controls to their means": knock_out(windows=1, selection="norm_matched", mode="mean"),
    "noise": noise(recovery=False),
    "noise on the embeddings": noise(site="resid_pre", recovery=False),
    "paths to the logits, MLPs frozen": paths("logits", mlps="frozen"),
    "patch z by head": patch("z", over="head"),
    "patch z by head and position": patch("z", over="head_position", positions=[3, 7]),
}
"""Other values written in those places: each on five or six of the families and backends."""

INSTRUMENTS = EVERYWHERE | IN_TURN


@pytest.mark.parametrize(
    ("family", "backend", "instrument"),
    [*((*case, name) for name in EVERYWHERE for case in CASES), *spread(list(IN_TURN), 5)],
)
def test_fast_equals_reference(tiny_model: Any, family: str, backend: str, instrument: str) -> None:
    if family == "gpt_neox" and instrument == "patch resid_mid":
        pytest.skip("parallel blocks have no resid_mid")
    model, seqs, run = tiny_model(family, backend), ragged(), INSTRUMENTS[instrument]
    options: dict[str, Any] = {"metrics": METRICS, "progress": False}
    fast = run(model, seqs, **options)
    plain = run(model, seqs, engine="reference", **options)
    for metric in METRICS:
        assert np.allclose(fast[metric], plain[metric], atol=1e-5, equal_nan=True)
        assert np.allclose(fast.baseline(metric), plain.baseline(metric), atol=1e-5)
    assert float(abs(plain.effect("target_logprob")).max()) > 1e-4
