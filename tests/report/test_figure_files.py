"""Sections and figures of a report that are of no single result."""

from __future__ import annotations

import html
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest

from memlens.report.from_directory import report_from_directory
from memlens.report.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path, title="Two sections", settings={})
    run.add_section("first", "The first part", "Its lead.")
    run.add_section("second", "The second part")
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4]), layout={"title": {"text": "A drawn line"}})
    run.add_figure("line", figure, section="first", reading="It rises.", caption="Small print.")
    run.add_table("numbers", pd.DataFrame({"a": [1]}), title="The numbers", section="second")
    return run


def test_sections_show_their_figures_and_tables_in_order(run: RunDirectory, tmp_path: Path) -> None:
    page = html.unescape(run.finish().read_text(encoding="utf-8"))
    places = [page.rindex(text) for text in ("The first part", "A drawn line", "It rises.", "Small print.")]
    assert max(places) < page.rindex("The second part") < page.rindex("The numbers")
    assert "Its lead." in page
    assert (tmp_path / "line.plotly.json").exists()


def test_a_figure_that_cannot_be_read_is_named_and_costs_nothing_else(
    run: RunDirectory, tmp_path: Path
) -> None:
    (tmp_path / "line.plotly.json").write_text("{")
    page = html.unescape(report_from_directory(tmp_path).read_text(encoding="utf-8"))
    assert "The figure line.plotly.json cannot be read" in page
    assert "The numbers" in page
    assert "The first part" not in page


def test_starting_over_deletes_the_figures_of_the_last_run(run: RunDirectory, tmp_path: Path) -> None:
    run.finish()
    RunDirectory(tmp_path, title="Anew", settings={}, fresh=True)
    assert not (tmp_path / "line.plotly.json").exists()
    assert not (tmp_path / "numbers.parquet").exists()


def test_a_figure_drawn_again_replaces_the_first(run: RunDirectory, tmp_path: Path) -> None:
    run.add_figure("line", go.Figure(layout={"title": {"text": "Drawn anew"}}), section="second")
    page = html.unescape(run.finish().read_text(encoding="utf-8"))
    assert "Drawn anew" in page
    assert "A drawn line" not in page
