"""Job arrays from the shell: the tasks together give what one process gives, byte for byte."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

import memlens as ml
from tests.cli.test_commands import call

FEW = (
    "--prefix-len", "8", "--max-sequences", "4", "--max-patched", "2", "--max-positions", "2",
    "--ranked-sequences", "1", "--most-forwards", "0", "--explored-memorized", "0",
    "--explored-controls", "0", "-q",
)  # fmt: skip


@pytest.mark.slow
def test_the_tasks_of_a_job_array_give_what_one_process_gives(
    recited: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of a whole study."""
    monkeypatch.setattr("memlens.sweeps.shards._SHARD_FLOPS", {"cpu": 0.0, "cuda": 0.0})
    model, rows = recited
    base = ("run", "localize", "-m", model, "-s", rows, *FEW, "--out")
    out = tmp_path / "many"
    code, script, error = call(*base, str(out), "--plan", "--slurm", "--array-tasks", "2")
    assert code == 0, error
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=True)
    assert "#SBATCH --array=0-1\n" in script
    words = shlex.split(script.splitlines()[-1])
    assert words == ["memlens", *base, str(out), "--part", "slurm"]
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "0")
    for task in (0, 1):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        code, shown, error = call(*words[1:])
        assert code == 0, error
        gathered, table, _ = call("gather", str(out))
        assert gathered == 1 - task
        assert ("missing in heads_matched_control: sequences-" in table) == (task == 0)
        assert ("this share is done" in shown) == (task == 0)
        assert (f"all parts are there; report: {out / 'report.html'}" in table) == (task == 1)
    assert (out / "report.html").exists()
    one = tmp_path / "one"
    assert call(*base, str(one))[0] == 0
    parts = sorted(path.relative_to(one) for path in one.rglob("*.npz"))
    assert len(parts) >= 7
    for part in parts:
        assert (one / part).read_bytes() == (out / part).read_bytes()
    name = "sweeps/heads_memorized"
    code, shown, error = call("gather", str(out / name), "--out", str(tmp_path / "heads.nc"))
    assert code == 0, error
    assert ml.load_result(tmp_path / "heads.nc").data.equals(ml.load_result(one / name / "result.nc").data)


def test_what_cannot_be_shared_is_one_line(recited: tuple[str, str], tmp_path: Path) -> None:
    model, rows = recited
    base = ("run", "localize", "-m", model, "-s", rows, *FEW, "--out", str(tmp_path / "run"))
    for more, words in (
        (("--part", "2/2"), "--part '2/2' is out of range: of 2 parts there are 0/2 to 1/2."),
        (("--part", "slurm"), "'slurm' needs a job array"),
        (("--plan", "--slurm", "--array-tasks", "0"), "--array-tasks 0 does no work"),
    ):
        code, _, error = call(*base, *more)
        assert code == 2
        assert words in " ".join(error.split())
    for study, why in (("idioms", "train the lens"), ("detectors", "follow from one another")):
        given = () if study == "idioms" else ("-s", rows)
        code, _, error = call(
            "run", study, "-m", model, *given, "--out", str(tmp_path / "run"), "--part", "0/2"
        )
        assert code == 2
        assert why in " ".join(error.split())
        assert "run it without --part" in " ".join(error.split())
    code, _, error = call("audit", model, rows, "--part", "0/2", "--workers", "2")
    assert code == 2
    assert "run it without --part and --workers (localize, bypass, comparative can)" in " ".join(
        error.split()
    )
    code, _, error = call("gather", str(tmp_path))
    assert code == 2
    assert "holds neither a sweep nor a study with sweeps" in " ".join(error.split())
