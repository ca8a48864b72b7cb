"""A study's folder: whatever a step raises, the rest of the study and the report are not lost."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pandas as pd
import pytest

from memlens.errors import OptionError
from memlens.report.model import Finding
from memlens.studies.localization.options import LocalizeOptions
from memlens.studies.registry import Study
from memlens.studies.running import StudyDirectory


@pytest.mark.parametrize(
    "error",
    [
        KeyError("layer"), TypeError("no len"), ZeroDivisionError("by zero"), OSError("disk"),
        ValueError("too many values to unpack"), RecursionError("too deep"), RuntimeError("shapes differ"),
        OptionError("of memlens"),
    ],
)  # fmt: skip
def test_every_failure_is_recorded_and_the_rest_goes_on(
    error: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = StudyDirectory(tmp_path, title="A run", settings={}, fresh=True)

    def broken() -> None:
        folder.add_table("before", pd.DataFrame({"a": [1]}), title="Before the error")
        raise error

    folder.step("broken", broken)
    folder.step("whole", lambda: folder.find(Finding("Found", "The other step ran.")))
    run = folder.done()
    said = str(error) if isinstance(error, OptionError) else f"{type(error).__name__}: {error}"
    (logged,) = caplog.records
    assert bool(logged.exc_info) is not isinstance(error, OptionError)  # where in the code it comes from
    assert run.failures == {"broken": said}
    assert [finding.statement for finding in run.findings] == ["The other step ran."]
    page = run.report.read_text(encoding="utf-8")
    assert "The other step ran." in page
    assert "Before the error" in page
    assert json.loads((tmp_path / "run.json").read_text())["failures"] == [
        {"step": "broken", "message": said}
    ]


def test_a_study_whose_steps_all_fail_has_a_report_that_says_so(tmp_path: Path) -> None:
    folder = StudyDirectory(tmp_path, title="A run", settings={}, fresh=True)

    def broken() -> None:
        raise OptionError("there is no layer 9")

    folder.step("only", broken)
    run = folder.done()
    assert run.failures == {"only": "there is no layer 9"}
    said = html.unescape(run.report.read_text(encoding="utf-8"))
    assert "The step 'only' failed: there is no layer 9" in said


def test_a_study_returns_its_run() -> None:
    study = Study(run=lambda **given: None, options=LocalizeOptions, help="What?")
    with pytest.raises(OptionError, match=r"returned None: it must return a StudyRun"):
        study(out="run")


def test_ctrl_c_still_stops_a_study(tmp_path: Path) -> None:
    folder = StudyDirectory(tmp_path, title="A run", settings={}, fresh=True)

    def stopped() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.step("stopped", stopped)
