from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import AutoModelForCausalLM

from memlens.errors import SiteError
from memlens.explorer.attention import attention_maps, pack_causal, quantized, unpack_causal
from tests.small import CASES
from tests.tiny import random_tokens


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_maps_are_the_attention_of_hugging_faces_model(
    family: str, backend: str, tiny_model: Callable[..., Any], tiny_folder: Callable[[str], Path]
) -> None:
    tokens = random_tokens(1, 21)[0]
    original = AutoModelForCausalLM.from_pretrained(tiny_folder(family), attn_implementation="eager")
    with torch.no_grad():
        expected = original(tokens[None], output_attentions=True).attentions
    wanted = [(0, 3), (2, 0), (1, 1), (2, 2)]
    maps = attention_maps(tiny_model(family, backend), tokens, wanted)
    assert sorted(maps) == sorted(wanted)
    for (layer, head), found in maps.items():
        difference = np.abs(found / 255 - expected[layer][0, head].numpy())
        assert difference.max() <= 1 / 510 + 1e-5


def test_no_hook_stays_and_only_what_is_asked_for_runs(tiny_model: Callable[..., Any]) -> None:
    model, ran = tiny_model("gpt_neox", "bridge"), []
    attention_maps(model, random_tokens(1, 5)[0], [(1, 0)])  # the model's own facts are asked for once
    hooks = [(f"blocks.{i}.hook_resid_post", lambda x, hook, i=i: ran.append(i)) for i in range(3)]
    with model.hooks(fwd_hooks=hooks):
        attention_maps(model, random_tokens(1, 5)[0], [(1, 0)])
    assert max(ran) == 1
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert attention_maps(model, random_tokens(1, 5)[0], []) == {}


@pytest.mark.parametrize("head", [(3, 0), (0, 4), (-1, 0)])
def test_a_head_that_does_not_exist_is_refused(head: tuple[int, int], tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(SiteError, match="does not exist"):
        attention_maps(tiny_model("gpt_neox", "bridge"), torch.tensor([1, 2]), [head])


@given(
    st.integers(1, 40).flatmap(
        lambda n: arrays(np.uint8, (n, n), elements=st.sampled_from([0, 0, 0, 1, 255]))
    )
)
def test_packing_keeps_every_byte_of_the_triangle(weights: np.ndarray) -> None:
    assert (unpack_causal(pack_causal(weights), len(weights)) == np.tril(weights)).all()


def test_packing_shortens_long_runs_of_zeros() -> None:
    weights = np.zeros((300, 300), np.uint8)
    weights[:, 0] = 255  # what a head at rest looks like
    assert len(pack_causal(weights)) < 300 * 5
    assert (unpack_causal(pack_causal(weights), 300) == weights).all()


@given(st.floats(0, 1))
def test_rounding_is_at_most_half_a_step(weight: float) -> None:
    assert abs(int(quantized(torch.tensor(weight, dtype=torch.float64))) / 255 - weight) <= 1 / 510 + 1e-6
