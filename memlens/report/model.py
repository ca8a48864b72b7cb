"""What a report is made of. No study is known here: studies fill these classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go


@dataclass(frozen=True)
class Finding:
    """One sentence that answers a question, with its number.

    Attributes:
        title: the question or the claim in a few words.
        statement: one sentence in plain words.
        estimate: the number, None where there is none.
        low: lower end of its interval.
        high: upper end of its interval.
        unit: `nats`, `share of sequences`, …
        n: number of sequences behind it.
        control: what it was compared with, and what that gave.

    Example:
        >>> Finding("Recall", "Most are recalled.", 0.75, 0.6, 0.86, "share of sequences", 48).number
        '0.75 [0.6, 0.86] share of sequences, n = 48'
    """

    title: str
    statement: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    n: int | None = None
    control: str | None = None

    @property
    def number(self) -> str:
        """Estimate, interval, unit and n in one line; empty where there is no estimate."""
        if not _known(self.estimate):
            return ""
        parts = f"{self.estimate:.3g}"
        if _known(self.low) and _known(self.high):
            parts += f" [{self.low:.3g}, {self.high:.3g}]"
        parts += f" {self.unit}" if self.unit else ""
        return parts + (f", n = {self.n}" if self.n is not None else "")


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


@dataclass(frozen=True, eq=False)
class FigureBlock:
    """A figure with a plain-words reading of it.

    Attributes:
        figure: any plotly figure; its title and subtitle become the heading.
        reading: what it shows, for someone who has not read the paper.
        caption: what was measured, in small print.
    """

    figure: go.Figure
    reading: str = ""
    caption: str = ""


@dataclass(frozen=True)
class FigureRequest:
    """A figure to draw from a saved result.

    Attributes:
        options: for `Result.plot`; JSON types (`metric` may be among them).
        reading: plain words; None has them made from the numbers.
        caption: small print.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    reading: str | None = None
    caption: str = ""


@dataclass(frozen=True, eq=False)
class TableBlock:
    """A table; every cell is shown as text.

    Attributes:
        title: its heading.
        frame: the data; long tables are cut at `rows`, and the report says so.
        note: small print below.
        rows: how many rows are shown.
    """

    title: str
    frame: pd.DataFrame
    note: str = ""
    rows: int = 100


@dataclass(frozen=True, eq=False)
class ExplorerBlock:
    """Sequences to look into one by one: tokens, lens, effects, attention, and what is written under edits.

    Attributes:
        payload: what the page's script reads, as `memlens.explorer.explorer_payload` makes it.
        reading: how to use it, in plain words.
        caption: what was measured, in small print.
    """

    payload: Mapping[str, Any]
    reading: str = ""
    caption: str = ""


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the report.

    Attributes:
        title: its heading, also in the table of contents.
        lead: a paragraph before the figures; blank lines divide paragraphs.
        figures: in order.
        tables: in order, after the figures.
        explorers: in order, before the figures.
    """

    title: str
    lead: str = ""
    figures: Sequence[FigureBlock] = ()
    tables: Sequence[TableBlock] = ()
    explorers: Sequence[ExplorerBlock] = ()
