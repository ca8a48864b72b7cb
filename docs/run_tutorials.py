"""Run the tutorials and store their outputs, free of times, warnings and this machine's paths.

`python docs/run_tutorials.py [NOTEBOOK ...]`; all of them by default. If `pyproject.toml` has the address
of the repository, each notebook begins with a badge for Colab, and a cell that installs memlens there.
"""

from __future__ import annotations

import base64
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "tutorials"
_COLAB = "https://colab.research.google.com"
_TAG = "colab"
_FIGURE = "application/vnd.plotly.v1+json"


def _passing(output: Any) -> bool:
    """Say whether an output is of the run and not of the story: warnings, and bars of loading."""
    return output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get(
        "data", {}
    )


def with_images(notebook: Any) -> Any:
    """Put an image next to each interactive figure, which code hosts do not draw; small ones if many."""
    drawn = [data for cell in notebook.cells for data in _data(cell) if _FIGURE in data]
    for data in drawn:
        figure = go.Figure(data[_FIGURE]["data"], data[_FIGURE]["layout"])
        size = {"width": 700, "height": figure.layout.height or 450, "scale": 1.0 if len(drawn) < 5 else 0.65}
        data["image/jpeg"] = base64.b64encode(figure.to_image("jpeg", **size)).decode("ascii")
    return notebook


def _data(cell: Any) -> list[Any]:
    return [output["data"] for output in cell.get("outputs", []) if "data" in output]


def repository() -> str:
    """Return the address of the repository, or "" as long as there is none."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["tool"]["memlens"]["repository"].rstrip("/")


def with_badge(notebook: Any, name: str, address: str) -> Any:
    """Put badge and install cell first, in place of earlier ones; without an address take them away."""
    cells = [cell for cell in notebook.cells if _TAG not in cell.metadata.get("tags", [])]
    if address:
        place = (
            f"{address.removeprefix('https://').replace('github.com', 'github')}/blob/main/tutorials/{name}"
        )
        badge = f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]({_COLAB}/{place})"
        install = (
            "import sys\n\n"
            'if "google.colab" in sys.modules:  # elsewhere memlens is there already\n'
            f'    %pip install -q "memlens @ git+{address}"'
        )
        first = nbformat.v4.new_markdown_cell(badge), nbformat.v4.new_code_cell(install)
        for number, cell in enumerate(first):
            cell["id"], cell.metadata["tags"] = f"{_TAG}-{number}", [_TAG]
        cells = [*first, *cells]
    notebook.cells = cells
    return notebook


def run(path: Path) -> None:
    """Execute a notebook and write it back."""
    notebook = with_badge(nbformat.read(path, as_version=4), path.name, repository())
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _passing(output)]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(with_images(notebook), path)


if __name__ == "__main__":
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # figures as data, not as pages with plotly inside
    for notebook in [Path(name) for name in sys.argv[1:]] or sorted(TUTORIALS.glob("*.ipynb")):
        run(notebook)
