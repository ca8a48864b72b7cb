from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from memlens.errors import ColumnError, OptionError, SequenceError
from memlens.sequences.readers.idioms import DEFECTS, idiom_defects
from memlens.sequences.readers.load import load_sequences
from tests.sequences.vocabularies import byte_level, characters, metaspace


def row(
    idiom: str, name: str, *, predictable: bool = False, similar: bool = False, **more: Any
) -> dict[str, Any]:
    flags = {"prompt_comp_ind": predictable, "similarity_ind": similar, "frequent_target_ind": True}
    return {
        "idiom": idiom,
        "id": name,
        "source": "made up",
        **flags,
        "hard_to_guess": not (predictable or similar),
        **more,
    }


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "idioms.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


ROWS = [
    row("turn a blind eye", "a1"),
    row("the cat sat on the mat", "a2", predictable=True),
    row("grind to a halt", "a3", similar=True),
]


@pytest.mark.parametrize("make", [byte_level, metaspace], ids=["byte level", "metaspace"])
def test_the_last_word_s_first_token_is_the_target(tmp_path: Path, make: Any) -> None:
    tokenizer = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seqs = load_sequences(write(tmp_path, ROWS), tokenizer=tokenizer)
    assert seqs.n_targets.tolist() == [1, 1, 1]
    for i, record in enumerate(ROWS):
        prompt, word = record["idiom"].rsplit(" ", 1)
        whole = tokenizer(record["idiom"], add_special_tokens=False)["input_ids"]
        n = int(seqs.prefix_len[i])
        assert seqs.rows()[i] == whole[: n + 1]
        assert tokenizer.decode(whole[:n]) == prompt
        token = tokenizer.convert_ids_to_tokens(int(seqs.target_ids[i, 0]))
        assert token[0] in "Ġ▁"
        assert word.startswith(token[1:])
        assert len(token) > 1


def test_the_whole_word_as_target(tmp_path: Path) -> None:
    tokenizer = byte_level()
    seqs = load_sequences(
        write(tmp_path, [row("turn a blind tunnelling", "a")]), tokenizer=tokenizer, target="word"
    )
    assert seqs.n_targets[0] > 1
    targets = seqs.target_ids[0].tolist()
    assert tokenizer.decode(targets) == " tunnelling"
    assert seqs.attrs["target"] == "word"


def test_a_bare_space_is_no_target(tmp_path: Path) -> None:
    tokenizer = characters()
    path = write(tmp_path, ROWS)
    first = load_sequences(path, tokenizer=tokenizer)
    assert [tokenizer.decode([t]) for t in first.target_ids[:, 0].tolist()] == ["e", "m", "h"]
    whole = load_sequences(path, tokenizer=tokenizer, target="word")
    assert tokenizer.decode(whole.target_ids[0, : whole.n_targets[0]].tolist()) == "eye"


def test_every_column_is_kept_and_the_words_are_counted(tmp_path: Path) -> None:
    seqs = load_sequences(write(tmp_path, ROWS), tokenizer=byte_level())
    for name in ("prompt_comp_ind", "similarity_ind", "frequent_target_ind", "hard_to_guess", "source"):
        assert seqs.table[name].tolist() == [record[name] for record in ROWS]
    assert seqs.table["n_words"].tolist() == [4, 6, 4]
    assert seqs.table["prompt"].tolist() == ["turn a blind", "the cat sat on the", "grind to a"]
    assert seqs.table["target"].tolist() == ["eye", "mat", "halt"]
    assert seqs.texts == [record["idiom"] for record in ROWS]


def test_ids_that_repeat_are_told_apart_and_named(tmp_path: Path) -> None:
    rows = [row("as dead as a doornail", "same"), row("as dead as a dodo", "same"), *ROWS]
    with pytest.warns(UserWarning, match="5 rows have 4 ids: 'same'"):
        seqs = load_sequences(write(tmp_path, rows), tokenizer=byte_level())
    assert seqs.ids == ["same", "same-2", "a1", "a2", "a3"]
    assert seqs.table["source_id"].tolist()[:2] == ["same", "same"]
    assert seqs.table["shared_prompt"].tolist() == [True, True, False, False, False]


def test_rows_of_the_same_prompt_and_target_are_one(tmp_path: Path) -> None:
    rows = [*ROWS, row("turn a blind eye", "b1")]
    with pytest.warns(UserWarning, match="1 repeated idioms are left out.*'turn a blind eye'"):
        seqs = load_sequences(write(tmp_path, rows), tokenizer=byte_level())
    assert seqs.ids == ["a1", "a2", "a3"]


def test_dictionary_definitions_are_marked_and_listed(tmp_path: Path) -> None:
    rows = [*ROWS, row("virtually impossible to find", "d1")]
    with pytest.warns(UserWarning, match="1 rows are dictionary definitions.*'virtually impossible to find'"):
        seqs = load_sequences(write(tmp_path, rows), tokenizer=byte_level())
    assert seqs.table["definition"].tolist() == [False, False, False, True]


def test_the_identity_of_the_flags_is_checked(tmp_path: Path) -> None:
    rows = [*ROWS, {**row("let bygones be bygones", "x", similar=True), "hard_to_guess": True}]
    with pytest.warns(UserWarning, match="1 rows contradict hard_to_guess.*'let bygones be bygones'"):
        load_sequences(write(tmp_path, rows), tokenizer=byte_level())


@pytest.mark.filterwarnings("ignore")
def test_a_row_is_hard_to_guess_where_it_is_neither_predictable_nor_similar() -> None:
    flags = np.array(list(itertools.product([False, True], repeat=3)))
    words = [f"turn a blind {letter}" for letter in "abcdefgh"]
    frame = pd.DataFrame(flags, columns=["hard_to_guess", "prompt_comp_ind", "similarity_ind"])
    table = load_sequences(frame.assign(idiom=words), tokenizer=byte_level()).table
    right = {(True, False, False), (False, True, False), (False, False, True), (False, True, True)}
    assert table["contradiction"].tolist() == [tuple(row) not in right for row in flags.tolist()]
    for name in frame:
        bare = frame.drop(columns=name).assign(idiom=words)
        assert not load_sequences(bare, tokenizer=byte_level()).table["contradiction"].any()


def test_the_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    forth = load_sequences(write(tmp_path, ROWS), tokenizer=byte_level())
    back = load_sequences(write(tmp_path, ROWS[::-1]), tokenizer=byte_level())
    assert dict(zip(forth.ids, forth.rows(), strict=True)) == dict(zip(back.ids, back.rows(), strict=True))


def test_bad_idioms(tmp_path: Path) -> None:
    path = write(tmp_path, [row("quixotic", "a")])
    with pytest.raises(SequenceError, match="row 0 holds the idiom 'quixotic'"):
        load_sequences(path, tokenizer=byte_level())
    with pytest.raises(SequenceError, match="needs a tokenizer"):
        load_sequences(write(tmp_path, ROWS))
    with pytest.raises(OptionError, match="target='token'"):
        load_sequences(path, tokenizer=byte_level(), target="token")


def test_a_text_column_that_is_named_goes_first(tmp_path: Path) -> None:
    seqs = load_sequences(write(tmp_path, ROWS), tokenizer=byte_level(), text_column="idiom", prefix_len=2)
    assert seqs.prefix_len.tolist() == [2, 2, 2]
    assert seqs.texts == [record["idiom"] for record in ROWS]


DEFECTIVE = [
    row("as dead as a doornail", "same"),
    row("as dead as a dodo", "same"),
    row("virtually impossible to find", "d1"),
    row("whatever you can say", "s1"),
    row("that's the whole thing", "s2"),
    row("Off you go, then", "no: a comma"),
    row("the icing on the Cake", "e1"),
    row("this is icing on the cake", "e2"),
    row("pull someone's leg", "p1"),
    {**row("let bygones be bygones", "c1", similar=True), "hard_to_guess": True},
    row("turn a blind eye", "fine"),
]


def test_every_defect_is_found_and_listed(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match="2 rows have only stop words before the target.*'whatever you can say'"
    ):
        seqs = load_sequences(write(tmp_path, DEFECTIVE), tokenizer=byte_level())
    table = idiom_defects(seqs)
    found = {defect: part["row"].tolist() for defect, part in table.groupby("defect")}
    assert found == {
        "shared_prompt": [0, 1],
        "repeated_id": [0, 1],
        "definition": [2],
        "stop_word_prompt": [3, 4],
        "shared_ending": [6, 7],
        "placeholder": [8],
        "contradiction": [9],
    }
    assert set(found) == set(DEFECTS)
    assert table["why"].tolist() == [DEFECTS[defect] for defect in table["defect"]]
    assert table["id"].tolist()[:1] == ["d1"]
    assert table["text"].tolist() == [seqs.texts[i] for i in table["row"]]
    assert idiom_defects(seqs.table).equals(table)
    assert len(idiom_defects(seqs[10])) == 0


def test_defects_of_another_set_are_refused(tmp_path: Path) -> None:
    seqs = load_sequences(["turn a blind eye"], tokenizer=byte_level(), prefix_len=2)
    with pytest.raises(ColumnError, match="no column 'definition'"):
        idiom_defects(seqs)


def test_files_without_flags_and_ids(tmp_path: Path) -> None:
    bare = [{"idiom": record["idiom"]} for record in ROWS]
    seqs = load_sequences(write(tmp_path, bare), tokenizer=byte_level())
    assert len(idiom_defects(seqs)) == 0
