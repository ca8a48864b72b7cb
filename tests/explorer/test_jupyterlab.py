"""The explorer in a real JupyterLab in a real browser, on the loopback interface."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

from tests.report import browser

LAB = shutil.which("jupyter-lab", path=str(Path(sys.executable).parent)) or shutil.which("jupyter-lab")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason=browser.MISSING),
    pytest.mark.skipif(LAB is None, reason="needs jupyterlab: pip install jupyterlab"),
]
_BOXES = Path(browser.__file__).with_name("boxes.js").read_text(encoding="utf-8")
_CODE = """
import memlens as ml
model = ml.load_model("zoo/pythia-xs")
sequences = ml.load_sequences("zoo", model)
often = sequences[sequences.table["copies"].to_numpy() >= 128][:2]
explorer = ml.explore(model, often)
explorer
"""
_ANSWERED = """
const accept = document.querySelector(".jp-Dialog .jp-mod-accept");
if (accept) { accept.click(); return false; }
const context = window.jupyterapp.shell.currentWidget?.sessionContext;
return !!context && context.isReady && context.session?.kernel?.status === "idle";
"""  # JupyterLab may ask which kernel is meant
_TOO_LATE = """
const real = AbortSignal.timeout.bind(AbortSignal);
AbortSignal.timeout = (milliseconds) => real(milliseconds === 2000 ? 0 : milliseconds);
"""  # anywidget gives a widget's module two seconds: here every one comes too late, as on a busy machine
_FIGURES = "Array.from(document.querySelectorAll('.jp-OutputArea .js-plotly-plot'))"


@contextmanager
def jupyterlab(folder: Path) -> Iterator[tuple[str, Path]]:
    """Start JupyterLab with the kernel and the widgets of this environment; yield its address and its log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    name = "memlens-test"
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "language": "python",
    }
    kernel = folder / "data" / "kernels" / name / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({**spec, "display_name": name}))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(_CODE)])
    book.metadata["kernelspec"] = {"name": name, "display_name": name, "language": "python"}
    nbformat.write(book, folder / "explorer.ipynb")
    settings = {
        "JUPYTER_PATH": os.pathsep.join([str(folder / "data"), str(Path(sys.prefix) / "share" / "jupyter")]),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    options = [
        "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
        "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", "--expose-app-in-browser",
        "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(LAB), *options], stdout=out, stderr=out, env={**os.environ, **settings}
        )
    try:
        yield f"http://127.0.0.1:{port}", log
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[browser.Page, Path]]:
    folder = tmp_path_factory.mktemp("lab")
    with jupyterlab(folder) as (address, log), browser.browser(folder / "profile") as page:
        page.resize(1400, 1000)
        browser.until_answers(address + "/api", 60)
        page.open(f"{address}/lab/tree/explorer.ipynb?reset")
        ready = "return !!(window.jupyterapp && document.querySelector('.jp-Notebook .jp-Cell'))"
        assert page.wait_for(ready, 60), log.read_text()
        assert page.wait_for(_ANSWERED, 60), log.read_text()
        page.run(_TOO_LATE)
        page.run("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        assert page.wait_for(f"return {_FIGURES}.filter((figure) => figure.data).length === 3", 90), (
            log.read_text()
        )
        yield page, log


def test_the_first_draw_shows_everything(lab: tuple[browser.Page, Path]) -> None:
    """Menus, tokens and three figures, as wide as the cell; every message reached the page."""
    page, log = lab
    assert page.run("return document.querySelectorAll('.jp-OutputArea [data-mime-type*=error]').length") == 0
    widths = (
        "const wide = (element) => element.getBoundingClientRect().width;"
        f"const widths = {_FIGURES}.map((figure) => "
        "[wide(figure.querySelector('.main-svg')), wide(figure.closest('.jp-OutputArea-output'))]);"
    )
    fits = "widths.every(([figure, cell]) => cell > 800 && Math.abs(figure - cell) < 20)"
    assert page.wait_for(f"{widths} return {fits}", 20), page.run(f"{widths} return widths")
    for figure, found in enumerate(page.run(f"{_BOXES} return {_FIGURES}.map(problemsOfFigure)")):
        assert found == [], figure
    text = page.run("return document.querySelector('.jp-OutputArea').textContent")
    assert "of the targets 100% are right" in text
    assert "100% of the tokens are (memorization score)" in text
    assert "not JSON compliant" not in log.read_text() + text
    errors = [line for line in page.console() if "Error" in line and "favicon" not in line]
    assert errors
    assert all("[anywidget] Failed to initialize model" in line for line in errors), errors


def test_another_sequence_and_a_switch_change_what_is_shown(lab: tuple[browser.Page, Path]) -> None:
    page, log = lab
    lens = f"JSON.stringify({_FIGURES}[0].data[0].x)"
    before = page.run(f"return {lens}")
    page.run(
        "const menu = document.querySelector('.jp-OutputArea select'); menu.selectedIndex = 1;"
        "menu.dispatchEvent(new Event('change', {bubbles: true}))"
    )
    assert page.wait_for(f"return {lens} !== {json.dumps(before)}", 60), log.read_text()
    page.run(
        "const buttons = Array.from(document.querySelectorAll('.jp-OutputArea button'));"
        "buttons.find((button) => button.textContent === 'L0').click()"
    )
    assert page.wait_for(
        "return document.querySelector('.jp-OutputArea').textContent.includes('bypass L0')", 60
    ), log.read_text()
    attention = f"{_FIGURES}[2].data[0].z"
    assert page.run(
        f"return {attention}[0][{attention}[0].length - 1] === null"
    )  # nothing above the diagonal
    assert "not JSON compliant" not in log.read_text()


def test_a_click_on_a_cell_reaches_the_kernel(lab: tuple[browser.Page, Path]) -> None:
    page, log = lab
    x, y = page.run(
        f"const map = {_FIGURES}[1].querySelector('.nsewdrag'); map.scrollIntoView({{block: 'center'}});"
        "const box = map.getBoundingClientRect(); return [box.left + 20, box.top + 20];"
    )  # the first head of the last layer
    page.click(x, y)
    title = f"{_FIGURES}[2].querySelector('.gtitle').textContent"
    assert page.wait_for(f"return {title}.startsWith('Attention of L3H0 ')", 60), page.run(f"return {title}")
    frame = page.run(f"const shape = {_FIGURES}[1].layout.shapes[0]; return [shape.x0, shape.y0]")
    assert frame == [-0.5, 2.5], log.read_text()


def test_in_a_narrow_window_the_buttons_lie_beside_the_titles(lab: tuple[browser.Page, Path]) -> None:
    page, _ = lab
    problems = (
        "const apart = (a, b) => a.right < b.left || a.bottom < b.top || b.bottom < a.top;"
        "const box = (figure, part) => figure.querySelector(part).getBoundingClientRect();"
        f"return {_FIGURES}.flatMap((figure) => {{"
        "  const wide = box(figure, '.main-svg').width, buttons = box(figure, '.modebar');"
        "  const cell = figure.closest('.jp-OutputArea-output').getBoundingClientRect().width;"
        "  const found = ['.gtitle', '.gtitle-subtitle'].filter("
        "    (part) => !apart(box(figure, part), buttons));"
        "  if (Math.abs(wide - cell) > 20 || cell < 420 || !buttons.width) { found.push([wide, cell]); }"
        "  return found;"
        "});"
    )
    for width in (900, 600):
        page.resize(width, 1000)
        assert page.wait_for(f"return !(() => {{ {problems} }})().length", 20), (width, page.run(problems))
        page.run("window.jupyterapp.commands.execute('application:toggle-left-area')")  # for the narrower
