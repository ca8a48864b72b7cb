"""The README's Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

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
