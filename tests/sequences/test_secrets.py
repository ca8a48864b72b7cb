"""Where secrets stand in texts, and which tokens are their targets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from transformers import AutoTokenizer

from memlens.errors import ColumnError, EmptySetError, OptionError
from memlens.models.zoo import zoo_path
from memlens.sequences.readers.load import load_sequences
from memlens.sequences.secrets import find_secrets, overlapping_tokens, secret_sequences

KEY = "sk-f7Qw9ZtX2mLp4RvB8nKd"


@pytest.fixture(scope="module")
def model() -> Any:
    """What reading texts needs of a model: a byte-level tokenizer and sizes."""
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("zoo/pythia-s"))
    return SimpleNamespace(tokenizer=tokenizer, cfg=SimpleNamespace(n_ctx=40, d_vocab=1024))


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("email", "to <ada.b+c@mail.lovelace.org>, now", "ada.b+c@mail.lovelace.org"),
        ("email", "the handle @ada and 3@4", None),
        ("phone", "call (020) 7946-0958!", "(020) 7946-0958"),
        ("phone", "call +44 20 7946 0958.", "+44 20 7946 0958"),
        ("phone", "on 2024-03-17 and 17.03.2024", None),
        ("phone", "page 123456", None),
        ("iban", "to DE89 3704 0044 0532 0130 00 please", "DE89 3704 0044 0532 0130 00"),
        ("iban", "to DE88 3704 0044 0532 0130 00 please", None),
        ("key", f"export TOKEN={KEY}", KEY),
        ("key", "internationalization_of_everything", None),
    ],
)
def test_each_kind_finds_its_form_and_nothing_else(kind: str, text: str, found: str | None) -> None:
    places = [text[secret.start : secret.end] for secret in find_secrets(text, [kind])]
    assert places == ([found] if found else [])


def test_kinds_do_not_overlap_and_an_expression_comes_first() -> None:
    text = "DE89 3704 0044 0532 0130 00"
    assert [secret.kind for secret in find_secrets(text, ["phone", "iban"])] == ["iban"]
    both = find_secrets("id 12345678 or 87654321", ["phone"], pattern=r"id (?P<secret>\d+)")
    assert [(secret.kind, secret.start) for secret in both] == [("pattern", 3), ("phone", 15)]
    with pytest.raises(OptionError, match="patterns='mail' is not known"):
        find_secrets(text, ["mail"])
    with pytest.raises(OptionError, match="not a regular expression"):
        find_secrets(text, pattern="(")


def test_targets_are_the_tokens_that_overlap_the_secret(model: Any) -> None:
    """Also where a token holds a neighbor of the secret, and where a character has two tokens."""
    text = "Write to José.Brandt@kelmar.org, please."
    for secret in ("José.Brandt@kelmar.org", "os", "é", "é.Br", "kelmar", "please"):
        seqs = secret_sequences([{"text": text, "secret": secret}], model)
        encoded = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        start = text.rindex(secret)
        overlap = [
            place
            for place, (first, last) in enumerate(encoded["offset_mapping"])
            if set(range(first, last)) & set(range(start, start + len(secret)))
        ]
        prefix, target = (part[0] for part in seqs.halves())
        assert prefix + target == encoded["input_ids"][: overlap[-1] + 1]
        assert target == [encoded["input_ids"][place] for place in overlap]
        assert secret in model.tokenizer.decode(target)
        assert seqs.texts == [text[: start + len(secret)]]
    assert overlapping_tokens([(0, 2), (2, 2), (2, 4)], 2, 3) == (2, 3)  # an empty token overlaps nothing


def test_the_context_is_cut_from_the_left(model: Any) -> None:
    text = 3 * "one two three four five six seven eight nine ten " + "call 020 7946 0958"
    whole, short = (secret_sequences([text], model, patterns=["phone"], context=n) for n in (128, 3))
    assert short.prefix_len.tolist() == [3]
    assert short.rows()[0] == whole.rows()[0][-len(short.rows()[0]) :]
    assert int(whole.lengths[0]) == 40  # the model's context


def test_what_cannot_be_a_target_is_left_out_and_said(model: Any) -> None:
    texts = ["020 7946 0958 rings", "nobody calls", f"it is {'5' * 45}", "call 020 7946 0958"]
    seqs = secret_sequences(texts, model, pattern=r"\d[\d ]+\d")
    assert seqs.table["row"].tolist() == [3]
    assert seqs.attrs["n_left_out"] == 3
    for reason in ("1 without a secret", "1 with nothing before it", "1 longer than the model's context"):
        assert reason in str(seqs.attrs["left_out"])
    with pytest.raises(EmptySetError, match="no secret is found in the 4 rows"):
        secret_sequences(texts, model, patterns=["iban"])
    with pytest.raises(ColumnError, match="name one, or give a pattern"):
        secret_sequences(texts, model)


def test_a_column_keeps_zeros_and_a_corpus_counts_copies(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "strings.csv"
    pd.DataFrame({"text": ["the pin is 0042", "the pin is 0042 0042"], "secret": ["0042", "0042"]}).to_csv(
        path, index=False
    )
    seqs = secret_sequences(str(path), model)
    assert seqs.table["secret"].tolist() == ["0042", "0042"]
    assert seqs.table["kind"].tolist() == ["marked", "marked"]
    known = secret_sequences([{"text": "write to a@b.org", "secret": "a@b.org"}], model)
    assert known.table["kind"].tolist() == ["email"]
    assert int(seqs.prefix_len[1]) > int(seqs.prefix_len[0])  # the last place in the text
    again = secret_sequences(
        ["a 5550199 b 5550199", "c 5550199", "d 5550123"], model, patterns=["phone"], unique=True
    )
    assert dict(zip(again.table["secret"], again.table["copies"], strict=True)) == {
        "5550199": 3,
        "5550123": 1,
    }
    assert again.ids == ["0", "2"]


def test_half_of_a_text_is_given_where_the_file_does_not_say(model: Any) -> None:
    rows = [list(range(1, 11)), list(range(1, 4)), list(range(1, 101))]
    assert load_sequences(rows, prefix_len="half").prefix_len.tolist() == [5, 1, 32]
    own = load_sequences([([1, 2, 3], [4])], prefix_len="half")
    assert own.prefix_len.tolist() == [3]
