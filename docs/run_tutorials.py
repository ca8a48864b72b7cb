"""Run the tutorials and store their outputs, free of times, warnings and this machine's paths.

`python docs/run_tutorials.py [NOTEBOOK ...]`; all of them by default.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[1] / "tutorials"


def _passing(output: Any) -> bool:
    """Say whether an output is of the run and not of the story: warnings, and bars of loading."""
    return output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get(
        "data", {}
    )


def run(path: Path) -> None:
    """Execute a notebook and write it back."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _passing(output)]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"  # figures as data, not as pages with plotly inside
    for notebook in [Path(name) for name in sys.argv[1:]] or sorted(TUTORIALS.glob("*.ipynb")):
        run(notebook)
