"""Gradient attribution: against finite differences, completeness, and a model left as it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, SequenceError, SilentInterventionError, SiteError
from memlens.forward.capture import ActivationSource
from memlens.instruments.screen.gradients import attribute_ablation, attribute_gradients
from memlens.models.names import has_hooked_transformer
from tests.devices import dev
from tests.small import CASES, corrupted, ragged, spread

STEP = 5e-3
CELLS = {
    "resid_pre": ("position", (slice(None), 3)),
    "resid_post": ("position", (slice(None), 5)),
    "attn_out": ("position", (slice(None), 2)),
    "mlp_out": ("layer", (slice(None),)),
    "mlp_post": ("neuron", (slice(None), slice(None), 7)),
    "z": ("head", (slice(None), slice(None), 1)),
    "q": ("head", (slice(None), slice(None), 2)),
    "k": ("head", (slice(None), slice(None), 0)),
    "v": ("head_position", (slice(None), 3, 0)),
    "pattern": ("head", (slice(None), 1)),
}
LABEL = {"resid_pre": (3,), "resid_post": (5,), "attn_out": (2,), "mlp_out": (), "mlp_post": (7,), "z": (1,),
         "q": (2,), "k": (0,), "v": (0, 3), "pattern": (1,)}  # fmt: skip


@pytest.fixture(scope="module")
def wide_model(tiny_folder: Any) -> Callable[[str, str], Any]:
    """A tiny model in float64, so that small differences are not lost in rounding."""
    loaded: dict[tuple[str, str], Any] = {}

    def model_of(family: str, backend: str) -> Any:
        if backend == "hooked" and not has_hooked_transformer():
            pytest.skip("this TransformerLens has no HookedTransformer")
        if (family, backend) not in loaded:
            folder = tiny_folder(family)
            loaded[family, backend] = ml.load_model(folder, backend=backend, device=dev(), dtype="float64")
        return loaded[family, backend]

    return model_of


def name_of(site: str, layer: int) -> str:
    part = {
        "z": "attn.",
        "q": "attn.",
        "k": "attn.",
        "v": "attn.",
        "pattern": "attn.",
        "mlp_post": "mlp.",
    }.get(site, "")
    return f"blocks.{layer}.{part}hook_{'post' if site == 'mlp_post' else site}"


def toward(store: ActivationSource, name: str, index: Any, share: float) -> ml.Intervention:
    """Move a cell a share of the way from where it is to the source's activation."""

    class Hook:
        def bind(self, batch: Any) -> Callable[..., torch.Tensor]:
            new = store.of(batch)[name]

            def fn(x: torch.Tensor, hook: Any) -> torch.Tensor:
                out = x.clone()
                out[index] += share * (new[index] - x[index])
                return out

            return fn

    return ml.Intervention(f"{name} {share}", [(name, Hook())])


@pytest.mark.parametrize(("family", "backend"), CASES)
@pytest.mark.parametrize("site", CELLS)
def test_is_the_slope_of_exact_patching(wide_model: Any, family: str, backend: str, site: str) -> None:
    model, clean = wide_model(family, backend), ragged()
    corrupt = corrupted(clean)
    if (family, backend, site) == ("gpt_neo", "bridge", "pattern"):
        pytest.skip("this bridge ignores what is written to its pattern")
    over, index = CELLS[site]
    layer = 1
    name = name_of(site, layer)
    store = ActivationSource(model, clean, [name])
    edits = [toward(store, name, index, share) for share in (STEP, -STEP)]
    exact = ml.sweep(model, corrupt, edits, ["target_logprob"], progress=False)["target_logprob"].values
    slope = (exact[:, 0] - exact[:, 1]) / (2 * STEP)
    found = attribute_gradients(
        model, clean, corrupt, site=site, over=over, layers=[layer], progress=False
    ).effect("target_logprob")
    got = found.sel(layer=layer, **dict(zip(found.dims[2:], LABEL[site], strict=True))).values
    assert got == pytest.approx(slope, abs=1e-5, rel=5e-3)
    assert abs(got).max() > 1e-4


@pytest.mark.parametrize("family", ["gpt_neox_sequential", "gpt_neo", "olmo", "olmo2", "olmo3"])
def test_resid_mid_is_the_whole_residual_on_both_backends(wide_model: Any, family: str) -> None:
    clean = ragged()
    corrupt = corrupted(clean)
    found = {}
    for backend in ("bridge", "hooked"):
        model = wide_model(family, backend)
        near = corrupted_toward(model, clean, corrupt)
        result = attribute_gradients(model, clean, corrupt, site="resid_mid", layers=[1], progress=False)
        found[backend] = result.effect("target_logprob").sel(layer=1).values
        assert found[backend][:, 2] == pytest.approx(near, abs=1e-5, rel=5e-3)
    assert np.allclose(found["bridge"], found["hooked"], atol=1e-3, equal_nan=True)


def corrupted_toward(model: Any, clean: ml.SequenceSet, corrupt: ml.SequenceSet) -> np.ndarray:
    """The slope of exact patching at resid_mid of layer 1, position 2, by way of attention's output."""
    mid, out = "blocks.1.hook_resid_mid", "blocks.1.hook_attn_out"
    there, here = (ActivationSource(model, seqs, [mid]) for seqs in (clean, corrupt))

    def edit(share: float) -> ml.Intervention:
        class Hook:
            def bind(self, batch: Any) -> Callable[..., torch.Tensor]:
                delta = (there.of(batch)[mid] - here.of(batch)[mid])[:, 2]

                def fn(x: torch.Tensor, hook: Any) -> torch.Tensor:
                    moved = x.clone()
                    moved[:, 2] += share * delta
                    return moved

                return fn

        return ml.Intervention(str(share), [(out, Hook())])

    values = ml.sweep(model, corrupt, [edit(STEP), edit(-STEP)], ["target_logprob"], progress=False)
    exact = values["target_logprob"].values
    return (exact[:, 0] - exact[:, 1]) / (2 * STEP)


def test_equals_autograd_by_hand(tiny_model: Any) -> None:
    """One row without padding, through the model's own forward."""
    model, clean = tiny_model("llama_gqa", "bridge"), ragged()
    corrupt = corrupted(clean)
    row, name = 2, "blocks.2.attn.hook_z"
    tokens = torch.tensor([corrupt.rows()[row]])
    with torch.no_grad():
        _, there = model.run_with_cache(torch.tensor([clean.rows()[row]]), names_filter=[name])
        _, here = model.run_with_cache(tokens, names_filter=[name])
    nudge = torch.zeros_like(here[name], requires_grad=True)
    logp = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: x + nudge)])[0].log_softmax(-1)
    start = int(clean.prefix_len[row])
    mean = torch.stack([logp[p - 1, tokens[0, p]] for p in range(start, tokens.shape[1])]).mean()
    (slope,) = torch.autograd.grad(mean, nudge)
    want = ((there[name] - here[name]) * slope)[0].sum(-1).T  # [head, pos]
    result = attribute_gradients(model, clean, corrupt, site="z", over="head_position", progress=False)
    got = result.effect("target_logprob").sel(layer=2)[row].values
    n = tokens.shape[1] - 1
    assert got[:, :n] == pytest.approx(want[:, :n].numpy(), abs=1e-5)
    assert np.isnan(got[:, n:]).all()


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_integrated_gradients_of_a_layer_sum_to_patching_it_whole(
    tiny_model: Any, family: str, backend: str
) -> None:
    model, clean = tiny_model(family, backend), ragged(2)
    corrupt = corrupted(clean)
    want = ml.measure(model, clean)["target_logprob"] - ml.measure(model, corrupt)["target_logprob"]

    def gap(steps: int) -> float:
        result = attribute_gradients(
            model, clean, corrupt, layers=[1], method="integrated_gradients", steps=steps, progress=False
        )
        return float(abs(result.effect("target_logprob").sum(("layer", "position")).values - want).max())

    coarse, fine = gap(2), gap(40)
    assert fine < 0.02 * abs(want).max()
    assert fine < coarse / 4


def test_steps_are_doubled_until_the_estimates_are_complete(
    tiny_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, clean = tiny_model("gpt_neox", "hooked"), ragged(2)
    corrupt = corrupted(clean)
    want = ml.measure(model, clean)["target_logprob"] - ml.measure(model, corrupt)["target_logprob"]

    def run(**options: Any) -> tuple[ml.Result, float]:
        result = attribute_gradients(
            model, clean, corrupt, layers=[1], method="integrated_gradients", progress=False, **options
        )
        return result, float(
            abs(result.effect("target_logprob").sum(("layer", "position")).values - want).max()
        )

    result, gap = run(steps=1)
    assert result.settings["completeness_gap"] == pytest.approx(gap, abs=1e-5)
    tolerance = gap / 20
    finer, small = run(steps=1, tolerance=tolerance)
    assert small < 1.01 * tolerance + 1e-5
    assert finer.settings["steps"] in (2, 4, 8, 16, 32, 64)
    assert finer.settings["completeness_gap"] <= tolerance
    assert run(steps=finer.settings["steps"] // 2)[0].settings["completeness_gap"] > tolerance
    run(steps=256, tolerance=1e-12)
    assert "miss its exact effect" in caplog.text
    with pytest.raises(ml.errors.OptionError, match="tolerance"):
        attribute_gradients(model, clean, corrupt, tolerance=0.1)


@pytest.mark.parametrize("site", ["z", "mlp_post", "resid_mid", "attn_out"])
def test_integrated_gradients_of_other_sites_are_complete(tiny_model: Any, site: str) -> None:
    model, clean = tiny_model("olmo2", "bridge"), ragged(2)
    corrupt = corrupted(clean)
    name = name_of("attn_out" if site == "resid_mid" else site, 1)
    read = name_of(site, 1)
    there, here = (ActivationSource(model, seqs, [read]) for seqs in (clean, corrupt))

    class Whole:
        def bind(self, batch: Any) -> Callable[..., torch.Tensor]:
            delta = there.of(batch)[read] - here.of(batch)[read]
            return lambda x, hook: x + delta

    edit = ml.Intervention("whole", [(name, Whole())])
    want = ml.sweep(model, corrupt, [edit], progress=False).effect("target_logprob").values[:, 0]
    result = attribute_gradients(
        model, clean, corrupt, site=site, over="layer", layers=[1], method="integrated_gradients", steps=96,
        progress=False,
    )  # fmt: skip
    assert result.effect("target_logprob").values[:, 0] == pytest.approx(want, abs=0.01, rel=0.02)


def test_the_paths_meet_at_the_first_blocks_input(tiny_model: Any) -> None:
    model, clean = tiny_model("gpt_neox", "bridge"), ragged()
    corrupt = corrupted(clean)
    a, b = (
        attribute_gradients(
            model, clean, corrupt, layers=[0, 2], method="integrated_gradients", path=path, steps=4,
            progress=False,
        ).effect("target_logprob")
        for path in ("site", "embedding")
    )  # fmt: skip
    assert np.allclose(a.sel(layer=0), b.sel(layer=0), atol=1e-5, equal_nan=True)
    assert not np.allclose(a.sel(layer=2), b.sel(layer=2), atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("site", "over"), [("resid_pre", "position"), ("z", "head"), ("z", "head_position"), ("z", "position"),
     ("q", "head"), ("k", "head"), ("v", "head_position"), ("pattern", "head"), ("pattern", "head_position")],
)  # fmt: skip
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_has_the_labels_of_patching(tiny_model: Any, site: str, over: str, direction: str) -> None:
    model, clean = tiny_model("llama_gqa", "bridge"), ragged()
    options: dict[str, Any] = {"site": site, "over": over, "direction": direction, "progress": False}
    exact = ml.patch_activations(model, clean, corrupted(clean), **options)
    cheap = attribute_gradients(model, clean, corrupted(clean), **options)
    assert cheap.kind == "gradient_attribution"
    for name in ("target_logprob", "normalized_effect"):
        assert cheap[name].dims == exact[name].dims
        assert cheap[name].isnull().equals(exact[name].isnull())
    for dim in exact["target_logprob"].dims:
        assert cheap[dim].values.tolist() == exact[dim].values.tolist()
    for tail in ("_clean", "_corrupt", "_baseline"):
        assert np.allclose(cheap["target_logprob" + tail], exact["target_logprob" + tail], atol=1e-5)


def test_positions_and_batches(tiny_model: Any) -> None:
    model, clean = tiny_model("olmo3", "bridge"), ragged()
    corrupt = corrupted(clean)
    whole = attribute_gradients(model, clean, corrupt, progress=False)
    part = attribute_gradients(model, clean, corrupt, positions=[7, 2], batch_size=1, progress=False)
    assert part["position"].values.tolist() == [7, 2]
    want = whole["target_logprob"].sel(position=[7, 2])
    assert np.allclose(part["target_logprob"], want, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("family", "backend", "mode"), spread(["zero", "mean", "resample", "mean_of_other_heads"], each=2)
)
def test_ablation_is_the_slope_of_exact_ablation(
    wide_model: Any, family: str, backend: str, mode: str
) -> None:
    """Head ablation a small share of the way, by the exact instrument's own hooks."""
    model, seqs = wide_model(family, backend), ragged()

    def partly(edit: ml.Intervention, share: float) -> ml.Intervention:
        ((name, by_batch),) = edit.hooks

        class Hook:
            def bind(self, batch: Any) -> Callable[..., torch.Tensor]:
                fn: Any = by_batch.bind(batch)  # type: ignore[union-attr]
                return lambda x, hook: x + share * (fn(x, hook=hook) - x)

        return ml.Intervention(f"{share}", [(name, Hook())])

    (edit,) = ml.edits.head_ablations(model, seqs, mode=mode, layers=[1], heads=[2], positions="targets")
    pair = [partly(edit, STEP), partly(edit, -STEP)]
    exact = ml.sweep(model, seqs, pair, ["target_logprob"], progress=False)["target_logprob"].values
    result = attribute_ablation(
        model, seqs, mode=mode, positions="targets", layers=[1], method="attribution_patching", progress=False
    )
    assert result["target_logprob"].dims == ("sequence", "layer", "head")
    got = result.effect("target_logprob").sel(layer=1, head=2).values
    assert got == pytest.approx((exact[:, 0] - exact[:, 1]) / (2 * STEP), abs=1e-5, rel=5e-3)


def test_ablated_heads_sum_to_the_ablated_attention(tiny_model: Any) -> None:
    """Llama's attention has no bias: all heads at 0 are its output at 0."""
    model, seqs = tiny_model("llama_gqa", "bridge"), ragged()
    heads = attribute_ablation(model, seqs, progress=False).effect("target_logprob")
    whole = attribute_ablation(model, seqs, site="attn_out", progress=False).effect("target_logprob")
    assert whole.dims == ("sequence", "layer")
    assert np.allclose(heads.sum("head"), whole, atol=1e-5)
    neurons = attribute_ablation(model, seqs, site="mlp_post", progress=False).effect("target_logprob")
    mlps = attribute_ablation(model, seqs, site="mlp_out", progress=False).effect("target_logprob")
    assert neurons.shape == (4, 3, 64)
    assert np.allclose(neurons.sum("neuron"), mlps, atol=1e-5)


def test_integrated_ablation_sums_to_ablating_the_layer(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    edit = ml.Intervention("no heads", [("blocks.1.attn.hook_z", lambda x, hook: 0 * x)])
    want = ml.sweep(model, seqs, [edit], progress=False).effect("target_logprob").values[:, 0]
    result = attribute_ablation(
        model, seqs, layers=[1], method="integrated_gradients", steps=64, progress=False
    )
    assert result.effect("target_logprob").sum(("layer", "head")).values == pytest.approx(want, abs=0.01)


def test_metrics(tiny_model: Any) -> None:
    model, clean = tiny_model("olmo", "bridge"), ragged()
    corrupt = corrupted(clean)

    def my_logprob(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        chosen = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        return (chosen * mask).sum(-1) / mask.sum(-1)

    mine = attribute_gradients(model, clean, corrupt, metric=my_logprob, progress=False)
    own = attribute_gradients(model, clean, corrupt, progress=False)
    assert np.allclose(mine["my_logprob"], own["target_logprob"], atol=1e-5, equal_nan=True)
    for metric in ("margin", "completion_entropy"):
        result = attribute_gradients(model, clean, corrupt, metric=metric, progress=False)
        want = ml.measure(model, corrupt, [metric])[metric]
        assert result.baseline(metric).values == pytest.approx(want, abs=1e-5)
        assert float(abs(result.effect(metric)).max()) > 1e-3


def state_of(model: Any) -> tuple[list[bool], bool, bool]:
    inner = [*model.parameters(), *getattr(model, "original_model", model).parameters()]
    hooks = any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    return [p.requires_grad for p in inner], any(p.grad is not None for p in inner), hooks


@pytest.mark.parametrize(("family", "backend"), [("gpt_neox", "hooked"), ("olmo2", "bridge")])
def test_the_model_is_left_as_it_was(tiny_model: Any, family: str, backend: str) -> None:
    model, clean = tiny_model(family, backend), ragged(2)
    corrupt = corrupted(clean)
    some = next(model.parameters())
    held = some.requires_grad
    try:
        some.requires_grad_(not held)
        before = state_of(model)
        attribute_gradients(model, clean, corrupt, progress=False)
        assert state_of(model) == before

        def broken(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no metric")

        with pytest.raises(OptionError, match="metric 'broken' raised RuntimeError: no metric"):
            attribute_gradients(model, clean, corrupt, metric=broken, progress=False)
        assert state_of(model) == before
        assert before[1:] == (False, False)
    finally:
        some.requires_grad_(held)


def test_works_where_gradients_are_off(tiny_model: Any) -> None:
    model, clean = tiny_model("gpt_neo", "bridge"), ragged(2)
    corrupt = corrupted(clean)
    want = attribute_gradients(model, clean, corrupt, progress=False)["target_logprob"]
    with torch.no_grad():
        quiet = attribute_gradients(model, clean, corrupt, progress=False)["target_logprob"]
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inference = attribute_gradients(model, clean, corrupt, progress=False)["target_logprob"]
    assert np.array_equal(want, quiet, equal_nan=True)
    assert np.array_equal(want, inference, equal_nan=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_widths(tiny_folder: Any, tiny_model: Any, dtype: str) -> None:
    clean = ragged()
    corrupt = corrupted(clean)
    model = ml.load_model(tiny_folder("llama"), backend="bridge", device=dev(), dtype=dtype)
    narrow = attribute_gradients(model, clean, corrupt, site="z", over="head", progress=False)
    plain = attribute_gradients(
        tiny_model("llama", "bridge"), clean, corrupt, site="z", over="head", progress=False
    )
    a, b = (r.effect("target_logprob").values.ravel() for r in (narrow, plain))
    assert np.corrcoef(a, b)[0, 1] > (0.9 if dtype == "bfloat16" else 1 - 1e-9)


def test_a_site_that_the_model_ignores_is_an_error(tiny_model: Any) -> None:
    model, clean = tiny_model("gpt_neo", "bridge"), ragged(2)
    with pytest.raises(SilentInterventionError, match="hook_pattern"):
        attribute_gradients(model, clean, corrupted(clean), site="pattern", over="head", progress=False)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("site", "over", "kind"),
    [("resid_pre", "position", "heatmap"), ("z", "head", "heatmap"), ("mlp_out", "layer", "scatter"),
     ("mlp_post", "neuron", "scatter"), ("mlp_post", "neuron_position", "scatter")],
)  # fmt: skip
def test_figures(tiny_model: Any, site: str, over: str, kind: str) -> None:
    model, clean = tiny_model("olmo", "bridge"), ragged(2)
    patched = attribute_gradients(model, clean, corrupted(clean), site=site, over=over, progress=False)
    ablated = attribute_ablation(model, clean, site=site, over=over, progress=False)
    for result, word in ((patched, "patching"), (ablated, "ablating")):
        fig = result.plot()
        assert {trace.type for trace in fig.data} == {kind}
        assert "stimated" in fig.layout.title.text
        assert kind == "scatter" or word in fig.layout.title.text


def test_bad_input(tiny_model: Any) -> None:
    model, clean = tiny_model("gpt_neox", "bridge"), ragged()
    corrupt = corrupted(clean)

    def run(**options: Any) -> None:
        attribute_gradients(model, clean, corrupt, progress=False, **options)

    with pytest.raises(OptionError, match="metric='exact_match' has no gradient"):
        run(metric="exact_match")
    with pytest.raises(OptionError, match="site='resid'"):
        run(site="resid")
    with pytest.raises(OptionError, match="over='head' needs site='z'"):
        run(over="head")
    with pytest.raises(OptionError, match="over='neuron' needs site='mlp_post'"):
        run(site="z", over="neuron")
    with pytest.raises(OptionError, match="steps=0"):
        run(method="integrated_gradients", steps=0)
    with pytest.raises(OptionError, match="path='input'"):
        run(method="integrated_gradients", path="input")
    with pytest.raises(SiteError, match="no site 'resid_mid'"):
        run(site="resid_mid")
    with pytest.raises(SiteError, match="layer 5 does not exist"):
        run(layers=[5])
    with pytest.raises(SiteError, match="position 40 does not exist"):
        run(positions=[40])
    with pytest.raises(OptionError, match="batch_size=0"):
        run(batch_size=0)
    with pytest.raises(OptionError, match="memory_budget=0"):
        run(memory_budget=0)
    with pytest.raises(OptionError, match="it must return a tensor of shape"):
        run(metric=lambda logits, ids, mask: logits.sum())
    with pytest.raises(OptionError, match="the metric has no gradient"):
        run(metric=lambda logits, ids, mask: logits.argmax(-1).double().mean(-1))
    with pytest.raises(SequenceError, match="a list is not a SequenceSet"):
        attribute_gradients(model, clean, corrupt.rows())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="site='pattern'"):
        attribute_ablation(model, clean, site="pattern")
    with pytest.raises(SequenceError, match="4 clean and 3 corrupt"):
        attribute_gradients(model, clean, corrupt[:3])
    with pytest.raises(OptionError, match="mean_of_other_heads needs site='z'"):
        attribute_ablation(model, clean, site="mlp_out", mode="mean_of_other_heads")


@pytest.mark.parametrize(("family", "backend"), [("gpt_neox", "bridge"), ("olmo2", "hooked")])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "z", "mlp_post"])
def test_going_back_layer_by_layer_gives_the_same(
    tiny_model: Any, family: str, backend: str, site: str
) -> None:
    model, seqs = tiny_model(family, backend), ragged()
    for options in ({"method": "attribution_patching"}, {"method": "integrated_gradients", "steps": 2}):
        call = partial(attribute_gradients, model, seqs, corrupted(seqs), site=site, batch_size=2, **options)
        whole = call(progress=False)
        parts = call(progress=False, memory_budget=1)
        assert (whole.settings["backward"], parts.settings["backward"]) == ("whole", "by layer")
        same = whole.effect("target_logprob").values, parts.effect("target_logprob").values
        np.testing.assert_allclose(*same, atol=1e-5)


_LONG = """
import resource, sys
import torch, transformers
import memlens as ml
from memlens.sequences.set import SequenceSet
torch.manual_seed(0)
torch.set_num_threads(1)
n = int(sys.argv[1])
shape = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4)
config = transformers.GPTNeoXConfig(vocab_size=500, max_position_embeddings=2048, **shape)
model = ml.load_model(transformers.GPTNeoXForCausalLM(config), device="cpu")
rows = torch.randint(0, 499, (2, n))
rows[1, n - 8 :] = rows[0, n - 8 :]
clean, other = (SequenceSet.from_tokens([row.tolist()], [n - 8]) for row in rows)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ml.attribute_gradients(model, clean, other, site="z", over="head", progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_the_memory_of_gradients_of_long_sequences_is_that_of_one_layer() -> None:
    """With the activations of all layers, and patterns that the bridge kept, it was 613 MiB; it is 269."""
    ran = subprocess.run([sys.executable, "-c", _LONG, "2048"], capture_output=True, text=True, check=True)
    assert int(ran.stdout.split()[-1]) < 400 * 1024  # kB
