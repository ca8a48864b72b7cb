"""Documents of symbols: code of a toy language, sums that are right, and tables."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from memlens.organisms.corpus import lexicon

_OPERATORS = ("+", "-", "*", "//")
_COMPARISONS = ("<", ">", "==", "!=")


def _operand(known: list[str], rng: Random) -> str:
    return rng.choice(known) if rng.random() < 0.6 else str(rng.randint(2, 99))


def _expression(known: list[str], rng: Random) -> str:
    return f"{rng.choice(known)} {rng.choice(_OPERATORS)} {_operand(known, rng)}"


def _statement(known: list[str], indent: str, rng: Random) -> str:
    """One statement that reads only names in `known`; a name that it defines is added to them."""
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
    """Return one to three functions of a Python-like language: names are defined before they are read.

    Args:
        rng: the source of every choice.

    >>> compile(code_document(Random(0)), "toy", "exec") is not None
    True
    """
    return "\n".join(_function(rng) for _ in range(rng.randint(1, 3)))


def _function(rng: Random) -> str:
    lines, known = code_lines(rng)
    return "".join(lines) + f"    return {rng.choice(known)}\n"


def code_lines(rng: Random) -> tuple[list[str], list[str]]:
    """Return the lines of a function up to its last, and the names defined there.

    Args:
        rng: the source of every choice.

    >>> code_lines(Random(0))[0][0].startswith("def ")
    True
    """
    arguments: list[str] = rng.sample(lexicon.IDENTIFIERS, rng.randint(1, 3))
    known = list(arguments)
    body = [_statement(known, "    ", rng) for _ in range(rng.randint(4, 8))]
    name = f"{rng.choice(lexicon.TRANSITIVE)[0]}_{rng.choice(lexicon.IDENTIFIERS)}"
    return [f"def {name}({', '.join(arguments)}):\n", *body], known


def arithmetic_document(rng: Random) -> str:
    """Return ten to sixteen lines of sums, differences and products, each right.

    Args:
        rng: the source of every choice.

    >>> all(eval(s.replace("=", "==")) for s in arithmetic_document(Random(0)).splitlines())
    True
    """
    return "".join(sum_line(rng) for _ in range(rng.randint(10, 16)))


def sum_line(rng: Random) -> str:
    """Return one sum, difference or product, with its result.

    Args:
        rng: the source of every choice.

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


def _csv_row(cells: list[str]) -> str:
    return ",".join(cells) + "\n"


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def table_document(rng: Random) -> str:
    """Return a table of three to five columns, as comma-separated values or as Markdown, with its header.

    Args:
        rng: the source of every choice.

    >>> len({line.count(",") for line in table_document(Random(1)).splitlines()})
    1
    """
    columns = rng.sample(list(_COLUMNS), rng.randint(3, 5))
    markdown = rng.random() < 0.5
    render = _markdown_row if markdown else _csv_row
    lines = [render(columns)] + ([_markdown_row(["---"] * len(columns))] if markdown else [])
    lines += [render([_COLUMNS[column](rng) for column in columns]) for _ in range(rng.randint(10, 14))]
    return "".join(lines)
