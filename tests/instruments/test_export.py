"""Exported edits: ordinary checkpoints whose logits equal the intervention's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlens as ml
from memlens.errors import InterventionError, ResultError, UnsupportedModelError, WriteError
from memlens.instruments.edit.export import RECORD, edited_model, export_edited
from memlens.instruments.edit.folding import as_weight_edit
from memlens.instruments.edit.weight_edit import WeightChange, weight_edit
from memlens.models.names import has_hooked_transformer
from tests.devices import dev
from tests.small import CASES, ragged, spread
from tests.tiny import D_VOCAB, random_tokens, tiny_huggingface_model, tiny_tokenizer

Edits = Callable[[Any], list[ml.Intervention]]
NORMED = ("olmo2", "olmo3")
WITHOUT_BIAS = ("olmo", "olmo2", "olmo3", "llama", "llama_gqa")


def heads(mode: Any) -> Edits:
    return lambda model: ml.edits.head_set_ablations(model, ragged(), {"two": [(0, 1), (1, 3)]}, mode=mode)


def neurons(mode: Any) -> Edits:
    return lambda model: ml.edits.neuron_knock_outs(model, ragged(), {"some": {0: [2, 9], 2: [5]}}, mode=mode)


MADE: dict[str, Edits] = {
    "heads to zero": heads("zero"),
    "heads to the mean": heads("mean"),
    "heads to the mean of others": heads("mean_of_other_heads"),
    "neurons to zero": neurons("zero"),
    "neurons to the mean": neurons("mean"),
    "attention to zero": lambda model: ml.edits.attention_bypasses(model, layers=[1], mode="zero"),
    "attention to its mean": lambda model: ml.edits.attention_ablations(
        model, ragged(), mode="mean", layers=[1]
    ),
    "MLP to zero": lambda model: ml.edits.mlp_ablations(model, ragged(), layers=[2]),
    "half of z": lambda model: [ml.Intervention("half", [("blocks.1.attn.hook_z", lambda z, hook: z / 2)])],
    "z, then attention": lambda model: [
        heads("zero")(model)[0] + ml.edits.attention_bypasses(model, layers=[1], mode="zero")[0]
    ],
}


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return plain(tokens).logits


EVERYWHERE = ("heads to zero", "neurons to zero", "MLP to zero")
"""What finds each part's weights; the others write other values there, each on six or seven of the cases."""


@pytest.mark.parametrize(
    ("family", "backend", "what"),
    [
        *((*case, what) for what in EVERYWHERE for case in CASES),
        *spread([what for what in MADE if what not in EVERYWHERE], each=3),
    ],
)
def test_an_exported_intervention_has_its_logits(
    family: str, backend: str, what: str, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model, tokens = tiny_model(family, backend), random_tokens()
    (edit,) = MADE[what](model)
    folded_away = what == "attention to its mean" and family in NORMED
    if folded_away or (what.endswith("mean") and family in WITHOUT_BIAS):
        with pytest.raises((InterventionError, UnsupportedModelError), match="cannot express"):
            export_edited(model, edit, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    folder = export_edited(model, edit, tmp_path / "out")
    with torch.no_grad():
        plain = model(tokens)
        with ml.applied(model, edit):
            wanted = model(tokens)
        assert torch.equal(model(tokens), plain)
    assert float((wanted - plain).abs().max()) > 1e-3
    got = logits_of(folder, tokens)
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_the_folder_is_an_ordinary_checkpoint_with_a_card(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_model("gpt_neox", "hooked")
    (edit,) = MADE["neurons to zero"](model)
    folder = export_edited(model, edit, tmp_path / "out")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", RECORD} <= {
        file.name for file in folder.iterdir()
    }
    record = json.loads((folder / RECORD).read_text())
    assert [(c["layer"], c["part"], c["rows_or_columns"]) for c in record["changes"]] == [
        (0, "out", 2),
        (2, "out", 1),
    ]
    assert record["parameters"] == [f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight" for layer in (0, 2)]
    card = (folder / "README.md").read_text()
    assert "| 0 | out | 2 | no |" in card
    assert "some" in card
    assert AutoTokenizer.from_pretrained(folder)("w3 w14")["input_ids"] == [3, 14]
    again = ml.load_model(folder, backend="bridge")
    assert float(ml.measure(again, ragged())["target_logprob"].sum()) == pytest.approx(
        float(ml.sweep(model, ragged(), [edit], progress=False)["target_logprob"].sum()), abs=1e-3
    )


def test_the_tokenizer_of_a_model_in_memory_is_the_bare_one(tmp_path: Path) -> None:
    model = ml.load_model(tiny_huggingface_model("gpt_neox"), tokenizer=tiny_tokenizer())
    assert model.tokenizer is not None
    assert model.tokenizer("w3 w14")["input_ids"] == [D_VOCAB - 1, 3, 14]
    folder = export_edited(model, MADE["heads to zero"](model), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder)("w3 w14")["input_ids"] == [3, 14]


def test_several_edits_are_joined(tiny_model: Callable[..., Any]) -> None:
    model, tokens = tiny_model("gpt_neox", "hooked"), random_tokens()
    edits = [*MADE["heads to zero"](model), *MADE["MLP to zero"](model)]
    plain = edited_model(model, edits)
    with torch.no_grad(), ml.applied(model, *edits):
        assert torch.allclose(plain(tokens).logits, model(tokens), atol=1e-4)


def test_what_weights_cannot_express_is_refused_with_the_reason(tiny_model: Callable[..., Any]) -> None:
    model, seqs = tiny_model("gpt_neox", "hooked"), ragged()
    (bypass,) = ml.edits.attention_bypasses(model, layers=[1])
    with pytest.raises(InterventionError, match=r"in_transformers"):
        edited_model(model, bypass)
    with pytest.raises(InterventionError, match="differs by sequence"):
        edited_model(model, ml.edits.head_ablations(model, seqs, mode="resample", layers=[0])[0])
    with pytest.raises(InterventionError, match="differs by sequence or position"):
        edited_model(model, ml.edits.mlp_ablations(model, seqs, positions="targets")[0])

    def later(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z[:, 2:] = 0
        return z

    pattern = [("blocks.0.attn.hook_pattern", lambda p, hook: p * 0)]
    with pytest.raises(InterventionError, match="attention scores"):
        edited_model(model, ml.Intervention("no pattern", pattern))
    with pytest.raises(InterventionError, match="not an affine function"):
        edited_model(model, ml.Intervention("relu", [("blocks.0.attn.hook_z", lambda z, hook: z.relu())]))
    with pytest.raises(InterventionError, match="not an affine function"):
        edited_model(model, ml.Intervention("later", [("blocks.0.attn.hook_z", later)]))
    with pytest.raises(InterventionError, match="no edit"):
        edited_model(model, [])
    with pytest.raises(InterventionError, match="str is not an edit"):
        edited_model(model, ["L0N5"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InterventionError, match="is not an edit"):
        edited_model(model, model)


def test_an_edit_of_another_model_is_refused(tiny_model: Callable[..., Any]) -> None:
    model, other = tiny_model("gpt_neox", "hooked"), ml.load_model("zoo/pythia-xs")
    for component in ("L0N5", "L3N5", "L0N100", "L0H4"):
        edit = ml.edits.edit_weights(other, [component])
        with pytest.raises(InterventionError, match=r"another model"):
            edited_model(model, edit)
        with pytest.raises(InterventionError, match=r"another model"):
            ml.instruments.join_edits(model, [edit])
    norm = WeightChange(0, "attn_norm", torch.ones(7))
    with pytest.raises(InterventionError, match="'attn_norm' in layer 0"):
        weight_edit(model, "norm", [norm])
    twin = ml.load_model("zoo/pythia-s-clean")
    edit = ml.edits.edit_weights(ml.load_model("zoo/pythia-s"), ["L0 MLP"], strength=0.5)
    with pytest.raises(InterventionError, match="made for other weights"):
        edited_model(twin, edit)


def test_a_model_that_is_not_its_checkpoint_is_refused(tiny_folder: Callable[..., Path]) -> None:
    backends = ["bridge", *(["hooked"] if has_hooked_transformer() else [])]
    for backend in backends:
        model = ml.load_model(tiny_folder("gpt_neox"), backend=backend)
        with torch.no_grad():
            next(model.blocks[0].mlp.parameters()).mul_(1.1)
        (edit,) = MADE["heads to zero"](model)
        if backend == "bridge":  # holds the weights that are exported, changed ones too
            tokens = torch.tensor([[3, 4, 5, 6]])
            with torch.no_grad(), ml.applied(model, edit):
                wanted = model(tokens)
            assert torch.allclose(edited_model(model, edit)(tokens).logits, wanted, atol=1e-5)
        else:
            with pytest.raises(UnsupportedModelError, match="not compute what its checkpoint does"):
                edited_model(model, edit)
    processed = ml.load_model(tiny_folder("gpt_neox"), process_weights=True)
    with pytest.raises(UnsupportedModelError, match="processed" if has_hooked_transformer() else None):
        edited_model(processed, MADE["heads to zero"](processed)[0])


def test_nothing_is_left_where_an_export_fails(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt_neox", "bridge")
    (edit,) = MADE["heads to zero"](model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ResultError, match="not empty"):
        export_edited(model, edit, tmp_path / "full")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memlens.instruments.edit.export.write_json", fail)
    with pytest.raises(WriteError):
        export_edited(model, edit, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_unit_columns_stay_as_they_are(tiny_model: Callable[..., Any]) -> None:
    """Only the heads that an ablation touches change, to the last bit."""
    model = tiny_model("gpt_neo", "hooked")
    folded = as_weight_edit(model, MADE["heads to zero"](model)[0])
    assert {(c.layer, tuple(c.index.tolist())) for c in folded.changes if c.index is not None} == {
        (0, tuple(range(8, 16))),
        (1, tuple(range(24, 32))),
    }
    assert all(c.bias is None and not c.weight.any() for c in folded.changes)


@pytest.mark.slow
def test_an_exported_model_is_served_by_lm_eval(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model = tiny_model("gpt_neox", "hooked")
    (edit,) = MADE["heads to zero"](model)
    folder = export_edited(model, edit, tmp_path / "out")
    served = lm_eval.HFLM(pretrained=str(folder), device=dev(), dtype="float32", batch_size=1)
    pairs = [("w1 w2 w3", " w4 w5"), ("w9 w8", " w7 w6")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = [total for total, _ in served.loglikelihood(requests, disable_tqdm=True)]
    with torch.no_grad(), ml.applied(model, edit):
        for ids, got in zip([[1, 2, 3, 4, 5], [9, 8, 7, 6]], found, strict=True):
            logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
            want = sum(float(logprobs[i - 1, ids[i]]) for i in (len(ids) - 2, len(ids) - 1))
            assert got == pytest.approx(want, abs=1e-4)
