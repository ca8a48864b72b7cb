"""Options of the studies: closed choices are the instruments', and every option has a help text."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest

import memlens as ml
from memlens.instruments.ablate.neuron_choice import SELECTIONS
from memlens.instruments.ablate.replacing import MODES, Positions
from memlens.instruments.bypass.bypass import BYPASS_MODES, CONTROL_MODES
from memlens.instruments.decode.decoding import STREAMS
from memlens.instruments.decode.promotion import NEAR_RANK
from memlens.instruments.patch.patching import PATCH_SITES
from memlens.options import descriptions
from memlens.results.statistics.tradeoff import OVER

CLASSES = [
    ml.studies.LocalizeOptions, ml.studies.IdiomOptions, ml.studies.BypassOptions,
    ml.studies.ComparativeOptions, ml.recall.CriteriaOptions,
]  # fmt: skip


def choices(cls: Any, name: str) -> set[Any]:
    """The strings that a field accepts."""

    def within(hint: Any) -> set[Any]:
        return {hint} if isinstance(hint, str) else {one for part in get_args(hint) for one in within(part)}

    return within(get_type_hints(cls)[name])


@pytest.mark.parametrize(
    ("cls", "name", "known"),
    [
        (ml.studies.LocalizeOptions, "head_mode", MODES),
        (ml.studies.LocalizeOptions, "bypass_mode", BYPASS_MODES),
        (ml.studies.LocalizeOptions, "patch_site", PATCH_SITES),
        (ml.studies.IdiomOptions, "streams", STREAMS),
        (ml.studies.IdiomOptions, "selections", SELECTIONS),
        (ml.studies.IdiomOptions, "positions", get_args(Positions)),
        (ml.studies.BypassOptions, "mode", BYPASS_MODES),
        (ml.studies.BypassOptions, "over", OVER),
        (ml.studies.BypassOptions, "edits", (*BYPASS_MODES, *CONTROL_MODES, "mean", "mlp_zero", "mlp_mean")),
    ],
)
def test_choices_are_those_of_the_instruments(cls: Any, name: str, known: Any) -> None:
    assert choices(cls, name) == {choice for choice in known if choice != "none"}


def test_defaults_are_those_of_the_instruments() -> None:
    assert ml.studies.IdiomOptions().near_rank == NEAR_RANK


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_has_a_help_text(cls: Any) -> None:
    assert [name for name, text in descriptions(cls).items() if not text] == []
