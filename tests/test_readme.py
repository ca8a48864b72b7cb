"""The README's Python runs as it stands there."""

from __future__ import annotations

import inspect
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

import memlens as ml

ROOT = Path(__file__).parents[1]


def _python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = _python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "plotly" in Path("decoding.html").read_text(encoding="utf-8")
    effect = names["heads"].effect("target_logprob").mean("sequence")
    assert effect.sizes == {"layer": 6, "head": 8}
    assert float(effect.min()) < 0
    assert float(names["result"].effect("target_logprob").mean()) < 0
    assert names["logits"].shape[:2] == names["memorized"].tokens.shape


def test_the_readme_links_only_to_files_that_exist() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


OTHER_RETURNS = {
    "score_recall": "RecallScores",
    "recall.counterfactual_memorization": "CounterfactualScores",
    "recall.score_criteria": "CriteriaScores",
    "screen_then_verify": "Screening",
    "bypass.in_transformers": "TransformersBypass",
    "tasks.as_lm_eval": "LensLM",
    "tasks.as_inspect": "Any",  # a class of inspect_ai
    "explore": "Explorer",
    "benchmark.run": "Leaderboard",
    "studies.study_comparative": "StudyRun",
    "studies.study_idioms": "StudyRun",
    "studies.study_attention_bypass": "StudyRun",
}
"""What the calls of the README's table return that return no `Result`."""


def test_the_calls_of_the_table_return_what_the_readme_says() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## What is measured")[1].split("\n## ")[0]
    rows = [row.split(" | ")[1] for row in table.splitlines() if row.startswith("| ")][1:]
    calls = [name for row in rows for name in re.findall(r"`([a-z_.]+)`", row)]
    assert len(calls) >= 25
    assert set(OTHER_RETURNS) <= set(calls)
    for name in calls:
        returned = str(inspect.signature(attrgetter(name)(ml)).return_annotation).strip("'")
        assert returned == OTHER_RETURNS.get(name, "Result"), name
    for returned in set(OTHER_RETURNS.values()) - {"Any", "LensLM", "TransformersBypass"}:
        assert f"`{returned}`" in table
