from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch

from memlens.errors import (
    ColumnError,
    EmptySetError,
    FileFormatError,
    OptionError,
    SequenceError,
    SourceNotFoundError,
    VocabularyError,
)
from memlens.models.zoo import zoo_path
from memlens.sequences.readers import sources
from memlens.sequences.readers.load import load_sequences
from memlens.sequences.set import SequenceSet
from tests.sequences.vocabularies import byte_level, characters, metaspace, model_with
from tests.tiny import tiny_tokenizer

ROWS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16"])
def test_npy(tmp_path: Path, dtype: str) -> None:
    array = np.arange(3 * 40).reshape(3, 40).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    seqs = load_sequences(tmp_path / "x.npy")
    assert seqs.tokens.tolist() == array.tolist()
    assert seqs.prefix_len.tolist() == [32] * 3
    assert seqs.attrs["source"] == "x.npy"
    assert load_sequences(str(tmp_path / "x.npy"), prefix_len=7, limit=2).n_targets.tolist() == [33, 33]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.arange(5), r"int64 of shape \(5,\)"),
        (np.ones((2, 5)), r"float64 of shape \(2, 5\)"),
        (np.array([[1, 2], [3, None]]), "not a .npy file of numbers"),
    ],
)
def test_npy_of_another_shape_or_type(tmp_path: Path, content: Any, words: str) -> None:
    np.save(tmp_path / "x.npy", content)
    with pytest.raises(FileFormatError, match=words):
        load_sequences(tmp_path / "x.npy")


def _write(folder: Path, suffix: str, frame: pd.DataFrame) -> Path:
    path = folder / f"x{suffix}"
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    elif suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_tables_of_token_ids(tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame(
        {"tokens": ROWS, "prefix_len": [2, 3], "uid": ["a", "b"], "domain": ["code", "prose"]}
    )
    seqs = load_sequences(_write(tmp_path, suffix, frame))
    assert seqs.rows() == ROWS
    assert seqs.prefix_len.tolist() == [2, 3]
    assert seqs.ids == ["a", "b"]
    assert seqs.table["domain"].tolist() == ["code", "prose"]
    named = _write(tmp_path, suffix, frame.rename(columns={"tokens": "window", "uid": "key"}))
    seqs = load_sequences(named, tokens_column="window", id_column="key", prefix_len=4)
    assert seqs.rows() == ROWS
    assert seqs.prefix_len.tolist() == [4, 4]
    assert seqs.ids == ["a", "b"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_tables_of_text(tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame({"text": ["w3 w1 w4", "w9 w2 w6 w5"], "copies": [1, 2]})
    seqs = load_sequences(_write(tmp_path, suffix, frame), model_with(tiny_tokenizer()), prefix_len=2)
    assert seqs.rows() == [[3, 1, 4], [9, 2, 6, 5]]
    assert seqs.texts == frame["text"].tolist()
    assert seqs.table["copies"].tolist() == [1, 2]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "names", [("prompt", "continuation"), ("prefix", "suffix"), ("prompt", "target"), ("q", "a")]
)
def test_tables_of_prompts_and_continuations(tmp_path: Path, suffix: str, names: tuple[str, str]) -> None:
    tokenizer = byte_level()
    frame = pd.DataFrame([["the cat sat", " on the mat"], ["turn a", " blind eye"]], columns=list(names))
    options = {"prompt_column": "q", "continuation_column": "a"} if names[0] == "q" else {}
    seqs = load_sequences(_write(tmp_path, suffix, frame), tokenizer=tokenizer, **options)
    assert seqs.texts == ["the cat sat on the mat", "turn a blind eye"]
    for row, n, prompt in zip(seqs.rows(), seqs.prefix_len.tolist(), frame[names[0]], strict=True):
        assert tokenizer.decode(row[:n]) == prompt
    assert tokenizer.decode(seqs.rows()[1]) == "turn a blind eye"


@pytest.mark.parametrize("tokenizer", [byte_level(), metaspace()], ids=["byte level", "metaspace"])
def test_the_space_between_prompt_and_continuation_goes_to_the_target(tokenizer: Any) -> None:
    pairs = [("the cat sat", " on the mat"), ("the cat sat ", "on the mat")]
    frame = pd.DataFrame(pairs, columns=["prompt", "continuation"])
    seqs = load_sequences(frame, tokenizer=tokenizer)
    whole = tokenizer("the cat sat on the mat", add_special_tokens=False)["input_ids"]
    n = len(tokenizer("the cat sat", add_special_tokens=False)["input_ids"])
    assert seqs.rows() == [whole, whole]
    assert seqs.prefix_len.tolist() == [n, n]


def test_a_token_across_the_boundary_is_a_target() -> None:
    tokenizer = byte_level()
    seqs = load_sequences(
        pd.DataFrame({"prompt": ["a blind e"], "continuation": ["ye"]}), tokenizer=tokenizer
    )
    n = int(seqs.prefix_len[0])
    assert seqs.rows()[0] == tokenizer("a blind eye")["input_ids"]
    assert tokenizer.decode(seqs.rows()[0][:n]) == "a blind"


def test_lists_arrays_tensors_and_sets() -> None:
    for source in (ROWS, np.array(ROWS), torch.tensor(ROWS), [np.array(r) for r in ROWS], tuple(ROWS)):
        seqs = load_sequences(source, prefix_len=3)
        assert seqs.rows() == ROWS
        assert seqs.prefix_len.tolist() == [3, 3]
    ragged = load_sequences([[1, 2, 3], [4, 5]], prefix_len=[2, 1])
    assert ragged.rows() == [[1, 2, 3], [4, 5]]
    again = load_sequences(ragged)
    assert again.rows() == ragged.rows()
    assert again.prefix_len.tolist() == [2, 1]
    assert load_sequences(["w1 w2 w3"], tokenizer=tiny_tokenizer(), prefix_len=1).rows() == [[1, 2, 3]]


def test_huggingface_datasets_with_the_columns_of_memorized_evals() -> None:
    tokens = np.arange(2 * 64).reshape(2, 64) % 90
    dataset = datasets.Dataset.from_dict(
        {"index": [417, 88], "tokens": tokens.tolist(), "__index_level_0__": [0, 1]}
    )
    seqs = load_sequences(dataset, model_with(tiny_tokenizer()))
    assert seqs.tokens.tolist() == tokens.tolist()
    assert seqs.prefix_len.tolist() == [32, 32]
    assert seqs.ids == ["417", "88"]
    assert "__index_level_0__" not in seqs.table
    assert load_sequences(dataset, limit=1).ids == ["417"]
    streamed = load_sequences(dataset.to_iterable_dataset(), limit=2)
    assert streamed.rows() == seqs.rows()
    with pytest.raises(SequenceError, match="limit="):
        load_sequences(dataset.to_iterable_dataset())
    with pytest.raises(SequenceError, match="'train'"):
        load_sequences(datasets.DatasetDict(train=dataset))


def test_a_set_goes_to_a_huggingface_dataset_and_back() -> None:
    table = pd.DataFrame({"id": ["a", "b"], "copies": [3, 1], "note": ["x", None]})
    seqs = SequenceSet.from_tokens([[5, 6, 7], [8, 9, 3, 2]], [1, 2]).with_table(table)
    dataset = seqs.to_dataset()
    assert dataset[1] == {"id": "b", "copies": 1, "note": None, "tokens": [8, 9, 3, 2], "prefix_len": 2}
    back = load_sequences(dataset.shuffle(seed=1).sort("id"))
    assert back.rows() == seqs.rows()
    assert back.prefix_len.tolist() == [1, 2]
    assert back.table["copies"].tolist() == [3, 1]


def test_hub_names_are_loaded_by_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        seen.append((name, split))
        if name == "no/such":
            raise ConnectionError("could not reach the hub\nat all")
        return datasets.Dataset.from_dict({"tokens": ROWS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    seqs = load_sequences("hf:EleutherAI/pythia-memorized-evals", split="duped.70m", prefix_len=1)
    assert seen == [("EleutherAI/pythia-memorized-evals", "duped.70m")]
    assert seqs.rows() == ROWS
    assert seqs.attrs["source"] == "hf:EleutherAI/pythia-memorized-evals"
    with pytest.raises(SourceNotFoundError, match=r"'no/such', split 'train', is not in the cache"):
        load_sequences("hf:no/such")


def test_zoo_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rows in (("pythia-s", ROWS), ("other", ROWS[:1])):
        path = tmp_path / "models" / "zoo" / name / "sequences.parquet"
        path.parent.mkdir(parents=True)
        frame = pd.DataFrame({"id": [f"{name}-{i}" for i in range(len(rows))], "tokens": rows})
        frame.assign(prefix_len=2, text="t", domain="code", copies=4, source=f"zoo/{name}").to_parquet(path)
    bundled = tmp_path / "models" / "zoo"
    monkeypatch.setattr(sources, "zoo_folders", lambda: (bundled, tmp_path / "cache"))
    seqs = load_sequences("zoo")
    assert seqs.ids == ["pythia-s-0", "pythia-s-1"]
    assert seqs.attrs["source"] == "zoo/pythia-s"
    assert seqs.table["copies"].tolist() == [4, 4]
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = str(tmp_path / "models" / "zoo" / "other")
    assert load_sequences("zoo", model_with(tokenizer)).ids == ["other-0"]
    tiny_tokenizer().save_pretrained(tmp_path / "models" / "zoo" / "other")
    assert load_sequences("zoo/other", model_with(tiny_tokenizer())).attrs["tokenizer"] == "zoo/other"
    with pytest.raises(
        VocabularyError, match=r"made with the tokenizer zoo/other \(101 entries\), the model has"
    ):
        load_sequences("zoo/other", model_with(byte_level()))
    (tmp_path / "cache" / "grown").mkdir(parents=True)
    (bundled / "other" / "sequences.parquet").replace(tmp_path / "cache" / "grown" / "sequences.parquet")
    assert load_sequences("zoo/grown").ids == ["other-0"]  # trained on demand, not shipped
    with pytest.raises(
        SourceNotFoundError, match=r"'zoo/pythia-z'.*zoo/grown, zoo/pythia-s.*Did you mean 'zoo/pythia-s'"
    ):
        load_sequences("zoo/pythia-z")
    outside = tmp_path / "outside" / "sequences.parquet"
    outside.parent.mkdir()
    shutil.copy(bundled / "pythia-s" / "sequences.parquet", outside)
    for name in ("zoo/../../outside", f"zoo/{outside.parent}", "zoo/.."):
        with pytest.raises(SourceNotFoundError, match="no planted sequences"):
            load_sequences(name)


def test_sets_written_by_memlens_come_back_with_their_attributes(tmp_path: Path) -> None:
    model = model_with(tiny_tokenizer())
    seqs = load_sequences(["w1 w2 w3 w4"], model, prefix_len=2, prepend_bos=True, name="mine")
    again = load_sequences(seqs.to_parquet(tmp_path / "s.parquet"), model, prepend_bos=True)
    assert again.rows() == [[100, 1, 2, 3, 4]]
    assert again.prefix_len.tolist() == [3]
    assert dict(again.attrs) == dict(seqs.attrs)
    assert again.attrs["name"] == "mine"


@pytest.mark.parametrize("make", [byte_level, metaspace, tiny_tokenizer])
def test_no_token_is_put_in_front_unless_asked(make: Any) -> None:
    tokenizer = make()
    plain = load_sequences(["the cat sat on the mat"], tokenizer=tokenizer, prefix_len=2)
    asked = load_sequences(["the cat sat on the mat"], tokenizer=tokenizer, prefix_len=2, prepend_bos=True)
    assert asked.rows()[0] == [tokenizer.bos_token_id, *plain.rows()[0]]
    assert asked.prefix_len.tolist() == [3]
    assert torch.equal(asked.target_ids, plain.target_ids)
    assert (plain.attrs["prepend_bos"], asked.attrs["prepend_bos"]) == (False, True)


def test_a_tokenizer_without_the_token_to_put_in_front() -> None:
    with pytest.raises(SequenceError, match="prepend_bos=True, but the tokenizer"):
        load_sequences(["the cat"], tokenizer=characters(), prefix_len=1, prepend_bos=True)


def test_max_targets_keeps_the_first_of_the_continuation() -> None:
    seqs = load_sequences(
        ["w1 w2 w3 w4 w5", "w6 w7 w8"], tokenizer=tiny_tokenizer(), prefix_len=2, max_targets=2
    )
    assert seqs.rows() == [[1, 2, 3, 4], [6, 7, 8]]
    assert seqs.texts == ["w1 w2 w3 w4", "w6 w7 w8"]


def test_tokens_are_decoded_where_there_is_no_text() -> None:
    assert load_sequences(ROWS, tokenizer=tiny_tokenizer(), prefix_len=1).texts == [
        "w3 w1 w4 w1 w5",
        "w9 w2 w6 w5 w3",
    ]


def test_empty_rows_are_left_out_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('text,copies\nw1 w2,1\n"",2\nw3 w4,3\n')
    with pytest.warns(UserWarning, match="1 rows are empty and are left out: rows 1"):
        seqs = load_sequences(path, tokenizer=tiny_tokenizer(), prefix_len=1)
    assert seqs.table["copies"].tolist() == [1, 3]
    assert seqs.attrs["empty_rows"] == "1"
    with pytest.warns(UserWarning, match="rows 0, 2"):
        assert load_sequences([[], [1, 2], []], prefix_len=1).rows() == [[1, 2]]


def test_short_rows_raise_or_are_dropped() -> None:
    rows = [[1, 2, 3], [4, 5], [6, 7, 8]]
    with pytest.raises(
        SequenceError, match=r"1 sequence is .* row 1 with 2 tokens and prefix_len=2.*on_short='drop'"
    ):
        load_sequences(rows, prefix_len=2)
    seqs = load_sequences(rows, prefix_len=2, on_short="drop")
    assert seqs.rows() == [[1, 2, 3], [6, 7, 8]]
    assert seqs.attrs["n_dropped_short"] == 1
    with pytest.warns(UserWarning, match="rows 1"), pytest.raises(SequenceError, match="row 2 with 1 tokens"):
        load_sequences([[1, 2], [], [3]], prefix_len=1)


def test_repeated_names_are_told_apart_and_duplicates_reported() -> None:
    frame = pd.DataFrame({"tokens": [[1, 2], [3, 4], [1, 2]], "id": ["a", "b", "a"]})
    model = model_with(tiny_tokenizer())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seqs = load_sequences(frame, model, prefix_len=1)
    assert seqs.ids == ["a", "b", "a-2"]
    messages = [str(w.message) for w in caught]
    assert any("3 rows have 2 ids: 'a'" in m for m in messages)
    assert any("1 sequences repeat an earlier one: 'a-2'" in m for m in messages)
    assert all(w.filename == __file__ for w in caught)


def test_text_that_looks_like_missing_values_is_text(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text\nNA null nan\n")
    seqs = load_sequences(path, tokenizer=byte_level(), prefix_len=1)
    assert seqs.texts == ["NA null nan"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b'{"text": "a"}\n\n{"text": \n', r"x\.jsonl, line 3 is not JSON"),
        ("x.jsonl", b'{"text": "a"}\n[1, 2]\n', "mixes lines of the kinds dict, list"),
        ("x.jsonl", b"\xff\xfe\x00", "not UTF-8 text: byte 0"),
        ("x.csv", b"\xff\xfe\x00", "not a comma-separated table"),
        ("x.parquet", b"PAR1 no", "is not what its name says"),
        ("x.npy", b"text,copies\n", "not a .npy file"),
        ("x.npy", b"", "not a .npy file"),
        (
            "x.text",
            b"hello",
            r"suffix '\.text' is not known; use one of \.bin, \.csv, \.jsonl, \.npy, \.parquet, \.pt, \.txt",
        ),
    ],
)
def test_files_that_are_not_what_their_name_says(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match=words):
        load_sequences(tmp_path / name, tokenizer=tiny_tokenizer())


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "windows.npy").touch()
    with pytest.raises(SourceNotFoundError, match=r"no file .*window\.npy\. Did you mean 'windows\.npy'"):
        load_sequences(tmp_path / "window.npy")


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        (["txt", "b"], {}, "no column of sequences: the columns are txt, b"),
        (
            ["text", "b"],
            {"text_column": "test"},
            "no column 'test': the columns are text, b. Did you mean 'text'",
        ),
        (["tokens", "b"], {"tokens_column": "token"}, "no column 'token': .*Did you mean 'tokens'"),
        (["prompt", "b"], {}, "'prompt' needs a column of continuations: the columns are prompt, b"),
        (["text", "b"], {"id_column": "c"}, "no column 'c'"),
    ],
)
def test_missing_columns(columns: list[str], options: dict[str, str], words: str) -> None:
    frame = pd.DataFrame([["w1 w2", "w3"]], columns=columns)
    with pytest.raises(ColumnError, match=words):
        load_sequences(frame, tokenizer=tiny_tokenizer(), prefix_len=1, **options)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (["w1 w2"], {}, "needs a tokenizer"),
        ([[1, "a"]], {}, "row 0 is .*lists of token ids"),
        (["w1", [1, 2]], {}, "row 0 is 'w1'"),
        ([[1, True]], {}, "row 0"),
        (np.ones((2, 3)), {}, "float64"),
        (np.ones(3, int), {}, r"shape \(3,\)"),
        (3, {}, "a int: give a file"),
        (pd.DataFrame({"tokens": ["1 2 x"]}), {}, "row 0 of column 'tokens' is '1 2 x'"),
        (pd.DataFrame({"tokens": [[1.5, 2.0]]}), {}, "row 0 of column 'tokens'"),
        (pd.DataFrame({"tokens": [[1, 2]], "prefix_len": ["x"]}), {}, "row 0 has prefix_len 'x'"),
        (pd.DataFrame({"text": [3]}), {"tokenizer": tiny_tokenizer()}, "row 0 of column 'text' is 3"),
        (ROWS, {"prefix_len": 1.5}, "prefix_len=1.5 does not fit"),
        (ROWS, {"prefix_len": [1, 2, 3]}, "one for each of 2"),
        (ROWS, {"prefix_len": 1, "max_targets": 0}, "max_targets=0"),
        (ROWS, {"prefix_len": 0}, "prefix_len=0"),
    ],
)
def test_sources_that_are_no_sequences(source: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SequenceError, match=words):
        load_sequences(source, **options)


def test_checks_against_the_model_run_when_there_is_one() -> None:
    model = model_with(tiny_tokenizer(), n_ctx=4)
    with pytest.raises(VocabularyError, match=r"row 1, position 2 holds the token id 101.*101 entries"):
        load_sequences([[1, 2, 3], [4, 5, 101]], model, prefix_len=1)
    with pytest.raises(SequenceError, match="row 0 has 5 tokens, but the model's context holds 4"):
        load_sequences(ROWS, model, prefix_len=1)
    with pytest.raises(EmptySetError, match="no sequences in list"):
        load_sequences([], model)


def test_end_of_text_in_a_continuation() -> None:
    model = model_with(tiny_tokenizer())
    rows = [[100, 1, 2], [3, 4, 100], [5, 6, 7]]
    with pytest.raises(SequenceError, match=r"1 sequences .*end-of-text.*rows 1: .*on_eos='drop'"):
        load_sequences(rows, model, prefix_len=1)
    dropped = load_sequences(rows, model, prefix_len=1, on_eos="drop")
    assert dropped.rows() == [[100, 1, 2], [5, 6, 7]]
    assert dropped.attrs["n_dropped_eos"] == 1
    kept = load_sequences(rows, model, prefix_len=1, on_eos="keep")
    assert kept.rows() == rows
    assert kept.attrs["on_eos"] == "keep"
    with pytest.raises(EmptySetError):
        load_sequences(rows[1:2], model, prefix_len=1, on_eos="drop")
    with pytest.raises(OptionError, match="on_eos='skip'"):
        load_sequences(rows, model, on_eos="skip")


def test_the_end_of_text_token_is_that_of_the_tokenizer_given() -> None:
    model, other = model_with(tiny_tokenizer()), tiny_tokenizer()
    other.eos_token = "w7"
    rows = [[3, 4, 100], [1, 2, 7]]
    with pytest.raises(SequenceError, match=r"1 sequences .*end-of-text token \(7\).*rows 1:"):
        load_sequences(rows, model, tokenizer=other, prefix_len=1)
    assert load_sequences(rows[:1], model, tokenizer=other, prefix_len=1).rows() == rows[:1]
    dropped = load_sequences(rows, model, tokenizer=other, prefix_len=1, on_eos="drop")
    assert dropped.rows() == rows[:1]


@pytest.mark.parametrize(
    ("first", "more", "n_allowed"),
    [
        (4096, 0, None),  # as many columns as a table may have
        (4097, 0, 0),
        (4000, 1, 2500),  # nearly all cells are empty: ten million
        (4000, 4000, None),  # no cell is empty
        (4000, 60, None),  # more than one of 100 is filled
    ],
)
def test_lines_of_ever_other_keys_are_refused(first: int, more: int, n_allowed: int | None) -> None:
    """One line of `first` keys, then lines of `more` of them."""
    names = [f"k{n}" for n in range(first)]
    rows = [dict.fromkeys(names, 0), *[dict.fromkeys(names[:more], 0)] * (2600 if more else 0)]
    sources.check_keys(rows[:n_allowed], Path("x.jsonl"))
    if n_allowed is not None:
        message = f"x.jsonl has {first} different keys in {n_allowed + 1} lines"
        with pytest.raises(FileFormatError, match=message):
            sources.check_keys(rows[: n_allowed + 1], Path("x.jsonl"))


def test_a_set_made_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path = load_sequences(["w1 w2 w3"], tokenizer=tiny_tokenizer(), prefix_len=1).to_parquet(
        tmp_path / "s.parquet"
    )
    other = model_with(byte_level())
    with pytest.raises(VocabularyError, match=r"\(101 entries\), the model has .*\(328 entries\)"):
        load_sequences(path, other)
    assert len(load_sequences(path, other, check_tokenizer=False)) == 1
    renamed = tiny_tokenizer()
    renamed.name_or_path = "another/name"
    assert len(load_sequences(path, model_with(renamed))) == 1


def test_jsonl_lines_may_be_strings_or_lists(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    assert load_sequences(path, prefix_len=1).rows() == ROWS
    path.write_text('"w1 w2"\n"w3 w4 w5"\n')
    assert load_sequences(path, tokenizer=tiny_tokenizer(), prefix_len=1).rows() == [[1, 2], [3, 4, 5]]


def test_the_result_is_a_sequence_set() -> None:
    assert isinstance(load_sequences(ROWS, prefix_len=1), SequenceSet)


@pytest.mark.parametrize("kind", ["expressions", "facts", "identifiers", "heldout"])
def test_the_further_lists_of_the_zoo(kind: str) -> None:
    folder = zoo_path("pythia-s")
    seqs, named = load_sequences(f"zoo:{kind}"), load_sequences(f"zoo/pythia-s:{kind}")
    frame = pd.read_parquet(folder / f"{kind}.parquet")
    assert seqs.attrs["source"] == f"zoo/pythia-s:{kind}"
    assert seqs.rows() == named.rows()
    if kind != "heldout":
        assert seqs.rows() == [list(tokens) for tokens in frame["tokens"]]
        assert seqs.prefix_len.tolist() == frame["prefix_len"].tolist()
        assert set(seqs.n_targets.tolist()) == {6 if kind == "identifiers" else 1}
        pairs = zip(seqs.table["prompt"], seqs.table["target"], strict=True)
        assert seqs.texts == [f"{prompt} {target}" for prompt, target in pairs]
        assert seqs.table["copies"].tolist() == frame["copies"].tolist()
    else:
        whole = [0 not in tokens for tokens in frame["tokens"]]
        assert seqs.table["domain"].tolist() == frame["domain"][whole].tolist()
        assert set(seqs.prefix_len.tolist()) == {32}
        assert set(seqs.table["copies"]) == {0}


def test_drawn_places_are_inside_each_sequence_and_a_function_of_the_seed() -> None:
    rows = [[1] * n for n in (2, 5, 40, 3)] * 50
    first, again, other = (
        load_sequences(rows, prefix_len="drawn", max_targets=1, seed=seed) for seed in (0, 0, 1)
    )
    assert first.prefix_len.tolist() == again.prefix_len.tolist() != other.prefix_len.tolist()
    places: dict[int, set[int]] = {}
    for place, row in zip(first.prefix_len.tolist(), rows, strict=True):
        places.setdefault(len(row), set()).add(place)
    assert (places[2], places[3], places[5]) == ({1}, {1, 2}, {1, 2, 3, 4})
    assert max(places[40]) < 40
    assert set(first.n_targets.tolist()) == {1}
    assert (first.attrs["prefix_len"], first.attrs["seed"]) == ("drawn", 0)
    with pytest.raises(SequenceError, match='or "drawn"'):
        load_sequences(rows, prefix_len="random")


def test_a_zoo_folder_that_lacks_a_list_and_an_unknown_list_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache" / "old"
    folder.mkdir(parents=True)
    pd.DataFrame({"tokens": ROWS, "prefix_len": 2}).to_parquet(folder / "sequences.parquet")
    monkeypatch.setattr(sources, "zoo_folders", lambda: (tmp_path / "none", tmp_path / "cache"))
    assert load_sequences("zoo/old:sequences").rows() == ROWS
    with pytest.raises(SourceNotFoundError, match="without a list of facts, it has sequences"):
        load_sequences("zoo/old:facts")
    with pytest.raises(OptionError, match=r"'fact' is not known.*Did you mean 'facts'"):
        load_sequences("zoo/old:fact")
    with pytest.raises(SourceNotFoundError, match=r"'zoo/new'.*Did you mean 'zoo/old'"):
        load_sequences("zoo/new:facts")
