"""Sites by name, and hooks that are gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memlens as ml
from memlens.errors import OptionError, SiteError
from memlens.forward.hooks import (
    SITES,
    attached,
    capturing,
    check_head,
    chosen_layers,
    has_site,
    hook_name,
    layer_of,
    resolve_hook,
)
from tests.tiny import random_tokens


@pytest.mark.parametrize(("family", "kv_heads"), [("llama_gqa", 2), ("llama", 4)])
@torch.no_grad()
def test_sites_have_the_axes_that_they_name(family: str, kv_heads: int, tiny_model: Any) -> None:
    model, tokens = tiny_model(family, "bridge"), random_tokens()
    sizes = {"batch": len(tokens), "pos": tokens.shape[1], "query": tokens.shape[1], "key": tokens.shape[1]}
    sizes |= {"d_model": 32, "head": 4, "kv_head": kv_heads, "d_head": 8, "d_mlp": 64}
    names = {site: hook_name(site, 1) for site in SITES}
    with capturing(model, list(names.values())) as acts:
        model(tokens)
    for site, name in names.items():
        assert list(acts[name].shape) == [sizes[axis] for axis in SITES[site].shape.split()], site
        assert (SITES[site].name, layer_of(name)) == (site, 1)
        assert SITES[site].meaning
    assert layer_of("blocks.12.hook_resid_pre") == 12
    assert layer_of("hook_blocks.3.x") is None
    with pytest.raises(OptionError, match="site='resid'"):
        hook_name("resid", 0)


def test_what_a_model_has(tiny_model: Any) -> None:
    parallel, sequential = tiny_model("gpt_neox", "bridge"), tiny_model("llama", "bridge")
    assert [has_site(model, "resid_mid") for model in (parallel, sequential)] == [False, True]
    assert has_site(sequential, "z", 2)
    assert not has_site(sequential, "z", 3)
    assert chosen_layers(None, 3) == [0, 1, 2]
    assert chosen_layers([2, 0], 3) == [2, 0]
    for bad in ([3], [0, -1]):
        with pytest.raises(
            SiteError, match=rf"layer {bad[-1]} does not exist: the model has layers 0 to 2\."
        ):
            chosen_layers(bad, 3)
    check_head(3, 4)
    check_head(0, 4)
    for head in (-1, 4):
        with pytest.raises(SiteError, match=rf"head {head} does not exist: each layer has heads 0 to 3\."):
            check_head(head, 4)
    with pytest.raises(SiteError, match=r"no hook named 'blocks.1.attn.hook_zz'\..*blocks.1.attn.hook_z"):
        resolve_hook(sequential, "blocks.1.attn.hook_zz")
    assert resolve_hook(sequential, "blocks.1.attn.hook_z") is sequential.hook_dict["blocks.1.attn.hook_z"]


@torch.no_grad()
def test_hooks_of_a_with_statement_are_removed_and_no_others(tiny_model: Any) -> None:
    model, tokens, name = tiny_model("llama", "bridge"), random_tokens(), "blocks.1.hook_mlp_out"
    point, order = model.hook_dict[name], list[str]()

    def note(word: str) -> Any:
        return lambda x, hook: order.append(word)

    def run() -> list[str]:
        order.clear()
        model(tokens)
        return list(order)

    with attached(model, [(name, note("outer")), (point, note("second"))]):
        with attached(model, [(name, note("inner")), (name, note("last"))]):
            assert run() == ["outer", "second", "inner", "last"]
        assert run() == ["outer", "second"]
        with attached(model, [(name, note("first"))], prepend=True):
            assert run() == ["first", "outer", "second"]
        with pytest.raises(ZeroDivisionError), attached(model, [(name, note("inner"))]):
            raise ZeroDivisionError
        with (
            pytest.raises(SiteError),
            attached(model, [(name, note("inner")), ("blocks.9.hook_z", note("no"))]),
        ):
            pass
        assert run() == ["outer", "second"]
    assert run() == []
    assert not point.fwd_hooks


@torch.no_grad()
def test_captured_activations_are_copies_before_or_after_the_user_s_hooks(tiny_model: Any) -> None:
    model, tokens, name = tiny_model("llama", "bridge"), random_tokens(), "blocks.1.hook_mlp_out"
    with capturing(model, [name]) as plain:
        model(tokens)
    double = ml.Intervention("double", [(name, lambda x, hook: x.mul_(2))])
    with ml.applied(model, double):
        with capturing(model, [name]) as after:
            model(tokens)
        with capturing(model, [name], before_hooks=True) as before:
            model(tokens)
    torch.testing.assert_close(after[name], 2 * plain[name])
    torch.testing.assert_close(before[name], plain[name])
