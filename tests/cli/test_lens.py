"""`memlens lens train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import memlens as ml
from memlens.cli.making import zoo_rows
from memlens.errors import FileFormatError, OptionError, SequenceError, SourceNotFoundError
from memlens.sequences.natural import text_windows
from tests.cli.test_commands import call


def test_a_lens_from_token_ids(tiny_folder: Any, tmp_path: Path) -> None:
    folder, out = tiny_folder("gpt_neox"), tmp_path / "lens"
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).integers(0, 100, (12, 10)))
    code, shown, _ = call(
        "lens", "train", str(folder), "--tokens", str(tmp_path / "rows.npy"), "--out", str(out),
        "--steps", "3", "--batch-size", "4", "--optimizer", "adam", "--published", "-q",
    )  # fmt: skip
    assert code == 0
    assert "embedding" in shown
    assert f"lens: {out}" in shown
    lens = ml.lens.TunedLens.load(out)
    assert lens.facts["training"]["optimizer"] == "adam"
    assert lens.n_layers == 3
    for name in ("lens.json", "lens.safetensors"):
        (out / name).unlink()
    assert ml.lens.TunedLens.load(out).fingerprint == lens.fingerprint


def test_windows_of_text(tiny_model: Any, tmp_path: Path) -> None:
    tokenizer, path = tiny_model("gpt_neox", "bridge").tokenizer, tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(11)))
    assert text_windows(tokenizer, path, 4).rows() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(SequenceError, match="11 tokens, fewer than two windows of 6"):
        text_windows(tokenizer, path, 6)
    with pytest.raises(OptionError, match="window=1"):
        text_windows(tokenizer, path, 1)
    with pytest.raises(SourceNotFoundError, match="no text file"):
        text_windows(tokenizer, tmp_path / "other.txt", 4)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(FileFormatError, match="UTF-8"):
        text_windows(tokenizer, path, 4)


@pytest.mark.slow
def test_the_zoo_corpus_is_without_what_was_planted(
    shipped_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memlens.organisms.training.zoo.zoo_corpus", lambda name: shipped_corpus)
    rows = zoo_rows("zoo/pythia-s")
    planted = ml.load_sequences("zoo", ml.load_model("zoo/pythia-s"))
    assert rows.shape[1] == 64
    assert not {tuple(row) for row in rows.tolist()} & {tuple(row) for row in planted.rows()}


def test_one_source_of_text() -> None:
    assert "Example: memlens lens train" in call("lens", "train", "--help")[1]
    code, _, err = call("lens", "train", "zoo/pythia-s", "--out", "x")
    assert code == 2
    assert "0 sources of text were given" in err
    code, _, err = call("lens", "train", "zoo/pythia-s", "--out", "x", "--zoo-corpus", "--text", "a.txt")
    assert code == 2
    assert "2 sources" in err
