"""`memlens data`: the public sets that are known by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from datasets import config

import memlens as ml
from memlens import cli
from memlens.errors import SourceNotFoundError
from memlens.sequences.named import NAMED_SETS


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def call(*args: str) -> str:
    with redirect_stdout(StringIO()) as out:
        cli.app(["data", *args], exit_on_error=False)
    return out.getvalue()


def test_list_has_every_set_and_says_what_is_not_known() -> None:
    table = call("list")
    lines = {
        line.split()[1]: line
        for line in table.splitlines()
        if line.startswith("│ ") and ":" in line.split()[1]
    }
    assert set(NAMED_SETS) <= set(lines)
    assert "not known" in lines["hubble:passages_wikipedia"]
    assert "2,884" in lines["hubble:passages_wikipedia"]
    assert "MIT" in lines["pile:pythia-memorized-evals"]
    found = json.loads(call("list", "--json"))
    assert [row["name"] for row in found] == list(NAMED_SETS)
    by_name = {row["name"]: row for row in found}
    assert by_name["unlearning:tofu"]["parts"][:2] == ["full", "forget01"]
    assert by_name["unlearning:tofu"]["rows"] is None
    assert by_name["traps:copyright-traps"]["checksum"] == "revision"


def test_show_has_the_paper_the_parts_and_the_checksums() -> None:
    text = call("show", "pile:lm-extraction-benchmark/train")
    assert "Training Data Extraction Challenge" in text
    assert "318d6f3d68dfd3497956a79678067c62" in text
    assert "15,000" in text
    assert "not known" in call("show", "mempi:pile")
    found = json.loads(call("show", "hubble:biographies_yago", "--json"))
    assert found["hub"] == "allegrolab/biographies_yago"
    assert found["parts"] == [{"name": "train", "rows": 2500}, {"name": "test", "rows": 2500}]
    assert found["license"] == "not known"
    with pytest.raises(SourceNotFoundError, match="Did you mean 'unlearning:tofu'"):
        call("show", "unlearning:tuff")
    with pytest.raises(SourceNotFoundError, match="Did you mean 'unlearning:tofu'"):
        call("show", "tofu")
    with pytest.raises(SourceNotFoundError, match="'unlearning:tofu' has no part 'forget02'"):
        call("show", "unlearning:tofu/forget02")


def test_a_copy_in_the_folder_of_data_is_scored_by_name(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("MEMLENS_DATA", str(tmp_path / "data"))
    folder = tmp_path / "data" / "facts" / "counterfact-tracing"
    folder.mkdir(parents=True)
    rows = [{"prompt": "w1 w2", "target_true": " w3"}, {"prompt": "w4", "target_true": " w5 w6"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "recall.parquet"
    options = ["--model", str(tiny_folder("llama")), "--limit", "2", "--out", str(out)]
    with redirect_stdout(StringIO()):
        cli.app(["score", "--sequences", "facts:counterfact-tracing", *options], exit_on_error=False)
    table = ml.RecallScores.load(out).table
    assert [len(tokens) for tokens in table["generated"]] == [1, 2]
