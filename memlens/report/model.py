"""The parts of a report. Nothing here is specific to one study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go

from memlens.results.statistics.estimates import shown_number

if TYPE_CHECKING:
    from memlens.results.statistics.estimates import Estimate

EXPLORER_FORMAT = "memlens explorer 1"


@dataclass(frozen=True)
class Finding:
    """One sentence that answers a question, with its number.

    Attributes:
        title: The question or the claim, in a few words.
        statement: One sentence in plain words.
        estimate: The number; None if there is none.
        low: Lower end of its interval.
        high: Upper end of its interval.
        unit: `nats`, `share of sequences`, …
        n: Number of sequences, or of what `over` names, behind it.
        control: What it was compared with, and the value for that.
        plain: The same for a reader who is not a specialist, as a clause of the report's second sentence;
            empty where the report does not open with it.
        beside: The comparison in the same words; empty where there is none.
        over: What `n` counts, in the plural.

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
    plain: str = ""
    beside: str = ""
    over: str = "sequences"

    @classmethod
    def of(
        cls,
        title: str,
        statement: str,
        found: Estimate,
        unit: str = "",
        control: str | None = None,
        **words: str,
    ) -> Finding:
        """Return a finding about an estimate; an estimate over 0 sequences has no known `n`."""
        return cls(
            title, statement, found.rounded, found.low, found.high, unit, found.n or None, control, **words
        )

    @property
    def has_interval(self) -> bool:
        """Whether there is a number with both ends of its interval."""
        return _known(self.estimate) and _known(self.low) and _known(self.high)

    @property
    def number(self) -> str:
        """Estimate, interval, unit and n in one line; empty without an estimate."""
        if not _known(self.estimate):
            return ""
        parts = shown_number(self.estimate)
        if _known(self.low) and _known(self.high):
            parts += f" [{shown_number(self.low)}, {shown_number(self.high)}]"
        parts += f" {self.unit}" if self.unit else ""
        few = self.n is not None and self.n < 3 and not _known(self.low)
        parts += f", n = {self.n}" if self.n is not None else ""
        return parts + (f" (too few {self.over} for an interval)" if few else "")


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


@dataclass(frozen=True, eq=False)
class FigureBlock:
    """A figure with a reading of it in plain words.

    Attributes:
        figure: Any plotly figure; its title and subtitle become the heading.
        reading: What it shows, for someone who has not read the paper.
        caption: What was measured, in small print.
    """

    figure: go.Figure
    reading: str = ""
    caption: str = ""


@dataclass(frozen=True)
class FigureRequest:
    """A figure to draw from a saved result.

    Attributes:
        options: Keyword arguments of `Result.plot` (`metric` may be one of them), of JSON types.
        reading: Plain words; by default they are generated from the numbers.
        caption: Small print.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    reading: str | None = None
    caption: str = ""


@dataclass(frozen=True, eq=False)
class TableBlock:
    """A table; every cell is shown as text.

    Attributes:
        title: Its heading.
        frame: The data; long tables are cut after `rows` rows, and the report says so.
        note: Small print below.
        rows: Number of rows that are shown.
    """

    title: str
    frame: pd.DataFrame
    note: str = ""
    rows: int = 100


@dataclass(frozen=True, eq=False)
class ExplorerBlock:
    """Sequences to explore one by one: tokens, lens, effects, attention, and continuations under edits.

    Attributes:
        payload: What the page's script reads, made by `memlens.explorer.page.explorer_payload`.
        reading: How to use it, in plain words.
        caption: What was measured, in small print.
    """

    payload: Mapping[str, Any]
    reading: str = ""
    caption: str = ""


@dataclass(frozen=True, eq=False)
class Section:
    """A part of the report.

    Attributes:
        title: Its heading, also in the table of contents.
        lead: Text before the figures; blank lines separate paragraphs.
        figures: In order.
        tables: In order, after the figures.
        explorers: In order, before the figures.
    """

    title: str
    lead: str = ""
    figures: Sequence[FigureBlock] = ()
    tables: Sequence[TableBlock] = ()
    explorers: Sequence[ExplorerBlock] = ()
