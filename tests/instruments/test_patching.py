"""Activation patching: identities, and one cell by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, SequenceError, SilentInterventionError, SiteError
from memlens.forward.hooks import hook_name
from tests.small import CASES, corrupted, ragged, spread


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_patching_everything_from_clean_gives_clean(tiny_model: Any, family: str, backend: str) -> None:
    model, clean = tiny_model(family, backend), ragged()
    corrupt = corrupted(clean)
    patches = ml.edits.activation_patches(model, clean, site="resid_pre", layers=[0, 2])
    whole = [
        ml.Intervention(
            f"all of {layer}", [h for p in patches if p.coords["layer"] == layer for h in p.hooks]
        )
        for layer in (0, 2)
    ]
    result = ml.sweep(model, corrupt, whole, progress=False)
    want = ml.measure(model, clean)["target_logprob"]
    for i in range(2):
        assert result["target_logprob"][:, i].values == pytest.approx(want, abs=1e-5)
    assert abs(result["target_logprob_baseline"].values - want).max() > 1e-3


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out", "z"])
def test_one_cell_by_hand(tiny_model: Any, site: str) -> None:
    model, clean = tiny_model("llama_gqa", "bridge"), ragged()
    corrupt = corrupted(clean)
    result = ml.patch_activations(model, clean, corrupt, site=site, progress=False)
    name = result.settings["site"]
    name = f"blocks.1.attn.hook_{name}" if name == "z" else f"blocks.1.hook_{name}"
    row, position = 2, 5
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([clean.rows()[row]]), names_filter=[name])

        def patch(x: torch.Tensor, hook: Any) -> torch.Tensor:
            x = x.clone()
            x[:, position] = cache[name][:, position]
            return x

        tokens = torch.tensor([corrupt.rows()[row]])
        logp = model.run_with_hooks(tokens, fwd_hooks=[(name, patch)])[0].log_softmax(-1)
    start = int(clean.prefix_len[row])
    want = np.mean([logp[p - 1, tokens[0, p]].item() for p in range(start, tokens.shape[1])])
    assert float(result["target_logprob"].sel(layer=1, position=position)[row]) == pytest.approx(
        want, abs=1e-5
    )


@pytest.mark.parametrize("family", ["gpt_neox_sequential", "gpt_neo", "olmo", "olmo2", "olmo3"])
def test_resid_mid_is_the_whole_residual_on_both_backends(tiny_model: Any, family: str) -> None:
    """Between attention and MLP the whole sum is patched, not the MLP's branch of it alone."""
    clean = ragged()
    first, last = 0, int(clean.lengths.max()) - 1
    bridge, corrupt = tiny_model(family, "bridge"), corrupted(clean)
    patches = ml.edits.activation_patches(bridge, clean, site="resid_mid", layers=[1])
    whole = ml.Intervention("all", [h for p in patches for h in p.hooks])
    restored = ml.sweep(bridge, corrupt, [whole], progress=False)["target_logprob"][:, 0]
    assert len(patches) == last - first
    assert restored.values == pytest.approx(ml.measure(bridge, clean)["target_logprob"], abs=1e-5)
    hooked = tiny_model(family, "hooked")
    a = ml.patch_activations(bridge, clean, corrupt, site="resid_mid", progress=False)["target_logprob"]
    b = ml.patch_activations(hooked, clean, corrupt, site="resid_mid", progress=False)["target_logprob"]
    assert np.allclose(a, b, atol=1e-4, equal_nan=True)


def test_both_directions_meet(tiny_model: Any) -> None:
    model, clean = tiny_model("gpt_neox", "bridge"), ragged()
    corrupt = corrupted(clean)
    into_corrupt = ml.patch_activations(model, clean, corrupt, progress=False)
    into_clean = ml.patch_activations(model, clean, corrupt, direction="noising", progress=False)
    for name in ("target_logprob_clean", "target_logprob_corrupt"):
        assert into_corrupt[name].values == pytest.approx(into_clean[name].values, abs=1e-5)
    swapped = ml.patch_activations(model, corrupted(clean), clean, progress=False)
    assert swapped["target_logprob"].values == pytest.approx(
        into_clean["target_logprob"].values, abs=1e-5, nan_ok=True
    )


@pytest.mark.parametrize("corruption", ["prefix", "edit"])
def test_per_token_and_kept_in_a_folder(tiny_model: Any, tmp_path: Any, corruption: str) -> None:
    model, clean = tiny_model("gpt_neox", "bridge"), ragged()
    edit = ml.Intervention("flipped", [("blocks.0.hook_resid_pre", lambda x, hook: x.flip(-1))])
    corrupt = corrupted(clean) if corruption == "prefix" else edit
    options: dict[str, Any] = {"layers": [1], "metrics": ("target_logprob",), "progress": False}
    whole = ml.patch_activations(model, clean, corrupt, **options)
    each = ml.patch_activations(model, clean, corrupt, per_token=True, out=tmp_path, **options)
    assert each["target_logprob"].dims == ("sequence", "layer", "position", "target")
    for name in ("target_logprob", "target_logprob_clean", "target_logprob_corrupt"):
        assert np.allclose(each[name].mean("target"), whole[name], atol=1e-6, equal_nan=True)
    low, high = each["target_logprob_corrupt"], each["target_logprob_clean"]
    want = ((each["target_logprob"] - low) / (high - low)).transpose(*each["target_logprob"].dims)
    assert np.allclose(each["normalized_effect"].transpose(*want.dims), want, equal_nan=True)
    assert ml.load_result(tmp_path / "result.nc").data.identical(each.data)


def test_normalized_effect(tiny_model: Any) -> None:
    model, clean = tiny_model("gpt_neox", "bridge"), ragged()
    corrupt = corrupted(clean)
    data = ml.patch_activations(model, clean, corrupt, progress=False).data
    want = (data.target_logprob - data.target_logprob_corrupt) / (
        data.target_logprob_clean - data.target_logprob_corrupt
    )
    assert np.allclose(data.normalized_effect, want, equal_nan=True)
    same = ml.patch_activations(model, clean, clean, layers=[0], positions=[0, 3], progress=False)
    assert bool(same["normalized_effect"].isnull().all())
    assert np.allclose(same["target_logprob"], same["target_logprob_clean"].values[:, None, None], atol=1e-6)


def test_cells_beyond_a_short_sequence_are_empty(tiny_model: Any) -> None:
    model, clean = tiny_model("gpt_neox", "bridge"), ragged()
    data = ml.patch_activations(model, clean, corrupted(clean), layers=[1], progress=False, batch_size=1).data
    for row, length in enumerate(clean.lengths.tolist()):
        here = data.target_logprob[row, 0].notnull().values
        assert here.tolist() == [p < length - 1 for p in range(data.sizes["position"])]


def test_heads_together_are_the_layer(tiny_model: Any) -> None:
    model, clean = tiny_model("olmo", "bridge"), ragged()
    corrupt = corrupted(clean)
    heads = ml.edits.activation_patches(model, clean, site="z", over="head", layers=[1])
    whole = ml.edits.activation_patches(model, clean, site="attn_out", layers=[1])
    joint = [
        ml.Intervention("heads", [h for i in heads for h in i.hooks]),
        ml.Intervention("attn", [h for i in whole for h in i.hooks]),
    ]
    values = ml.sweep(model, corrupt, joint, progress=False)["target_logprob"]
    assert np.allclose(values[:, 0], values[:, 1], atol=1e-5)
    single = ml.patch_activations(
        model, clean, corrupt, site="z", over="head_position", layers=[1], positions=[3]
    )
    assert single["target_logprob"].dims == ("sequence", "layer", "head", "position")


@pytest.mark.parametrize(
    ("family", "backend", "site"),
    [*((*case, "pattern") for case in CASES), *spread(["q", "k", "v"])],
)
def test_inside_attention(tiny_model: Any, family: str, backend: str, site: str) -> None:
    """Patches of all heads of a site together are what a plain hook with the clean cache does."""
    model, clean = tiny_model(family, backend), ragged()
    corrupt = corrupted(clean)
    if site == "pattern" and (family, backend) == ("gpt_neo", "bridge"):
        with pytest.raises(SilentInterventionError, match="hook_pattern"):
            ml.patch_activations(model, clean, corrupt, site=site, layers=[1], progress=False)
        return
    name = hook_name(site, 1)
    axis = 1 if site == "pattern" else 2
    options: dict[str, Any] = {"site": site, "layers": [1], "metrics": ("target_logprob",), "progress": False}
    by_head = ml.patch_activations(model, clean, corrupt, over="head", **options)
    by_place = ml.patch_activations(model, clean, corrupt, positions=[2, 9], **options)
    both = ml.patch_activations(model, clean, corrupt, over="head_position", positions=[9], **options)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean.tokens, names_filter=[name])
    heads = cache[name].shape[axis]
    assert by_head.data.sizes["head"] == (model.cfg.n_heads if site in ("q", "pattern") else heads)

    def patch(*index: Any) -> ml.Intervention:
        def fn(x: torch.Tensor, hook: Any) -> torch.Tensor:
            x = x.clone()
            x[index] = cache[name][index]
            return x

        return ml.Intervention(str(index), [(name, fn)])

    every = slice(None)
    place = (every, every, 9) if site == "pattern" else (every, 9)
    head = (every, heads - 1) if axis == 1 else (every, every, heads - 1)
    cell = (every, heads - 1, 9) if axis == 1 else (every, 9, heads - 1)
    plain = ml.sweep(
        model, corrupt, [patch(*place), patch(*head), patch(*cell)], engine="reference", progress=False
    )["target_logprob"].values
    assert np.allclose(by_place["target_logprob"][:, 0, 1], plain[:, 0], atol=1e-5, equal_nan=True)
    assert np.allclose(by_head["target_logprob"][:, 0, -1], plain[:, 1], atol=1e-5)
    assert np.allclose(both["target_logprob"][:, 0, -1, 0], plain[:, 2], atol=1e-5, equal_nan=True)
    assert float(abs(by_head.effect("target_logprob")).max()) > 1e-5


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "z"])
def test_corrupted_by_an_edit(tiny_model: Any, site: str, direction: str) -> None:
    model, clean = tiny_model("llama_gqa", "bridge"), ragged()
    first = ml.Intervention("halved", [("blocks.0.hook_resid_pre", lambda x, hook: x.flip(-1))])
    options: dict[str, Any] = {"site": site, "direction": direction, "progress": False}
    result = ml.patch_activations(model, clean, first, **options)
    whole = ml.sweep(model, clean, [first], engine="reference", progress=False)
    assert np.allclose(result["target_logprob_clean"], whole.baseline("target_logprob"), atol=1e-5)
    assert np.allclose(result["target_logprob_corrupt"], whole["target_logprob"][:, 0], atol=1e-5)
    plain = ml.patch_activations(model, clean, first, engine="reference", **options)
    for name in ("target_logprob", "normalized_effect"):
        assert np.allclose(result[name], plain[name], atol=1e-4, equal_nan=True)
    base = "corrupt" if direction == "denoising" else "clean"
    assert np.allclose(result.baseline("target_logprob"), result[f"target_logprob_{base}"])


def test_bad_input(tiny_model: Any) -> None:
    model, clean = tiny_model("gpt_neox", "bridge"), ragged()
    corrupt = corrupted(clean)
    with pytest.raises(OptionError, match="site='resid'"):
        ml.patch_activations(model, clean, corrupt, site="resid")
    with pytest.raises(OptionError, match="over='head' needs a site with heads"):
        ml.patch_activations(model, clean, corrupt, over="head")
    with pytest.raises(OptionError, match=r"direction='denoise'.*denoising"):
        ml.patch_activations(model, clean, corrupt, direction="denoise")
    with pytest.raises(SiteError, match="parallel blocks have no site 'resid_mid'"):
        ml.patch_activations(model, clean, corrupt, site="resid_mid")
    with pytest.raises(SiteError, match="position 40 does not exist"):
        ml.patch_activations(model, clean, corrupt, positions=[40])
    with pytest.raises(SequenceError, match="4 clean and 3 corrupt"):
        ml.patch_activations(model, clean, corrupt[:3])
    with pytest.raises(SequenceError, match="pair 0 has different continuations"):
        ml.patch_activations(model, clean, ragged(4, seed=7))
