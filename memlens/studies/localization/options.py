"""Options of the main job."""

from __future__ import annotations

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from memlens.choices import AblationMode, BypassedTo, PatchSite
from memlens.errors import OptionError
from memlens.options import options_class


@options_class
class LocalizeOptions:
    """Options of `localize`; the run records all of them.

    Example:
        >>> import memlens as ml
        >>> ml.studies.LocalizeOptions(max_sequences=32).max_sequences
        32
    """

    max_sequences: PositiveInt = 64
    """Most memorized sequences to examine, chosen at random."""
    max_patched: PositiveInt = 32
    """Most sequences for activation patching."""
    max_positions: PositiveInt = 48
    """Most positions for activation patching, evenly spaced."""
    head_mode: AblationMode = "mean_of_other_heads"
    """What replaces the output of an ablated head; "donor" needs `donor`."""
    donor: str | None = None
    """Another model of the same shape, such as a clean twin or the base of a fine-tune: each head is also
    patched from it."""
    bypass_mode: BypassedTo = "identity"
    """How attention is bypassed."""
    patch_site: PatchSite = "resid_pre"
    """Which activation is patched."""
    corrupted_position: int = -2
    """Which prefix token is replaced for patching, counted from the end of the prefix. At the last one, -1,
    the first target is predicted: restoring the residual there restores that prediction at any depth and
    says nothing about where the cue went."""
    untrained_control: bool = True
    """Also run on freshly initialized weights."""
    ranked_sequences: PositiveInt = 8
    """Most memorized sequences by which components are ranked with the benchmark's best method."""
    most_forwards: NonNegativeFloat = 400
    """Most that this method may cost, in forward passes of the sequences of a zoo model; a larger model has
    more components, and exact methods need more passes there."""
    explored_memorized: NonNegativeInt = 4
    """Memorized sequences in the report's explorer, which is left out with 0 of these and of the controls."""
    explored_controls: NonNegativeInt = 2
    """Matched controls shown in the explorer."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        if self.head_mode == "donor" and self.donor is None:
            raise OptionError("head_mode='donor' needs the model whose heads are taken: give donor.")
