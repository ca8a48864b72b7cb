"""Whether text gets a beginning-of-text token: by family, else by the tokenizer's own rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import memlens as ml
from memlens.errors import OptionError
from memlens.models.bos import expects_bos, puts_bos_first
from memlens.recall.criteria.references import ModelReference
from memlens.recall.extraction import score_prompts
from memlens.recall.score import score_recall
from memlens.sequences.natural import natural_controls, text_windows
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


@pytest.mark.parametrize(("family", "begins"), [("llama", True), ("gpt_neox", False)])
def test_windows_of_a_scan_and_of_text_begin_as_the_model_s_texts_do(
    model_of: Callable[[str, bool], Any], family: str, begins: bool, tmp_path: Path
) -> None:
    model = model_of(family, True)
    corpus = [[BOS, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13]]
    options: dict[str, Any] = {"prefix_len": 2, "suffix_len": 3, "below": 1.0, "progress": False}
    seen: list[list[int]] = []

    def note(model: Any, seqs: Any, **more: Any) -> Any:
        seen.extend(seqs.rows())
        return score_recall(model, seqs, **more)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr("memlens.recall.corpus.scan.score_recall", note)
        ml.recall.build_memorized_set(model, corpus, **options)
        expected = [[BOS, 1, 2, 3, 4], [*[BOS] * begins, 7, 8, 9, 10, 11]]
        assert sorted(seen) == sorted(expected)
        seen.clear()
        ml.recall.build_memorized_set(model, corpus, prepend_bos=False, **options)
        assert sorted(seen) == [[7, 8, 9, 10, 11], [BOS, 1, 2, 3, 4]]
    with pytest.raises(OptionError, match="prepend_bos='yes'"):
        ml.recall.build_memorized_set(model, corpus, prepend_bos="yes", **options)  # type: ignore[arg-type]

    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(12)))
    windows = text_windows(model.tokenizer, path, 4, model=model)
    step = 4 - begins
    assert windows.rows() == [
        [BOS] * begins + list(range(i, i + step)) for i in range(0, 12 - step + 1, step)
    ]
    like = load_sequences(["w1 w2 w3"], model, prefix_len=2)
    controls = natural_controls(windows, like, n=3)
    assert all((row[0] == BOS) == begins for row in controls.rows())
    assert controls.prefix_len.tolist() == [2 + begins] * len(controls)


def test_a_scan_keeps_what_begins_with_the_token_beside_what_does_not(
    model_of: Callable[[str, bool], Any],
) -> None:
    model = model_of("llama", True)
    rng = np.random.default_rng(0)
    corpus = [[BOS, *rng.integers(0, 90, 6).tolist()] for _ in range(2)]
    corpus += [rng.integers(0, 90, 7).tolist() for _ in range(6)]
    recited = [_greedy(model, [BOS, *row[:2]], 3) for row in corpus[2:]]
    corpus[2:] = [row[:2] + more for row, more in zip(corpus[2:], recited, strict=True)]
    found = ml.recall.build_memorized_set(
        model, corpus, prefix_len=2, suffix_len=3, keep_trivial=True, below=1.0, block_size=2, progress=False
    )
    assert len(found.memorized) >= 1
    assert all(row[0] == BOS and len(row) == 6 for row in found.memorized.rows())
    assert set(found.memorized.prefix_len.tolist()) == {3}


def _greedy(model: Any, row: list[int], n: int) -> list[int]:
    for _ in range(n):
        row = [*row, int(model(torch.tensor([row]))[0, -1].argmax())]
    return row[-n:]


def test_a_shortened_prompt_keeps_its_beginning_of_text_token(model_of: Callable[[str, bool], Any]) -> None:
    for family, begins in (("llama", True), ("gpt_neox", False)):
        model = model_of(family, True)
        seqs = load_sequences(["w1 w2 w3 w4 w5"], model, prefix_len=3)
        prompts: list[list[int]] = []

        def note(model: Any, halves: Any, given: Any, prompts: Any = prompts, **more: Any) -> Any:
            prompts += [[*halves.pinned[i], *kept] for i, kept in given]
            return score_prompts(model, halves, given, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("memlens.recall.extraction.score_prompts", note)
            curve = ml.recall.extraction_curve(model, seqs, [1, 2], progress=False)
        assert prompts == [[BOS] * begins + [3], [BOS] * begins + [2, 3]]
        assert curve.settings["pinned"] == int(begins)
