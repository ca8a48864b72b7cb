"""Bounds of the bypass: what is measured is what the model does, and never passes what was bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import memlens as ml
from memlens.errors import OptionError, SiteError, UnsupportedModelError
from memlens.forward.hooks import hook_name
from memlens.forward.read_weights import attention_post_norm
from tests.devices import dev
from tests.small import CASES, ragged
from tests.tiny import D_VOCAB, write_tiny

ROUNDING = 1e-9
"""Relative; a bound may be equal to what it bounds (in parallel blocks B4 is)."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "clipped values": ("olmo", {"clip_qkv": 0.4}),
    "multi-query Llama": ("llama", {"num_key_value_heads": 1}),
    "YaRN": (
        "olmo3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "query biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "ReLU": ("gpt_neox", {"hidden_act": "relu"}),
}


def bounds(model: Any, seqs: ml.SequenceSet, **options: Any) -> Any:
    return ml.bypass.bounds(model, seqs, progress=False, **options).data


def assert_nothing_passes_its_bound(found: Any) -> None:
    """Everything that is measured and bounded, with no more room than rounding takes."""
    tokens = found.measured <= found.limit * (1 + ROUNDING) + found.rounding
    assert bool((tokens | found.measured.isnull()).all())
    assert float(found.identity_error.max()) < 1e-11


@pytest.fixture(scope="module")
def own_model(tiny_folder: Any, tiny_model: Any) -> Callable[[str, str], Any]:
    """A model in float64 that this module may change."""
    loaded: dict[tuple[str, str], Any] = {}

    def model_of(family: str, backend: str) -> Any:
        tiny_model(family, backend)  # skips what the installed release does not have
        if (family, backend) not in loaded:
            folder = tiny_folder(family)
            loaded[family, backend] = ml.load_model(folder, backend=backend, dtype="float64", device=dev())
        return loaded[family, backend]

    return model_of


@settings(
    max_examples=4,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
@pytest.mark.parametrize(("family", "backend"), CASES)
def test_no_measured_value_passes_its_bound(own_model: Any, family: str, backend: str, data: Any) -> None:
    """Over drawn weights, from small to large ones, and drawn sequences."""
    model = own_model(family, backend)
    seed = data.draw(st.integers(0, 2**31 - 1), label="seed of the weights")
    scale = 10 ** data.draw(st.floats(-1.5, 1), label="log10 of their scale")
    rows = data.draw(
        st.lists(st.lists(st.integers(0, D_VOCAB - 1), min_size=2, max_size=16), min_size=1, max_size=3),
        label="sequences",
    )
    # a bridge computes with q, k and v, and refuses edits of both them and what they are cut from
    kept = [(p, p.data) for name, p in model.named_parameters() if ".qkv." not in name]
    generator = torch.Generator().manual_seed(seed)
    try:
        for p, weights in kept:
            noise = torch.randn(weights.shape, generator=generator, dtype=weights.dtype)
            p.data = scale * weights.std().nan_to_num(0.3) * noise + (p.data if p.ndim == 1 else 0)
        found = bounds(model, ml.SequenceSet.from_tokens(rows, 1))
    finally:
        for p, weights in kept:
            p.data = weights
    assert_nothing_passes_its_bound(found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bounds_hold_for_variants(tmp_path: Any, variant: str) -> None:
    family, overrides = VARIANTS[variant]
    model = ml.load_model(write_tiny(family, tmp_path, **overrides), backend="bridge", device=dev())
    found = bounds(model, ragged())
    assert_nothing_passes_its_bound(found)
    assert float(found.measured.max()) > 1e-3


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neo", "olmo2"])
def test_bounds_hold_with_folded_norms(tiny_folder: Any, tiny_model: Any, family: str) -> None:
    plain = tiny_model(family, "hooked")
    model = ml.load_model(tiny_folder(family), backend="hooked", device=dev(), process_weights=True)
    found, want = (bounds(m, ragged()) for m in (model, plain))
    assert_nothing_passes_its_bound(found)
    assert np.allclose(found.kl, want.kl, rtol=1e-3, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("family", "backend"), CASES)
@torch.no_grad()
def test_what_is_measured_is_what_the_bypassed_model_does(own_model: Any, family: str, backend: str) -> None:
    model, seqs = own_model(family, backend), ragged(3)[:1]
    found = bounds(model, seqs).isel(sequence=0)
    last = len(model.blocks) - 1
    names = [hook_name(s, n) for s in ("attn_out", "resid_post") for n in range(last + 1)]
    at = (seqs.target_positions[0] - 1)[seqs.target_mask[0]]
    plain_logits, plain = model.run_with_cache(seqs.tokens, names_filter=names)
    for layer in range(last + 1):
        with ml.bypassed(model, [layer]):
            logits, other = model.run_with_cache(seqs.tokens, names_filter=names)
        change = {name: (other[name] - plain[name])[0] for name in names}
        here = found.sel(layer=layer)
        for bound, site in (("B3", "attn_out"), ("B4", "resid_post")):
            want = change[hook_name(site, layer)].norm(dim=-1)
            assert here.measured.sel(bound=bound).values == pytest.approx(want.numpy(), abs=1e-4)
        if attention_post_norm(model, layer) is None:
            assert np.array_equal(here.measured.sel(bound="B1"), here.measured.sel(bound="B3"))
        p, q = (x[0, at].log_softmax(-1) for x in (plain_logits, logits))
        kl = (p.exp() * (p - q)).sum(-1).numpy()
        n = len(at)
        assert here.kl.values[:n] == pytest.approx(kl, abs=1e-4)
        moved = (logits - plain_logits)[0, at]
        assert here.max_logit_change.values[:n] == pytest.approx(moved.abs().amax(-1).numpy(), abs=1e-3)
        assert here.logit_change.values[:n] == pytest.approx(moved.norm(dim=-1).numpy(), abs=1e-3)


def test_a_sequence_s_numbers_do_not_depend_on_its_batch(tiny_model: Any) -> None:
    model, seqs = tiny_model("olmo2", "bridge"), ragged(4)
    whole = bounds(model, seqs)
    for i in range(len(seqs)):
        alone = bounds(model, seqs[i])
        n, targets = int(seqs.lengths[i]), int(seqs.n_targets[i])
        part = whole.isel(sequence=[i], position=slice(0, n), target=slice(0, targets))
        for name in alone.data_vars:
            if name != "slack":
                assert np.allclose(part[name], alone[name], rtol=1e-6, atol=1e-9, equal_nan=True), name
    assert bool(whole.measured.isel(sequence=2, position=slice(12, None)).isnull().all())


def test_the_first_token_cannot_change_and_bounds_know_it(tiny_model: Any) -> None:
    found = bounds(tiny_model("gpt_neo", "bridge"), ragged())
    first = found.isel(position=0)
    assert float(first.measured.max()) < 1e-12
    assert float(first.limit.sel(bound=["B1", "B2", "B4"]).max()) < 1e-9
    assert float(first.predictor.max()) == 0


def test_attention_that_writes_nothing_has_bounds_of_zero(tiny_folder: Any) -> None:
    model = ml.load_model(tiny_folder("llama_gqa"), backend="bridge", device=dev())
    with torch.no_grad():
        model.original_model.model.layers[1].self_attn.o_proj.weight.zero_()
    found = bounds(model, ragged())
    assert float(found.limit.sel(layer=1).max()) == 0
    assert float(found.kl.sel(layer=1).max()) == 0
    assert float(found.predictor.sel(layer=1).max()) == 0
    assert float(found.measured.sel(layer=0).max()) > 1e-3


def test_bounds_say_something(tiny_model: Any) -> None:
    """B1 and B2 stand within a small factor of what they bound."""
    found = bounds(tiny_model("gpt_neox_sequential", "bridge"), ragged(6))
    slack = found.slack.median(("sequence", "layer", "position"))
    assert (
        1 < float(slack.sel(bound="B1")) < float(slack.sel(bound="B2")) < float(slack.sel(bound="B3")) < 100
    )
    assert float(slack.sel(bound="B4")) < 30


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_model_is_given_back_as_it_was(tiny_folder: Any, dtype: str) -> None:
    model = ml.load_model(tiny_folder("olmo2"), backend="bridge", dtype=dtype, device=dev())
    tokens, before = ragged().tokens, state_of(model)
    logits = model(tokens)
    wide = bounds(model, ragged())
    assert wide.measured.dtype == np.float64
    assert float(wide.identity_error.max()) < 1e-12
    edit = ml.Intervention("half", [("blocks.1.attn.hook_z", lambda x, hook: x / 2)])
    with ml.applied(model, edit), pytest.raises(UnsupportedModelError, match="block 1 does not compute"):
        bounds(model, ragged())
    assert state_of(model) == before
    assert torch.equal(model(tokens), logits)


def state_of(model: Any) -> list[Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(n, t.data_ptr(), t.dtype) for n, t in tensors] + [model.cfg.dtype]


def test_layers_and_settings(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    whole, some = (bounds(model, ragged()), ml.bypass.bounds(model, ragged(), layers=[2, 0], progress=False))
    assert some.kind == "bypass_bounds"
    assert some["layer"].values.tolist() == [2, 0]
    assert np.allclose(some["limit"], whole.limit.sel(layer=[2, 0]), equal_nan=True)
    assert np.allclose(some["kl"], whole.kl.sel(layer=[2, 0]), equal_nan=True)
    assert some.settings["dtype"] == "float64"
    assert "not a published theorem" in some.settings["bounds_are"]
    narrow = bounds(model, ragged(), dtype="float32")
    assert np.allclose(narrow.limit, whole.limit, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_figures(tiny_model: Any) -> None:
    result = ml.bypass.bounds(tiny_model("gpt_neox", "bridge"), ragged(), progress=False)
    fig = result.plot()
    lines = {t.name: np.array(t.y, dtype=float) for t in fig.data if t.mode == "lines+markers"}
    want = result["limit"].sel(bound="B2").mean("position").mean("sequence")
    assert np.allclose(lines["B2: attention to others"], want)
    assert (lines["attention, measured"] <= lines["B1: what heads mix"]).all()
    assert fig.layout.yaxis.type == "log"
    assert set(lines) == {
        "attention, measured", "B1: what heads mix", "B2: attention to others", "B3: weights alone"
    }  # fmt: skip
    olmo2 = ml.bypass.bounds(tiny_model("olmo2", "bridge"), ragged(), progress=False)
    lines = {t.name: np.array(t.y, dtype=float) for t in olmo2.plot().data if t.mode == "lines+markers"}
    assert (lines["after its norm, measured"] <= lines["B3: weights alone"]).all()
    assert (lines["block, measured"] <= lines["B4: the block"]).all()
    slack = {t.name for t in result.plot("slack").data if t.mode == "lines+markers"}
    assert slack == {"B1", "B2", "B3", "B4"}
    assert result.plot("kl").layout.yaxis.title.text == "KL of the predictions (nats)"
    with pytest.raises(OptionError, match="group= is not drawn"):
        result.plot(group="domain")


def test_bounds_are_their_formulas(own_model: Any) -> None:
    """B1 to B3, and B4 of a parallel block, from the hooks and weights of a HookedTransformer."""
    model, seqs = own_model("gpt_neox", "hooked"), ml.SequenceSet.from_tokens([[5, 9, 2, 44, 9, 7, 30]], 3)
    found = bounds(model, seqs)
    with torch.no_grad():
        _, cache = model.run_with_cache(seqs.tokens)
    for layer, block in enumerate(model.blocks):
        norm, (pattern,) = block.ln1, cache["pattern", layer]
        z = (cache["normalized", layer, "ln1"][0] * norm.w + norm.b).double()
        products = block.attn.W_V.double() @ block.attn.W_O.double()
        gains = torch.linalg.matrix_norm(products, ord=2)
        apart = z[None] - pattern.double() @ z
        between = (z[:, None] - z[None]).norm(dim=-1)
        expected = {
            "B1": (gains[:, None] * apart.norm(dim=-1)).sum(0),
            "B2": between.tril().amax(1) * (gains[:, None] * (1 - pattern.diagonal(0, 1, 2))).sum(0),
            "B3": torch.full((7,), 2 * z.shape[1] ** 0.5 * float(norm.w.abs().max()) * float(gains.sum())),
            "B4": (apart @ products).sum(0).norm(dim=-1),
        }
        for name, limit in expected.items():
            ours = found.limit.sel(bound=name, layer=layer).values[0]
            np.testing.assert_allclose(ours, limit.detach().numpy(), rtol=1e-6, atol=1e-9, err_msg=name)


def test_bad_input(tiny_folder: Any, tiny_model: Any) -> None:
    model = tiny_model("gpt_neox", "bridge")
    folded = ml.load_model(tiny_folder("gpt_neox"), backend="bridge", device=dev(), process_weights=True)
    with pytest.raises(UnsupportedModelError, match="load it with process_weights=False"):
        bounds(folded, ragged())
    with pytest.raises(SiteError, match="layer 7 does not exist"):
        bounds(model, ragged(), layers=[7])
    with pytest.raises(OptionError, match=r"layers=\[\] selects nothing"):
        bounds(model, ragged(), layers=[])
    with pytest.raises(OptionError, match="dtype='bfloat16' rounds too much"):
        bounds(model, ragged(), dtype="bfloat16")
