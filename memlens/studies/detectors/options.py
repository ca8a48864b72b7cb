"""Options of the study of detectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from memlens.choices import CurvatureMatrix
from memlens.options import options_class

if TYPE_CHECKING:  # their modules are heavy, and help texts appear at once
    from memlens.instruments.detect.behaviour import BehaviourOptions
    from memlens.instruments.detect.context.sets import ContextOptions
    from memlens.instruments.detect.exposure import ExposureOptions
    from memlens.instruments.detect.generalizing import GeneralizingOptions
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
    generalizing_task: str = "arithmetic"
    """The task whose answered questions are set against recalled sequences; all tasks if none has this
    name."""
    answering_alphas: Annotated[tuple[float, ...], Field(min_length=1)] = (-1.0, 1.0)
    """Doses of steering along the neurons of recalling against answering. Texts of two kinds differ so much
    that shifts several times as large end recall in any direction."""
    max_text: PositiveInt = 60
    """Most texts for the curvature, and as many others on which its edits are judged."""
    kept: Annotated[tuple[float, ...], Field(min_length=1)] = (0.95, 0.9, 0.8)
    """Shares of the curvature that the edits keep."""
    matrices: Annotated[tuple[CurvatureMatrix, ...], Field(min_length=1)] = ("out",)
    """The matrices that they change; see `curvature_edits`."""
    max_modules: PositiveInt = 60
    """Most recalled sequences for the modular view."""
    modules_by: str = "domain"
    """The column of the sequences whose groups are compared in the modular view."""
    module_steps: PositiveInt = 4
    """Points on the path of the gradients that estimate the effects of neurons."""
    n_module_draws: PositiveInt = 100
    """Resamples and random divisions of the modular view."""
    max_context: PositiveInt = 24
    """Most recalled sequences that are measured alone and with the text in the prompt; as many matched
    ones."""
    context_targets: PositiveInt = 24
    """Most targets of these, as far as twice the text fits the context."""
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

    def generalizing(self) -> GeneralizingOptions:
        """Return the options of `recall_or_generalize`."""
        from memlens.instruments.detect.generalizing import GeneralizingOptions

        return GeneralizingOptions(share=self.share, folds=self.folds, seed=self.seed)

    def context(self) -> ContextOptions:
        """Return the options of the prompts in which a text stands twice."""
        from memlens.instruments.detect.context.sets import ContextOptions

        return ContextOptions(too_long="drop", seed=self.seed)

    def exposure(self) -> ExposureOptions:
        """Return the options of `exposure`."""
        from memlens.instruments.detect.exposure import ExposureOptions

        return ExposureOptions(most_nodes=self.most_nodes, seed=self.seed)
