"""A model on two devices gives the numbers of the same model on one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import memlens as ml
from memlens.errors import UnsupportedModelError
from memlens.forward.blocks import FunctionalBlocks
from memlens.instruments.screen import backward
from tests.small import corrupted, ragged
from tests.spread import Devices, dispatched, place_of

Analysis = Callable[[Any, ml.SequenceSet], ml.Result]


def own_hooks(model: Any, seqs: ml.SequenceSet) -> ml.Result:
    """Hooks that know their batch, in place and not, on points that the layers themselves have to run."""

    class Halved:
        def bind(self, batch: Any) -> Any:
            return lambda x, hook: torch.where(batch.predicts[:, :, None, None], 0.5 * x, x)

    def in_place(x: torch.Tensor, hook: Any) -> None:
        x[:, 2:] *= 0.5

    points = [f"blocks.{n}.attn.hook_v" for n in range(3)]
    edits = [
        ml.Intervention(f"{p} {i}", [(p, fn)]) for p in points for i, fn in enumerate((Halved(), in_place))
    ]
    return ml.sweep(model, seqs, edits, progress=False)


ANALYSES: dict[str, Analysis] = {
    "heads ablated": lambda m, s: ml.ablate_heads(m, s, mode="mean", reference=corrupted(s), progress=False),
    "layers bypassed": lambda m, s: ml.bypass_attention(m, s, progress=False),
    "residual patched": lambda m, s: ml.patch_activations(m, s, corrupted(s), progress=False),
    "own hooks": own_hooks,
    "plain forwards": lambda m, s: ml.ablate_mlps(m, s, engine="reference", progress=False),
    "residual perturbed": lambda m, s: ml.perturb_residual(m, s, progress=False),
    "gradients": lambda m, s: ml.attribute_gradients(
        m, s, corrupted(s), site="z", over="head", progress=False
    ),
    "integrated gradients": lambda m, s: ml.instruments.attribute_ablation(m, s, steps=2, progress=False),
    "residual decoded": lambda m, s: ml.decode_residual(m, s, progress=False),
    "logits attributed": lambda m, s: ml.attribute_logits(m, s, progress=False),
}


@pytest.fixture(scope="module", params=["gpt_neox", "llama_gqa"])
def both(request: Any, tiny_folder: Any, tiny_model: Any) -> tuple[Any, Any]:
    """A tiny model, and the same on two devices."""
    plain = tiny_model(request.param, "bridge")
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder(request.param), attn_implementation="eager")
    with Devices():
        dispatched(hf, boundary=1)
        model = ml.load_model(hf, tokenizer=plain.tokenizer)
    return plain, model


@pytest.mark.parametrize("analysis", ANALYSES)
def test_two_devices_give_the_numbers_of_one(both: tuple[Any, Any], analysis: str) -> None:
    plain, model = both
    want = ANALYSES[analysis](plain, ragged())
    with Devices():
        assert {str(place_of(p)) for p in model.parameters()} == {"cpu:0", "cpu:1"}
        found = ANALYSES[analysis](model, ragged())
    for name, array in want.data.data_vars.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(found.data[name], array, atol=1e-6, err_msg=str(name))
        else:
            np.testing.assert_array_equal(found.data[name], array, err_msg=str(name))


def test_scores_and_the_fast_path_on_two_devices(
    both: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = both
    places: set[tuple[str, str]] = set()
    run = FunctionalBlocks.run

    def note(self: Any, layer: int, resid: torch.Tensor, *args: Any, **how: Any) -> torch.Tensor:
        out = run(self, layer, resid, *args, **how)
        places.add((str(self.blocks[layer].o.weight.device), str(out.device)))
        return out

    want = ml.score_recall(plain, ragged(), progress=False).table
    with Devices(), monkeypatch.context() as patch:
        patch.setattr(FunctionalBlocks, "run", note)
        found = ml.score_recall(model, ragged(), progress=False).table
        ml.patch_activations(model, ragged(), corrupted(ragged()), layers=[0], progress=False)
    assert places == {("cpu:0", "cpu:0"), ("cpu:1", "cpu:0")}
    np.testing.assert_allclose(found["target_logprob"], want["target_logprob"], atol=1e-6)


def test_gradients_layer_by_layer_on_two_devices(
    both: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = both
    want = ANALYSES["gradients"](plain, ragged())
    monkeypatch.setattr(backward, "budget_bytes", lambda given, device: 1)
    with Devices():
        found = ANALYSES["gradients"](model, ragged())
    np.testing.assert_allclose(found.data["target_logprob"], want.data["target_logprob"], atol=1e-6)


def test_the_devices_are_kept_apart() -> None:
    with Devices():
        a, b = torch.ones(2, device="cpu:0"), torch.ones(2).to("cpu:1")
        for mixed in (
            lambda: a + b,
            lambda: torch.where(a > 0, b, b),
            lambda: a[b.long()],
            lambda: a @ torch.ones(2),
        ):
            with pytest.raises(RuntimeError):
                mixed()
        assert (a.cpu() + b.cpu()).device == torch.device("cpu")
        assert (a * torch.tensor(2.0))[torch.tensor([0])].device == torch.device("cpu:0")


@pytest.mark.parametrize("place", ["disk", "meta"])
def test_weights_that_are_not_in_memory_are_refused(tiny_folder: Any, tmp_path: Any, place: str) -> None:
    from accelerate import cpu_offload, disk_offload

    hf = AutoModelForCausalLM.from_pretrained(tiny_folder("gpt_neox"))
    disk_offload(hf, str(tmp_path)) if place == "disk" else cpu_offload(
        hf, execution_device=torch.device("cpu")
    )
    with pytest.raises(UnsupportedModelError, match="are not in memory") as error:
        ml.load_model(hf)
    assert "without offloading" in str(error.value)
    assert "\n" not in str(error.value)
