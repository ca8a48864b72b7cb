"""16 bits: the result says how far it stands from float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import memlens as ml
from memlens.sweeps.contexts import in_dtype
from tests.devices import dev
from tests.small import corrupted, ragged, spread


@pytest.mark.parametrize(("family", "backend", "dtype"), spread(["bfloat16", "float16"]))
def test_agreement_is_the_difference_to_the_same_weights_in_float32(
    tiny_folder: Any, tiny_model: Any, family: str, backend: str, dtype: str
) -> None:
    tiny_model(family, backend)  # skips what the installed release does not have
    model = ml.load_model(tiny_folder(family), backend=backend, dtype=dtype, device=dev())
    wide = ml.load_model(tiny_folder(family), backend=backend, dtype=dtype, device=dev())
    clean = ragged()
    edits = ml.edits.head_ablations(model, clean, mode="zero")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    logits = model(clean.tokens)
    got = ml.sweep(model, clean, edits, ("target_logprob",), progress=False)
    said = got.settings["float32_agreement"]
    assert (said["dtype"], said["sequences"], said["interventions"]) == (dtype, 4, 8)
    off = said["largest_difference"]["target_logprob"]
    assert 1e-7 < off["value"] < {"bfloat16": 0.1, "float16": 0.02}[dtype]
    assert all(torch.equal(p, before[n]) and p.dtype == before[n].dtype for n, p in model.named_parameters())
    assert torch.equal(model(clean.tokens), logits)
    with in_dtype(wide, torch.float32):
        plain = ml.sweep(wide, clean, edits, ("target_logprob",), engine="reference", progress=False)
    whole = np.abs(got["target_logprob"].values - plain["target_logprob"].values)
    assert off["value"] <= whole.max() + 1e-6
    assert "float32_agreement" not in plain.settings


def test_patches_are_compared_in_float32_too(tiny_folder: Any) -> None:
    model = ml.load_model(tiny_folder("llama"), backend="bridge", dtype="bfloat16", device=dev())
    seqs = ragged()
    result = ml.patch_activations(model, seqs, corrupted(seqs), layers=[0, 2], progress=False)
    off = result.settings["float32_agreement"]["largest_difference"]["target_logprob"]
    assert 0 < off["value"] < 0.1
    again = ml.patch_activations(model, seqs, corrupted(seqs), layers=[0, 2], progress=False)
    assert np.array_equal(result["target_logprob"], again["target_logprob"], equal_nan=True)


def test_it_can_be_asked_for_or_left_out(tiny_folder: Any, tiny_model: Any) -> None:
    seqs, wide = ragged(), tiny_model("llama", "bridge")
    edits = ml.edits.head_ablations(wide, seqs, layers=[1])
    asked = ml.sweep(wide, seqs, edits, ("target_logprob",), check_dtype=True, progress=False, per_token=True)
    assert asked.settings["float32_agreement"]["largest_difference"]["target_logprob"]["value"] < 1e-5
    narrow = ml.load_model(tiny_folder("llama"), backend="bridge", dtype="bfloat16", device=dev())
    left_out = ml.sweep(narrow, seqs, edits, check_dtype=False, progress=False)
    assert "float32_agreement" not in left_out.settings
