"""Whatever a file holds, it is read or refused by name: no other exception, no hang, no flood of memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.heavy import HEAVY
from tests.hostile.readers import READERS
from tests.hostile.running import GOOD, Case, Valid, outcomes, table


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Valid:
    return Valid(tmp_path_factory.mktemp("hostile") / "valid")


def check(cases: list[Case], valid: Valid) -> None:
    found = outcomes(cases, valid)
    bad = [f"{each.kind}: {each.case}: {each.said}" for each in found if each.kind not in GOOD]
    assert not bad, "\n".join([*bad, table(found)])


def test_hostile_files_are_read_or_refused_by_name(valid: Valid) -> None:
    """The same 20 files for each reader each time; `python -m tests.hostile` tries all."""
    cases = [*valid.cases(sample=20)]
    assert len(cases) >= 600
    assert {case.reader.name for case in cases} == {reader.name for reader in READERS}
    check(cases, valid)


@pytest.mark.slow
def test_large_hostile_files_are_read_or_refused_by_name(tmp_path: Path) -> None:
    """Bombs, and numbers that ask for more than there is: under 20 s and 4 GB each."""
    valid = Valid(tmp_path / "valid", [*dict.fromkeys(case.reader for case in HEAVY)])
    check([*HEAVY], valid)
