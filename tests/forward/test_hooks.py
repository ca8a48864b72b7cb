"""Sites by name, and hooks that are gone afterwards."""

from __future__ import annotations

import re
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
    refuse_sites,
    resolve_hook,
)
from tests.devices import dev
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


DESCRIBED = {
    "resid_pre": ("blocks.7.hook_resid_pre", "batch pos d_model", "layer's input"),
    "resid_mid": ("blocks.7.hook_resid_mid", "batch pos d_model", "between attention and MLP"),
    "resid_post": ("blocks.7.hook_resid_post", "batch pos d_model", "layer's output"),
    "attn_out": ("blocks.7.hook_attn_out", "batch pos d_model", "what attention adds .* after any post-norm"),
    "mlp_out": ("blocks.7.hook_mlp_out", "batch pos d_model", "what the MLP adds .* after any post-norm"),
    "q": ("blocks.7.attn.hook_q", "batch pos head d_head", "queries"),
    "k": ("blocks.7.attn.hook_k", "batch pos kv_head d_head", "keys"),
    "v": ("blocks.7.attn.hook_v", "batch pos kv_head d_head", "values"),
    "z": ("blocks.7.attn.hook_z", "batch pos head d_head", "each head's mixed values"),
    "pattern": ("blocks.7.attn.hook_pattern", "batch head query key", "attention weights"),
    "mlp_post": ("blocks.7.mlp.hook_post", "batch pos d_mlp", "hidden activations"),
}


def test_each_site_has_its_hook_axes_and_meaning() -> None:
    assert list(SITES) == list(DESCRIBED)
    for name, (hook, axes, words) in DESCRIBED.items():
        site = SITES[name]
        assert (site.name, hook_name(name, 7), site.shape) == (name, hook, axes)
        assert re.search(words, site.meaning), name
        assert re.fullmatch(r"[a-z].*[a-z)]|the MLP's hidden activations", site.meaning), name
        assert layer_of(hook) == 7


def test_sites_that_were_found_to_be_misnamed_are_refused(tiny_folder: Any) -> None:
    model = ml.load_model(tiny_folder("llama"), backend="bridge", device=dev())
    assert has_site(model, "q", 1)
    refuse_sites(model, ["q"])
    assert not has_site(model, "q")
    assert has_site(model, "k")
    for layer in (0, 2):
        with pytest.raises(
            SiteError, match=rf"'blocks.{layer}.attn.hook_q' does not do what its name claims"
        ):
            resolve_hook(model, hook_name("q", layer))
    for name in ("blocks.1.attn.hook_k", "hook_embed"):
        assert resolve_hook(model, name) is model.hook_dict[name]
    with pytest.raises(SiteError, match=r"no hook named 'hook_q'"):
        resolve_hook(model, "hook_q")
    refuse_sites(model, [])
    assert has_site(model, "q")


def test_levels_of_hooks_go_up_and_down(tiny_model: Any) -> None:
    model, name = tiny_model("llama", "bridge"), "blocks.1.hook_mlp_out"
    start, point = model.context_level, model.hook_dict[name]
    with attached(model, [(name, lambda x, hook: None)]):
        assert model.context_level == start + 1
        assert [hook.context_level for hook in point.fwd_hooks] == [start + 1]
        with attached(model, [(point, lambda x, hook: None)]):
            assert model.context_level == start + 2
            assert [hook.context_level for hook in point.fwd_hooks] == [start + 1, start + 2]
    assert model.context_level == start
