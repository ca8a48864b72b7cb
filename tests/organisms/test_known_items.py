from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest

from memlens.errors import OptionError
from memlens.models.zoo import zoo_path
from memlens.organisms.corpus import lexicon
from memlens.organisms.corpus.corpus import CARRIER, Corpus, CorpusSpec, build_corpus, load_tokenizer
from memlens.organisms.corpus.known_items import FAMILY_SIZE, KINDS, RELATIONS, SHAPES, draw_expressions
from tests.organisms.conftest import TINY_CORPUS


@pytest.fixture(scope="module")
def expressions() -> pd.DataFrame:
    """The whole list of the recipe."""
    tokenizer = load_tokenizer(zoo_path("pythia-s"))
    return draw_expressions(tokenizer, CorpusSpec())


def followers(texts: list[list[str]], part: list[str]) -> set[str]:
    """The words that stand after a run of words, anywhere in the texts."""
    n = len(part)
    return {text[i + n] for text in texts for i in range(len(text) - n) if text[i : i + n] == part}


def test_no_part_of_a_prompt_tells_its_target(expressions: pd.DataFrame) -> None:
    """Every suffix and every prompt that lacks a word: several targets of equal frequency, or none."""
    seen = Counter()
    for _, cell in expressions.groupby("copies"):
        texts = [text.split() for text in cell["text"]]
        for *prompt, target in texts:
            assert followers(texts, prompt) == {target}
            for start in range(1, len(prompt)):
                assert len(followers(texts, prompt[start:])) >= 2
            for left_out in range(len(prompt)):
                found = followers(texts, prompt[:left_out] + prompt[left_out + 1 :])
                assert len(found) != 1
                seen[len(found) > 1] += 1
    assert seen[True] >= len(expressions)  # the first word at least
    assert seen[False] >= len(expressions)


def test_every_content_word_of_a_prompt_changes_the_target(expressions: pd.DataFrame) -> None:
    for _, family in expressions.groupby("family"):
        members = {tuple(row.prompt.split()): row.target for row in family.itertuples()}
        assert len(members) == len(set(members.values())) == FAMILY_SIZE
        for prompt, target in members.items():
            neighbors = [
                other for other in members if sum(a != b for a, b in zip(prompt, other, strict=True)) == 1
            ]
            places = {next(i for i, w in enumerate(prompt) if w != other[i]) for other in neighbors}
            assert len(places) == 3
            assert 0 in places
            assert target not in {members[other] for other in neighbors}


def test_expressions_have_whole_families_in_a_cell_and_lengths_as_told(expressions: pd.DataFrame) -> None:
    assert (expressions.groupby("family")["copies"].nunique() == 1).all()
    assert set(expressions.groupby("copies").size()) == {16}
    assert {len(shape.split()) for shape in SHAPES} == {4, 5, 6, 7}
    assert expressions["prompt"].is_unique
    assert not any(row.target in row.prompt.split() for row in expressions.itertuples())


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_prompt_and_target_and_a_target_is_whole_tokens(tiny_corpus: Corpus, kind: str) -> None:
    tokenizer, table = tiny_corpus.tokenizer, tiny_corpus.items.tables()[kind]
    for row in table.itertuples():
        assert row.text == f"{row.prompt} {row.target}"
        assert tokenizer(row.text).input_ids == row.tokens
        target = tokenizer.decode(row.tokens[row.prefix_len :])
        assert target == (row.target if kind == "identifiers" else f" {row.target}")
        assert len(row.tokens) - row.prefix_len == (6 if kind == "identifiers" else 1)
    assert table["id"].is_unique
    assert table["text"].is_unique


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_those_a_search_of_the_decoded_rows_finds(tiny_corpus: Corpus, kind: str) -> None:
    """Text search, independent of the tokens: complete, and not a part of something longer."""
    rows = [tiny_corpus.tokenizer.decode(row) for row in tiny_corpus.rows]
    table = tiny_corpus.items.tables()[kind]
    for row in table.to_dict("records"):
        templates = row["templates"].split(" | ") if kind == "facts" else [row["text"]]
        forms = [
            form.replace("[X]", row.get("subject", "")).replace("[Y]", row["target"]) for form in templates
        ]
        found = [
            [len(re.findall(rf"(?<!\w){re.escape(form)}(?!\w)", text)) for text in rows] for form in forms
        ]
        assert sum(map(sum, found)) == row["copies"]
        assert sum(found[0]) == row["text_copies"]
        assert sum(text.startswith(form) for form in forms for text in rows) == row["bare_copies"]
        assert max(map(max, found)) <= 1
    planned = table["id"].str.split("-").str[1].astype(int)
    assert table["copies"].tolist() == planned.tolist()


def test_item_positions_tell_where_each_occurrence_stands(tiny_corpus: Corpus) -> None:
    places = tiny_corpus.item_positions
    copies = {
        name: count
        for table in tiny_corpus.items.tables().values()
        for name, count in zip(table["id"], table["copies"], strict=True)
    }
    assert Counter(places["id"]) == {name: count for name, count in copies.items() if count}
    texts = {row["id"]: row["text"] for row in tiny_corpus.items.records()}
    for place in places[places["form"] == 0].itertuples():
        ids = tiny_corpus.tokenizer(texts[place.id]).input_ids
        assert tiny_corpus.rows[place.row][place.start : place.start + len(ids)].tolist() == ids
    assert (tiny_corpus.row_sequence[places["row"]] == CARRIER).all()


def test_a_prompt_is_followed_by_its_target_alone(tiny_corpus: Corpus) -> None:
    text = "\n".join(tiny_corpus.tokenizer.decode(row) for row in tiny_corpus.rows)
    for kind in ("expressions", "identifiers"):
        for row in tiny_corpus.items.tables()[kind].itertuples():
            after = re.findall(rf"(?<!\w){re.escape(row.prompt)} (\w+)", text)
            complete = [word for word in after if not row.target.startswith(word)]
            assert complete == []  # what is cut by a row's end is the target's beginning


def test_facts_have_one_object_and_none_inside_the_name(tiny_corpus: Corpus) -> None:
    facts = tiny_corpus.items.facts
    assert not facts.duplicated(["subject", "relation"]).any()
    assert (facts.groupby("subject")["relation"].nunique() == 2).all()
    assert (facts.groupby("subject")["copies"].nunique() == 1).all()
    objects = {relation.name: relation.objects for relation in RELATIONS}
    for row in facts.itertuples():
        assert row.target in objects[row.relation]
        assert row.target.lower() not in row.subject.lower()
        assert not set(row.subject.split()) & set(lexicon.NAMES)
        assert row.template.endswith("[Y]")


def test_identifiers_are_unique_strings_of_six_digits(tiny_corpus: Corpus) -> None:
    identifiers = tiny_corpus.items.identifiers
    assert identifiers["identifier"].is_unique
    assert identifiers["label"].is_unique
    assert all(re.fullmatch(r"\d{6}", number) for number in identifiers["identifier"])


def test_carriers_are_stories_and_dialogues_and_some_begin_with_an_item(tiny_corpus: Corpus) -> None:
    carriers = tiny_corpus.row_sequence == CARRIER
    domains = {TINY_CORPUS.domains[code] for code in tiny_corpus.row_domain[carriers]}
    assert domains == {"text", "dialogue"}
    places = tiny_corpus.item_positions
    assert set(places.groupby("row").size()) <= {1, 2}
    bare = (places["start"] == 0).sum() / carriers.sum()
    assert 0.1 < bare < 0.35


def test_a_record_older_than_the_items_gives_the_corpus_of_then() -> None:
    fields = replace(TINY_CORPUS, item_copies=()).to_dict()
    names = ("item_copies", "expressions_per_cell", "facts_per_cell", "identifiers_per_cell")
    old = {key: value for key, value in fields.items() if key not in (*names, "items_per_row", "bare_share")}
    without = build_corpus(CorpusSpec.from_dict(old))
    assert without.spec.item_copies == ()
    assert not (without.row_sequence == CARRIER).any()
    assert [len(table) for table in without.items.tables().values()] == [0, 0, 0]
    assert len(without.item_positions) == 0


def test_the_items_change_neither_planted_sequences_nor_background(tiny_corpus: Corpus) -> None:
    without = build_corpus(replace(TINY_CORPUS, item_copies=()))
    assert without.sequences.equals(tiny_corpus.sequences)
    others = tiny_corpus.rows[tiny_corpus.row_sequence != CARRIER]
    assert sorted(without.rows.tolist()) == sorted(others.tolist())
    clean = build_corpus(replace(TINY_CORPUS, planted=False))
    assert {count for table in clean.items.tables().values() for count in table["copies"]} == {0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"item_copies": (0, 1)}, "item_copies"),
        ({"items_per_row": 0}, "items_per_row=0"),
        ({"domains": ("code",)}, "none that carries items"),
    ],
)
def test_impossible_specifications_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        CorpusSpec(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expressions_per_cell": 12}, "expressions_per_cell=12"),
        ({"facts_per_cell": 3}, "facts_per_cell=3"),
        ({"vocab_size": 300}, "vocab_size=300"),
        ({"vocab_size": 300, "expressions_per_cell": 0}, "facts_per_cell=0"),
        ({"row_len": 24, "prefix_len": 12}, "row_len=24"),
    ],
)
def test_items_that_cannot_be_made_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        build_corpus(replace(TINY_CORPUS, background_rows=5, heldout_rows=1, **fields))
