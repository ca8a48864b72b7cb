"""What a test reads from the page of a report."""

from __future__ import annotations

import html
import re
from pathlib import Path

from memlens.report.summary import Summary

LABELS = [
    "What was asked",
    "What was found",
    "How sure that is",
    "Compared with what",
    "What it does not show",
]


def sentences(report: Path) -> dict[str, str]:
    """The five sentences of a report's page."""
    found = re.findall(
        r"<dt>(.*?)</dt><dd><bdi>(.*?)</bdi></dd>", report.read_text(encoding="utf-8"), re.DOTALL
    )
    assert [label for label, _ in found] == LABELS
    texts = [html.unescape(text) for _, text in found]
    assert all(text.endswith((".", "?")) and not re.search(r"[{}]|\bnan\b", text) for text in texts)
    return dict(zip(Summary.__dataclass_fields__, texts, strict=True))
