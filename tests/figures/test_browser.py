"""Every kind of figure in a real browser: nothing overlaps and nothing is cut, in wide and narrow pages."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from memlens import figures
from memlens.report.model import FigureBlock, Section
from memlens.report.render import write_report
from tests.figures.every import every
from tests.report import browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason=browser.MISSING),
]
_BOXES = Path(browser.__file__).with_name("boxes.js").read_text(encoding="utf-8")
_NOTEBOOK = """
<!doctype html><meta charset="utf-8"><script>{script}</script><body style="margin: 0">
<script>
for (const [place, spec] of {specs}.entries()) {{
  const div = document.body.appendChild(document.createElement("div"));
  div.className = "chart"; div.id = `figure-${{place + 1}}`;
  Plotly.newPlot(div, spec.data, spec.layout, {{responsive: true}})
    .then(() => {{ div.dataset.drawn = "yes"; }});
}}
</script>
"""


@pytest.fixture(scope="module")
def drawn() -> list[tuple[str, go.Figure]]:
    return [(f"{name}, {n}", figure) for name, some in every().items() for n, figure in enumerate(some, 1)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    with browser.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_every_function_that_draws_is_tried() -> None:
    drawing = {
        name
        for name in figures.__all__
        if inspect.isfunction(function := getattr(figures, name))
        and inspect.signature(function).return_annotation == "go.Figure"
    }
    assert drawing - {"dark"} == set(every())


@pytest.mark.parametrize("where", ["notebook", "report"])
def test_nothing_overlaps_and_nothing_is_cut(
    where: str, page: browser.Page, drawn: list[tuple[str, go.Figure]], tmp_path: Path
) -> None:
    """A figure alone, as a wide cell of a notebook shows it, and one in a report, without its title."""
    file = tmp_path / "page.html"
    if where == "notebook":
        specs = ",".join(str(figure.to_json()).replace("</", "<\\/") for _, figure in drawn)
        file.write_text(_NOTEBOOK.format(script=get_plotlyjs(), specs=f"[{specs}]"), encoding="utf-8")
    else:
        blocks = [FigureBlock(figure) for _, figure in drawn]
        write_report(file, title="All", findings=[], sections=[Section("All", "", blocks)], settings={})
    page.open(file)
    page.wait_for(f"return document.querySelectorAll('div.chart[data-drawn]').length === {len(drawn)}")
    found = {}
    for width in (1400, 900, 600):
        page.resize(width)
        problems = page.run(
            "const charts = Array.from(document.querySelectorAll('div.chart'));"
            f"{_BOXES} return Promise.all(charts.map((div) => Plotly.Plots.resize(div))).then("
            "() => charts.map((div) => [div.getBoundingClientRect().width, problemsOfFigure(div)]));"
        )
        assert all(wide > 0.9 * min(width, 1020) - 40 for wide, _ in problems)  # as wide as its page
        for (name, _), (_, these) in zip(drawn, problems, strict=True):
            if these:
                found[f"{name} at {width} px"] = these[:3]
    assert found == {}
