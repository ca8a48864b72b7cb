"""A study's folder: whatever a step raises, the rest of the study and the report are not lost."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from memlens.report.model import Finding
from memlens.studies.running import StudyDirectory


@pytest.mark.parametrize(
    "error", [KeyError("layer"), TypeError("no len"), ZeroDivisionError("by zero"), OSError("disk")]
)
def test_every_failure_is_recorded_and_the_rest_goes_on(error: Exception, tmp_path: Path) -> None:
    folder = StudyDirectory(tmp_path, title="A run", settings={}, fresh=True)

    def broken() -> None:
        folder.add_table("before", pd.DataFrame({"a": [1]}), title="Before the error")
        raise error

    folder.step("broken", broken)
    folder.step("whole", lambda: folder.find(Finding("Found", "The other step ran.")))
    run = folder.done()
    said = f"{type(error).__name__}: {error}"
    assert run.failures == {"broken": said}
    assert [finding.statement for finding in run.findings] == ["The other step ran."]
    page = run.report.read_text(encoding="utf-8")
    assert "The other step ran." in page
    assert "Before the error" in page
    assert json.loads((tmp_path / "run.json").read_text())["failures"] == [
        {"step": "broken", "message": said}
    ]


def test_ctrl_c_still_stops_a_study(tmp_path: Path) -> None:
    folder = StudyDirectory(tmp_path, title="A run", settings={}, fresh=True)

    def stopped() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.step("stopped", stopped)
