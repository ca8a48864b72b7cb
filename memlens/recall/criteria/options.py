"""Options of the recall criteria, apart from them, so that help texts of commands import nothing heavy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from memlens.options import options_class

NEUTRAL_CONTEXTS = (
    "As people often say,",
    "Here is one more example:",
    "She wrote these words on the board:",
)
"""Lead-ins without a topic."""

SHIFTED_CONTEXTS = (
    "The recipe asks for two cups of flour and a little salt.",
    "Rain is expected in the north, with strong winds along the coast.",
    "The committee approved the annual budget for public transport.",
)
"""Lead-ins about another topic."""


@options_class
class CriteriaOptions:
    """How the criteria are tested (see `score_criteria`).

    Raises:
        OptionError: A number out of range.

    Example:
        >>> import memlens as ml
        >>> ml.recall.CriteriaOptions(max_suffix=2).max_suffix
        2
    """

    max_suffix: PositiveInt = 4
    """K, the largest number of last words tried as a part; a proper part has fewer than all."""
    part_threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A part of the prompt (some last words, a deletion, a substitution) still gives the target if the target
    is more likely than this; None: if it is the prediction."""
    min_references: PositiveInt = 1
    """m, the number of references that must agree that an edited prompt still gives the target."""
    substitutes: NonNegativeInt = 1
    """Number of words tried in place of each word."""
    pool: PositiveInt = 10
    """Substitutes are drawn from this many words above and below the word in frequency."""
    neutral_contexts: tuple[str, ...] = NEUTRAL_CONTEXTS
    """Lead-ins without a topic."""
    shifted_contexts: tuple[str, ...] = SHIFTED_CONTEXTS
    """Lead-ins about another topic."""
    common_zipf: float = 5.5
    """With `corpus_counts`: a target with at least this Zipf frequency (log10 of the occurrences per billion
    words) is common."""
    prepend_bos: bool | Literal["auto"] = "auto"
    """Prepend the beginning-of-text token to every prompt of a model; auto: see `load_sequences`."""
    allow_probed_reference: bool = False
    """Accept the probed model as a reference too, with a warning."""
    batch_size: PositiveInt | None = None
    """Prompts per forward pass; None: as many as the memory budget allows."""
    seed: int = 0
    """Seed of the substitutions."""
