"""A few kills of each job; `python -m tests.kill_loops --kills 100` does more, and the slow ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kill_loops import JOBS, Job, kill_loop


@pytest.mark.parametrize("job", [job for job in JOBS if not job.slow], ids=lambda job: job.name)
def test_nothing_is_lost_or_mixed_by_kills(job: Job, tmp_path: Path) -> None:
    found = kill_loop(job, 4, tmp_path)
    assert found.kills >= 4
    assert found.ends


@pytest.mark.slow
@pytest.mark.parametrize("name", ["benchmark", "zoo training"])
def test_nothing_is_lost_or_mixed_by_kills_of_long_work(name: str, tmp_path: Path) -> None:
    job = next(job for job in JOBS if job.name == name)
    assert kill_loop(job, 2, tmp_path).kills >= 2


def test_a_loss_is_noticed(tmp_path: Path) -> None:
    """Work that leaves what it began, and work that mixes, do not pass."""

    def adds(folder: Path) -> None:
        with (folder / "log.txt").open("a") as file:
            for number in range(2000):
                file.write(f"{number}\n")
                file.flush()

    with pytest.raises(AssertionError, match="differ"):
        kill_loop(Job("adds", adds), 20, tmp_path)
