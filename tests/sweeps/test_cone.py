"""What the fast engine leaves out is what nothing depends on: blocks, positions, queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import memlens as ml
from memlens.forward.blocks import FunctionalBlocks, Stack
from memlens.forward.exclusive import computation
from memlens.forward.hooks import capturing, has_site, hook_name
from memlens.forward.trunk import Trunk
from memlens.sweeps.engine.cone import Cone
from memlens.sweeps.engine.entries import entry_of
from memlens.sweeps.interventions import Reads
from tests.devices import dev
from tests.small import CASES, corrupted, largest_difference, ragged
from tests.tiny import random_tokens

METRICS = ("target_logprob", "margin", "completion_entropy")


@torch.no_grad()
def residuals(trunk: Trunk, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    names = {hook_name("resid_pre", layer): layer for layer in range(trunk.n_layers)}
    with capturing(trunk.model, list(names)) as store:
        final = trunk.run(trunk.embed(tokens))
    return {layer: store[name] for name, layer in names.items()} | {trunk.n_layers: final}


@pytest.mark.parametrize(("family", "backend"), CASES)
@torch.no_grad()
def test_blocks_as_functions_are_the_models_blocks(tiny_model: Any, family: str, backend: str) -> None:
    trunk = Trunk(tiny_model(family, backend))
    resid = residuals(trunk, random_tokens(3, 28))  # keys that attention fills up, from 28 to 32
    blocks = FunctionalBlocks.of(trunk, resid)
    assert blocks is not None
    asked = torch.tensor([[1, 4], [0, 9], [13, 2]])
    for layer in range(trunk.n_layers):
        want = resid[layer + 1]
        assert torch.allclose(blocks.run(layer, resid[layer]), want, atol=1e-5)
        keys, values = blocks.keys_values(layer, resid[layer])
        past = (keys[:, :, :9], values[:, :, :9])
        assert torch.allclose(blocks.run(layer, resid[layer][:, 9:], past), want[:, 9:], atol=1e-5)
        some = blocks.run(layer, resid[layer][:, 9:], past, asked)
        assert torch.allclose(some, want[torch.arange(3)[:, None], 9 + asked], atol=1e-5)
        ends = [Stack(resid[layer]), Stack(resid[layer][:, 9:], past), Stack(resid[layer][1:2, :3])]
        for got, first, rows in zip(
            blocks.run_together(layer, ends), (0, 9, 0), (slice(3), slice(3), slice(1, 2)), strict=True
        ):
            assert torch.allclose(got, want[rows, first : first + got.shape[1]], atol=1e-5)
        ends = [Stack(resid[layer][:, 9:], past, asked), Stack(resid[layer], None, asked + 1)]
        late, early = blocks.run_together(layer, ends)
        assert torch.allclose(late, some, atol=1e-5)
        assert torch.allclose(early, want[torch.arange(3)[:, None], asked + 1], atol=1e-5)
    assert torch.allclose(blocks.unembed(want), trunk.unembed(want), atol=1e-5)


@pytest.mark.parametrize(("family", "backend"), CASES)
@torch.no_grad()
def test_a_change_at_one_position_goes_through_a_layer(tiny_model: Any, family: str, backend: str) -> None:
    trunk = Trunk(tiny_model(family, backend))
    resid = residuals(trunk, random_tokens(2, 20))
    blocks = FunctionalBlocks.of(trunk, resid)
    assert blocks is not None
    draw = torch.Generator().manual_seed(0)
    for layer in range(trunk.n_layers):
        base = blocks.unchanged(layer, resid[layer], resid[layer + 1])
        for places in ([(0, 1), (7, 2), (19, 3)], [(18, 9), (19, 9)]):  # the last in several portions
            new = [torch.randn(2 * n, trunk.d_model, generator=draw).to(resid[0]) for _, n in places]
            changes = [(first, rows) for (first, _), rows in zip(places, new, strict=True)]
            for got, (first, rows) in zip(blocks.run_changed(layer, base, changes), changes, strict=True):
                x = resid[layer].repeat(len(rows) // 2, 1, 1)
                x[:, first] = rows
                torch.testing.assert_close(got, blocks.run(layer, x)[:, first:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_instruments_equal_the_reference(tiny_model: Any, family: str, backend: str) -> None:
    model, clean = tiny_model(family, backend), ragged()
    corrupt = corrupted(clean)
    sites = [("resid_pre", None), ("resid_post", None), ("attn_out", None), ("mlp_out", None), ("z", "head")]
    sites += [("resid_mid", None)] * has_site(model, "resid_mid")
    edits = [
        i
        for site, over in sites
        for i in ml.edits.activation_patches(
            model, clean, site=site, over=over, layers=[0, 2], positions=[0, 7, 17]
        )
    ]
    edits += ml.edits.head_ablations(model, clean, mode="mean", layers=[1], positions="targets")
    edits += ml.edits.attention_bypasses(model, layers=[0, 2, [0, 1]])
    edits = [ml.Intervention(f"{n}", i.hooks, first_position=i.first_position) for n, i in enumerate(edits)]
    fast = ml.sweep(model, corrupt, edits, METRICS, progress=False)
    plain = ml.sweep(model, corrupt, edits, METRICS, engine="reference", progress=False)
    assert largest_difference(fast, plain) < 1e-5
    assert float(abs(fast.effect("target_logprob")).max()) > 1e-2


def test_attention_fills_its_keys_up_where_few_are_missing(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: from more than half of sixteen on, with keys that no query sees."""
    if dev() != "cpu":
        pytest.skip("a CPU's kernel")
    trunk = Trunk(tiny_model("gpt_neox", "bridge"))
    resid = residuals(trunk, random_tokens(2, 33))
    blocks = FunctionalBlocks.of(trunk, resid)
    assert blocks is not None
    seen: list[tuple[int, ...]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def look(q: torch.Tensor, k: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
        seen.append((q.shape[2], k.shape[2], *how["attn_mask"].shape[-2:]))
        return plain(q, k, *rest, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    for width in (33, 31, 25, 24, 16):
        blocks.run(0, resid[0][:, :width])
    keys, values = blocks.keys_values(0, resid[0])
    blocks.run(0, resid[0][:, 20:31], (keys[:, :, :20], values[:, :, :20]))
    assert seen == [(33, 33, 33, 33), (31, 32, 31, 32), (25, 32, 25, 32), (24, 24, 24, 24), (16, 16, 16, 16),
                    (11, 32, 11, 32)]  # fmt: skip


def test_only_the_positions_after_a_change_run(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clean = tiny_model("gpt_neox", "bridge"), ragged()
    ml.sweep(
        model, clean, ml.edits.activation_patches(model, clean, positions=[0]), progress=False
    )  # compare once
    ran: list[tuple[int, ...]] = []
    plain = FunctionalBlocks.run

    def look(self: Any, layer: int, resid: torch.Tensor, *rest: Any, **traced: Any) -> torch.Tensor:
        if not traced:  # the passes of the unchanged model are
            ran.append((layer, *resid.shape[:2]))
        return plain(self, layer, resid, *rest, **traced)

    monkeypatch.setattr(FunctionalBlocks, "run", look)
    one, other = ml.edits.activation_patches(model, corrupted(clean), layers=[1], positions=[15, 16])
    ml.sweep(model, clean, [one + other], progress=False)
    stop = int(clean.lengths.max()) - 1  # the last token predicts nothing
    assert ran == [(1, len(clean), stop - 15), (2, len(clean), stop - 15)]
    ran.clear()
    changed: list[tuple[int, ...]] = []
    shortcut = FunctionalBlocks.run_changed

    def look_at(self: Any, layer: int, base: Any, changes: Any) -> list[torch.Tensor]:
        changed.append((layer, *((first, len(rows)) for first, rows in changes)))
        return shortcut(self, layer, base, changes)

    monkeypatch.setattr(FunctionalBlocks, "run_changed", look_at)
    ml.sweep(model, clean, [other], progress=False)
    assert ran == [(2, len(clean), stop - 16)]
    assert changed == [(1, (16, len(clean)))]


def test_an_edit_of_the_last_blocks_heads_runs_no_block(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    want = ml.ablate_heads(model, seqs, layers=[2], engine="reference", progress=False)
    ml.ablate_heads(model, seqs, layers=[2], progress=False)
    monkeypatch.setattr(Cone, "_run", None)
    got = ml.ablate_heads(model, seqs, layers=[2], progress=False)
    assert np.allclose(got["target_logprob"], want["target_logprob"], atol=1e-5)


@pytest.mark.parametrize("hint", [0, 3, 11, 60])
def test_a_wrong_first_position_changes_nothing(tiny_model: Any, hint: int) -> None:
    model, clean = tiny_model("llama_gqa", "bridge"), ragged()
    patches = ml.edits.activation_patches(model, clean, site="mlp_out", positions=[2, 9, 16])
    told = [ml.Intervention(p.name, p.hooks, p.coords, first_position=hint) for p in patches]
    a, b = (ml.sweep(model, corrupted(clean), e, METRICS, progress=False) for e in (patches, told))
    assert largest_difference(a, b) < 1e-5


def test_a_model_with_other_blocks_runs_its_own(tiny_folder: Any) -> None:
    model, seqs = ml.load_model(tiny_folder("llama"), backend="bridge"), ragged()
    edits = ml.edits.head_ablations(model, seqs)
    before = ml.sweep(model, seqs, edits, METRICS, progress=False)
    mlp = model.blocks[2].mlp.original_component
    inner = mlp.act_fn
    mlp.act_fn = torch.nn.Sequential(inner, torch.nn.Tanh())  # the blocks take the MLP as it is
    same = ml.sweep(model, seqs, edits, METRICS, progress=False)
    assert largest_difference(before, same) > 1e-3
    plain = ml.sweep(model, seqs, edits, METRICS, engine="reference", progress=False)
    assert largest_difference(same, plain) < 1e-5
    norm = model.blocks[2].ln1.original_component
    norm.register_forward_hook(lambda module, args, out: out * 1.1)  # no TransformerLens hook knows of it
    trunk = Trunk(model)
    assert FunctionalBlocks.of(trunk, residuals(trunk, seqs.tokens)) is None
    hooked = ml.sweep(model, seqs, edits, METRICS, progress=False)
    plain = ml.sweep(model, seqs, edits, METRICS, engine="reference", progress=False)
    assert largest_difference(hooked, plain) < 1e-5


def test_a_block_that_differs_is_noticed(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = ml.load_model(tiny_folder("olmo2"), backend="bridge"), random_tokens(1, 12)
    trunk = Trunk(model)
    resid = residuals(trunk, tokens)
    assert FunctionalBlocks.of(trunk, resid) is not None
    other = ml.load_model(tiny_folder("olmo2"), backend="bridge")
    hf = other.blocks[1].attn.original_component
    monkeypatch.setattr(hf, "scaling", hf.scaling * 1.01)
    assert FunctionalBlocks.of(Trunk(other), residuals(Trunk(other), tokens)) is not None
    monkeypatch.setattr(FunctionalBlocks, "add_mlp", lambda self, layer, resid: resid)
    third = ml.load_model(tiny_folder("olmo2"), backend="bridge")
    assert FunctionalBlocks.of(Trunk(third), residuals(Trunk(third), tokens)) is None


def test_which_edits_are_carried_by_themselves() -> None:
    def edit(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x

    def entry(*hooks: tuple[str, Any]) -> Any:
        return entry_of(ml.Intervention("edit", hooks))

    assert entry(("blocks.1.attn.hook_z", edit)).next_layer() == 2
    assert entry(("blocks.1.hook_resid_pre", edit)).next_layer() == 1
    assert entry(("blocks.1.attn.hook_v", Reads(edit)), ("blocks.1.attn.hook_z", edit)).site == "z"
    assert entry(("blocks.1.attn.hook_v", edit), ("blocks.1.attn.hook_z", edit)) is None
    assert entry(("blocks.1.attn.hook_z", Reads(edit)), ("blocks.1.attn.hook_z", edit)) is None
    assert entry(("blocks.2.attn.hook_v", Reads(edit)), ("blocks.1.attn.hook_z", edit)) is None
    assert entry(("blocks.1.attn.hook_q", edit)) is None
    assert entry(("hook_embed", edit)) is None


@pytest.mark.parametrize("family", ["gpt_neox", "llama_gqa", "olmo2"])
def test_plan_counts_the_operations_that_run(tiny_model: Any, family: str) -> None:
    model, clean = tiny_model(family, "bridge"), ragged(2)
    corrupt = corrupted(clean)
    edits = [
        *ml.edits.activation_patches(model, clean, layers=[1, 2], positions=range(0, 16, 3)),
        *ml.edits.head_ablations(model, clean, layers=[0]),
    ]
    edits = [replace(edit, name=f"{n}") for n, edit in enumerate(edits)]
    base = [ml.Intervention("none", [("blocks.2.hook_resid_post", lambda x, hook: None)])]
    with computation(model):
        for some in (edits, base):  # what is asked once is not counted
            ml.sweep(model, corrupt, some, progress=False)
        with FlopCounterMode(display=False) as alone:
            ml.sweep(model, corrupt, base, progress=False)
        with FlopCounterMode(display=False) as counter:
            ml.sweep(model, corrupt, edits, progress=False)
    cost, least = (ml.plan(model, corrupt, e, calibrate=False) for e in (edits, base))
    want = cost.block_flops + cost.unembed_flops - least.block_flops - least.unembed_flops
    got = counter.get_total_flops() - alone.get_total_flops()
    assert got == pytest.approx(want, rel=0.15)
