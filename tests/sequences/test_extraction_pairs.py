from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memlens.errors import FileFormatError, SequenceError, SourceNotFoundError, VocabularyError
from memlens.models.load import load_model
from memlens.sequences.readers.load import load_sequences

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("zoo/pythia-s")


def write(folder: Path, prefix: np.ndarray, suffix: np.ndarray) -> tuple[Path, Path]:
    paths = folder / "train_prefix.npy", folder / "train_suffix.npy"
    np.save(paths[0], prefix)
    np.save(paths[1], suffix)
    return paths


def ids(n: int, width: int, dtype: Any = np.uint16, high: int = 1000) -> np.ndarray:
    return RNG.integers(1, high, (n, width)).astype(dtype)


def test_the_benchmark_s_layout(tmp_path: Path, model: Any) -> None:
    prefix, suffix = ids(7, 50), ids(7, 50)
    seqs = load_sequences(write(tmp_path, prefix, suffix), model)
    assert seqs.tokens.tolist() == np.hstack([prefix, suffix]).tolist()
    assert seqs.prefix_len.tolist() == [50] * 7
    assert seqs.target_ids.tolist() == suffix.tolist()
    assert seqs.attrs["source"] == "train_prefix.npy + train_suffix.npy"
    assert seqs.texts is not None
    assert seqs.texts[3] == model.tokenizer.decode([*prefix[3].tolist(), *suffix[3].tolist()])


def test_options_of_every_source_apply(tmp_path: Path, model: Any) -> None:
    prefix, suffix = ids(4, 20), ids(4, 8)
    paths = write(tmp_path, prefix, suffix)
    names = str(paths[0]), str(paths[1])
    seqs = load_sequences(names, model, limit=2, max_targets=3)
    assert seqs.tokens.tolist() == np.hstack([prefix, suffix[:, :3]])[:2].tolist()
    assert load_sequences(names, model, prefix_len=24).n_targets.tolist() == [4] * 4


def test_large_ids_of_uint16_stay_positive(tmp_path: Path) -> None:
    prefix = np.full((1, 2), 65535, np.uint16)
    assert load_sequences(write(tmp_path, prefix, prefix - 1)).tokens.tolist() == [[65535] * 2 + [65534] * 2]


def test_different_numbers_of_rows(tmp_path: Path, model: Any) -> None:
    with pytest.raises(SequenceError, match=r"train_prefix.npy has 3 rows and train_suffix.npy has 4"):
        load_sequences(write(tmp_path, ids(3, 5), ids(4, 5)), model)


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (np.ones((3, 5)), r"train_suffix.npy contains float64 of shape \(3, 5\)"),
        (np.ones(3, np.uint16), r"train_suffix.npy contains uint16 of shape \(3,\)"),
        (np.ones((3, 0), np.uint16), r"train_suffix.npy has shape \(3, 0\)"),
    ],
)
def test_arrays_that_are_no_ids(tmp_path: Path, model: Any, suffix: np.ndarray, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        load_sequences(write(tmp_path, ids(3, 5), suffix), model)


def test_ids_outside_the_vocabulary(tmp_path: Path, model: Any) -> None:
    suffix = ids(3, 5)
    suffix[2, 4] = 50256
    with pytest.raises(VocabularyError, match=r"row 2, position 9 holds the token id 50256"):
        load_sequences(write(tmp_path, ids(3, 5), suffix), model)


def test_a_missing_file_is_named_and_two_texts_are_texts(tmp_path: Path, model: Any) -> None:
    paths = write(tmp_path, ids(3, 5), ids(3, 5))
    with pytest.raises(SourceNotFoundError, match=r"train_sufix.npy.*Did you mean 'train_suffix.npy'"):
        load_sequences((paths[0], tmp_path / "train_sufix.npy"), model)
    texts = load_sequences(("the miller of Tarn sold", "a net and two spoons"), model, prefix_len=2)
    assert len(texts) == 2
