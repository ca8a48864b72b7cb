"""The domains of the synthetic corpus: a name and a function that draws one document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from memlens.errors import check_option
from memlens.organisms.corpus.prose import dialogue_document, text_document
from memlens.organisms.corpus.structured import arithmetic_document, code_document, table_document


@dataclass(frozen=True)
class Domain:
    """A kind of text.

    Attributes:
        name: as it stands in the column `domain` of every table.
        draw: returns one document; the same state of the generator gives the same document.
    """

    name: str
    draw: Callable[[Random], str]


DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for domain in (
        Domain("text", text_document),
        Domain("dialogue", dialogue_document),
        Domain("code", code_document),
        Domain("arithmetic", arithmetic_document),
        Domain("table", table_document),
    )
}


def documents(domain: str, seed: int, purpose: str) -> Iterator[str]:
    """Yield documents of one domain without end.

    Args:
        domain: a key of `DOMAINS`.
        seed: of the corpus.
        purpose: keeps the streams apart that must not share their randomness ("background", "planted", …).

    Raises:
        OptionError: no such domain.

    >>> next(documents("code", 0, "example")).startswith("def ")
    True
    """
    check_option("domain", domain, list(DOMAINS))
    rng = Random(f"memlens/{seed}/{purpose}/{domain}")
    while True:
        yield DOMAINS[domain].draw(rng)
