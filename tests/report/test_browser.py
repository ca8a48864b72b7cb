"""The report in a real browser, without a network."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import pytest

from memlens.report.model import FigureRequest, Finding
from memlens.report.run_directory import RunDirectory
from tests.report import browser, synthetic
from tests.report.test_render import NASTY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason=browser.MISSING),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    folder = tmp_path_factory.mktemp("run")
    run = RunDirectory(
        folder / "run", title="Browser <i>test</i>", settings={"seed": 0, "text": NASTY["script"]}
    )
    run.add_finding(Finding("A finding", NASTY["script"], 0.5, 0.4, 0.6, "nats", 9, NASTY["quotes"]))
    for name, make in synthetic.ALL.items():
        run.add_result(name, make())
    run.add_result("one", synthetic.residual_decoding(), figures=[FigureRequest({"sequence": "seq-003"})])
    groups = [FigureRequest({"group": "copies"})]
    run.add_result("groups", synthetic.head_ablation(), figures=groups)
    run.add_table("recall", pd.DataFrame({"name": list(NASTY), "text": list(NASTY.values())}))
    with browser.browser(folder / "profile") as opened:
        opened.open(run.finish())
        opened.wait_for("return document.querySelectorAll('div.chart:not([data-drawn])').length === 0")
        yield opened


def test_every_figure_is_drawn(page: browser.Page) -> None:
    drawn = page.run(
        "return Array.from(document.querySelectorAll('div.chart')).map(d => d.dataset.drawn === 'yes' && "
        "d.querySelector('svg.main-svg').getBoundingClientRect().height > 200)"
    )
    assert drawn == [True] * 9


def test_console_is_silent(page: browser.Page) -> None:
    assert page.console() == []


def test_nothing_is_requested(page: browser.Page) -> None:
    requests = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in requests if not name.startswith(("data:", "blob:"))] == []


def test_text_of_sequences_is_shown_and_not_run(page: browser.Page) -> None:
    assert page.run("return window.ran === undefined") is True
    shown = page.run(
        "return Array.from(document.querySelectorAll('td')).map("
        "(d) => Array.from(d.querySelectorAll('bdi')).map((part) => part.textContent).join(''))"
    )
    assert set(NASTY.values()) <= set(shown)


def test_no_cell_scrolls_and_the_page_is_not_wider_than_its_window(page: browser.Page) -> None:
    for width in (1400, 900, 600):
        page.resize(width)
        scrolling = page.run(
            "return Array.from(document.querySelectorAll('.cell')).filter((cell) => "
            "cell.scrollHeight > cell.clientHeight + 1 || cell.scrollWidth > cell.clientWidth + 1).length"
        )
        assert scrolling == 0
        assert page.wait_for("return document.documentElement.scrollWidth <= window.innerWidth", 10)
    page.resize(1100)
    assert page.run("return document.querySelectorAll('main img, main b, main i').length") == 0


def test_token_labels_are_text(page: browser.Page) -> None:
    labels = page.run(
        "return Array.from(document.querySelectorAll('#figure-8 .xtick')).map(d => d.textContent.trim())"
    )
    assert "<b>_4" in labels
    assert "$x$_11" in labels


def _center(page: browser.Page, selector: str, place: int = 0) -> tuple[float, float]:
    """Scroll an element into view and return the middle of it, in the window."""
    return tuple(
        page.run(
            f"const e = document.querySelectorAll({selector!r})[{place}];"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]"
        )
    )


def test_menu_answers_a_click(page: browser.Page) -> None:
    shown = "return document.getElementById('figure-2').data.map(t => t.visible)"
    assert page.run(shown) == [True, False, False]
    page.click(*_center(page, "#figure-2 .updatemenu-header"))
    page.wait_for("return document.querySelectorAll('#figure-2 .updatemenu-dropdown-button').length === 3")
    page.click(*_center(page, "#figure-2 .updatemenu-dropdown-button:nth-of-type(2)"))
    page.wait_for(shown + "[1]")
    assert page.run(shown) == [False, True, False]


def test_hover_tells_the_whole_row(page: browser.Page) -> None:
    x, y = _center(page, "#figure-4 .heatmaplayer image")
    page.move(x + 4, y + 4)  # 20 positions and 8 layers: the middle is between two cells
    text = page.wait_for("return document.querySelector('#figure-4 .hoverlayer').textContent")
    assert "layer 3" in text
    assert "position 10" in text
    assert "n = 48 sequences" in text


def test_menus_of_groups_and_of_metrics_go_together(page: browser.Page) -> None:
    """The map answers for the group of one menu in the metric of the other, whichever was chosen first."""
    ci = synthetic.head_ablation().mean_ci(metric="target_rank", of="effect", group="copies")
    figure = "document.getElementById('figure-9')"

    def choose(menu: int, entry: int) -> None:
        page.click(*_center(page, "#figure-9 .updatemenu-header", menu))
        page.wait_for("return document.querySelectorAll('#figure-9 .updatemenu-dropdown-button').length > 1")
        page.click(*_center(page, "#figure-9 .updatemenu-dropdown-button", entry))
        page.wait_for("return !document.querySelector('#figure-9 .updatemenu-dropdown-button')")

    choose(1, 4)
    choose(0, 1)
    seen = f"return {figure}.data.map((t, i) => t.visible && t.opacity && t.hovertemplate ? i : -1)"
    assert [place for place in page.run(seen) if place >= 0] == [6 + 4]
    page.run(f"Plotly.Fx.hover({figure}, {{xval: 2, yval: 5}})")
    text = page.wait_for("return document.querySelector('#figure-9 .hoverlayer').textContent")
    expected = float(ci["target_rank"].sel(statistic="mean", layer=5, head=2).isel(copies=4))
    assert f"change in target rank: {expected:.4g}".replace("-", "−") in text
