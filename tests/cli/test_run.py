"""`memlens run idioms` on a checkpoint folder and files of one's own."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memlens as ml
from tests.cli.test_commands import call


@pytest.fixture
def sources(tiny_folder: Any, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A tiny random model, items of which it 'recalls' half (its own predictions), and running text."""
    folder = tiny_folder("gpt_neox")
    model = ml.load_model(folder)
    rows = np.random.default_rng(0).integers(1, 100, (40, 7))
    own = ml.score_recall(model, ml.SequenceSet.from_tokens(rows, 6), progress=False)
    said = np.stack(own.table["generated"].tolist())[:, 0]
    rows, said = rows[said != 100][:24], said[said != 100]  # 100 ends a text
    rows[:12, 6] = said[:12]
    items, text = tmp_path / "items.parquet", tmp_path / "text.txt"
    ml.SequenceSet.from_tokens(rows, 6).to_parquet(items)
    text.write_text(" ".join(f"w{i}" for i in np.random.default_rng(1).integers(0, 100, 2000)))
    return folder, items, text


def test_idioms_from_files_without_knock_outs(sources: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, items, text = sources
    out, other = tmp_path / "run", tmp_path / "other.txt"
    other.write_text("w1 w2 w3 w4 w5")
    code, shown, error = call(
        "run", "idioms", "-m", str(folder), "--idioms", str(items), "--text", str(text), "--out", str(out),
        "--reference-text", str(other), "--no-knock-out", "--train-lens", "--lens-steps", "2", "-q",
    )  # fmt: skip
    assert code == 0, shown + error
    assert "predicts the target of 12 of 24 idioms" in " ".join(shown.split())
    assert (out / "lens" / "lens.json").exists()
    assert (out / "idioms_decoding_tuned.nc").exists()
    assert not (out / "sweeps").exists()
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    assert "--no-knock-out" in page
    assert "first 2 of" not in page


def test_the_grid_is_chosen_and_bad_numbers_are_one_line(
    sources: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    folder, items, _ = sources
    base = ("run", "idioms", "-m", str(folder), "--idioms", str(items), "--out", str(tmp_path / "run"), "-q")
    code, _, error = call(*base, "--top-k", "1,2", "--windows", "1", "--max-items", "3", "--no-controls")
    assert code == 0, error
    result = ml.load_result(tmp_path / "run" / "idioms_knock_out_top.nc")
    assert result.data["k"].values.tolist() == [1, 2]
    assert result.data["window"].values.tolist() == [1]
    assert "selection" not in result.data.dims
    assert result.data.sizes["sequence"] == 3
    code, _, error = call(*base, "--text", "a.txt", "--reference-text", "a.txt")
    assert code == 2
    assert "are both a.txt" in " ".join(error.split())
    code, _, error = call(*base, "--top-k", "1,x")
    assert code == 2
    assert "--top-k 'x' is not allowed: give a whole number." in " ".join(error.split())
