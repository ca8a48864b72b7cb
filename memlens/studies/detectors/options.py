"""Options of the study of detectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from memlens.options import options_class

if TYPE_CHECKING:  # their modules are heavy, and help texts appear at once
    from memlens.instruments.detect.behaviour import BehaviourOptions
    from memlens.instruments.detect.exposure import ExposureOptions
    from memlens.instruments.detect.separation import SeparationOptions


@options_class
class DetectorOptions:
    """Options of `study_detectors`; the run records all of them.

    Example:
        >>> import memlens as ml
        >>> ml.studies.DetectorOptions(folds=3).folds
        3
    """

    max_sequences: PositiveInt = 150
    """Most recalled sequences to examine, chosen at random; as many matched ones."""
    max_steered: PositiveInt = 32
    """Most sequences, of those that the neurons were not found on, for the dose curve of steering."""
    max_canaries: PositiveInt = 80
    """Most canaries for exposure and prediction invariance, chosen at random."""
    probed_targets: PositiveInt = 4
    """Most targets of each sequence that the probe sees."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Folds of every cross-validation."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the neurons that are behaviour neurons."""
    alphas: Annotated[tuple[float, ...], Field(min_length=1)] = (-4.0, -2.0, -1.0, 1.0, 2.0)
    """Doses of steering."""
    n_random: NonNegativeInt = 3
    """Random shifts for each dose."""
    most_nodes: PositiveInt = 2000
    """Most beginnings of candidates that are run for the exact rank of one canary."""
    n_buckets: PositiveInt = 50
    """Buckets of popularity for the canaries."""
    n_permutations: PositiveInt = 10_000
    """Permutations of the buckets."""
    least_mixed: Annotated[int, Field(ge=2)] = 3
    """Fewest recalled and fewest other sequences of a number of copies for the comparison inside copies."""
    seed: int = 0
    """Seed of every random choice."""

    def separation(self) -> SeparationOptions:
        """Return the options of `separation`."""
        from memlens.instruments.detect.separation import SeparationOptions

        return SeparationOptions(max_targets=self.probed_targets, folds=self.folds, seed=self.seed)

    def behaviour(self) -> BehaviourOptions:
        """Return the options of `behaviour_neurons`."""
        from memlens.instruments.detect.behaviour import BehaviourOptions

        return BehaviourOptions(share=self.share, seed=self.seed)

    def exposure(self) -> ExposureOptions:
        """Return the options of `exposure`."""
        from memlens.instruments.detect.exposure import ExposureOptions

        return ExposureOptions(most_nodes=self.most_nodes, seed=self.seed)
