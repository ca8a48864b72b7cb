"""Blocks as functions: their intermediate results are what the model's own hooks see."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memlens as ml
from memlens.forward.batches import at_positions
from memlens.forward.blocks import FunctionalBlocks
from memlens.forward.read_weights import attention_post_norm
from memlens.instruments.bypass.traces import BlockTrace, trace_block
from tests.devices import dev
from tests.small import CASES
from tests.tiny import random_tokens

CHOSEN = [case for case in CASES if case[0] in ("gpt_neox", "olmo2", "olmo3", "gpt_neo", "gpt_bigcode")]


@pytest.fixture(params=CHOSEN, ids="-".join)
def case(
    request: pytest.FixtureRequest, tiny_model: Any
) -> tuple[Any, ml.Trunk, FunctionalBlocks, dict[str, Any]]:
    """A model, its trunk and blocks, and its own activations on two sequences."""
    model = tiny_model(*request.param)
    trunk = ml.Trunk(model)
    with torch.no_grad():
        cache = model.run_with_cache(random_tokens(2, 14))[1]
        return model, trunk, FunctionalBlocks(trunk, range(trunk.n_layers), 14), cache


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_trace_holds_what_hooks_see(case: Any) -> None:
    model, trunk, blocks, cache = case
    for layer in range(trunk.n_layers):
        at = f"blocks.{layer}."
        resid = cache[at + "hook_resid_pre"]
        trace = trace_block(blocks, layer, resid)
        assert trace.resid is resid
        close(trace.v, cache[at + "attn.hook_v"].transpose(1, 2))
        close(trace.added, cache[at + "hook_attn_out"])
        post = attention_post_norm(model, layer)
        close(trace.added, trace.projected if post is None else post(trace.projected))
        close(trace.out, cache[at + "hook_resid_post"])
        close(trace.mlp_from, resid if trunk.parallel else cache[at + "hook_resid_mid"])
        close(trace.mlp_raw, model.blocks[layer].mlp(trace.mlp_in))
        close(trace.out - trace.mlp_from - trunk.parallel * trace.added, cache[at + "hook_mlp_out"])
        close(blocks.pattern(layer, trace.q, trace.k), cache[at + "attn.hook_pattern"])
        z = cache[at + "attn.hook_z"]
        close(blocks.attention_output(layer, z), cache[at + "hook_attn_out"])
        change = torch.zeros_like(z)
        change[:, :, 1:3] = torch.randn_like(change[:, :, 1:3])
        moved = blocks.attention_output(layer, z + change) - blocks.attention_output(layer, z)
        found = blocks.head_output_change(layer, change[:, :, 1:3], slice(1, 3))
        assert (found is None) == (post is not None)
        if found is not None:
            close(found, moved)
        alone = trace_block(blocks, layer, resid, bypass=True)
        own = alone.v.repeat_interleave(trunk.n_heads // trunk.n_kv_heads, 1).transpose(1, 2)
        close(alone.added, blocks.attention_output(layer, own))
        assert (alone.out - trace.out).abs().max() > 1e-3


@torch.no_grad()
def test_positions_after_a_past_and_chosen_queries_are_those_of_the_whole(case: Any) -> None:
    _, trunk, blocks, cache = case
    queries = torch.tensor([[2, 0, 7], [5, 5, 1]])
    for layer in range(trunk.n_layers):
        resid, whole = cache[f"blocks.{layer}.hook_resid_pre"], cache[f"blocks.{layer}.hook_resid_post"]
        close(blocks.run(layer, resid), whole)
        close(blocks.run(layer, resid, queries=queries), at_positions(whole, queries))
        for cut in (1, 6):
            past = blocks.keys_values(layer, resid[:, :cut])
            close(blocks.run(layer, resid[:, cut:], past), whole[:, cut:])
            close(blocks.run(layer, resid[:, cut:], past, queries), at_positions(whole[:, cut:], queries))
            later = blocks.keys_values(layer, resid[:, cut:], cut)
            for first, second, every in zip(past, later, blocks.keys_values(layer, resid), strict=True):
                close(torch.cat([first, second], 2), every)
    final = cache[f"blocks.{trunk.n_layers - 1}.hook_resid_post"]
    close(blocks.unembed(final), trunk.unembed(final))


def traced(value: float) -> BlockTrace:
    shapes = dict.fromkeys(BlockTrace.__dataclass_fields__, (3, 2, 4))
    shapes |= dict.fromkeys("qkv", (3, 2, 2, 4))
    return BlockTrace(**{name: torch.full(shape, value) for name, shape in shapes.items()})


def test_rows_of_traces_are_taken_and_mixed() -> None:
    ones, twos = traced(1.0), traced(2.0)
    mixed = ones.where(torch.tensor([True, False, True]), twos)
    for name in BlockTrace.__dataclass_fields__:
        value = getattr(mixed, name)
        assert value.shape == getattr(ones, name).shape
        assert value.flatten(1).unique(dim=1).flatten().tolist() == [1, 2, 1], name
        assert getattr(mixed[1:], name).flatten(1)[:, 0].tolist() == [2, 1], name


@torch.no_grad()
def test_a_hook_of_the_user_s_leaves_the_model_itself(tiny_folder: Any) -> None:
    model = ml.load_model(tiny_folder("llama"), backend="bridge", device=dev())
    trunk = ml.Trunk(model)
    resid = {0: trunk.embed(random_tokens(2, 9))}
    for layer in range(3):
        resid[layer + 1] = trunk.run(resid[layer], layer, layer + 1)
    assert FunctionalBlocks.of(trunk, resid) is not None
    assert FunctionalBlocks.of(trunk, {n: resid[n] for n in (1, 2)}) is not None
    module = model.blocks[1].mlp
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *args: None)
        assert FunctionalBlocks.of(trunk, resid) is None
        handle.remove()
    model.add_hook("blocks.0.hook_resid_pre", lambda x, hook: None)
    assert FunctionalBlocks.of(trunk, resid) is None
    model.reset_hooks()
    assert FunctionalBlocks.of(trunk, resid) is not None
