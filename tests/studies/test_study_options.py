"""Options of the studies: defaults are the instruments', and every option has a help text."""

from __future__ import annotations

from typing import Any

import pytest

import memlens as ml
from memlens.instruments.decode.promotion import NEAR_RANK
from memlens.options import descriptions

CLASSES = [
    ml.studies.LocalizeOptions, ml.studies.IdiomOptions, ml.studies.BypassOptions,
    ml.studies.ComparativeOptions, ml.recall.CriteriaOptions,
]  # fmt: skip


def test_defaults_are_those_of_the_instruments() -> None:
    assert ml.studies.IdiomOptions().near_rank == NEAR_RANK


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_has_a_help_text(cls: Any) -> None:
    assert [name for name, text in descriptions(cls).items() if not text] == []
