"""What memlens wrote before its folders were rebuilt still opens, or names the version that wrote it.

`tests/old_run` is a small run of `localize` on `zoo/pythia-xs` and a persisted sweep, of commit 8e6f875.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import memlens as ml
from memlens.errors import OtherRunError
from memlens.report.from_directory import report_from_directory
from memlens.results.kinds import reading
from tests.devices import dev

OLD = Path(__file__).parent / "old_run"
RESULTS = sorted(OLD.glob("*.nc"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_an_old_result_opens_with_figure_and_reading(path: Path) -> None:
    result = ml.load_result(path)
    assert result.settings
    assert result.plot().data
    assert reading(result)


def test_an_old_result_holds_the_numbers_that_were_measured() -> None:
    """The same heads, ablated now."""
    old = ml.load_result(OLD / "sweep" / "result.nc")
    model = ml.load_model("zoo/pythia-xs", device=dev())
    seqs = ml.load_sequences("zoo", model)
    seqs = seqs[[list(seqs.ids).index(name) for name in old["sequence"].values.astype(str)]]
    new = ml.ablate_heads(model, seqs, layers=[0], progress=False)
    difference = old["target_logprob"].values.reshape(2, -1) - new["target_logprob"].values.reshape(2, -1)
    assert np.abs(difference).max() < 1e-5


def test_an_old_table_of_recall_opens() -> None:
    recall = ml.RecallScores.load(OLD / "recall.parquet")
    assert len(recall.table) == 8
    assert len(recall.memorized()) == recall.table["exact_match"].sum()


def test_an_old_run_gives_its_report(tmp_path: Path) -> None:
    folder = shutil.copytree(OLD, tmp_path / "run")
    text = report_from_directory(folder).read_text(encoding="utf-8")
    assert "Which head matters most" in text
    assert "could not" not in text.split("</style>")[-1].split("<script")[0]


def test_an_old_sweep_is_refused_with_the_version_that_wrote_it(tmp_path: Path) -> None:
    folder = shutil.copytree(OLD / "sweep", tmp_path / "sweep")
    model = ml.load_model("zoo/pythia-xs", device=dev())
    seqs = ml.load_sequences("zoo", model)[:2]
    with pytest.raises(OtherRunError, match=r"was written by memlens 0\.1\.0 or earlier"):
        ml.ablate_heads(model, seqs, layers=[0], out=folder, progress=False)
