"""Explorers in a run's folder and its report."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import pytest

from memlens.explorer.page import explorer_payload
from memlens.report.from_directory import report_from_directory
from memlens.report.model import Finding
from memlens.report.run_directory import RunDirectory
from tests.explorer.synthetic import exploration, view
from tests.report.test_render import NASTY


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path, title="One explorer", settings={})
    payload = explorer_payload(exploration([view("a", ["given", *NASTY.values()], 1)]))
    run.add_section("single", "Single sequences", "Its lead.")
    run.add_explorer("single", payload, section="single", reading="Click.", caption="Small print.")
    return run


def test_the_report_holds_the_payload_and_lets_only_its_scripts_run(
    run: RunDirectory, tmp_path: Path
) -> None:
    page = run.finish().read_text(encoding="utf-8")
    assert all(words in page for words in ("Single sequences", "Its lead.", "Click.", "Small print."))
    (stored,) = re.findall(
        r'<script type="application/json" id="explorer-1-0-data">(.*?)</script>', page, re.S
    )
    assert json.loads(stored) == json.loads((tmp_path / "single.explorer.json").read_text(encoding="utf-8"))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 3  # plotly, the report's, the explorer's
    policy = html.unescape(page[: page.index("<title>")])
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert NASTY["script"] not in page


def test_a_damaged_explorer_is_named_and_costs_nothing_else(run: RunDirectory, tmp_path: Path) -> None:
    run.finish()
    (tmp_path / "single.explorer.json").write_text('{"format": "memlens explorer 0"}')
    run.add_finding(Finding("A finding", "It stays."))
    page = html.unescape(report_from_directory(tmp_path).read_text(encoding="utf-8"))
    assert "The explorer single.explorer.json cannot be read: its format is 'memlens explorer 0'" in page
    assert "It stays." in page
    assert "Single sequences" not in page


def test_starting_over_deletes_the_explorer_of_the_last_run(run: RunDirectory, tmp_path: Path) -> None:
    run.finish()
    assert (tmp_path / "single.explorer.json").exists()
    RunDirectory(tmp_path, title="Anew", settings={}, fresh=True)
    assert not (tmp_path / "single.explorer.json").exists()
