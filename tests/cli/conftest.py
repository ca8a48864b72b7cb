"""What the tests of the command line share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import memlens as ml


@pytest.fixture(scope="session")
def recited(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny checkpoint, and 24 sequences of which it recalls the first half: what it generates itself."""
    folder = tiny_folder("llama")
    model = ml.load_model(folder)
    rows = np.random.default_rng(0).integers(0, 100, (24, 14))
    generated = ml.score_recall(model, ml.SequenceSet.from_tokens(rows, 8), progress=False)
    own = np.concatenate([rows[:, :8], np.stack(generated.table["generated"].tolist())], axis=1)
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, np.concatenate([own[:12], rows[12:]]))
    return str(folder), str(path)
