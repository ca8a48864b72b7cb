"""`CriteriaOptions`: how `score_criteria` tests the criteria, and the lead-ins it puts before prompts."""

from __future__ import annotations

from dataclasses import dataclass

from memlens.errors import OptionError

__all__ = ["NEUTRAL_CONTEXTS", "SHIFTED_CONTEXTS", "CriteriaOptions"]

NEUTRAL_CONTEXTS = (
    "As people often say,",
    "Here is one more example:",
    "She wrote these words on the board:",
)
"""Lead-ins that say nothing of a topic."""

SHIFTED_CONTEXTS = (
    "The recipe asks for two cups of flour and a little salt.",
    "Rain is expected in the north, with strong winds along the coast.",
    "The committee approved the annual budget for public transport.",
)
"""Lead-ins about something else."""


@dataclass(frozen=True)
class CriteriaOptions:
    """How the criteria are tested (see `score_criteria`).

    Attributes:
        max_suffix: K, the most last words that are tried as a part; a proper part has fewer than all.
        part_threshold: A part of the prompt (some last words, a deletion, a substitution) still gives the
            target where it is the prediction (None), or where it is more likely than this.
        min_references: m, how many references must agree that an edited prompt still gives the target.
        substitutes: How many words are tried in each word's place.
        pool: They are drawn from so many words above and below it in frequency.
        neutral_contexts: Lead-ins that say nothing of a topic.
        shifted_contexts: Lead-ins about something else.
        common_zipf: With `corpus_counts`: a target of at least this Zipf frequency (log10 of occurrences in
            a billion words) is common.
        prepend_bos: Ask models with the beginning-of-text token in front.
        allow_probed_reference: Take the probed model as a reference too, with a warning.
        batch_size: Prompts a forward pass; chosen to a memory budget by default.
        seed: Of the substitutions.

    Raises:
        OptionError: A number out of range.
    """

    max_suffix: int = 4
    part_threshold: float | None = None
    min_references: int = 1
    substitutes: int = 1
    pool: int = 10
    neutral_contexts: tuple[str, ...] = NEUTRAL_CONTEXTS
    shifted_contexts: tuple[str, ...] = SHIFTED_CONTEXTS
    common_zipf: float = 5.5
    prepend_bos: bool = False
    allow_probed_reference: bool = False
    batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"max_suffix": 1, "min_references": 1, "substitutes": 0, "pool": 1}.items():
            if getattr(self, name) < least:
                raise OptionError(f"{name}={getattr(self, name)} is below {least}")
        if self.part_threshold is not None and not 0 < self.part_threshold < 1:
            raise OptionError(f"part_threshold={self.part_threshold} is not a probability in (0, 1)")
