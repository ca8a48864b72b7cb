"""Models as references: many edits in few passes, and each as by a plain forward pass of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import memlens as ml
from memlens.errors import OptionError, SequenceError
from memlens.models.provenance import describe
from memlens.recall.criteria import references
from memlens.recall.criteria.references import ModelReference
from tests.small import CASES
from tests.tiny import N_CTX

TEXTS = pd.DataFrame(
    {"prompt": ["w1 w2 w3 w4", "w5 w6", "w7 w8 w9", "w11"], "target": ["w5", "w9", "w2", "w0"]}
)


@torch.no_grad()
def plainly(model: Any, prompt: str, target: str) -> tuple[bool, float]:
    """Top-1 and log-probability of the target by one forward pass."""
    ids = model.tokenizer([f"{prompt} {target}"], add_special_tokens=False)["input_ids"][0]
    logits = model(torch.tensor([ids[:-1]]))[0, -1]
    return int(logits.argmax()) == ids[-1], float(logits.double().log_softmax(-1)[ids[-1]])


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_each_edit_as_by_its_own_forward_pass(tiny_model: Any, family: str, backend: str) -> None:
    model = tiny_model(family, backend)
    # The last target is made the model's own prediction, so that some edits keep it.
    top = int(model(torch.tensor([[1, 2, 3, 4]]))[0, -1].argmax())
    texts = TEXTS.assign(target=[f"w{top}", *TEXTS["target"][1:]])
    scores = ml.recall.score_criteria(texts, model, progress=False)
    plain = [plainly(model, p, t) for p, t in scores.edits[["prompt", "target"]].itertuples(index=False)]
    np.testing.assert_allclose(scores.edits["logprob"], [lp for _, lp in plain], atol=1e-4)
    assert scores.edits["top1"].tolist() == [float(top) for top, _ in plain]
    assert scores.table["full_top1"][0] == 1
    (name,) = scores.settings["n_passes"]
    assert scores.settings["n_passes"][name] == 1
    assert len(scores.edits) > 40


def test_passes_are_counted_and_batches_change_nothing(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox")
    one = ml.recall.score_criteria(TEXTS, model, progress=False)
    many = ml.recall.score_criteria(
        TEXTS, model, progress=False, options=ml.recall.CriteriaOptions(batch_size=7)
    )
    (passes,) = many.settings["n_passes"].values()
    assert passes == -(-one.settings["n_prompts"] // 7)
    numbers = [c for c in one.table if one.table[c].dtype == float]
    np.testing.assert_allclose(one.table[numbers], many.table[numbers], atol=1e-4)


def test_the_number_of_forward_passes_is_the_number_run(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memlens.forward.baseline import TeacherForced

    model, run = tiny_model("llama"), []
    original = TeacherForced.run
    monkeypatch.setattr(TeacherForced, "run", lambda *args, **by: run.append(1) or original(*args, **by))
    scores = ml.recall.score_criteria(
        TEXTS, model, progress=False, options=ml.recall.CriteriaOptions(batch_size=10)
    )
    assert sum(scores.settings["n_passes"].values()) == len(run) > 1


def test_the_beginning_of_text_token_is_put_in_front(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox")
    asked = ModelReference(model, prepend_bos=True).answer(["w1 w2"], ["w3"])
    with torch.no_grad():
        logits = model(torch.tensor([[model.tokenizer.bos_token_id, 1, 2]]))[0, -1]
    assert asked.logprob[0] == pytest.approx(float(logits.double().log_softmax(-1)[3]), abs=1e-4)
    assert asked.logprob[0] != pytest.approx(
        ModelReference(model).answer(["w1 w2"], ["w3"]).logprob[0], abs=1e-3
    )


def test_the_probed_model_is_neither_reference_nor_embedding(tiny_model: Any) -> None:
    model, other = tiny_model("gpt_neox"), tiny_model("llama")
    for probed in (model, ModelReference(model).name):
        with pytest.raises(OptionError, match="would judge itself"):
            ml.recall.score_criteria(TEXTS, [other, model], probed=probed, progress=False)
        with pytest.raises(OptionError, match="gives the embeddings"):
            ml.recall.score_criteria(TEXTS, other, embeddings=model, probed=probed, progress=False)
    assert len(ml.recall.score_criteria(TEXTS, other, probed=model, progress=False)) == len(TEXTS)


def test_similarity_from_a_model_s_embeddings(tiny_model: Any) -> None:
    model = tiny_model("gpt_neox")
    table = ml.recall.score_criteria(TEXTS, model, embeddings=model, progress=False).table
    matrix = model.W_E.detach().double()
    matrix = matrix - matrix.mean(0)
    top = torch.linalg.eigh(matrix.T @ matrix)[1][:, -1]
    matrix = matrix - torch.outer(matrix @ top, top)
    cosines = [float(torch.cosine_similarity(matrix[i], matrix[9], 0)) for i in (5, 6)]
    assert table["max_similarity"][1] == pytest.approx(max(cosines), abs=1e-5)
    assert table["similar_word"][1] == f"w{5 + int(np.argmax(cosines))}"


def test_a_prompt_that_melts_into_its_target_cannot_be_asked() -> None:
    backend = Tokenizer(models.WordLevel({"a b": 0, "a": 1, "?": 2}, unk_token="?"))
    model = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?"))
    answer = ModelReference(model, name="melting").answer(["a"], ["b"])
    assert np.isnan(answer.top1).all()
    assert np.isnan(answer.logprob).all()
    assert answer.n_passes == 0


def test_too_long_and_without_tokenizer(tiny_model: Any) -> None:
    long = pd.DataFrame({"prompt": [" ".join(["w1"] * N_CTX)], "target": ["w2"]})
    with pytest.raises(SequenceError, match="context holds"):
        ml.recall.score_criteria(long, tiny_model("gpt_neox"), progress=False)
    with pytest.raises(SequenceError, match="needs a tokenizer"):
        ModelReference(SimpleNamespace(tokenizer=None), name="bare")


def test_names_and_defaults_of_a_model_as_reference(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("gpt_neox")
    plain, named = ModelReference(model), ModelReference(model, name="mine")
    assert plain.name == describe(model)["model"]
    assert named.name == "mine"
    assert plain.model is model
    assert plain.tokenizer is model.tokenizer
    asked = (["w1 w2", "w5"], ["w3", "w6"])
    capsys.readouterr()
    answer = plain.answer(*asked)
    assert capsys.readouterr() == ("", "")
    plain.answer(*asked, progress=True)
    assert "scoring" in capsys.readouterr().err
    for begins in (True, False):
        monkeypatch.setattr(references, "expects_bos", lambda *_, begins=begins: begins)
        auto = ModelReference(model).answer(*asked).logprob
        assert auto.tolist() == ModelReference(model, prepend_bos=begins).answer(*asked).logprob.tolist()
        found = references.as_references(model)[0][plain.name].answer(*asked).logprob
        assert found.tolist() == auto.tolist()
        assert (auto == answer.logprob).all() == (not begins)
    forced = references.as_references(model, prepend_bos=True)[0][plain.name].answer(*asked).logprob
    assert forced.tolist() == ModelReference(model, prepend_bos=True).answer(*asked).logprob.tolist()


def test_batches_are_as_large_as_memory_allows_and_passes_are_counted(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("gpt_neox")
    sizes: list[tuple[int, str]] = []

    def rows(config: Any, length: int, device: torch.device) -> int:
        assert config is model.cfg
        sizes.append((length, device.type))
        return 2

    monkeypatch.setattr(references, "rows_per_batch", rows)
    prompts, targets = ["w1 w2 w3", "w5", "w7 w8", "w1", "w2"], ["w3", "w6", "w9", "w1", "w2"]
    answer = ModelReference(model, prepend_bos=False).answer(prompts, targets)
    assert sizes == [(4, "cpu")]
    assert answer.n_passes == 3
    whole = ModelReference(model, prepend_bos=False).answer(prompts, targets, batch_size=5)
    assert whole.n_passes == 1
    np.testing.assert_allclose(answer.logprob, whole.logprob, atol=1e-5)
    assert answer.top1.tolist() == whole.top1.tolist()


@pytest.mark.parametrize(
    ("reference", "probed", "same"),
    [
        ("a", None, False), ("a", "a", True), ("a", "b", False), ("unnamed", "unnamed", False),
        (None, "a", False), (None, None, False),
    ],
)  # fmt: skip
def test_a_reference_is_the_probed_model_by_its_name(reference: Any, probed: Any, same: bool) -> None:
    assert references.is_probed(SimpleNamespace(name=reference), probed) is same
    if probed is not None:
        assert references.is_probed(SimpleNamespace(name=reference), SimpleNamespace(name=probed)) is same


def test_a_reference_is_the_probed_model_by_what_it_holds(tiny_model: Any) -> None:
    model, other = tiny_model("gpt_neox"), tiny_model("llama")
    wrapped = ModelReference(model, name="another name")
    for probed in (model, wrapped, describe(model)["model"]):
        assert references.is_probed(wrapped, probed)
        assert references.is_probed(model, model)
    assert not references.is_probed(wrapped, other)
    assert not references.is_probed(model, wrapped.name)
    assert references.name_of(model) == describe(model)["model"]
    assert references.name_of(wrapped) == "another name"
    assert references.name_of(object()) is None
    for given, names in (
        ([model, wrapped], [describe(model)["model"], "another name"]),
        (wrapped, ["another name"]),
        ({"x": model, "y": other}, ["x", "y"]),
        ((wrapped, wrapped), ["another name", "another name-2"]),
    ):
        found, circular = references.as_references(given)
        assert list(found) == names
        assert not circular
        assert all(isinstance(one, references.Reference) for one in found.values())
    assert references.as_references(wrapped, model, allow_probed=True)[1]
    for empty in ([], (), {}):
        with pytest.raises(OptionError, match="references is empty"):
            references.as_references(empty)
