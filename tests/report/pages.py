"""What a test reads from the page of a report."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

from memlens.report.summary import Summary

LABELS = [
    "What was asked",
    "What was found",
    "How sure that is",
    "Compared with what",
    "What it does not show",
]


TASKS = ("last_word",)
_NAME = re.compile(r"(?<![\w./`'\"])[a-z0-9]+(_[a-z0-9]+)+(?![\w`'\"]|[./(]\w)")


def said_once(text: str) -> None:
    """Check that no clause says what another says with a few words more."""
    clauses = [clause.lower().strip(" .").split() for clause in text.split(";")]
    for i, one in enumerate(clauses):
        for other in clauses[:i] + clauses[i + 1 :]:
            rest = iter(other)
            assert not all(word in rest for word in one), " ".join(one)


def check_words(report: Path) -> None:
    """Check that every figure has a text, and that texts have neither raw names nor rounding errors."""
    page = report.read_text(encoding="utf-8")
    for figure in re.findall(r"<figure>.*?</figure>", page, re.DOTALL):
        heading, text = (re.sub(r"<[^>]+>", " ", part) for part in figure.split("<figcaption>"))
        assert len(text.split()) > 5, heading[:200]
    page = page.partition("<h2>Methods")[0]
    blocks = re.findall(
        r'<p(?: class="(?:reading|small)")?>(?:Control: )?<bdi>(.*?)</bdi></p>', page, re.DOTALL
    )
    headers = re.findall(r"<th[^>]*>(.*?)</th>|<h[123]>(.*?)</h[123]>", page, re.DOTALL)
    assert blocks
    texts = [*blocks, *("".join(pair) for pair in headers), *_in_figures(page)]
    for words in (html.unescape(re.sub(r"<[^>]+>", " ", block)) for block in texts):
        assert not _NAME.search(words), words
        assert not re.search(r"\de-1\d\b|\de\+0\d|[{}]", words), words
        assert not re.search(
            r"\blayers \d+\b(?![-,]\d| (?:and|to) )|\b1 (?:\w+ )?tokens\b|,\.|: That", words
        ), words


def _in_figures(page: str) -> Iterator[str]:
    """The names of lines and panels; of tasks, which are names of their own, none."""
    for spec in re.findall(r'id="figure-\d+-data">(.*?)</script>', page, re.DOTALL):
        figure = json.loads(spec)
        yield from (trace["name"] for trace in figure["data"] if trace.get("name") not in (None, *TASKS))
        yield from (note["text"] for note in figure["layout"].get("annotations", ()))


def sentences(report: Path) -> dict[str, str]:
    """The five sentences of a report's page."""
    found = re.findall(
        r"<dt>(.*?)</dt><dd><bdi>(.*?)</bdi></dd>", report.read_text(encoding="utf-8"), re.DOTALL
    )
    assert [label for label, _ in found] == LABELS
    texts = [html.unescape(text) for _, text in found]
    assert all(text.endswith((".", "?")) and not re.search(r"[{}]|\bnan\b", text) for text in texts)
    for text in texts:
        said_once(text)
    check_words(report)
    return dict(zip(Summary.__dataclass_fields__, texts, strict=True))
