from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memlens.models.zoo import zoo_path
from memlens.organisms.corpus.corpus import END_OF_TEXT, Corpus, load_tokenizer

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
SHIPPED = load_tokenizer(zoo_path("pythia-s"))


@settings(max_examples=200, deadline=None)
@given(UNICODE)
def test_any_text_comes_back(text: str) -> None:
    assert SHIPPED.decode(SHIPPED(text).input_ids) == text


def test_it_is_a_fast_tokenizer_of_1024_tokens_with_end_of_text_first() -> None:
    assert isinstance(SHIPPED, PreTrainedTokenizerFast)
    assert len(SHIPPED) == 1024
    assert SHIPPED.eos_token == SHIPPED.bos_token == END_OF_TEXT
    assert SHIPPED.eos_token_id == 0
    assert SHIPPED("a").input_ids[0] != 0  # nothing is put in front


def test_digits_are_single_tokens() -> None:
    digits = SHIPPED("8675309").tokens()
    assert digits == list("8675309")


def test_saving_and_loading_changes_nothing(tiny_corpus: Corpus, tmp_path: Path) -> None:
    tiny_corpus.tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path))
    text = "Mara has 12 kettles.\n\ndef f(x):\n    return x"
    assert loaded(text).input_ids == tiny_corpus.tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == text
