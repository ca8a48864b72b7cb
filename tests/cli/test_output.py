"""What the commands print for programs, what they do in a pipe, and how they stop and go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from memlens import cli
from memlens.cli.commands import complete_model
from memlens.cli.console import print_json
from memlens.studies.bypass.command import BypassSources
from memlens.studies.bypass.options import BypassOptions
from memlens.studies.idioms.command import IdiomInputs
from memlens.studies.idioms.options import IdiomOptions
from memlens.studies.registry import Call, ModelChoice
from tests.cli.test_commands import call


def asked(*args: str) -> Any:
    """Run a command with --json; its output must be one document and nothing else."""
    code, out, err = call(*args, "--json")
    assert code == 0, err
    return json.loads(out)


def test_every_command_takes_json() -> None:
    commands = [["demo"], ["score"], ["plan"], ["report"], ["models"], ["generate"], ["lens", "train"]]
    commands += [["zoo", "list"], ["zoo", "train"]]
    commands += [["run", name] for name in ("localize", "idioms", "bypass", "comparative", "detectors")]
    for command in commands:
        assert "--json" in call(*command, "--help")[1], command


def test_score_and_models_as_json(recited: tuple[str, str], tmp_path: Path) -> None:
    model, rows = recited
    told = asked(
        "score", "-m", model, "-s", rows, "--prefix-len", "8", "-q", "--out", str(tmp_path / "r.parquet")
    )
    table = pd.read_parquet(told["table"])
    (every,) = [row for row in told["summary"] if row["metric"] == "exact_match"]
    assert every["mean"] == pytest.approx(table["exact_match"].mean())
    assert [row["exact_match"] for row in told["sequences"]] == table["exact_match"].tolist()
    assert {row["prefix_len"] for row in told["sequences"]} == {8}
    listed = asked("models")
    assert "zoo/pythia-s" in listed["zoo"]
    assert {"EleutherAI/pythia-70m", "bigcode/starcoderbase"} <= {row["model"] for row in listed["families"]}
    assert {row["status"] for row in asked("zoo", "list")} <= {"bundled", "trained", "recipe"}


def test_a_study_as_json_tells_its_findings(recited: tuple[str, str], tmp_path: Path) -> None:
    model, rows = recited
    args = (
        *("run", "localize", "-m", model, "-s", rows, "--prefix-len", "8", "--max-patched", "2"),
        *("--ranked-sequences", "1", "--most-forwards", "100", "--explored-controls", "0"),
        *("--out", str(tmp_path), "-q"),
    )
    plan = asked(*args, "--plan")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert [row["work"] for row in plan["works"]] == [
        "ablate each head", "bypass each layer", "patch layer x position"
    ]  # fmt: skip
    steps = {row["step"] for row in plan["steps"]}
    assert {"loading of models", "recall", "head ablation", "rankings", "report"} <= steps
    assert all(row["seconds"] >= 0 and row["cpu_seconds"] >= 0 for row in plan["steps"])
    told = asked(*args)
    assert Path(told["report"]).is_file()
    assert told["failures"] == {}
    stored = json.loads((tmp_path / "run.json").read_text())
    saved = stored["findings"]
    assert [finding["statement"] for finding in told["findings"]] == [each["statement"] for each in saved]
    assert told["findings"][0]["estimate"] == 0.5
    assert told["times"] == stored["times"]
    assert steps <= {row["step"] for row in told["times"]}  # nothing is planned that does not happen
    assert all({"planned_seconds", "seconds"} <= set(row) for row in told["times"])  # and all is planned
    assert told["seconds"] == pytest.approx(sum(row["seconds"] for row in told["times"]))


def test_sweeps_of_the_other_studies_are_counted() -> None:
    where = ModelChoice(model="zoo/pythia-xs")
    counted = BypassSources().plan(Call(where, BypassOptions(), None))
    rows = {row["work"]: row for row in counted.document["works"]}
    assert rows["bypass each layer"]["interventions"] == 4
    assert rows["bypass each layer"]["sequences"] == 128
    assert rows["bypass each head"]["interventions"] == 4 * 5
    options = IdiomOptions(windows=(1, 2), top_k=(1, 10))
    idioms = IdiomInputs().plan(Call(where, options, None)).document
    assert idioms["works"][0]["interventions"] == (4 + 3) * 2


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(
        {"a": float("nan"), "b": np.float32(0.5), "c": np.array([1, 2]), 3: Path("x"), "d": (True, None)}
    )
    assert json.loads(capsys.readouterr().out) == {
        "a": None,
        "b": 0.5,
        "c": [1, 2],
        "3": "x",
        "d": [True, None],
    }


def test_models_complete() -> None:
    assert complete_model("zoo/pythia-x") == ["zoo/pythia-xs"]
    assert "EleutherAI/pythia-12b" in complete_model("EleutherAI/pythia-1")


def test_shells_complete_through_the_installed_script() -> None:
    asked = ["score", "--model", "zoo/pythia-x"]  # as the installed script asks
    done = subprocess.run(
        [sys.executable, "-m", "memlens", "__complete", *asked], capture_output=True, text=True, check=False
    )
    assert "zoo/pythia-xs" in done.stdout
    for shell in ("bash", "zsh", "fish"):
        assert "--max-targets" in cli.app.generate_completion(prog_name="memlens", shell=shell)


@pytest.mark.slow
def test_the_demo_stops_cleanly_at_ctrl_c_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """As a user runs it."""
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "memlens", "demo", "--out", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    while not list(out.glob("sweeps/heads_*/*.npz")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"finished parts are in {out}; run the same command again to continue." in " ".join(err.split())
    assert "Traceback" not in err
    assert len(err.splitlines()) < 40  # bars do not flood a pipe
    kept = {path: path.stat().st_mtime_ns for path in out.glob("sweeps/*/*.npz")}
    done = subprocess.run([*command, "-q"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbered = [line[:2] for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert numbered == ["1.", "2.", "3.", "4.", "5."]
    assert done.stdout.rstrip().endswith("report.html")
    assert (out / "report.html").exists()
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
