"""The explorer's page in a real browser, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from memlens.explorer.data import Exploration
from memlens.explorer.drawing import running_text
from memlens.explorer.page import write_explorer
from tests.explorer.synthetic import exploration, view
from tests.report import browser
from tests.report.test_render import NASTY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason=browser.MISSING),
]

TOKENS = ["The", " cat", " sat", " on", " the", " mat", ".\n", " It", " slept", "."]
NASTY_TOKENS = ["given", *NASTY.values()]
ARROW_RIGHT, END, TAB = "\ue014", "\ue010", "\ue004"


@pytest.fixture(scope="module")
def shown() -> Exploration:
    plain = view("plain", TOKENS, 4, seed=1)
    nasty = view("nasty <b>id</b>", NASTY_TOKENS, 1, seed=2, wrong=NASTY["script"])
    bare = replace(view("bare", TOKENS[:6], 2, seed=3), attention={}, edited=())
    return exploration([plain, nasty, bare])


@pytest.fixture(scope="module")
def page(shown: Exploration, tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    folder = tmp_path_factory.mktemp("explorer")
    with browser.browser(folder / "profile") as opened:
        opened.open(write_explorer(folder / "page.html", shown))
        opened.wait_for("return document.querySelectorAll('.live[data-drawn]').length === 3")
        yield opened


@pytest.fixture(autouse=True)
def first(page: browser.Page) -> None:
    choose(page, "sequence", "0")
    choose(page, "edit", "unchanged model")


def choose(page: browser.Page, part: str, value: str) -> None:
    page.run(
        f"const menu = document.querySelector('[data-part={part}]'); menu.value = {value!r};"
        "menu.dispatchEvent(new Event('change')); return menu.value"
    )


def text_of(page: browser.Page, part: str) -> str:
    return page.run(f"return document.querySelector('[data-part=\"{part}\"]').textContent")


def tokens(page: browser.Page) -> list[str]:
    return page.run("return Array.from(document.querySelectorAll('.token')).map(t => t.textContent)")


def map_of(page: browser.Page, part: str, trace: int = 0) -> np.ndarray:
    """The values that plotly holds of a figure; NaN where it has none."""
    z = page.run(
        f"return document.querySelector('[data-part={part}]').data[{trace}].z.map(r => Array.from(r))"
    )
    return np.array(z, dtype=float)


def expected_attention(shown: Exploration, sequence: int, head: tuple[int, int]) -> np.ndarray:
    weights = shown.views[sequence].attention[head] / 255
    weights[np.triu_indices(len(weights), 1)] = np.nan
    return weights


def press(page: browser.Page, key: str) -> None:
    keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
    page.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})


def click_cell(page: browser.Page, x: float, y: float) -> None:
    """Click where the map of effects has this place on its axes."""
    at = page.run(
        "const map = document.querySelector('[data-part=effects]'), layout = map._fullLayout;"
        "map.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const box = map.getBoundingClientRect(), xa = layout.xaxis, ya = layout.yaxis;"
        f"return [box.x + xa._offset + xa.l2p({x}), box.y + ya._offset + ya.l2p({y})]"
    )
    page.click(*at)


def test_console_is_silent_and_nothing_is_requested(page: browser.Page) -> None:
    choose(page, "sequence", "1")
    choose(page, "sequence", "2")
    assert page.console() == []
    names = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in names if not name.startswith(("data:", "blob:"))] == []


def test_the_first_sequence_is_shown(page: browser.Page, shown: Exploration) -> None:
    one = shown.views[0]
    assert tokens(page) == [running_text(token) for token in TOKENS]
    kinds = page.run("return Array.from(document.querySelectorAll('.token')).map(t => t.className)")
    right = ["token right" if right else "token wrong" for right in one.continuation.correct]
    assert kinds == ["token given"] * 4 + right
    assert np.allclose(map_of(page, "lens"), one.lens_probability, atol=1e-4)
    assert np.allclose(map_of(page, "effects"), one.head_effects, rtol=1e-3)
    beside = np.stack([one.mlp_effects, one.bypass_effects], 1)
    assert np.allclose(map_of(page, "effects", 1), beside, rtol=1e-3)
    strongest = np.unravel_index(np.abs(one.head_effects).argmax(), one.head_effects.shape)
    assert text_of(page, "attention-title").startswith("Attention of L{}H{} ".format(*strongest))
    found = map_of(page, "attention")
    assert np.allclose(found, expected_attention(shown, 0, strongest), equal_nan=True)


def test_the_picker_changes_tokens_and_figures(page: browser.Page, shown: Exploration) -> None:
    choose(page, "sequence", "2")
    assert tokens(page) == [running_text(token) for token in TOKENS[:6]]
    assert map_of(page, "lens").shape == (3, 4)
    assert np.allclose(map_of(page, "effects"), shown.views[2].head_effects, rtol=1e-3)
    assert "is not on this page, which keeps none of its maps." in text_of(page, "attention-note")
    assert page.run("return document.querySelector('[data-part=attention]').hidden") is True
    assert "Left out to keep the page small, smallest effects first: 12 attention maps." in text_of(
        page, "left-out"
    )
    choose(page, "sequence", "0")
    assert page.run("return document.querySelector('[data-part=attention]').hidden") is False
    assert text_of(page, "left-out") == ""


@pytest.mark.parametrize("head", [(2, 3), (0, 0)])
def test_a_click_on_a_head_shows_its_attention(page: browser.Page, shown: Exploration, head: Any) -> None:
    layer, number = head
    click_cell(page, number, layer)
    title = f"Attention of L{layer}H{number} in the unchanged model"
    script = "return document.querySelector('[data-part=\"attention-title\"]').textContent === "
    page.wait_for(script + repr(title))
    assert text_of(page, "attention-title") == title
    assert np.allclose(map_of(page, "attention"), expected_attention(shown, 0, head), equal_nan=True)
    frame = page.run(
        "const s = document.querySelector('[data-part=effects]').layout.shapes[0]; return [s.x0, s.y0]"
    )
    assert frame == [number - 0.5, layer - 0.5]
    menus = page.run("return ['layer', 'head'].map(p => document.querySelector(`[data-part=${p}]`).value)")
    assert menus == [str(layer), str(number)]


def test_the_menus_choose_a_head_without_a_mouse(page: browser.Page, shown: Exploration) -> None:
    choose(page, "layer", "1")
    choose(page, "head", "2")
    assert np.allclose(map_of(page, "attention"), expected_attention(shown, 0, (1, 2)), equal_nan=True)


def test_a_click_on_a_bypass_and_the_menu_change_what_is_written(
    page: browser.Page, shown: Exploration
) -> None:
    one = shown.views[0]
    before = tokens(page), text_of(page, "written")
    assert "bypass L1" not in before[1]
    click_cell(page, 4 - 0.5 + 2.5, 1)
    page.wait_for("return document.querySelector('[data-part=edit]').value === 'bypass L1'")
    for place, name in ((1, "bypass L1"), (2, "ablate L1H2")):
        choose(page, "edit", name)
        edited = one.edited[place]
        share = f"{name} (memorization score: {edited.same.sum()} of 6 tokens)"
        assert share in text_of(page, "written")
        written = page.run(
            "return Array.from(document.querySelectorAll('[data-part=written] tr')).pop()"
            ".querySelector('td').textContent"
        )
        assert written == "".join(running_text(token) for token in edited.tokens)
        changed = page.run("return document.querySelectorAll('[data-part=written] .changed').length")
        assert changed == (~edited.same).sum() + (~one.continuation.same).sum()
        wrong = page.run(
            "return Array.from(document.querySelectorAll('.token')).map(t => t.className.endsWith('wrong'))"
        )
        assert wrong == [False] * 4 + (~edited.correct).tolist()
    choose(page, "edit", "unchanged model")
    assert (tokens(page), text_of(page, "written")) == before


def test_tokens_answer_the_keyboard(page: browser.Page, shown: Exploration) -> None:
    page.run("document.querySelector('.token[tabindex=\"0\"]').focus()")
    assert text_of(page, "detail").startswith("token 4: “ the”")
    press(page, ARROW_RIGHT)
    one = shown.views[0].continuation
    assert text_of(page, "detail").startswith("token 5: “ mat”")
    assert f"probability {one.probability[1]:.3f}, rank {one.rank[1]}" in text_of(page, "detail")
    press(page, END)
    assert text_of(page, "detail").startswith("token 9: “.”")
    assert page.run("return document.querySelectorAll('.token[tabindex=\"0\"]').length") == 1
    press(page, TAB)
    assert page.run("return document.activeElement.classList.contains('token')") is False


def test_text_of_sequences_is_shown_and_not_run(page: browser.Page) -> None:
    choose(page, "sequence", "1")
    choose(page, "edit", "bypass L0")
    page.wait_for("return document.querySelector('[data-part=lens] .xtick') !== null")
    assert tokens(page) == [running_text(token) for token in NASTY_TOKENS]
    assert NASTY["script"] in text_of(page, "written")
    assert page.run("return window.ran === undefined") is True
    assert (
        page.run(
            "return document.querySelectorAll('main img, main b, main i, main script:not([type])').length"
        )
        == 0
    )
    options = page.run(
        "return Array.from(document.querySelectorAll('[data-part=sequence] option')).map(o => o.text)"
    )
    assert options[1].startswith("nasty <b>id</b> · ")
    labels = page.run(
        "return Array.from(document.querySelectorAll('[data-part=lens] .xtick')).map(t => t.textContent)"
    )
    assert any(label.startswith("<script>window.ran") for label in labels)
    wide = page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    assert wide is True
    assert page.console() == []
