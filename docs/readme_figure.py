"""Draw the README's picture from a demo's folder: `python docs/readme_figure.py memlens-demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import memlens as ml

TITLE = "The next token, decoded after each layer"


def draw(folder: Path, to: Path) -> None:
    """Write the picture (needs the extra `export`, and Chrome or Chromium)."""
    data = ml.load_result(folder / "residual_decoding.nc").data
    groups = ("memorized", "matched control")
    shown = {name: ml.Result(data.isel(sequence=data["group"].values == name)) for name in groups}
    ml.overlay(shown, title=TITLE).update_layout(width=860, height=570).write_image(to)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(__file__).parent / "_static" / "decoding.png")
