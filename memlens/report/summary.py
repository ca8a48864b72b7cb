"""The five sentences with which a report opens, for a reader who is not a specialist."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from memlens.errors import check_option
from memlens.report.model import Finding
from memlens.results.statistics.estimates import shown_number

_NOT_FOUND = (
    "Nothing was found that can be put in one sentence: the figures and tables below give the numbers."
)
_NOT_SURE = "That cannot be said: no interval was computed, mostly because there were too few sequences."
_ALONE = "Nothing: there is no control, so what was found need not be special to these sequences."
_MOST = 3
"""Findings in one sentence."""
_HIDES = (
    "It describes one model on these sequences and says nothing about other models or other text. The "
    "largest of several values is overstated unless it was measured again on other sequences."
)


@dataclass(frozen=True)
class Summary:
    """Five sentences about a run.

    A study gives the first and the last (`RunDirectory(summary=…)`); the others are made from its findings
    (`Finding.plain` and `Finding.beside`), so that they say what was found, also where that is nothing.

    Attributes:
        asked: What was asked.
        found: What was found.
        sure: How sure that is.
        compared: What it was compared with, and with what outcome.
        hides: What it does not show.

    Example:
        >>> found = Finding("Recall", "…", 0.5, 0.3, 0.7, "", 20, plain="half of 20 are recalled")
        >>> summary = Summary.of({"asked": "Which sequences are recalled?"}, [found])
        >>> summary.found
        'Half of 20 are recalled.'
        >>> print(summary.sure)
        The true numbers are likely to lie in these ranges (95 % intervals): 0.3 to 0.7 (Recall, n = 20).
    """

    asked: str
    found: str
    sure: str
    compared: str
    hides: str

    @classmethod
    def of(
        cls,
        given: Mapping[str, str],
        findings: Sequence[Finding],
        *,
        title: str = "",
        readings: Sequence[str] = (),
        missing: Sequence[str] = (),
    ) -> Summary:
        """Return the sentences that were given, and the others from the findings.

        Args:
            given: Sentences by the name of their attribute.
            findings: Of the run. The first three with a `plain` clause are told, else the first one.
            title: Of the run, which says what was asked where that is not given.
            readings: Of the results, for a run without findings.
            missing: Steps that failed.

        Raises:
            OptionError: A given sentence is none of the five.
        """
        names = [field.name for field in fields(cls)]
        for name in given:
            check_option("sentence", name, names)
        told = [finding for finding in findings if finding.plain][:_MOST] or list(findings[:1])
        said = [finding.plain or finding.statement for finding in told] or list(readings[:1])
        beside = [finding.beside for finding in findings if finding.beside][:_MOST]
        if not any(finding.plain or finding.beside for finding in findings):
            beside = [finding.control or "" for finding in told]
        found = {
            "asked": title and f"What is reported under the title “{title}”.",
            "found": _joined(said) or _NOT_FOUND,
            "sure": _sure(told),
            "compared": _joined(filter(None, beside)) or _ALONE,
            "hides": _HIDES,
        }
        sentences = {**found, **given}
        if missing:
            sentences["hides"] += f" What failed is missing: {', '.join(missing)}."
        return cls(**sentences)

    def rows(self) -> list[tuple[str, str]]:
        """Return each sentence with the words before it."""
        return [(words, str(getattr(self, name))) for name, words in _WORDS.items()]


_WORDS = {
    "asked": "What was asked",
    "found": "What was found",
    "sure": "How sure that is",
    "compared": "Compared with what",
    "hides": "What it does not show",
}


def _sure(told: Sequence[Finding]) -> str:
    ranges = [
        " ".join(filter(None, (f"{shown_number(finding.low)} to {shown_number(finding.high)}", finding.unit)))
        + (f" ({finding.title}, n = {finding.n})" if finding.n else f" ({finding.title})")
        for finding in told
        if finding.has_interval
    ]
    if not ranges:
        return _NOT_SURE
    return f"The true numbers are likely to lie in these ranges (95 % intervals): {'; '.join(ranges)}."


def _joined(clauses: Iterable[str]) -> str:
    """Return clauses as one sentence; an empty text for none."""
    parts = [clause.strip().removesuffix(".") for clause in clauses]
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""
