"""Options of the attention-bypass study."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveInt

from memlens.choices import BypassControl, BypassedTo, TaskCost
from memlens.errors import OptionError
from memlens.options import Flags, options_class

Edit = Literal[BypassedTo, "mean", BypassControl, "mlp_zero", "mlp_mean"]
EDITS: tuple[Edit, ...] = get_args(Edit)
"""What replaces a layer's attention (or MLP): "identity" is the bypass, the others are its controls."""


@options_class
class BypassOptions:
    """Options of `study_attention_bypass`; the run records all of them.

    Example:
        >>> import memlens as ml
        >>> ml.studies.BypassOptions(max_sequences=32).max_sequences
        32
    """

    mode: BypassedTo = "identity"
    """How attention is bypassed: "identity" as in the paper, or "zero"."""
    max_sequences: Annotated[int, Field(ge=4)] = 128
    """Most sequences of each group to examine, chosen at random."""
    free_running: bool = True
    """Also decode the memorized sequences freely under each bypass, for the score M."""
    max_free_running: PositiveInt = 64
    """Most sequences for free decoding."""
    ban_eos: bool = True
    """Never emit the end-of-text token in free decoding, as in the paper's code; not where it is a target."""
    edits: tuple[Edit, ...] = EDITS
    """What is done to each layer for the comparison with other edits; empty leaves the comparison out."""
    control_sequences: Annotated[int, Field(ge=2)] = 48
    """Most sequences of each group for these edits and for single heads."""
    heads: bool = True
    """Also bypass every head alone."""
    untrained_control: bool = True
    """Also edit freshly initialized weights."""
    bounds_sequences: Annotated[NonNegativeInt, Flags("--bounds")] = 8
    """Sequences for the bounds and the predictor; 0 leaves them out."""
    joint_sequences: NonNegativeInt = 96
    """Most sequences for the search over sets of layers; 0 leaves it out."""
    joint_questions: PositiveInt | None = 50
    """Most questions of each task for that search; None takes all."""
    over: TaskCost = "max"
    """Whether the cost of an edit is the largest or the mean loss over tasks."""
    greedy_size: PositiveInt = 4
    """Layers in the last set of the greedy search."""
    exact_layers: NonNegativeInt = 7
    """Models with at most this many layers are searched over every set of layers."""
    exact_pool: PositiveInt = 5
    """In deeper models, every set of this many best single layers is tried."""
    n_random: NonNegativeInt = 8
    """Random sets of each size that the search reached."""
    quartiles: Annotated[int, Field(ge=2)] = 4
    """Number of parts into which depth is cut."""
    n_resamples: PositiveInt = 2000
    """Resamples of every bootstrap."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        if self.edits and "identity" not in self.edits:
            raise OptionError(f"edits={self.edits} lacks 'identity', the edit under study.")
