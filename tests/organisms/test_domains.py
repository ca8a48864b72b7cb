from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest

from memlens.errors import OptionError
from memlens.organisms.corpus import lexicon
from memlens.organisms.corpus.domains import DOMAINS, documents
from memlens.organisms.corpus.grammar import sentence_grammar


def draw(domain: str, n: int = 200) -> list[str]:
    return list(islice(documents(domain, 0, "test"), n))


@pytest.mark.parametrize("domain", DOMAINS)
def test_documents_are_decided_by_seed_and_purpose(domain: str) -> None:
    first = list(islice(documents(domain, 3, "a"), 5))
    assert list(islice(documents(domain, 3, "a"), 5)) == first
    assert list(islice(documents(domain, 4, "a"), 5)) != first
    assert list(islice(documents(domain, 3, "b"), 5)) != first


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_template_is_left_open_and_documents_differ(domain: str) -> None:
    texts = draw(domain)
    assert not any(re.search(r"[{}]|<[A-Za-z_]+>", text) for text in texts)
    assert len(set(texts)) == len(texts)


def test_every_sum_is_right() -> None:
    lines = [line for text in draw("arithmetic") for line in text.splitlines()]
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for line in lines:
        a, operator, b, _, result = line.split()
        assert operations[operator](int(a), int(b)) == int(result)
    assert {line.split()[1] for line in lines} == set(operations)


def test_code_compiles_and_reads_only_names_it_defined() -> None:
    for text in draw("code"):
        for function in text.split("\n\n"):
            compiled = compile(function, "toy", "exec")
            body = next(const for const in compiled.co_consts if hasattr(const, "co_code"))
            assert set(body.co_names) <= {"print", "range"}  # globals read: none of its own


def test_tables_keep_their_number_of_columns() -> None:
    for text in draw("table"):
        separator = "|" if text.startswith("|") else ","
        assert len({line.count(separator) for line in text.splitlines()}) == 1


def test_dialogue_alternates_between_two_speakers() -> None:
    for text in draw("dialogue"):
        speakers = [line.split(":")[0] for line in text.splitlines()]
        assert speakers[::2] == [speakers[0]] * (len(speakers) // 2)
        assert speakers[1::2] == [speakers[1]] * (len(speakers) // 2)
        assert speakers[0] != speakers[1]


def test_a_story_keeps_its_hero_pronoun_and_town() -> None:
    for text in draw("text"):
        words = set(re.findall(r"\w+", text.lower()))
        assert not {"he", "she"} <= words
        hero = re.findall(r"(\w+) (?:left|stayed in) (\w+)", text)[-1]
        assert hero[1] in lexicon.TOWNS
        assert text.count(hero[0]) >= 2


@pytest.mark.parametrize("number", ["sg", "pl"])
def test_subject_and_verb_agree_across_relative_clauses(number: str) -> None:
    grammar, rng = sentence_grammar(), Random(0)
    form = ("sg", "pl").index(number)
    persons = {noun[form] for noun in lexicon.PERSONS} | {noun[form] for noun in lexicon.NOUNS}
    verbs = {verb[1 - form] for verb in lexicon.TRANSITIVE + lexicon.INTRANSITIVE + lexicon.SPEECH}
    verbs |= {"is" if number == "sg" else "are"} | set(lexicon.ADVERBS)
    for _ in range(200):
        subject = grammar.expand(f"<NP_{number}_present>", rng)
        assert set(subject.split()) & persons
        assert grammar.expand(f"<VP_{number}_present>", rng).split()[0] in verbs


def test_verb_forms_are_spelled_right() -> None:
    forms = {verb[0]: verb[1:] for verb in lexicon.TRANSITIVE + lexicon.INTRANSITIVE}
    assert forms["carry"] == ("carries", "carried")
    assert forms["buy"] == ("buys", "bought")
    assert forms["watch"] == ("watches", "watched")
    assert forms["smile"] == ("smiles", "smiled")


def test_an_unknown_domain_is_named() -> None:
    with pytest.raises(OptionError, match=r"'dialog'.*Did you mean 'dialogue'"):
        next(documents("dialog", 0, "test"))
