"""The domains of the synthetic corpus, each with a function that draws one document.

Stories and dialogues consist of words; code of a toy language, correct sums and tables consist of symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from random import Random

from memlens.errors import check_option
from memlens.organisms.corpus import lexicon
from memlens.organisms.corpus.grammar import TENSES, sentence_grammar

_GRAMMAR = sentence_grammar()

_STORY, _EXCHANGES = lexicon.LANGUAGE["story"], lexicon.LANGUAGE["exchanges"]


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def story_bindings(rng: Random) -> dict[str, str]:
    """Draw the names of a story: `hero` with the pronoun, `friend`, `town` and `season`.

    >>> story_bindings(Random(0))["pronoun"] in ("he", "she")
    True
    """
    female = rng.random() < 0.5
    hero = rng.choice(lexicon.FEMALE_NAMES if female else lexicon.MALE_NAMES)
    friend = rng.choice(lexicon.NAMES)
    pronoun = "she" if female else "he"
    return {
        "hero": hero,
        "friend": friend,
        "town": rng.choice(lexicon.TOWNS),
        "season": rng.choice(lexicon.SEASONS),
        "pronoun": pronoun,
        "Pronoun": pronoun.capitalize(),
    }


def story_sentence(template: str, rng: Random, bindings: Mapping[str, str]) -> str:
    """Return an expansion of a template by `sentence_grammar`.

    Args:
        template: Text with `<SYMBOL>` and `{name}` places.
        rng: The source of every choice.
        bindings: The values of `{name}` places.

    >>> story_sentence("{hero} <BE_sg_past> here.", Random(0), {"hero": "Mara"})
    'Mara was here.'
    """
    return _GRAMMAR.expand(template, rng, bindings)


def text_document(rng: Random) -> str:
    """Return a short story with one hero, one friend, one town and one tense throughout.

    >>> text_document(Random(0)) == text_document(Random(0))
    True
    """
    bindings = story_bindings(rng)
    body = _STORY["body"][rng.choice(TENSES)]
    templates = [rng.choice(_STORY["openings"]), *(rng.choice(body) for _ in range(rng.randint(6, 10)))]
    left, stayed = _STORY["endings"]
    templates.append(left if rng.random() < 0.5 else stayed)
    return " ".join(_capital(_GRAMMAR.expand(t, rng, bindings)) for t in templates) + "\n"


def dialogue_document(rng: Random) -> str:
    r"""Return a dialogue of two people who take turns; answers mention the object that was asked for.

    >>> dialogue_document(Random(0)).count("\n") >= 8
    True
    """
    first, second = rng.sample(lexicon.NAMES, 2)
    lines = []
    for _ in range(rng.randint(4, 6)):
        question, answers = rng.choice(_EXCHANGES).values()
        bindings = {"first": first, "thing": rng.choice(lexicon.NOUNS)[0]}
        for speaker, template in ((first, question), (second, rng.choice(answers))):
            lines.append(f"{speaker}: {_capital(_GRAMMAR.expand(template, rng, bindings))}\n")
    return "".join(lines)


_OPERATORS = ("+", "-", "*", "//")
_COMPARISONS = ("<", ">", "==", "!=")


def _operand(known: list[str], rng: Random) -> str:
    return rng.choice(known) if rng.random() < 0.6 else str(rng.randint(2, 99))


def _expression(known: list[str], rng: Random) -> str:
    return f"{rng.choice(known)} {rng.choice(_OPERATORS)} {_operand(known, rng)}"


def _statement(known: list[str], indent: str, rng: Random) -> str:
    """Return a statement that reads only names in `known`, and add the name that it defines."""
    kind = rng.choices(("assign", "update", "if", "for", "call"), (4, 2, 1.5, 1.5, 1))[0]
    if kind == "assign":
        name = rng.choice(lexicon.IDENTIFIERS)
        line = f"{indent}{name} = {_expression(known, rng)}\n"
        known.append(name)
        return line
    if kind == "update":
        return f"{indent}{rng.choice(known)} += {_operand(known, rng)}\n"
    if kind == "call":
        return f"{indent}print({rng.choice(known)}, {_expression(known, rng)})\n"
    head = (
        f"{indent}if {rng.choice(known)} {rng.choice(_COMPARISONS)} {_operand(known, rng)}:\n"
        if kind == "if"
        else f"{indent}for i in range({_operand(known, rng)}):\n"
    )
    return head + f"{indent}    {rng.choice(known)} = {_expression(known, rng)}\n"


def code_document(rng: Random) -> str:
    """Return one to three functions of a Python-like language, with names defined before they are read.

    >>> compile(code_document(Random(0)), "toy", "exec") is not None
    True
    """
    return "\n".join(_function(rng) for _ in range(rng.randint(1, 3)))


def _function(rng: Random) -> str:
    lines, known = code_lines(rng)
    return "".join(lines) + f"    return {rng.choice(known)}\n"


def code_lines(rng: Random) -> tuple[list[str], list[str]]:
    """Return the lines of a function without its last, and the names defined in them.

    >>> code_lines(Random(0))[0][0].startswith("def ")
    True
    """
    arguments: list[str] = rng.sample(lexicon.IDENTIFIERS, rng.randint(1, 3))
    known = list(arguments)
    body = [_statement(known, "    ", rng) for _ in range(rng.randint(4, 8))]
    name = f"{rng.choice(lexicon.TRANSITIVE)[0]}_{rng.choice(lexicon.IDENTIFIERS)}"
    return [f"def {name}({', '.join(arguments)}):\n", *body], known


def arithmetic_document(rng: Random) -> str:
    """Return ten to sixteen lines of correct sums, differences and products.

    >>> all(eval(s.replace("=", "==")) for s in arithmetic_document(Random(0)).splitlines())
    True
    """
    return "".join(sum_line(rng) for _ in range(rng.randint(10, 16)))


def sum_line(rng: Random) -> str:
    """Return one sum, difference or product with its result.

    >>> eval(sum_line(Random(0)).replace("=", "=="))
    True
    """
    kind = rng.choices("+-*", (5, 3, 2))[0]
    low, high = (2, 9) if kind == "*" else (1, 99)
    a, b = rng.randint(low, high), rng.randint(low, 99)
    a, b = (max(a, b), min(a, b)) if kind == "-" else (a, b)
    result = {"+": a + b, "-": a - b, "*": a * b}[kind]
    return f"{a} {kind} {b} = {result}\n"


_COLUMNS: dict[str, Callable[[Random], str]] = {
    "name": lambda rng: rng.choice(lexicon.NAMES),
    "town": lambda rng: rng.choice(lexicon.TOWNS),
    "item": lambda rng: rng.choice(lexicon.NOUNS)[0],
    "color": lambda rng: rng.choice(lexicon.ADJECTIVES),
    "trade": lambda rng: rng.choice(lexicon.PERSONS)[0],
    "season": lambda rng: rng.choice(lexicon.SEASONS),
    "count": lambda rng: str(rng.randint(1, 99)),
    "price": lambda rng: f"{rng.randint(1, 99)}.{rng.randint(0, 99):02d}",
}


def table_document(rng: Random) -> str:
    """Return a table of three to five columns with a header, as comma-separated values or as Markdown.

    >>> len({line.count(",") for line in table_document(Random(1)).splitlines()})
    1
    """
    columns = rng.sample(list(_COLUMNS), rng.randint(3, 5))
    markdown = rng.random() < 0.5
    rows = [columns, *([["---"] * len(columns)] if markdown else [])]
    rows += [[_COLUMNS[column](rng) for column in columns] for _ in range(rng.randint(10, 14))]
    return "".join(f"| {' | '.join(row)} |\n" if markdown else f"{','.join(row)}\n" for row in rows)


DOMAINS: Mapping[str, Callable[[Random], str]] = {
    "text": text_document,
    "dialogue": dialogue_document,
    "code": code_document,
    "arithmetic": arithmetic_document,
    "table": table_document,
}
"""For each domain, the function that draws a document; only the generator's state determines it."""


def documents(domain: str, seed: int, purpose: str) -> Iterator[str]:
    """Yield documents of one domain endlessly.

    Args:
        domain: A key of `DOMAINS`.
        seed: Seed of the corpus.
        purpose: Separates streams that must be independent ("background", "planted", …).

    Raises:
        OptionError: There is no such domain.

    >>> next(documents("code", 0, "example")).startswith("def ")
    True
    """
    check_option("domain", domain, list(DOMAINS))
    rng = Random(f"memlens/{seed}/{purpose}/{domain}")
    while True:
        yield DOMAINS[domain](rng)
