"""`memlens edit`: the folder holds the edited model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import memlens as ml
from tests.cli.test_commands import call
from tests.small import ragged
from tests.tiny import random_tokens


def test_the_folder_holds_the_edited_model(tiny_model: Any, tiny_folder: Any, tmp_path: Path) -> None:
    model, out = tiny_model("gpt_neox", "hooked"), tmp_path / "edited"
    code, shown, _ = call(
        "edit", str(tiny_folder("gpt_neox")), "--components", "L1H2,L2 MLP", "--components", "L0N7",
        "--backend", "hooked", "--device", "cpu", "--strength", "0.5", "--out", str(out), "--json",
    )  # fmt: skip
    assert code == 0
    found = json.loads(shown)
    assert (found["model"], found["components"]) == (str(out), ["L1H2", "L2 MLP", "L0N7"])
    edit = ml.edits.edit_weights(model, ["L1H2", "L2 MLP", "L0N7"], strength=0.5)
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad(), ml.applied(model, edit):
        assert torch.allclose(plain(random_tokens()).logits, model(random_tokens()), atol=1e-4)


def test_what_an_edit_does_not_use_is_refused(tmp_path: Path) -> None:
    """Before the model is loaded, here one that does not exist."""
    for option, value in (("keep", "zoo"), ("sequences", "zoo"), ("steps", "3"), ("keep-weight", "2")):
        code, _, err = call(
            "edit", "nowhere", "--components", "L1H2", f"--{option}", value, "--out", str(tmp_path / "out")
        )
        assert code == 2
        assert re.search(rf"--how 'zero' does not use (--)?{option}: leave it out, or choose --how", err)


def test_output_vectors_are_searched_on_the_sequences(tiny_folder: Any, tmp_path: Path) -> None:
    file = ragged().to_parquet(tmp_path / "seqs.parquet")
    code, shown, _ = call(
        "edit", str(tiny_folder("gpt_neox")), "--components", "L1N2", "--how", "output_vector",
        "--steps", "3", "--sequences", str(file), "--device", "cpu", "--out", str(tmp_path / "edited"),
        "--json", "--quiet",
    )  # fmt: skip
    assert code == 0
    about = json.loads(shown)["about"]
    assert about["steps"] == 3
    assert about["target_logprob_after"] < about["target_logprob_before"]
