"""A hook that changes nothing is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memlens as ml
from memlens.errors import InterventionError, SilentInterventionError
from memlens.sweeps.contexts import check_hook_is_heard
from tests.small import ragged


def uniform(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
    return torch.full_like(pattern, 1 / pattern.shape[-1])


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_ignored_pattern_of_gpt_neo(tiny_folder: Any, engine: str) -> None:
    model = ml.load_model(tiny_folder("gpt_neo"), backend="bridge")
    edit = ml.Intervention("uniform", [("blocks.1.attn.hook_pattern", uniform)])
    with pytest.raises(SilentInterventionError, match=r"blocks\.1\.attn\.hook_pattern"):
        ml.sweep(model, ragged(), [edit], engine=engine, progress=False)


def test_heard_pattern_of_neox(tiny_model: Any) -> None:
    edit = ml.Intervention("uniform", [("blocks.1.attn.hook_pattern", uniform)])
    result = ml.sweep(tiny_model("gpt_neox", "bridge"), ragged(), [edit], progress=False)
    assert float(abs(result.effect("target_logprob")).max()) > 1e-4


def test_reading_without_writing_is_no_error(tiny_folder: Any) -> None:
    model = ml.load_model(tiny_folder("gpt_neo"), backend="bridge")
    edit = ml.Intervention("look", [("blocks.1.attn.hook_pattern", lambda x, hook: None)])
    result = ml.sweep(model, ragged(), [edit], progress=False)
    assert float(abs(result.effect("target_logprob")).max()) == 0


def test_hook_that_never_runs(tiny_folder: Any) -> None:
    model = ml.load_model(tiny_folder("gpt_neox"), backend="bridge")
    model.hook_dict["blocks.0.hook_mlp_out"]  # exists and fires
    name = next(n for n in model.hook_dict if n.endswith("attn.hook_result") and n.startswith("blocks.0"))
    with pytest.raises(SilentInterventionError, match="never ran"):
        ml.sweep(model, ragged(), [ml.Intervention("gone", [(name, lambda x, hook: 0 * x)])], progress=False)


def test_context_raises_on_leaving(tiny_folder: Any) -> None:
    model = ml.load_model(tiny_folder("gpt_neo"), backend="bridge")
    tokens = torch.tensor([[1, 2, 3, 4]])
    with (
        pytest.raises(SilentInterventionError, match="hook_pattern"),
        ml.applied(model, ml.Intervention("uniform", [("blocks.1.attn.hook_pattern", uniform)])),
    ):
        model(tokens)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


def test_context_refuses_hooks_by_sequence(tiny_model: Any) -> None:
    model, seqs = tiny_model("gpt_neox", "bridge"), ragged()
    patch = ml.edits.activation_patches(model, seqs, layers=[0], positions=[0])[0]
    with pytest.raises(InterventionError, match=r"memlens\.sweep"), ml.applied(model, patch):
        pass


@pytest.mark.parametrize("family", ["gpt_neox", "olmo2", "gpt_bigcode"])
def test_every_site_used_here_is_heard(tiny_model: Any, family: str) -> None:
    model = tiny_model(family, "bridge")
    tokens = torch.tensor([[1, 2, 3, 4]])
    for site in (
        "hook_resid_pre",
        "hook_attn_out",
        "hook_mlp_out",
        "hook_resid_post",
        "attn.hook_z",
        "attn.hook_v",
    ):
        assert check_hook_is_heard(model, f"blocks.1.{site}", tokens) is None
