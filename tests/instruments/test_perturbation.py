"""Noise in the residual and replaced prefixes: statistics, identities, independent computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, SequenceError, SiteError
from memlens.instruments.noise import replaced_prefixes, residual_noise
from memlens.sequences.set import SequenceSet
from tests.small import CASES, largest_difference, ragged
from tests.tiny import D_VOCAB, tiny_huggingface_model

POST = "blocks.{}.hook_resid_post"


def many(n: int = 40, length: int = 60) -> SequenceSet:
    generator = torch.Generator().manual_seed(7)
    return SequenceSet.from_tokens(torch.randint(0, D_VOCAB - 1, (n, length), generator=generator), 50)


def changed(model: Any, seqs: SequenceSet, edit: ml.Intervention, name: str) -> tuple[torch.Tensor, ...]:
    """The activation at a hook without and with an edit, as a sweep in one batch sees it."""
    seen: list[torch.Tensor] = []

    def keep(x: torch.Tensor, hook: Any) -> None:
        seen.append(x.clone())

    look = ml.Intervention("look", [(name, keep)])
    ml.sweep(model, seqs, [look, edit + look], progress=False, engine="reference", batch_size=len(seqs))
    return seen[0], seen[1]


def noise(model: Any, alpha: float, **options: Any) -> ml.Intervention:
    options = {"layer": 0, "site": "resid_post", "positions": "prompt", "scale": "norm", **options}
    return residual_noise(model, [alpha], **{"n_draws": 1, "seed": 0, **options})[0]


@pytest.mark.parametrize("scale", ["norm", "std"])
def test_strength_of_the_noise(tiny_model: Any, scale: str) -> None:
    model, seqs = tiny_model("llama", "bridge"), many()
    clean, noisy = changed(model, seqs, noise(model, 0.3, scale=scale), POST.format(0))
    added = (noisy - clean)[:, :50]
    size = clean[:, :50].norm(dim=-1) if scale == "norm" else clean[:, :50].std(-1, correction=0) * 32**0.5
    ratio = added.norm(dim=-1) / size
    assert float(ratio.square().mean()) == pytest.approx(0.3**2, rel=0.03)  # E||noise||² = α²||h||²
    assert float(ratio.mean()) == pytest.approx(0.3, rel=0.02)
    unit = added / (size[..., None] / 32**0.5 * 0.3)
    assert abs(float(unit.mean())) < 0.02
    assert float(unit.std()) == pytest.approx(1, rel=0.02)
    neighbors = (unit[:, 1:] * unit[:, :-1]).mean()  # positions are independent
    assert abs(float(neighbors)) < 0.02


@pytest.mark.parametrize("positions", ["prompt", "all", "targets", "last_prompt"])
def test_positions(tiny_model: Any, positions: str) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    clean, noisy = changed(model, seqs, noise(model, 0.5, positions=positions), POST.format(0))
    moved = (clean != noisy).any(-1) & seqs.mask
    for row, (prefix, length) in enumerate(zip(seqs.prefix_len.tolist(), seqs.lengths.tolist(), strict=True)):
        want = {
            "prompt": range(prefix),
            "all": range(length),
            "targets": range(prefix - 1, length - 1),
            "last_prompt": [prefix - 1],
        }[positions]
        assert torch.nonzero(moved[row])[:, 0].tolist() == list(want)


def test_one_direction_for_all_strengths(tiny_model: Any) -> None:
    model, seqs = tiny_model("olmo2", "bridge"), ragged()
    parts = []
    for alpha in (0.1, 0.4):
        clean, noisy = changed(model, seqs, noise(model, alpha), POST.format(0))
        parts.append((noisy - clean) / alpha)
    assert torch.allclose(*parts, atol=1e-5)


def test_noise_depends_on_seed_row_and_draw_only(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(6)

    def run(**options: Any) -> np.ndarray:
        options = {"alphas": (0.2, 0.5), "n_draws": 2, "progress": False, **options}
        return ml.perturb_residual(model, seqs, **options)["target_logprob"].sel(alpha=0.5).values

    first = run()
    assert np.array_equal(first, run())
    assert np.allclose(first, run(batch_size=1), atol=1e-5)
    assert np.allclose(first, run(alphas=(0.5, 0.1)), atol=1e-5)
    assert np.abs(first - run(seed=1)).max() > 1e-3
    assert np.abs(first[:, 0] - first[:, 1]).max() > 1e-3
    twins = SequenceSet.from_tokens([seqs.rows()[0]] * 2, 8)
    twice = ml.perturb_residual(model, twins, alphas=[0.5], progress=False)["target_logprob"].values
    assert abs(twice[0] - twice[1]).max() > 1e-3


@pytest.mark.parametrize("recovery", [False, True])
@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_no_noise_is_the_baseline(tiny_model: Any, recovery: bool, engine: str) -> None:
    model, seqs = tiny_model("olmo", "bridge"), ragged()
    result = ml.perturb_residual(
        model, seqs, alphas=[0], recovery=recovery, engine=engine, progress=False, metrics=("target_logprob",)
    )
    assert float(abs(result.effect("target_logprob")).max()) < (1e-6 if recovery else 1e-12)
    assert ("similarity" in result.data) == recovery
    if recovery:
        assert np.allclose(result["similarity"], 1, atol=1e-6)
        assert np.allclose(result["recovery"], 0, atol=1e-6)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_noise_and_similarity_by_hand(tiny_model: Any, family: str, backend: str) -> None:
    """One unpadded sequence, plain hooks, and the cosine written out."""
    model, seqs = tiny_model(family, backend), ragged()
    result = ml.perturb_residual(model, seqs, alphas=[0.4], layer=1, seed=5, progress=False)
    row, n_layers = 2, len(model.blocks)
    tokens, prefix = torch.tensor([seqs.rows()[row]]), int(seqs.prefix_len[row])
    eps = np.random.default_rng([5, row, 0]).standard_normal((tokens.shape[1], 32), dtype=np.float32)

    def add(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        size = x[0, :prefix].square().mean(-1, keepdim=True).sqrt()
        x[0, :prefix] += 0.4 * size * torch.from_numpy(eps[:prefix])
        return x

    def run(hooks: list[Any]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        seen: dict[int, torch.Tensor] = {}

        def keep(x: torch.Tensor, hook: Any, layer: int = 0) -> None:
            seen[layer] = x[0, :prefix].clone()

        looks = [(POST.format(n), lambda x, hook, n=n: keep(x, hook, n)) for n in range(1, n_layers)]
        with torch.no_grad():
            return model.run_with_hooks(tokens, fwd_hooks=[*hooks, *looks])[0], seen

    logits, noisy = run([(POST.format(1), add)])
    _, clean = run([])
    ids = tokens[0, prefix:]
    want = logits[prefix - 1 : -1].log_softmax(-1).gather(1, ids[:, None]).mean()
    assert float(result["target_logprob"][row, 0]) == pytest.approx(float(want), abs=2e-5)
    curve = [
        ((clean[n] * noisy[n]).sum(-1) / (clean[n].norm(dim=-1) * noisy[n].norm(dim=-1))).mean().item()
        for n in range(1, n_layers)
    ]
    assert result["similarity"].data.shape == (4, 1, n_layers - 1)
    assert np.allclose(result["similarity"][row, 0], curve, atol=1e-5)
    assert float(result["similarity_at_noise"][row, 0]) == pytest.approx(curve[0], abs=1e-5)
    assert float(result["recovery"][row, 0]) == pytest.approx(curve[-1] - curve[0], abs=1e-5)


def test_similarity_right_after_noise_is_what_geometry_says(tiny_model: Any) -> None:
    """In many dimensions, noise of relative length α leaves a cosine of about 1 / sqrt(1 + α²)."""
    model = tiny_model("llama", "bridge")
    result = ml.perturb_residual(model, many(), alphas=[0.3, 1.0], site="resid_pre", progress=False)
    found = result["similarity_at_noise"].mean("sequence").values
    assert np.allclose(found, [1 / np.sqrt(1.09), 1 / np.sqrt(2)], atol=0.01)


@pytest.mark.parametrize("at", ["last_prompt", "targets"])
def test_similarity_at_other_positions(tiny_model: Any, at: str) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    result = ml.perturb_residual(model, seqs, alphas=[0.5], seed=2, similarity_at=at, progress=False)
    clean, noisy = changed(model, seqs, noise(model, 0.5, seed=2), POST.format(2))
    cosine = torch.cosine_similarity(clean, noisy, dim=-1)
    for row, (prefix, length) in enumerate(zip(seqs.prefix_len.tolist(), seqs.lengths.tolist(), strict=True)):
        part = cosine[row, prefix - 1 : (prefix if at == "last_prompt" else length - 1)]
        assert float(result["similarity"][row, 0, 2]) == pytest.approx(float(part.mean()), abs=1e-5)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_similarities_of_both_engines_agree(tiny_model: Any, family: str, backend: str) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    options: dict[str, Any] = {"alphas": (0, 0.3), "n_draws": 2, "layer": 1, "progress": False}
    fast = ml.perturb_residual(model, seqs, **options)
    plain = ml.perturb_residual(model, seqs, engine="reference", **options)
    assert fast["similarity"].dims == ("sequence", "alpha", "layer", "draw")
    assert largest_difference(fast, plain) < 1e-5
    assert float(fast["similarity"].sel(alpha=0.3).max()) < 0.999


def test_similarities_persist_with_the_sweep(tiny_model: Any, tmp_path: Path) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged(6)
    options: dict[str, Any] = {"alphas": (0, 0.3), "n_draws": 2, "batch_size": 2, "progress": False}
    whole = ml.perturb_residual(model, seqs, out=tmp_path, **options)
    parts = sorted(tmp_path.glob("*.npz"))
    assert len(parts) == 3
    parts[1].unlink()
    stamps = {p: p.stat().st_mtime_ns for p in (parts[0], parts[2])}
    again = ml.perturb_residual(model, seqs, out=tmp_path, **options)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert bool(again["similarity"].notnull().all())
    assert largest_difference(whole, again) < 1e-6
    assert ml.load_result(tmp_path / "result.nc").data.identical(again.data)


def test_half_precision_keeps_its_own_similarities() -> None:
    """The comparison with float32 that follows a 16-bit sweep leaves its similarities alone."""
    model = ml.load_model(tiny_huggingface_model("llama"), backend="bridge", dtype="bfloat16")
    options: dict[str, Any] = {"alphas": [0.3], "progress": False}
    checked = ml.perturb_residual(model, ragged(), check_dtype=True, **options)
    unchecked = ml.perturb_residual(model, ragged(), check_dtype=False, **options)
    assert "float32_agreement" in checked.settings
    assert np.array_equal(checked["similarity"], unchecked["similarity"])


def test_embedding_noise_is_an_intervention(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neo", "bridge"), ragged()
    (edit,) = ml.edits.embedding_noise(model, alphas=[0.5], seed=4)
    clean, noisy = changed(model, seqs, edit, "blocks.0.hook_resid_pre")
    prompt = torch.arange(clean.shape[1]) < seqs.prefix_len[:, None]
    assert torch.equal((clean != noisy).any(-1), prompt)
    one = ml.sweep(model, seqs, [edit], progress=False)["target_logprob"].values[:, 0]
    same = ml.perturb_residual(
        model, seqs, alphas=[0.5], site="resid_pre", seed=4, recovery=False, progress=False
    )
    assert np.allclose(one, same["target_logprob"][:, 0], atol=1e-6)


def test_noise_draws_its_curves(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    result = ml.perturb_residual(model, seqs, alphas=(0, 0.2, 0.5), n_draws=2, progress=False)
    (line,) = [t for t in result.plot("target_logprob").data if t.mode == "lines+markers"]
    assert list(line.x) == [0, 0.2, 0.5]
    assert np.allclose(line.y, result["target_logprob"].mean(["sequence", "draw"]))
    figure = result.plot("similarity")
    lines = [t for t in figure.data if t.mode == "lines+markers"]
    assert [t.name for t in lines] == ["alpha 0", "alpha 0.2", "alpha 0.5"]
    assert all(list(t.x) == [0, 1, 2] for t in lines)
    prefix = ml.instruments.perturb_prefix(model, seqs, counts=[0, 3], progress=False)
    assert prefix.plot("exact_match").layout.xaxis.title.text == "replaced prefix tokens"


def test_bad_noise(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    with pytest.raises(OptionError, match=r"alpha=-0\.1"):
        ml.perturb_residual(model, seqs, alphas=[0, -0.1])
    with pytest.raises(OptionError, match="alpha=nan"):
        ml.edits.embedding_noise(model, alphas=[float("nan")])
    with pytest.raises(OptionError, match=r"alphas=\[0.1, 0.1\]"):
        ml.perturb_residual(model, seqs, alphas=[0.1, 0.1])
    with pytest.raises(OptionError, match=r"alphas=\[\]"):
        ml.perturb_residual(model, seqs, alphas=[])
    with pytest.raises(OptionError, match="scale='rms'"):
        ml.perturb_residual(model, seqs, scale="rms")
    with pytest.raises(OptionError, match="site='z'"):
        ml.perturb_residual(model, seqs, site="z")
    with pytest.raises(OptionError, match="positions='prefix'"):
        ml.edits.embedding_noise(model, positions="prefix")
    with pytest.raises(OptionError, match="similarity_at='all'"):
        ml.perturb_residual(model, seqs, similarity_at="all")
    with pytest.raises(OptionError, match="n_draws=0"):
        ml.perturb_residual(model, seqs, n_draws=0)
    with pytest.raises(SiteError, match="layer 3 does not exist"):
        ml.perturb_residual(model, seqs, layer=3)


@pytest.mark.parametrize("strategy", ["random", "first", "last"])
def test_replaced_positions(strategy: str) -> None:
    seqs = ragged()
    found = replaced_prefixes(seqs, [0, 1, 3], strategy=strategy, n_draws=1, seed=2)
    variants = {count: s for count, _, s in found}
    assert variants[0] is None
    one, three = variants[1], variants[3]
    assert one is not None
    assert three is not None
    moved = [(s.tokens != seqs.tokens).numpy() for s in (one, three)]
    for row, prefix in enumerate(seqs.prefix_len.tolist()):
        places = [set(np.flatnonzero(m[row])) for m in moved]
        assert [len(p) for p in places] == [1, 3]
        assert places[0] < places[1]
        assert max(places[1]) < prefix
        if strategy != "random":
            want = range(3) if strategy == "first" else range(prefix - 3, prefix)
            assert places[1] == set(want)
            assert places[0] == ({0} if strategy == "first" else {prefix - 1})
    assert torch.equal(one.tokens[moved[0]], three.tokens[moved[0]])


def test_replaced_prefixes_are_measured(tiny_model: Any) -> None:
    model, seqs = tiny_model("olmo3", "bridge"), ragged()
    result = ml.instruments.perturb_prefix(model, seqs, counts=[0, 2, 4], n_draws=2, seed=3, progress=False)
    assert result["target_logprob"].dims == ("sequence", "replaced", "draw")
    assert np.array_equal(result["target_logprob"].sel(replaced=0, draw=1), result.baseline("target_logprob"))
    for n, draw, variant in replaced_prefixes(seqs, [0, 2, 4], strategy="random", n_draws=2, seed=3):
        if variant is not None:
            want = ml.measure(model, variant)["target_logprob"]
            assert np.allclose(result["target_logprob"].sel(replaced=n, draw=draw), want, atol=1e-6)
    assert float(abs(result.effect("target_logprob")).sel(replaced=[2, 4]).min()) > 1e-4
    again = ml.instruments.perturb_prefix(
        model, seqs, counts=[0, 2, 4], n_draws=2, seed=3, batch_size=1, progress=False
    )
    assert largest_difference(result, again) < 1e-5


def test_default_counts_fit_every_prefix(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    result = ml.instruments.perturb_prefix(
        model, ragged(), progress=False
    )  # the shortest prefix has four tokens
    assert result.data["replaced"].values.tolist() == [0, 1, 2, 4] == result.settings["counts"]
    begun = ragged().with_attrs(prepend_bos=True)
    result = ml.instruments.perturb_prefix(model, begun, strategy="first", progress=False)
    assert result.settings["counts"] == [0, 1, 2]
    for _, _, variant in replaced_prefixes(begun, [2], strategy="first", n_draws=1, seed=0):
        assert variant is not None
        assert torch.equal(variant.tokens[:, 0], begun.tokens[:, 0])


def test_bad_prefixes(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    with pytest.raises(OptionError, match="strategy='middle'"):
        ml.instruments.perturb_prefix(model, seqs, strategy="middle")
    with pytest.raises(OptionError, match=r"counts=\[1, 1\]"):
        ml.instruments.perturb_prefix(model, seqs, counts=[1, 1])
    with pytest.raises(OptionError, match=r"counts=\[-1\]"):
        ml.instruments.perturb_prefix(model, seqs, counts=[-1])
    with pytest.raises(OptionError, match="n_draws=0"):
        ml.instruments.perturb_prefix(model, seqs, n_draws=0)
    with pytest.raises(SequenceError, match="n_tokens=5 is too many"):
        ml.instruments.perturb_prefix(model, seqs, counts=[5])
