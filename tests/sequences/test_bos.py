"""Whether text gets a beginning-of-text token: by family, else by the tokenizer's own rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import memlens as ml
from memlens.errors import OptionError
from memlens.models.bos import expects_bos, puts_bos_first
from memlens.recall.criteria.references import ModelReference
from memlens.sequences.readers.load import load_sequences
from memlens.studies.registry import SequenceChoice
from tests.sequences.vocabularies import metaspace
from tests.tiny import tiny_huggingface_model, tiny_tokenizer

TEXT = "w1 w2 w3 w4"
BOS = 100


def beginning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the tokenizer with a rule that puts its BOS token before every text, as Llama's has."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def model_of() -> Callable[[str, bool], Any]:
    def make(family: str, begins: bool) -> Any:
        tokenizer = beginning(tiny_tokenizer()) if begins else tiny_tokenizer()
        return ml.load_model(tiny_huggingface_model(family, num_hidden_layers=2), tokenizer=tokenizer)

    return make


@pytest.mark.parametrize(
    ("family", "begins", "expected"),
    [("llama", True, True), ("llama", False, False), ("gpt_neox", True, False), ("olmo2", True, False)],
)
def test_the_family_and_else_the_tokenizer_decides(
    model_of: Callable[[str, bool], Any], family: str, begins: bool, expected: bool
) -> None:
    model = model_of(family, begins)
    assert model.tokenizer("w1")["input_ids"] == [BOS, 1]  # TransformerLens' form of every tokenizer
    assert puts_bos_first(model) == begins
    assert expects_bos(model, model.tokenizer) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seqs = load_sequences([TEXT], model, prefix_len=2)
        pairs = load_sequences([("w1 w2", " w3")], model)
        choice = SequenceChoice(sequences="").prepend_bos
    assert choice == "auto"
    assert seqs.rows() == [[BOS] * expected + [1, 2, 3, 4]]
    assert pairs.rows() == [[BOS] * expected + [1, 2, 3]]
    assert (seqs.prefix_len.tolist(), seqs.attrs["prepend_bos"]) == ([2 + expected], expected)
    answers = [
        ModelReference(model, prepend_bos=asked).answer(["w1 w2"], ["w3"]).logprob
        for asked in ("auto", expected, not expected)
    ]
    assert answers[0] == answers[1] != answers[2]
    facts = pd.DataFrame([{"sub_label": "w1", "obj_label": "w4"}])
    cloze = ml.sequences.fact_sequences(facts, model, template="[X] w2 [Y]")
    assert cloze.rows() == [[BOS] * expected + [1, 2, 4]]


def test_a_setting_that_disagrees_is_followed_with_a_warning(model_of: Callable[[str, bool], Any]) -> None:
    llama, pythia = model_of("llama", True), model_of("gpt_neox", True)
    with pytest.warns(UserWarning, match=r"1 of 1 sequences do not begin with .* \(100\)") as told:
        assert load_sequences([TEXT], llama, prefix_len=2, prepend_bos=False).rows() == [[1, 2, 3, 4]]
    with pytest.warns(UserWarning, match=r"this model's family.* begin without one"):
        assert load_sequences([TEXT], pythia, prefix_len=2, prepend_bos=True).rows() == [[BOS, 1, 2, 3, 4]]
    assert len(told) == 1
    with pytest.raises(OptionError, match="prepend_bos='yes'"):
        load_sequences([TEXT], llama, prefix_len=2, prepend_bos="yes")  # type: ignore[arg-type]


def test_token_ids_stay_as_they_are(model_of: Callable[[str, bool], Any], tmp_path: Path) -> None:
    model = model_of("llama", True)
    with pytest.warns(UserWarning, match=r"1 of 2 sequences .* rows 1; token ids are used as they are"):
        seqs = load_sequences([[BOS, 1, 2], [1, 2, 3]], model, prefix_len=1)
    assert seqs.rows() == [[BOS, 1, 2], [1, 2, 3]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = load_sequences([TEXT], model, prefix_len=2)
        again = load_sequences(text.to_parquet(tmp_path / "s.parquet"), model)
    assert (again.rows(), dict(again.attrs)) == (text.rows(), dict(text.attrs))


def test_there_are_never_two(model_of: Callable[[str, bool], Any]) -> None:
    model = model_of("llama", True)
    with pytest.warns(UserWarning, match="they get no second one"):
        seqs = load_sequences([f"{model.tokenizer.bos_token} {TEXT}"], model, prefix_len=2)
    assert seqs.rows() == [[BOS, 1, 2, 3, 4]]


def test_the_rule_of_a_tokenizer_alone() -> None:
    plain, begins = metaspace(), beginning(metaspace())
    without, with_one = (load_sequences(["the cat"], tokenizer=t, prefix_len=1) for t in (plain, begins))
    assert with_one.rows()[0] == [begins.bos_token_id, *without.rows()[0]]
    pythia = ml.load_model("zoo/pythia-s")
    first = load_sequences(["the miller of Tarn"], tokenizer=pythia.tokenizer, prefix_len=1).rows()[0][0]
    assert first != pythia.tokenizer.bos_token_id


def test_the_command_line_passes_it_on(model_of: Callable[[str, bool], Any], tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"text": "w1 w2 w3"}\n')
    model = model_of("llama", True)
    for asked, first in (("auto", BOS), ("always", BOS), ("never", 1)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seqs = SequenceChoice(sequences=str(path), prefix_len=1, prepend_bos=asked).load(model)
        assert seqs.rows()[0][0] == first


def test_check_model_shows_the_difference(model_of: Callable[[str, bool], Any]) -> None:
    for name, how in (("zoo/pythia-s", "without it"), ("zoo/openllama-s", "without it")):
        model = ml.load_model(name)
        (shown,) = [check for check in ml.check_model(model).checks if check.name == "BOS"]
        assert shown.status == "ok"
        assert shown.note.endswith(f"load_sequences reads text {how}")
        ids = model.tokenizer("The quick brown fox jumps over the lazy dog.", add_special_tokens=False)
        rows = [ids["input_ids"], [model.tokenizer.bos_token_id, *ids["input_ids"]]]
        seqs = [ml.SequenceSet.from_tokens([row], [n]) for n, row in enumerate(rows, 1)]
        bare, begun = (float(ml.measure(model, s, ["target_logprob"])["target_logprob"][0]) for s in seqs)
        assert f"{begun:.2f} with the beginning-of-text token, {bare:.2f} without" in shown.note
    model = model_of("llama", True)
    assert "reads text with it" in repr(ml.check_model(model))
