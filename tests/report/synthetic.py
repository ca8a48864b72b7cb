"""Results of every kind, made up but shaped like real ones."""

from __future__ import annotations

import numpy as np
import xarray as xr

from memlens.results.result import Result

N, LAYERS, HEADS, TARGETS, POSITIONS = 48, 8, 6, 12, 20
FACTS = {"model": "zoo/pythia-s", "backend": "HookedTransformer", "dtype": "float32", "seed": 0}
TOKENS = [" the", " quick", "\n", " brown", "<b>", " fox", " jumps", " the", "\t", " שלום", "🦊", "$x$"]


def _coords(rng: np.random.Generator, **extra: object) -> dict[str, object]:
    return {
        "sequence": [f"seq-{i:03d}" for i in range(N)],
        "domain": ("sequence", rng.choice(["code", "dialogue", "table"], N).astype(object)),
        "copies": ("sequence", rng.choice([0, 1, 4, 16, 64, 256], N)),
        **extra,
    }


def residual_decoding() -> Result:
    rng = np.random.default_rng(1)
    depth = np.linspace(-6, 4, LAYERS)[None, :, None] + rng.normal(0, 1, (N, 1, TARGETS))
    probability = 1 / (1 + np.exp(-depth + rng.normal(0, 0.5, (N, LAYERS, TARGETS))))
    dims = ("sequence", "layer", "target")
    data = xr.Dataset(
        {
            "probability": (dims, probability),
            "rank": (dims, np.floor((1 / probability - 1) ** 0.8)),
            "entropy": (dims, 5 * (1 - probability)),
            "kl_to_final": (dims, 4 * (1 - probability)),
            "first_promotion": (("sequence", "target"), rng.integers(0, LAYERS, (N, TARGETS))),
            "token": (("sequence", "target"), np.array([TOKENS] * N, dtype=object)),
        },
        _coords(rng, layer=np.arange(LAYERS)),
    )
    return Result.create(data, kind="residual_decoding", settings={"lens": "logit"}, **FACTS)


def _ablated(rng: np.random.Generator, extra: tuple[int, ...], scale: float) -> dict[str, np.ndarray]:
    base = -np.abs(rng.normal(0, 0.3, N))
    site = scale * rng.exponential(1.0, extra) ** 2
    harm = site * (1 + 0.4 * rng.normal(0, 1, (N, *extra)))
    logprob = base.reshape(-1, *[1] * len(extra)) - harm
    return {"base": base, "logprob": logprob, "exact": (logprob > -1.2).astype(float)}


def head_ablation(layers: int = LAYERS, heads: int = HEADS) -> Result:
    rng = np.random.default_rng(2)
    made = _ablated(rng, (layers, heads), 0.3)
    dims = ("sequence", "layer", "head")
    data = xr.Dataset(
        {
            "target_logprob": (dims, made["logprob"]),
            "target_logprob_baseline": ("sequence", made["base"]),
            "target_rank": (dims, np.floor(-3 * made["logprob"])),
            "target_rank_baseline": ("sequence", np.zeros(N)),
            "exact_match": (dims, made["exact"]),
            "exact_match_baseline": ("sequence", np.ones(N)),
        },
        _coords(rng, layer=np.arange(layers), head=np.arange(heads)),
    )
    return Result.create(data, kind="head_ablation", settings={"mode": "zero"}, **FACTS)


def attention_bypass() -> Result:
    rng = np.random.default_rng(3)
    made = _ablated(rng, (LAYERS,), 0.8)
    data = xr.Dataset(
        {
            "target_logprob": (("sequence", "layer"), made["logprob"]),
            "target_logprob_baseline": ("sequence", made["base"]),
            "exact_match": (("sequence", "layer"), made["exact"]),
            "exact_match_baseline": ("sequence", np.ones(N)),
        },
        _coords(rng, layer=np.arange(LAYERS)),
    )
    return Result.create(data, kind="attention_bypass", settings={"mode": "identity"}, **FACTS)


def activation_patching() -> Result:
    rng = np.random.default_rng(4)
    layer, place = np.mgrid[0:LAYERS, 0:POSITIONS]
    bump = np.exp(-((layer - 2) ** 2 + (place - 4) ** 2) / 8) + np.exp(-((layer - 6) ** 2) / 4) * (place == 9)
    effect = bump + rng.normal(0, 0.15, (N, LAYERS, POSITIONS))
    dims = ("sequence", "layer", "position")
    corrupt, clean = -5 + rng.normal(0, 0.5, N), -0.2 * rng.random(N)
    tokens = np.array([(TOKENS * 2)[:POSITIONS]] * N, dtype=object)
    data = xr.Dataset(
        {
            "target_logprob": (dims, corrupt[:, None, None] + effect * (clean - corrupt)[:, None, None]),
            "target_logprob_clean": ("sequence", clean),
            "target_logprob_corrupt": ("sequence", corrupt),
            "normalized_effect": (dims, effect),
            "token": (("sequence", "position"), tokens),
        },
        _coords(
            rng, layer=np.arange(LAYERS), position=np.arange(POSITIONS), prefix_len=("sequence", [10] * N)
        ),
    )
    return Result.create(data, kind="activation_patching", settings={"site": "resid_pre"}, **FACTS)


def logit_attribution() -> Result:
    rng = np.random.default_rng(5)
    head = rng.normal(0, 0.3, (N, LAYERS, HEADS)) + 0.6 * rng.standard_t(2, (LAYERS, HEADS))
    data = xr.Dataset(
        {
            "heads": (("sequence", "layer", "head"), head),
            "attn": (("sequence", "layer"), head.sum(-1)),
            "mlp": (("sequence", "layer"), rng.normal(0, 0.4, (N, LAYERS)) + np.linspace(0, 3, LAYERS)),
            "embedding": ("sequence", rng.normal(0, 0.1, N)),
            "bias": ("sequence", np.zeros(N)),
            "total": ("sequence", rng.normal(12, 1, N)),
        },
        _coords(rng, layer=np.arange(LAYERS), head=np.arange(HEADS)),
    )
    return Result.create(data, kind="logit_attribution", settings={}, **FACTS)


def sweep() -> Result:
    rng = np.random.default_rng(6)
    made = _ablated(rng, (14,), 0.5)
    names = [f"bypass layer {i}" for i in range(10)] + [
        "zero L3H1",
        "mean <b>L3H2</b>",
        "noise α = 0.2",
        "my edit",
    ]
    data = xr.Dataset(
        {
            "target_logprob": (("sequence", "intervention"), made["logprob"]),
            "target_logprob_baseline": ("sequence", made["base"]),
            "exact_match": (("sequence", "intervention"), made["exact"]),
            "exact_match_baseline": ("sequence", np.ones(N)),
        },
        _coords(rng, intervention=names),
    )
    return Result.create(data, kind="sweep", settings={}, **FACTS)


def recall() -> Result:
    rng = np.random.default_rng(7)
    coords = _coords(rng)
    copies = np.asarray(coords["copies"][1])  # type: ignore[index]
    score = np.clip(np.log2(copies + 1) / 7 + rng.normal(0, 0.15, N), 0, 1)
    data = xr.Dataset(
        {"exact_match": ("sequence", (score > 0.9).astype(float)), "memorization_score": ("sequence", score)},
        coords,
    )
    return Result.create(data, kind="recall", settings={"n_targets": 32}, **FACTS)


ALL = {
    make.__name__: make
    for make in (
        residual_decoding, head_ablation, attention_bypass, activation_patching,
        logit_attribution, sweep, recall,
    )
}  # fmt: skip
