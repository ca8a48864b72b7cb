"""Options of the idiom study."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from memlens.choices import NeuronSelection, Positions, Stream
from memlens.errors import OptionError
from memlens.options import options_class
from memlens.recall.criteria.options import CriteriaOptions


@options_class
class IdiomOptions:
    """Options of `study_idioms`; the run records all of them.

    Example:
        >>> import memlens as ml
        >>> ml.studies.IdiomOptions(near_rank=5).near_rank
        5
    """

    leave_out: tuple[str, ...] = ()
    """Columns of the items' table, such as definition,shared_prompt of the idiom file: items for which one of
    them is true are left out."""
    streams: tuple[Stream, ...] = get_args(Stream)
    """What is decoded; a stream that the model does not have is left out."""
    near_rank: NonNegativeInt = 10
    """Largest zero-based rank that counts as near the top."""
    length_caliper: PositiveFloat = 1.0
    """Largest difference in prompt length (tokens) within a matched pair."""
    probability_caliper: PositiveFloat = 0.1
    """Largest difference in the final probability of the predicted token within a matched pair."""
    max_items: PositiveInt | None = None
    """Most recalled items for the knock-outs, chosen at random; None takes all (the released code of arXiv
    2210.03588 takes 30)."""
    max_controls: PositiveInt | None = 30
    """Of these, most items whose random and norm-matched neurons are knocked out for comparison; None takes
    all, which makes the controls twice as expensive as the knock-outs themselves."""
    max_others: PositiveInt = 30
    """Most items of each control group for the knock-outs."""
    knock_out: bool = True
    """Run the knock-out grid, by far the longest part."""
    top_k: tuple[PositiveInt, ...] | None = None
    """Numbers of neurons per layer to knock out; None: 1, 10, 100, 1000 as far as a layer has them."""
    windows: tuple[PositiveInt, ...] | None = None
    """Numbers of consecutive layers; None: 1 to 5."""
    non_top: bool = True
    """Also knock out all but the top k (k of 10, 100, 1000, windows of 1 to 3)."""
    selections: tuple[NeuronSelection, ...] = get_args(NeuronSelection)
    """Which neurons are knocked out: "dominant", and the controls "random" and "norm_matched"."""
    positions: Positions = "all"
    """Positions at which neurons are knocked out."""
    replace: Literal["zero", "mean"] = "zero"
    """What replaces their activation: zero, or the mean over all positions of the knocked-out set."""
    n_draws: PositiveInt = 1
    """Draws of the controls."""
    lens_steps: PositiveInt = 250
    """Updates of the tuned lens, where one is trained."""
    lens_batch_size: PositiveInt = 16
    """Rows per update."""
    lens_window: PositiveInt = 64
    """Most tokens per training row of the lens."""
    criteria: CriteriaOptions | None = Field(default_factory=CriteriaOptions)
    """How the recall criteria are tested where there are references; None leaves them out."""
    control_n: PositiveInt | None = None
    """Prompts from natural text; None takes as many as there are items."""
    n_resamples: PositiveInt = 2000
    """Resamples of every bootstrap."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        if "resid_post" not in self.streams:
            raise OptionError(f"streams={self.streams} lacks 'resid_post', from which the phases are read.")
        if "dominant" not in self.selections:
            raise OptionError(
                f"selections={self.selections} lacks 'dominant', with which the controls are compared."
            )
