"""Path patching: against a slow run by hand with every head frozen, and its limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, SequenceError, SiteError
from memlens.instruments.patch.path_patching import patch_paths, path_patches
from tests.small import corrupted, ragged, spread

PARALLEL = "gpt_neox"


def keep(model: Any, tokens: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    store: dict[str, torch.Tensor] = {}

    def look(name: str) -> Any:
        def fn(x: torch.Tensor, hook: Any) -> None:
            store[name] = x.detach().clone()

        return fn

    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(n, look(n)) for n in names])
    return store


def by_hand(
    model: Any,
    base: list[int],
    source: list[int],
    prefix: int,
    sender: tuple[int, int],
    receiver: tuple[str, int | None],
    mlps: str,
) -> float:
    """One path, with full forwards and every head held by a hook of its own layer."""
    n_layers = len(model.blocks)
    z = [f"blocks.{n}.attn.hook_z" for n in range(n_layers)]
    mlp = [f"blocks.{n}.hook_mlp_out" for n in range(n_layers)]
    tokens = torch.tensor([base])
    old = keep(model, tokens, [*z, *mlp])
    new = keep(model, torch.tensor([source]), z)
    layer, head = sender
    held = dict(old)
    held[z[layer]] = held[z[layer]].clone()
    held[z[layer]][:, :, head] = new[z[layer]][:, :, head]
    frozen = z if mlps == "recomputed" else [*z, *mlp]
    target, part = receiver
    taken: dict[str, torch.Tensor] = {}

    def hold(name: str) -> Any:
        return lambda x, hook: held[name].clone()

    def take(x: torch.Tensor, hook: Any) -> None:
        taken["x"] = x.detach().clone()

    def give(x: torch.Tensor, hook: Any) -> torch.Tensor:
        out = x.clone()
        out[:, :, part] = taken["x"][:, :, part]
        return out if part is not None else taken["x"]

    hooks = [(name, hold(name)) for name in frozen if name != target]
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=[*hooks, (target, take)])
        if target != f"blocks.{n_layers - 1}.hook_resid_post":
            logits = model.run_with_hooks(tokens, fwd_hooks=[(target, give)])
    logp = logits[0].log_softmax(-1)
    return float(np.mean([logp[p - 1, base[p]].item() for p in range(prefix, len(base))]))


def target_name(model: Any, receiver_input: str, layer: int) -> str:
    if receiver_input == "logits":
        return f"blocks.{len(model.blocks) - 1}.hook_resid_post"
    return (
        f"blocks.{layer}.hook_mlp_out"
        if receiver_input == "mlp"
        else f"blocks.{layer}.attn.hook_{receiver_input}"
    )


INPUTS = ["logits", "q", "k", "v", "mlp"]
VARIANTS = list(zip(["recomputed", "frozen"] * 5, INPUTS * 2, strict=True))
"""All ten, each input with the other `mlps` the second time: every five that follow hold every input."""


@pytest.mark.parametrize(
    ("family", "backend", "mlps", "receiver_input"),
    [(family, backend, *variant) for family, backend, variant in spread(VARIANTS, each=5)],
)
def test_equals_a_slow_run_by_hand(
    tiny_model: Any, family: str, backend: str, mlps: str, receiver_input: str
) -> None:
    model, clean = tiny_model(family, backend), ragged(2)
    corrupt = corrupted(clean)
    kv_heads = ml.Trunk(model).n_kv_heads
    sender, layer, head = (0, 2), 2, 1 if receiver_input == "q" else kv_heads - 1
    receivers: Any = {"logits": None, "mlp": [layer]}.get(receiver_input, [(layer, head)])
    result = patch_paths(
        model, clean, corrupt, senders=[sender], receivers=receivers, receiver_input=receiver_input,
        mlps=mlps, progress=False,
    )  # fmt: skip
    got = result["target_logprob"].values.ravel()
    part = head if receiver_input in ("q", "k", "v") else None
    name = target_name(model, receiver_input, layer)
    want = [
        by_hand(
            model, corrupt.rows()[i], clean.rows()[i], int(clean.prefix_len[i]), sender, (name, part), mlps
        )
        for i in range(2)
    ]
    assert got == pytest.approx(want, abs=1e-5)
    assert abs(result.effect("target_logprob")).max() > 1e-5


@pytest.mark.parametrize(("family", "backend"), [("llama", "bridge"), ("gpt_neo", "bridge")])
def test_a_sequential_blocks_own_mlp_is_reached(tiny_model: Any, family: str, backend: str) -> None:
    model, clean = tiny_model(family, backend), ragged(2)
    corrupt = corrupted(clean)
    for mlps in ("recomputed", "frozen"):
        result = patch_paths(
            model, clean, corrupt, senders=[(1, 0)], receivers=[1], receiver_input="mlp", mlps=mlps,
            direction="noising", progress=False,
        )  # fmt: skip
        want = [
            by_hand(model, clean.rows()[i], corrupt.rows()[i], int(clean.prefix_len[i]), (1, 0),
                    ("blocks.1.hook_mlp_out", None), mlps)
            for i in range(2)
        ]  # fmt: skip
        assert result["target_logprob"].values.ravel() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("receiver_input", ["logits", "q", "mlp"])
def test_a_sender_that_does_not_change_has_no_effect(tiny_model: Any, receiver_input: str) -> None:
    model, clean = tiny_model("olmo2", "bridge"), ragged(2)
    result = patch_paths(
        model, clean, clean, senders=[(0, 0), (0, 3)], receiver_input=receiver_input, progress=False
    )
    effect = result.effect("target_logprob")
    assert float(abs(effect).max()) < 1e-6
    assert bool(result["normalized_effect"].isnull().all())


def test_last_layers_heads_reach_the_logits_whole(tiny_model: Any) -> None:
    """Nothing stands between a parallel block's last head and the logits but the final norm."""
    model, clean = tiny_model(PARALLEL, "bridge"), ragged()
    corrupt = corrupted(clean)
    direct = patch_paths(model, clean, corrupt, senders=[(2, h) for h in range(4)], progress=False)
    whole = ml.patch_activations(model, clean, corrupt, site="z", over="head", layers=[2], progress=False)
    assert direct["target_logprob"].dims == ("sequence", "layer", "head")
    assert np.allclose(direct["target_logprob"], whole["target_logprob"], atol=1e-5)
    earlier = patch_paths(model, clean, corrupt, senders=[(0, h) for h in range(4)], progress=False)
    total = ml.patch_activations(model, clean, corrupt, site="z", over="head", layers=[0], progress=False)
    assert float(abs(earlier["target_logprob"] - total["target_logprob"].values).max()) > 1e-3


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_all_pairs_and_both_engines(tiny_model: Any, engine: str) -> None:
    model, clean = tiny_model("llama_gqa", "bridge"), ragged(2)
    corrupt = corrupted(clean)
    result = patch_paths(
        model, clean, corrupt, receiver_input="k", engine=engine, batch_size=1, progress=False
    )
    data = result["target_logprob"]
    assert data.dims == ("sequence", "sender_layer", "sender_head", "receiver_layer", "receiver_head")
    assert data.shape == (2, 2, 4, 2, 2)  # the last layer sends nothing, the first receives nothing
    assert bool(data.sel(sender_layer=1, receiver_layer=1).isnull().all())
    assert int(data.isel(sequence=0).notnull().sum()) == 4 * 2 * 3
    want = by_hand(
        model, corrupt.rows()[1], clean.rows()[1], int(clean.prefix_len[1]), (1, 3),
        ("blocks.2.attn.hook_k", 0), "recomputed",
    )  # fmt: skip
    cell = data.sel(sender_layer=1, sender_head=3, receiver_layer=2, receiver_head=0)[1]
    assert float(cell) == pytest.approx(want, abs=1e-5)


def test_what_comes_before_a_run_is_checked(tiny_model: Any) -> None:
    model, clean = tiny_model("llama_gqa", "bridge"), ragged(2)
    corrupt = corrupted(clean)
    with pytest.raises(SiteError, match=r"sender \(2, 0\) takes part in no path"):
        patch_paths(model, clean, corrupt, senders=[(0, 0), (2, 0)], receivers=[(1, 0)], receiver_input="q")
    with pytest.raises(SiteError, match=r"receiver \(0, 1\) takes part in no path"):
        patch_paths(model, clean, corrupt, receivers=[(0, 1)], receiver_input="q")
    with pytest.raises(SiteError, match="head 2 does not exist: each layer has heads 0 to 1"):
        patch_paths(model, clean, corrupt, receivers=[(1, 2)], receiver_input="v")
    with pytest.raises(SiteError, match="layer 9 does not exist"):
        patch_paths(model, clean, corrupt, senders=[(9, 0)])
    with pytest.raises(SiteError, match="give pairs"):
        patch_paths(model, clean, corrupt, receivers=[1], receiver_input="q")
    with pytest.raises(OptionError, match="the logits are the only receiver"):
        patch_paths(model, clean, corrupt, receivers=[(1, 0)])
    with pytest.raises(OptionError, match="receiver_input='query'"):
        patch_paths(model, clean, corrupt, receiver_input="query")
    with pytest.raises(OptionError, match="mlps='held'"):
        patch_paths(model, clean, corrupt, mlps="held")
    with pytest.raises(SequenceError, match="2 clean and 1 corrupt"):
        patch_paths(model, clean, corrupt[:1])


def test_parallel_blocks_do_not_reach_their_own_mlp(tiny_model: Any) -> None:
    model, clean = tiny_model(PARALLEL, "bridge"), ragged(2)
    with pytest.raises(SiteError, match="receiver 1 takes part in no path"):
        path_patches(model, clean, clean, senders=[(1, 0)], receivers=[1], receiver_input="mlp")


@pytest.mark.parametrize(("receiver_input", "shape"), [("logits", (3, 4)), ("v", (8, 4)), ("mlp", (12, 3))])
def test_figures(tiny_model: Any, receiver_input: str, shape: tuple[int, int]) -> None:
    model, clean = tiny_model("llama_gqa", "bridge"), ragged(2)
    result = patch_paths(model, clean, corrupted(clean), receiver_input=receiver_input, progress=False)
    fig = result.plot()
    assert fig.data[0].z.shape == shape
    assert "2 sequences" in fig.layout.title.subtitle.text
    one = result.plot("target_logprob", sequence="1")
    want = result.effect("target_logprob")[1].values
    got = one.data[0].z
    assert np.nansum(got) == pytest.approx(np.nansum(want), abs=1e-4)
    if receiver_input == "v":
        assert list(fig.data[0].y[:2]) == ["L0H0", "L0H1"]
        assert list(fig.data[0].x) == ["L1H0", "L1H1", "L2H0", "L2H1"]


def test_nothing_is_left_on_the_model(tiny_model: Any) -> None:
    model, clean = tiny_model("olmo", "bridge"), ragged(2)
    patch_paths(model, clean, corrupted(clean), senders=[(0, 0)], receiver_input="q", progress=False)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
