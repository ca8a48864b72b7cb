"""The options of the study."""

from __future__ import annotations

from pydantic import PositiveInt

from memlens.options import options_class


@options_class
class ScalingOptions:
    """Options of `study_scaling`; the run records all of them."""

    factor: float = 0.5
    """What each MLP's output is multiplied by."""
    max_sequences: PositiveInt = 16
    """Most memorized sequences to examine, chosen at random."""
    seed: int = 0
    """Seed of the random choice."""
